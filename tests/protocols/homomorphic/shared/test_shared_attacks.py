"""Attacks on the shared-key sum: on how the key is handed out, on rounds, and on what is sent.

Parties and server run for real, with a hand on every wire. Each test fails when the check that it names is removed.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
import tenseal.sealapi as sealapi

from choral.protocols.crypto.keys import ed25519_public, ed25519_sign, seal, x25519_public, x25519_shared
from choral.protocols.errors import (
    FaultyPartyError,
    FaultyPartyOrServerError,
    FaultyServerError,
    GarbledSumError,
    KeyDisputeError,
    LateVectorError,
    MessageError,
    PolicyError,
    ProtocolError,
    SpecError,
    StateUsedError,
    TooFewSurvivorsError,
)
from choral.protocols.homomorphic.shared import key_messages, seal_files
from choral.protocols.homomorphic.shared import party as steps
from choral.protocols.homomorphic.shared import setup as terms
from choral.protocols.homomorphic.shared.seal import RingKey, ring_of, ternary
from choral.protocols.homomorphic.shared.server import Adding, CollectingConfirmations, Dealing, Known, Totalling
from choral.protocols.homomorphic.shared.setup import Floats
from choral.protocols.interface import SumSpec
from choral.protocols.masking import messages, party
from choral.protocols.masking.policy import Policy
from choral.protocols.masking.server.opening import Gathering, Opening
from choral.protocols.masking.signing import Signatures, commitment, hello, session_digest, setup_digest
from choral.protocols.wire_format import encode, read

FLOATS = Floats(1.0, 1e-5)

LENGTH, BOUND = 20, 1000
Hook = Callable[[str, bytes], bytes]


class Stream:
    """Reproducible randomness that remembers what it gave."""

    def __init__(self, name: str) -> None:
        self.name = name.encode()
        self.given: list[bytes] = []

    def __call__(self, size: int) -> bytes:
        self.given.append(hashlib.shake_256(self.name + b"/%d" % len(self.given)).digest(size))
        return self.given[-1]


@dataclass(frozen=True)
class Agreement:
    """What a party of its own making brings to :func:`steps.meet`."""

    private: bytes
    plan: Any

    def meet(self, revealing: Any, reveals: bytes, *, randomness: Any) -> Any:
        return steps.meet(revealing, reveals, self.private, self.plan, randomness=randomness)


class Network:
    """hooks: by ("up" or "down", kind of message), a function (party, bytes) -> bytes on what passes."""

    def __init__(self, n: int = 4, *, seed: int = 0, scheme: str = "bfv", policy: Any = None, **changes: Any) -> None:
        self.names = tuple(f"p{place}" for place in range(n))
        self.random = {name: Stream(f"{seed}/{name}") for name in (*self.names, "server")}
        self.identities = {name: hashlib.sha256(b"identity" + name.encode()).digest() for name in self.names}
        self.directory = {name: ed25519_public(identity) for name, identity in self.identities.items()}
        self.floats = FLOATS if scheme == "ckks" else None
        self.setup = make_setup(self.names, self.random["server"](16), scheme=scheme, **changes)
        self.policy = make_policy(self.directory, **(policy or {}))
        self.signatures = Signatures()
        self.hooks: dict[tuple[str, str], Hook] = {}
        self.sent: list[bytes] = []
        self.holders: dict[str, Any] = {}
        self.states: list[Any] = []

    @property
    def plan(self) -> Any:
        return terms.plan_of(len(self.names), self.setup, self.floats)

    def pass_on(self, way: str, kind: str, party: str, raw: bytes) -> bytes:
        hook = self.hooks.get((way, kind))
        raw = hook(party, raw) if hook else raw
        self.sent.append(raw)
        return raw

    def accept(self, name: str, setup: bytes, identity: str | None = None) -> tuple[Any, Any, bytes]:
        message = read(messages.SumSetup, setup, sender="", limit=10**6)
        policy, plan = terms.agreed(self.policy, message, self.floats)
        private: list[bytes] = []

        def public(size: int) -> bytes:
            private.append(self.random[name](size))
            return x25519_public(private[0])

        identity = self.identities[identity or name]
        state, raw = party.join(setup, name=name, identity=identity, policy=policy, randomness=public)
        return state, Agreement(private[0], plan), raw

    def join(self) -> tuple[Gathering, dict[str, Any], dict[str, bytes]]:
        """The stage, the parties' states and what each is sent: everybody's Hello."""
        opening = Opening(self.setup, self.directory, self.signatures)
        joining = {}
        self.agreements = {}
        for name in self.names:
            setup = self.pass_on("down", "setup", name, opening.invitation)
            joining[name], self.agreements[name], raw = self.accept(name, setup)
            opening.receive(name, self.pass_on("up", "hello", name, raw))
        gathering, hellos = opening.close()
        return gathering, joining, {name: self.pass_on("down", "hellos", name, raw) for name, raw in hellos.items()}

    def reveal(self) -> tuple[Dealing, dict[str, Any], dict[str, bytes]]:
        """The same, with everybody's public key."""
        gathering, joining, hellos = self.join()
        revealing = {}
        for name, raw in hellos.items():
            revealing[name], reveal = joining[name].reveal(raw)
            gathering.receive(name, self.pass_on("up", "reveal", name, reveal))
        session, reveals = gathering.close()
        self.states += [*joining.values(), *revealing.values()]
        raws = {name: self.pass_on("down", "reveals", name, raw) for name, raw in reveals.items()}
        return Dealing(session.terms, self.plan), revealing, raws

    def meet(self) -> tuple[CollectingConfirmations, dict[str, Any], dict[str, bytes], dict[str, bytes]]:
        """The stage, the parties' states, what was dealt to each, and the dealer's confirmation, as its signature."""
        dealing, revealing, reveals = self.reveal()
        states: dict[str, Any] = {}
        deals = {}
        for name, raw in reveals.items():
            agreement = self.agreements[name]
            states[name], deals[name] = agreement.meet(revealing[name], raw, randomness=self.random[name])
        self.states += states.values()
        dealer = self.names[0]
        dealing.receive(dealer, self.pass_on("up", "deal", dealer, deals[dealer]))
        confirming, outbox = dealing.close()
        dealt = {name: self.pass_on("down", "dealt", name, raw) for name, raw in outbox.items()}
        deal = read(key_messages.KeyDeal, deals[dealer], sender="", limit=10**6)
        confirm = key_messages.KeyConfirm(deal.session, deal.commitment, deal.signature)
        return confirming, states, dealt, {dealer: encode(confirm)}

    def confirm(self) -> tuple[Known, dict[str, Any], dict[str, bytes]]:
        confirming, states, dealt, _ = self.meet()
        for name, raw in dealt.items():
            states[name], confirm = states[name].receive(raw)
            confirming.receive(name, self.pass_on("up", "confirm", name, confirm))
        self.states += states.values()
        session, outbox = confirming.close()
        return session, states, {n: self.pass_on("down", "confirmations", n, raw) for n, raw in outbox.items()}

    def open(self) -> Network:
        self.session, states, confirmations = self.confirm()
        self.holders = {name: states[name].enter(raw) for name, raw in confirmations.items()}
        return self

    def encrypt(
        self, number: int, vectors: Mapping[str, Any], begun: bytes = terms.NO_BEGIN
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        encrypted, uploads = {}, {}
        for name, vector in vectors.items():
            self.states.append(self.holders[name])
            self.holders[name], encrypted[name], uploads[name] = self.holders[name].encrypt(number, vector, begun)
            self.sent.append(uploads[name])
        self.states += encrypted.values()
        return encrypted, uploads

    def summed(self, number: int = 1, vectors: Mapping[str, Any] | None = None) -> tuple[Totalling, dict[str, Any]]:
        """A closed round and the parties' states."""
        vectors = vectors or self.vectors()
        adding = Adding(self.session, number)
        encrypted, uploads = self.encrypt(number, vectors)
        for name, raw in uploads.items():
            adding.receive(name, raw)
        return adding.close(), encrypted

    def vectors(self, value: int = 0) -> dict[str, Any]:
        rng = np.random.default_rng(7)
        return {name: rng.integers(-BOUND, BOUND + 1, LENGTH) if not value else full(value) for name in self.names}


def full(value: int) -> Any:
    return np.full(LENGTH, value, np.int64)


def make_setup(
    names: tuple[str, ...], session: bytes, *, scheme: str = "bfv", length: int = LENGTH, **changes: Any
) -> messages.SumSetup:
    bound = BOUND if scheme == "bfv" else 1
    spec = SumSpec(**{"parties": names, "length": length, "bound": bound, "encoding": "unit 1/7"} | changes)
    return terms.key_setup(spec, session=session, min_survivors=2, floats=None if scheme == "bfv" else FLOATS)


def make_policy(directory: Mapping[str, bytes], **changes: Any) -> Policy:
    return Policy(**{"directory": directory, "corrupt": 0, "server": "semi-honest", "encoding": "unit 1/7"} | changes)


def edited(kind: type[Any], raw: bytes, **changes: Any) -> bytes:
    message = read(kind, raw, sender="test", limit=1 << 30)
    return encode(msgspec.structs.replace(message, **changes))


def one_hello(place: int, **changes: Any) -> Callable[[type[Any], bytes], bytes]:
    def edit(kind: type[Any], raw: bytes) -> bytes:
        entries = list(read(kind, raw, sender="test", limit=1 << 30).hellos)
        entries[place] = msgspec.structs.replace(entries[place], **changes)
        return edited(kind, raw, hellos=tuple(entries))

    return edit


def one_entry(place: int, **changes: Any) -> Callable[[type[Any], bytes], bytes]:
    def edit(kind: type[Any], raw: bytes) -> bytes:
        entries = list(read(kind, raw, sender="test", limit=1 << 30).entries)
        entries[place] = msgspec.structs.replace(entries[place], **changes)
        return edited(kind, raw, entries=tuple(entries))

    return edit


# -- the key ------------------------------------------------------------------------------------------------------


def test_a_session_opens_and_sums() -> None:
    network = Network().open()
    totalling, encrypted = network.summed()
    ((name, raw),) = totalling.ask("p0").items()
    totalling.receive(name, encrypted[name].open(raw))
    outcome = totalling.close()
    assert np.array_equal(outcome.total, sum(network.vectors().values()))
    assert (outcome.survivors, name) == (network.names, "p0")


def other_nonce(kind: type[Any], raw: bytes, place: int, nonce: bytes) -> bytes:
    nonces = list(read(kind, raw, sender="", limit=10**6).nonces)
    nonces[place] = nonce
    return edited(kind, raw, nonces=tuple(nonces))


def test_a_swapped_public_key_is_found_by_everyone() -> None:
    """The server in the middle: it shows its own key as the dealer's, or as another party's to the dealer."""
    mine = x25519_public(bytes(range(32)))
    for place in (0, 2):
        network = Network()
        _, revealing, reveals = network.reveal()
        for name in network.names:
            with pytest.raises(FaultyPartyOrServerError, match=f"p{place}, or the server: the nonce is not the one"):
                network.agreements[name].meet(
                    revealing[name],
                    other_nonce(messages.Reveals, reveals[name], place, mine),
                    randomness=network.random[name],
                )
        network = Network()
        _, joining, hellos = network.join()
        committed = commitment(setup_digest(encode(network.setup)), place, mine)
        for name in network.names:
            raw = one_hello(place, commitment=committed)(messages.Hellos, hellos[name])
            with pytest.raises(FaultyServerError, match=f"p{place} is not signed|another Hello"):
                joining[name].reveal(raw)


def test_hellos_that_change_places_are_found() -> None:
    network = Network()
    _, joining, hellos = network.join()
    entries = list(read(messages.Hellos, hellos["p0"], sender="", limit=10**6).hellos)
    entries[1], entries[2] = entries[2], entries[1]
    with pytest.raises(FaultyServerError, match="not signed"):
        joining["p3"].reveal(edited(messages.Hellos, hellos["p3"], hellos=tuple(entries)))


def test_a_changed_nonce_or_a_missing_party_is_found() -> None:
    network = Network()
    _, revealing, reveals = network.reveal()
    with pytest.raises(FaultyPartyOrServerError, match="p2, or the server: the nonce is not the one"):
        network.agreements["p1"].meet(
            revealing["p1"], other_nonce(messages.Reveals, reveals["p1"], 2, bytes(32)), randomness=bytes
        )
    nonces = read(messages.Reveals, reveals["p2"], sender="", limit=10**6).nonces
    for name, changes, message in (
        ("p2", {"nonces": nonces[:3]}, "expected 4"),
        ("p3", {"session": bytes(16)}, "another session"),
    ):
        raw = edited(messages.Reveals, reveals[name], **changes)
        with pytest.raises(FaultyServerError, match=message):
            network.agreements[name].meet(revealing[name], raw, randomness=bytes)
    network = Network()
    _, joining, hellos = network.join()
    entries = read(messages.Hellos, hellos["p2"], sender="", limit=10**6).hellos
    for name, changes, message in (
        ("p2", {"hellos": entries[:3]}, "expected 4"),
        ("p3", {"session": bytes(16)}, "another session"),
    ):
        with pytest.raises(FaultyServerError, match=message):
            joining[name].reveal(edited(messages.Hellos, hellos[name], **changes))


def test_hellos_of_an_earlier_session_are_found_even_under_its_identifier() -> None:
    """All signatures are genuine; but this party's own commitment to its key is not in it."""
    old = Network(seed=1)
    _, _, replayed = old.join()
    network = Network(seed=2)
    network.setup = old.setup
    _, joining, _ = network.join()
    for name in network.names:
        with pytest.raises(FaultyServerError, match="another Hello of this party"):
            joining[name].reveal(replayed[name])


def test_a_key_of_an_earlier_session_is_found() -> None:
    """The dealer's signature covers the session, which has everybody's fresh nonce in it."""
    old, network = Network(seed=1), Network(seed=2)
    old.setup = network.setup
    _, _, replayed, _ = old.meet()
    _, states, _, _ = network.meet()
    with pytest.raises(FaultyPartyOrServerError, match="not signed"):
        states["p1"].receive(replayed["p1"])


def test_sealed_keys_open_for_their_receiver_only() -> None:
    network = Network()
    _, states, dealt, _ = network.meet()
    with pytest.raises(FaultyPartyOrServerError, match="does not open"):
        states["p1"].receive(dealt["p2"])
    sealed = bytearray(read(key_messages.KeyDeal, dealt["p2"], sender="", limit=10**4).sealed[0])
    sealed[5] ^= 1
    with pytest.raises(FaultyPartyOrServerError, match="does not open"):
        states["p2"].receive(edited(key_messages.KeyDeal, dealt["p2"], sealed=(bytes(sealed),)))
    with pytest.raises(FaultyServerError, match="another session"):
        states["p3"].receive(edited(key_messages.KeyDeal, dealt["p3"], session=bytes(16)))


def test_the_server_cannot_deal() -> None:
    """It makes a seed and seals it: but the key agreement needs the dealer's private key, and the deal its identity."""
    network = Network()
    _, states, dealt, _ = network.meet()
    committed = bytes(32)
    forged = ed25519_sign(bytes(32), terms.confirm(bytes(32), 0, committed))
    with pytest.raises(FaultyPartyOrServerError, match="not signed"):
        states["p1"].receive(edited(key_messages.KeyDeal, dealt["p1"], commitment=committed, signature=forged))


class Dealer:
    """A dealer with a mind of its own."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def deal(self, states: Mapping[str, Any], dealt: bytes, receiver: int, seed: bytes, committed: bytes) -> bytes:
        network = self.network
        (entered,) = states[network.names[receiver]]._content
        session, private = entered.member.session, network.random["p0"].given[0]
        committed = terms.key_commitment(session, committed)
        key = terms.seal_key(x25519_shared(private, entered.publics[receiver]), session, receiver)
        sealed = seal(key, bytes(12), seed, terms.seal_data(session, receiver, committed))
        signature = ed25519_sign(network.identities["p0"], terms.confirm(session, 0, committed))
        return edited(key_messages.KeyDeal, dealt, commitment=committed, sealed=(sealed,), signature=signature)


def test_a_dealer_that_deals_two_keys_is_found_before_anything_is_encrypted() -> None:
    network = Network()
    confirming, states, dealt, confirms = network.meet()
    second = bytes(range(32))
    dealt["p2"] = Dealer(network).deal(states, dealt["p2"], 2, second, second)
    for name, raw in dealt.items():
        states[name], confirms[name] = states[name].receive(raw)
    confirming.receive("p1", confirms["p1"])
    with pytest.raises(KeyDisputeError) as found:  # an honest server sees it first
        confirming.receive("p2", confirms["p2"])
    assert (found.value.dealer, found.value.party) == ("p0", "p2")
    entries = []  # one that works with the dealer hands everything on
    for name in network.names:
        message = read(key_messages.KeyConfirm, confirms[name], sender="", limit=10**4)
        entries.append(key_messages.ConfirmEntry(message.commitment, message.signature))
    raw = encode(key_messages.KeyConfirmations(network.setup.session, tuple(entries)))
    for name, other in (("p1", "p2"), ("p3", "p2"), ("p2", "p0")):
        with pytest.raises(KeyDisputeError) as found:
            states[name].enter(raw)
        assert found.value.party == other


def test_a_dealer_that_seals_another_key_than_it_commits_to_is_found() -> None:
    network = Network()
    _, states, dealt, _ = network.meet()
    raw = Dealer(network).deal(states, dealt["p1"], 1, bytes(range(32)), bytes(32))
    with pytest.raises(FaultyPartyError, match="p0: sealed another key"):
        states["p1"].receive(raw)


def test_confirmations_must_be_everybodys_own() -> None:
    for edit, message in (
        (one_entry(2, signature=bytes(64)), "p2 is not signed"),
        (one_entry(2, commitment=bytes(32)), "p2 is not signed"),
        (lambda kind, raw: edited(kind, raw, session=bytes(16)), "another session"),
        (lambda kind, raw: edited(kind, raw, entries=()), "expected 4"),
    ):
        network = Network()
        _, states, confirmations = network.confirm()
        with pytest.raises(FaultyServerError, match=message):
            states["p1"].enter(edit(key_messages.KeyConfirmations, confirmations["p1"]))


def test_a_confirmation_counts_for_its_sender_only() -> None:
    network = Network()
    _, states, confirmations = network.confirm()
    entries = list(read(key_messages.KeyConfirmations, confirmations["p1"], sender="", limit=10**4).entries)
    entries[2] = entries[3]
    with pytest.raises(FaultyServerError, match="p2 is not signed"):
        states["p1"].enter(edited(key_messages.KeyConfirmations, confirmations["p1"], entries=tuple(entries)))


def test_what_one_party_has_checked_vouches_for_the_same_bytes_alone() -> None:
    """Parties of one process share what they verified; a forged list after a genuine one is refused all the same."""
    network = Network()
    _, joining, hellos = network.join()
    joining["p1"].reveal(hellos["p1"])
    with pytest.raises(FaultyServerError, match="p0 is not signed"):
        joining["p2"].reveal(one_hello(0, commitment=bytes(32))(messages.Hellos, hellos["p2"]))
    network = Network()
    _, states, confirmations = network.confirm()
    states["p1"].enter(confirmations["p1"])
    with pytest.raises(FaultyServerError, match="p3 is not signed"):
        states["p2"].enter(one_entry(3, signature=bytes(64))(key_messages.KeyConfirmations, confirmations["p2"]))


def test_a_public_key_of_small_order_is_refused_by_the_dealer() -> None:
    network = Network()

    def weak_hello(name: str, raw: bytes) -> bytes:
        if name != "p2":
            return raw
        digest = setup_digest(encode(network.setup))
        committed = commitment(digest, 2, bytes(32))
        signature = ed25519_sign(network.identities["p2"], hello(digest, 2, committed))
        return edited(messages.Hello, raw, commitment=committed, signature=signature)

    def weak_key(name: str, raw: bytes) -> bytes:
        return edited(messages.Reveal, raw, nonce=bytes(32)) if name == "p2" else raw

    network.hooks |= {("up", "hello"): weak_hello, ("up", "reveal"): weak_key}
    gathering, joining, hellos = network.join()
    revealing = {}
    for name in ("p0", "p1", "p3"):
        revealing[name], reveal = joining[name].reveal(hellos[name])
        gathering.receive(name, reveal)
    gathering.receive("p2", encode(messages.Reveal(network.setup.session, bytes(32))))
    _, reveals = gathering.close()
    with pytest.raises(FaultyPartyError, match="p2: its public key"):
        network.agreements["p0"].meet(revealing["p0"], reveals["p0"], randomness=network.random["p0"])


def test_the_server_refuses_forged_and_surplus_messages() -> None:
    network = Network()
    opening = Opening(network.setup, network.directory, network.signatures)
    hellos = {}
    for name in network.names:
        _, _, hellos[name] = network.accept(name, opening.invitation)
    with pytest.raises(FaultyPartyError, match="p2: its Hello is not signed"):
        opening.receive("p2", hellos["p1"])
    with pytest.raises(FaultyPartyError, match="not in the roster"):
        opening.receive("stranger", hellos["p1"])
    with pytest.raises(FaultyPartyError, match="another session"):
        opening.receive("p1", edited(messages.Hello, hellos["p1"], session=bytes(16)))
    opening.receive("p1", hellos["p1"])
    opening.receive("p1", hellos["p1"])  # a network that retries
    with pytest.raises(FaultyPartyError, match="a second Hello"):
        opening.receive("p1", edited(messages.Hello, hellos["p1"], commitment=bytes(32)))
    with pytest.raises(MessageError):
        opening.receive("p2", b"\x01garbage")
    assert opening.waiting == ("p0", "p2", "p3")
    with pytest.raises(TooFewSurvivorsError, match="p0, p2, p3"):
        opening.close()
    with pytest.raises(StateUsedError):
        opening.close()


def test_the_server_takes_the_deal_from_the_dealer_alone() -> None:
    network = Network()
    dealing, revealing, reveals = network.reveal()
    _, deal = network.agreements["p0"].meet(revealing["p0"], reveals["p0"], randomness=network.random["p0"])
    with pytest.raises(FaultyPartyError):
        dealing.receive("p1", deal)
    with pytest.raises(FaultyPartyError, match="not signed"):
        dealing.receive("p0", edited(key_messages.KeyDeal, deal, commitment=bytes(32)))
    short = read(key_messages.KeyDeal, deal, sender="", limit=10**4).sealed[:-1]
    with pytest.raises(FaultyPartyError, match="expected 3"):
        dealing.receive("p0", edited(key_messages.KeyDeal, deal, sealed=short))
    dealing.receive("p0", deal)
    confirming, _ = dealing.close()
    dealt = read(key_messages.KeyDeal, deal, sender="", limit=10**4)
    confirm = encode(key_messages.KeyConfirm(dealt.session, dealt.commitment, dealt.signature))
    with pytest.raises(FaultyPartyError, match="p1: its KeyConfirm is not signed"):
        confirming.receive("p1", confirm)
    confirming.receive("p0", deal)  # a network that retries


@pytest.mark.parametrize(
    ("changes", "policy", "message"),
    [
        ({"encoding": "shared-key sum, terms " + 64 * "0"}, {}, "ring"),
        ({"encoding": "unit 1/7"}, {}, "ring"),
        ({"bound": 2**40}, {}, "ring"),
        ({"length": 21}, {}, "ring"),
        ({"modulus_bits": 64}, {}, "ring"),
        ({"threshold": 3}, {}, "more protection"),
        ({"corrupt": 1}, {}, "more protection"),
        ({"dropouts": 1}, {}, "more protection"),
        ({"server": "malicious"}, {}, "more protection"),
        ({"directory": 9, "cohort": "random"}, {"directory_size": 9}, "more protection"),
        ({"directory": 9, "cohort": "chosen"}, {}, "out of 9"),
        ({"bound": 2**61}, {}, "plain modulus"),
        ({"roster": ("p0", "p1", "p1", "p3")}, {}, "twice"),
        ({"roster": ("p0", "p1", "mallory", "p3")}, {}, "not pinned"),
        ({"min_survivors": 5}, {}, "never be made"),
        ({}, {"minimum_cohort": 3}, "at least 3"),
        ({}, {"maximum_bound": 999}, "bound of at most 999"),
        ({}, {"maximum_length": 19}, "length of at most 19"),
        ({}, {"encoding": "unit 1/8"}, "encoding"),
        ({}, {"corrupt": 1}, "withstands no corrupt party"),
        ({}, {"server": "malicious"}, "withstands no corrupt party"),
    ],
    ids=str,
)
def test_setups_that_are_weak_or_inconsistent_are_refused(changes: Any, policy: Any, message: str) -> None:
    network = Network(policy=policy)
    network.accept("p0", encode(network.setup)) if not policy else None
    setup = msgspec.structs.replace(network.setup, **changes)
    network.random["p0"] = Stream("p0")
    with pytest.raises(PolicyError, match=message):
        network.accept("p0", encode(setup))
    assert network.random["p0"].given == [], "nothing was made, so nothing was sent"


def test_setups_without_a_bound_are_no_setups() -> None:
    network = Network()
    with pytest.raises(MessageError):
        network.accept("p0", encode(msgspec.structs.replace(network.setup, bound=0)))


def test_parties_of_integers_and_of_floats_do_not_meet() -> None:
    """What is summed, and to which precision, a party has from elsewhere than the server."""
    for scheme, own in (("bfv", FLOATS), ("ckks", None), ("ckks", Floats(1.0, 1e-4)), ("ckks", Floats(2.0, 1e-5))):
        network = Network(scheme=scheme)
        network.floats = own
        with pytest.raises(PolicyError, match="ring"):
            network.accept("p0", encode(network.setup))
        assert network.random["p0"].given == []


def test_parties_join_as_themselves_only() -> None:
    network = Network()
    for name, identity, error in (("p0", "p1", SpecError), ("stranger", "p1", PolicyError)):
        with pytest.raises(error):
            network.accept(name, encode(network.setup), identity)


def test_policies_are_checked() -> None:
    key = bytes(32)
    for wrong in ({"minimum_cohort": 1}, {"directory": {"a": key[1:]}}, {"directory": {"a": key, "b": key}}):
        with pytest.raises(SpecError):
            make_policy(**({"directory": {"a": key}} | wrong))


# -- rounds -------------------------------------------------------------------------------------------------------


def opened(totalling: Totalling, encrypted: Mapping[str, Any], name: str | None = None) -> list[int]:
    name = name or totalling.survivors[0]
    totalling.receive(name, encrypted[name].open(totalling.ask(name)[name]))
    return list(totalling.close().total)


def body_of(upload: bytes) -> bytes:
    (body,) = read(messages.Upload, upload, sender="", limit=10**7).vector
    return bytes(body)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"session": bytes(16)}, "another session"),
        ({"round": 2}, "of round 2, not 1"),
        ({"vector": (b"x",)}, "expected 1 ciphertexts"),
        ({"vector": (b"x", b"y")}, "expected 1 ciphertexts"),
    ],
    ids=str,
)
def test_other_ciphertexts_are_refused_and_change_nothing(change: Any, message: str) -> None:
    network = Network().open()
    adding = Adding(network.session, 1)
    vectors = network.vectors()
    encrypted, uploads = network.encrypt(1, vectors)
    for name in network.names:
        raw = uploads[name]
        with pytest.raises(FaultyPartyError, match=message) as found:
            adding.receive(name, edited(messages.Upload, raw, **change))
        assert found.value.party == name
        adding.receive(name, raw)
        adding.receive(name, raw)  # a network that retries: it counts once
        other = bytes([body_of(raw)[0] ^ 1]) + body_of(raw)[1:]
        with pytest.raises(FaultyPartyError, match="a second Upload"):
            adding.receive(name, edited(messages.Upload, raw, vector=(other,)))
    assert adding.waiting == ()
    assert opened(adding.close(), encrypted) == list(sum(vectors.values()))


def test_ciphertexts_name_the_key_that_everybody_confirmed() -> None:
    """Session and key are one name: of the same session under another key, a ciphertext is of another session."""
    network = Network().open()
    adding = Adding(network.session, 1)
    _, uploads = network.encrypt(1, network.vectors())
    session = network.session.terms.session
    other = terms.keyed_session(session, bytes(32))[:16]
    assert read(messages.Upload, uploads["p1"], sender="", limit=10**6).session != other != session[:16]
    for wrong in (other, session[:16], network.setup.session):
        with pytest.raises(FaultyPartyError, match="another session"):
            adding.receive("p1", edited(messages.Upload, uploads["p1"], session=wrong))


def test_bodies_that_are_no_ciphertexts_are_refused_and_change_nothing() -> None:
    network = Network().open()
    adding = Adding(network.session, 1)
    vectors = network.vectors()
    encrypted, uploads = network.encrypt(1, vectors)
    raw = uploads["p1"]
    body = body_of(raw)
    unreduced = body[:-4] + b"\xff" * 4
    full_size = body[64:] * 2  # what a ciphertext without a seed has
    for wrong in (body[:-1], body + b"\0", body * 2, full_size, unreduced):
        with pytest.raises((FaultyPartyError, MessageError)) as found:
            adding.receive("p1", edited(messages.Upload, raw, vector=(wrong,)))
        assert found.value.blame == "p1"
    for garbage in (b"", raw[:-1], raw + b"\0", raw * 2, bytes(10**7)):
        with pytest.raises(MessageError):
            adding.receive("p1", garbage)
    with pytest.raises(FaultyPartyError, match="roster"):
        adding.receive("stranger", raw)
    for name in network.names:
        adding.receive(name, uploads[name])
    assert opened(adding.close(), encrypted) == list(sum(vectors.values()))


def test_vectors_after_the_close_are_thrown_away() -> None:
    network = Network().open()
    adding = Adding(network.session, 1)
    vectors = network.vectors()
    encrypted, uploads = network.encrypt(1, vectors)
    for name in ("p0", "p3"):
        adding.receive(name, uploads[name])
    totalling = adding.close()
    for stage in (adding, totalling):
        with pytest.raises(LateVectorError):
            stage.receive("p1", uploads["p1"])
    with pytest.raises(StateUsedError):
        adding.close()
    assert totalling.survivors == ("p0", "p3")
    assert opened(totalling, encrypted) == list(vectors["p0"] + vectors["p3"])


@pytest.mark.parametrize("wrong_first", [True, False])
def test_half_a_vector_leaves_no_trace(wrong_first: bool) -> None:
    """The last of p2's ciphertexts is none: those before are subtracted again, and the noise they brought with them."""
    length = 60_000
    network = Network(length=length).open()
    adding = Adding(network.session, 1)
    vectors = {name: np.full(length, BOUND if name == "p2" else 5) for name in network.names}
    encrypted, uploads = network.encrypt(1, vectors)
    assert terms.blocks_of(network.plan, length) > 2
    broken = edited(messages.Upload, uploads["p2"], vector=(body_of(uploads["p2"])[:-4] + b"\xff" * 4,))
    for name in ("p2", "p0", "p1", "p3") if wrong_first else ("p0", "p1", "p2", "p3"):
        if name == "p2":
            with pytest.raises(FaultyPartyError, match="p2: its vector is no ciphertext"):
                adding.receive("p2", broken)
        else:
            adding.receive(name, uploads[name])
    totalling = adding.close()
    assert totalling.survivors == ("p0", "p1", "p3")
    assert opened(totalling, encrypted) == [15] * length


def test_ciphertexts_of_an_earlier_round_do_not_pass_for_this_one() -> None:
    """Relabelled by a party, which the server cannot see; but they are under another key, and that shows."""
    network = Network().open()
    adding = Adding(network.session, 1)
    _, old = network.encrypt(1, network.vectors())
    adding.receive("p0", old["p0"])
    adding = Adding(network.session, 2)
    encrypted, uploads = network.encrypt(2, network.vectors())
    with pytest.raises(FaultyPartyError, match="of round 1"):
        adding.receive("p0", old["p0"])
    with pytest.raises(LateVectorError):  # which never was in a sum
        adding.receive("p1", old["p1"])
    adding.receive("p1", edited(messages.Upload, old["p1"], round=2))
    adding.receive("p0", uploads["p0"])
    totalling = adding.close()
    with pytest.raises(GarbledSumError, match="noise"):
        opened(totalling, encrypted)


@pytest.mark.parametrize("scheme", ["bfv", "ckks"])
def test_a_wrong_key_or_changed_bytes_give_no_sum(scheme: str) -> None:
    """What is encrypted under another session's key, and what was changed in one residue, spoil the sum visibly."""
    vectors = {f"p{place}": full(1) if scheme == "bfv" else np.ones(LENGTH) for place in range(4)}
    other = Network(seed=9, scheme=scheme).open()
    _, strange = other.encrypt(1, vectors)
    network = Network(scheme=scheme).open()
    for number, kind in enumerate(("wrong key", "changed"), 1):
        adding = Adding(network.session, number)
        encrypted, uploads = network.encrypt(number, vectors)
        body = bytearray(body_of(strange["p2"] if kind == "wrong key" else uploads["p2"]))
        if kind == "changed":
            body[64 + 2] ^= 0x10  # a high byte of one coefficient
        uploads["p2"] = edited(messages.Upload, uploads["p2"], vector=(bytes(body),))
        for name, raw in uploads.items():
            adding.receive(name, raw)
        with pytest.raises(GarbledSumError):
            encrypted["p0"].read(adding.close().encrypted)


@pytest.mark.parametrize("scheme", ["bfv", "ckks"])
def test_parties_that_were_shown_different_models_have_no_sum(scheme: str) -> None:
    """The key of a round comes from what the party was shown, too; all that were shown the same have one."""
    network = Network(scheme=scheme).open()
    vectors = {name: full(1) if scheme == "bfv" else np.ones(LENGTH) for name in network.names}
    for number, second in enumerate((b"m" * 32, b"n" * 32, terms.NO_BEGIN), 1):
        adding = Adding(network.session, number)
        encrypted, uploads = network.encrypt(number, {n: v for n, v in vectors.items() if n != "p2"}, b"m" * 32)
        theirs = network.encrypt(number, {"p2": vectors["p2"]}, second)
        encrypted, uploads = encrypted | theirs[0], uploads | theirs[1]
        for name, raw in uploads.items():
            adding.receive(name, raw)
        closed = adding.close()
        if number == 1:
            assert np.abs(encrypted["p2"].read(closed.encrypted)[0] - 4).max() < 1e-4
        else:
            for name in network.names:
                with pytest.raises(GarbledSumError):
                    encrypted[name].read(closed.encrypted)


def test_a_vector_counted_twice_is_seen_where_it_passes_the_bound() -> None:
    network = Network().open()
    adding = Adding(network.session, 1)
    encrypted, uploads = network.encrypt(1, network.vectors(BOUND))
    for name in ("p0", "p1"):
        adding.receive(name, uploads[name])
    adding._ring.evaluator.add_inplace(adding._sum[0], adding._sum[0])
    with pytest.raises(GarbledSumError, match="outside"):
        opened(adding.close(), encrypted)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"session": bytes(16)}, FaultyServerError, "of another session"),
        ({"round": 2}, FaultyServerError, "of round 2, not 1"),
        ({"survivors": b"\x0e"}, FaultyServerError, "this party dropped out, and still asks"),
        ({"survivors": b"\x01"}, TooFewSurvivorsError, "1 of the 2"),
        ({"survivors": b"\xff"}, FaultyServerError, "no set"),
        ({"survivors": b"\x0f\x00"}, FaultyServerError, "no set"),
        ({"ciphertexts": (b"x",)}, FaultyServerError, "expected 1 ciphertexts"),
        ({"ciphertexts": (b"x", b"y")}, FaultyServerError, "expected 1 ciphertexts"),
        ({"ciphertexts": (bytes(10**6),)}, MessageError, "at most"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_parties_open_no_other_sum(change: Any, error: type[ProtocolError], message: str) -> None:
    network = Network().open()
    totalling, encrypted = network.summed()
    raw = totalling.ask("p0")["p0"]
    with pytest.raises(error, match=message):
        encrypted["p0"].open(edited(key_messages.EncryptedSum, raw, **change))
    with pytest.raises(StateUsedError):
        encrypted["p0"].open(raw)


def test_parties_open_one_sum_of_a_round_and_none_of_a_round_before() -> None:
    network = Network().open()
    totalling, encrypted = network.summed()
    assert len(opened(totalling, encrypted)) == LENGTH
    with pytest.raises(StateUsedError):
        opened(totalling, encrypted)
    network.summed(2)
    with pytest.raises(StateUsedError, match="round 1 ended"):
        opened(totalling, encrypted, "p3")


def test_another_survivor_opens_the_sum_when_the_first_does_not_answer() -> None:
    network = Network().open()
    totalling, encrypted = network.summed()
    totalling.ask("p0")
    assert opened(totalling, encrypted, "p2") == list(sum(network.vectors().values()))


def test_sums_with_ciphertexts_missing_or_unreduced_are_refused() -> None:
    length = 60_000
    network = Network(length=length).open()
    totalling, encrypted = network.summed(1, {name: np.ones(length, np.int64) for name in network.names})
    raw = totalling.encrypted
    (body,) = read(key_messages.EncryptedSum, raw, sender="", limit=10**8).ciphertexts
    size = network.plan.parameters.full_bytes
    assert len(body) > 2 * size
    with pytest.raises(FaultyServerError, match=r"ciphertexts of .* bytes in the sum, got"):
        encrypted["p0"].open(edited(key_messages.EncryptedSum, raw, ciphertexts=(body[:-size],)))
    with pytest.raises(FaultyServerError, match="no ciphertext"):
        encrypted["p2"].open(edited(key_messages.EncryptedSum, raw, ciphertexts=(b"\xff" * len(body),)))
    assert encrypted["p3"].read(raw)[0].tolist() == [4] * length


def test_the_server_takes_the_sum_from_whom_it_asked_and_in_range() -> None:
    network = Network().open()
    totalling, encrypted = network.summed(1, {name: full(3) for name in network.names[:3]})
    with pytest.raises(StateUsedError):
        totalling.close()
    with pytest.raises(SpecError, match="no survivor"):
        totalling.ask("p3")
    raw = encrypted["p1"].open(totalling.ask("p1")["p1"])
    with pytest.raises(FaultyPartyError, match="not asked"):
        totalling.receive("p0", raw)
    (body,) = read(key_messages.OpenedSum, raw, sender="", limit=10**6).total
    for change in (
        {"session": bytes(16)},
        {"round": 2},
        {"total": (body[:-1],)},
        {"total": (body[:1], body[1:])},
        {"total": (b"\xff\x0f" + body[2:],)},  # 4095 of 13 bits: more than three vectors can give
    ):
        with pytest.raises(FaultyPartyError):
            totalling.receive("p1", edited(key_messages.OpenedSum, raw, **change))
    with pytest.raises(StateUsedError):
        totalling.close()
    totalling.receive("p1", raw)
    totalling.receive("p1", raw)  # a network that retries
    with pytest.raises(FaultyPartyError, match="a second OpenedSum"):
        totalling.receive("p1", edited(key_messages.OpenedSum, raw, total=(bytes(len(body)),)))
    assert totalling.close().total.tolist() == [9] * LENGTH


def test_sums_of_floats_are_never_reported_to_the_server() -> None:
    network = Network(scheme="ckks").open()
    closed, encrypted = network.summed(1, {name: np.full(LENGTH, 0.5) for name in network.names})
    with pytest.raises(SpecError, match="never reported"):
        closed.ask("p0")
    with pytest.raises(SpecError, match="never reported"):
        encrypted["p0"].open(closed.encrypted)
    total, survivors = encrypted["p0"].read(closed.encrypted)
    assert np.abs(total - 2).max() < 1e-5
    assert survivors == network.names


def test_rounds_go_forward_and_missed_ones_do_not_part_the_parties() -> None:
    network = Network().open()
    holder = network.holders["p0"]
    for wrong in (0, -1, terms.MAX_SKIPPED, 1 << 32, True, 1.0, None):
        with pytest.raises(FaultyServerError, match="asked for round"):
            holder.encrypt(wrong, full(1))
    assert opened(*network.summed(1)) == list(sum(network.vectors().values()))
    two = {name: full(2) for name in ("p0", "p1")}
    assert opened(*network.summed(2, two)) == [4] * LENGTH
    assert opened(*network.summed(7)) == list(sum(network.vectors().values()))
    with pytest.raises(FaultyServerError, match="round 7 after round 7"):
        network.holders["p1"].encrypt(7, full(1))


def test_a_wrong_vector_leaves_the_key_for_a_right_one() -> None:
    holder = Network().open().holders["p0"]
    with pytest.raises(ProtocolError):
        holder.encrypt(1, full(BOUND + 1))
    holder.encrypt(1, full(BOUND))
    with pytest.raises(StateUsedError):
        holder.encrypt(1, full(BOUND))


def test_nothing_of_a_past_round_can_be_made_again() -> None:
    """After a round's key is made, a party keeps the next link only; the one before is not in any state of it."""
    network = Network().open()
    (chain,) = network.holders["p0"]._content
    link, session = chain.link, chain.member.session
    network.encrypt(1, network.vectors())
    network.states.clear()
    (later,) = network.holders["p0"]._content
    assert later.link == terms.next_link(session, link, 1) != link
    assert link not in repr(vars(later)).encode()
    assert terms.round_seed(session, link, 1) != terms.round_seed(session, later.link, 2) != later.link
    chain = None
    gc.collect()
    assert not any(
        held is link for found in gc.get_objects() if type(found).__name__ == "Chain" for held in [found.link]
    )


# -- secrets ------------------------------------------------------------------------------------------------------


def serialisations(ring_key: RingKey, seed: bytes) -> dict[str, bytes]:
    """A secret key in every form that it has anywhere: coefficients, residues, SEAL's own, packed, compressed."""
    ring = ring_key.ring
    degree = ring.parameters.degree
    coefficients = ternary(seed, degree)
    found = {
        "seed": seed,
        "seed in hex": seed.hex().encode(),
        "int8": coefficients.astype(np.int8).tobytes(),
        "int64": coefficients.astype("<i8").tobytes(),
        "digits": (coefficients + 1).astype(np.uint8).tobytes(),
        "two bits": np.packbits(np.unpackbits((coefficients % 3).astype(np.uint8)[:, None], axis=1)[:, 6:]).tobytes(),
        "list": repr(coefficients.tolist()).encode(),
        "SEAL's file": seal_files.scratch().save(ring_key._secret)[80:],
    }
    words = seal_files.saved(ring_key._secret, ring._version)[80:]
    found["SEAL's words"] = words
    for prime in ring.parameters.primes:
        width = -(-prime.bit_length() // 8)
        residues = coefficients % prime
        raw = residues.astype("<u8").view(np.uint8).reshape(-1, 8)
        found[f"residues {prime}"] = residues.astype("<u8").tobytes()
        found[f"packed residues {prime}"] = raw[:, :width].tobytes()
    count = len(words) // 8
    found["packed words"] = np.frombuffer(words, np.uint8, count * 8).reshape(-1, 8)[:, :width].tobytes()
    return found


def windows(secret: bytes) -> list[bytes]:
    """Pieces that betray a secret: 16 bytes of a short one, 64 of a long one, at its beginning, middle and end."""
    size = 16 if len(secret) <= 64 else 64
    return [secret[at : at + size] for at in (0, (len(secret) - size) // 2, len(secret) - size)]


def betrayed(secrets: Mapping[str, bytes], text: bytes) -> list[str]:
    return [name for name, secret in secrets.items() if any(window in text for window in windows(secret))]


@pytest.mark.parametrize("scheme", ["bfv", "ckks"])
def test_no_secret_is_in_anything_sent_shown_or_raised(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[bytes] = []
    links: list[bytes] = []
    make, step = terms.round_seed, terms.next_link
    monkeypatch.setattr(terms, "round_seed", lambda *a: seeds.append(make(*a)) or seeds[-1])
    monkeypatch.setattr(terms, "next_link", lambda *a: links.append(step(*a)) or links[-1])
    network = Network(scheme=scheme).open()
    value = full(3) if scheme == "bfv" else np.full(LENGTH, 0.5)
    for number in (1, 2):
        closed, encrypted = network.summed(number, dict.fromkeys(network.names, value))
        network.sent.append(closed.encrypted)
        if scheme == "bfv":
            network.sent.append(encrypted["p0"].open(closed.encrypted))
        with pytest.raises(ProtocolError) as found:
            encrypted["p1"].read(edited(key_messages.EncryptedSum, closed.encrypted, session=bytes(16)))
        network.states.append(found.value)
    ring = ring_of(network.plan.parameters)
    secrets: dict[str, bytes] = {}
    for place, seed in enumerate(sorted(set(seeds))):
        for form, raw in serialisations(RingKey.from_seed(ring, seed), seed).items():
            secrets[f"round key {place}, {form}"] = raw
    for place, link in enumerate(sorted(set(links))):
        secrets[f"link {place}"] = link
    for name in network.names:
        given = network.random[name].given
        private, *rest = given
        assert any(x25519_public(private) in raw for raw in network.sent)
        secrets |= {f"{name}'s X25519 key": private, f"{name}'s identity": network.identities[name]}
        secrets |= {f"{name}'s seed": seed for seed in rest}
    assert len(set(seeds)) == 2
    assert "p0's seed" in secrets
    shown = "".join(f"{state!r} {state!s}" for state in [*network.states, network, network.policy]).encode()
    sent = b"|".join(network.sent)
    assert betrayed(secrets, sent) == []
    assert betrayed(secrets, shown) == []
    for name, secret in secrets.items():  # the search finds what is there
        assert name in betrayed(secrets, sent + secret[len(secret) // 3 :])


def test_states_show_and_copy_nothing() -> None:
    network = Network().open()
    network.summed()
    for state in [*network.states, *network.holders.values()]:
        assert repr(state) in (f"<{type(state).__name__}: ready>", f"<{type(state).__name__}: used>")
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(StateUsedError):
                duplicate(state)


# -- what the trust statement leaves out is really possible, and so must be said ---------------------------------------


def test_a_server_that_cheats_reads_one_vector() -> None:
    """It hands one party's ciphertext to a party as if it were everybody's sum. No check can see that."""
    network = Network().open()
    vectors = network.vectors()
    adding = Adding(network.session, 1)
    encrypted, uploads = network.encrypt(1, vectors)
    for name, raw in uploads.items():
        adding.receive(name, raw)
    adding._sum[0] = adding._ring.load_fresh(body_of(uploads["p2"]))
    assert opened(adding.close(), encrypted) == list(vectors["p2"])


def test_a_party_that_shows_its_key_opens_the_vectors_of_all() -> None:
    network = Network().open()
    vectors = network.vectors()
    _, uploads = network.encrypt(1, vectors)
    seed = terms.round_seed(*_chain_of(network))
    plan = network.plan
    key = RingKey.from_seed(ring_of(plan.parameters), seed)
    for name, raw in uploads.items():
        plain = sealapi.Plaintext()
        key.decryptor().decrypt(key.ring.load_fresh(body_of(raw)), plain)
        assert np.array_equal(plan.decode(key.ring, plain, LENGTH), vectors[name])


def _chain_of(network: Network) -> tuple[bytes, bytes, int]:
    """Session, link and number of round 1, from what p0 dealt: its second draw is the seed."""
    digest = setup_digest(encode(network.setup))
    publics = [x25519_public(network.random[name].given[0]) for name in network.names]
    opened = session_digest(digest, [commitment(digest, *one) for one in enumerate(publics)], publics)
    seed = network.random["p0"].given[1]
    session = terms.keyed_session(opened, terms.key_commitment(opened, seed))
    return session, terms.next_link(session, seed, 0), 1
