"""Attacks on the shared-key sum: on how the key is handed out, on rounds, and on what is sent.

Parties and server run for real, with a hand on every wire. Each test fails when the check that it names is removed.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import pickle
from collections.abc import Callable, Iterable, Mapping
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
    LateVectorError,
    MessageError,
    PolicyError,
    ProtocolError,
    SpecError,
    StateUsedError,
    TooFewSurvivorsError,
)
from choral.protocols.homomorphic.messages import Ciphertext
from choral.protocols.homomorphic.shared import bfv, ckks, seal_files
from choral.protocols.homomorphic.shared import messages as wire
from choral.protocols.homomorphic.shared import party as steps
from choral.protocols.homomorphic.shared import setup as terms
from choral.protocols.homomorphic.shared.seal import RingKey, ternary
from choral.protocols.homomorphic.shared.server import Confirming, Dealing, Opening, Session
from choral.protocols.homomorphic.shared.server_round import Adding, Relayed, Totalling
from choral.protocols.homomorphic.shared.setup import KeyDisputeError, SharedPolicy
from choral.protocols.masking import messages as base
from choral.protocols.masking.signing import Signatures, setup_digest

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


class Network:
    """hooks: by ("up" or "down", kind of message), a function (party, bytes) -> bytes on what passes."""

    def __init__(self, n: int = 4, *, seed: int = 0, scheme: str = "bfv", policy: Any = None, **changes: Any) -> None:
        self.names = tuple(f"p{place}" for place in range(n))
        self.random = {name: Stream(f"{seed}/{name}") for name in (*self.names, "server")}
        self.identities = {name: hashlib.sha256(b"identity" + name.encode()).digest() for name in self.names}
        self.directory = {name: ed25519_public(identity) for name, identity in self.identities.items()}
        self.setup = make_setup(self.names, self.random["server"](16), scheme=scheme, **changes)
        self.policy = SharedPolicy(directory=self.directory, **({"encoding": self.setup.encoding} | (policy or {})))
        self.signatures = Signatures()
        self.hooks: dict[tuple[str, str], Hook] = {}
        self.sent: list[bytes] = []
        self.holders: dict[str, Any] = {}
        self.states: list[Any] = []

    def pass_on(self, way: str, kind: str, party: str, raw: bytes) -> bytes:
        hook = self.hooks.get((way, kind))
        raw = hook(party, raw) if hook else raw
        self.sent.append(raw)
        return raw

    def join(self) -> tuple[Dealing, dict[str, Any], dict[str, bytes]]:
        opening = Opening(self.setup, self.directory, self.signatures)
        joining = {}
        for name in self.names:
            joining[name], hello = steps.join(
                self.pass_on("down", "setup", name, opening.invitation),
                name=name,
                identity=self.identities[name],
                policy=self.policy,
                randomness=self.random[name],
            )
            opening.receive(name, self.pass_on("up", "hello", name, hello))
        dealing, hellos = opening.close()
        return dealing, joining, {name: self.pass_on("down", "hellos", name, raw) for name, raw in hellos.items()}

    def meet(self) -> tuple[Confirming, dict[str, Any], dict[str, bytes], dict[str, bytes]]:
        """The stage, the parties' states, what was dealt to each, and the dealer's confirmation."""
        dealing, joining, hellos = self.join()
        states, answers = {}, {}
        for name, raw in hellos.items():
            states[name], answers[name] = joining[name].meet(raw, randomness=self.random[name])
        self.states += [*joining.values(), *states.values()]
        dealer = self.names[0]
        deal, confirm = answers[dealer]
        dealing.receive(dealer, self.pass_on("up", "deal", dealer, deal))
        confirming, outbox = dealing.close()
        dealt = {name: self.pass_on("down", "dealt", name, raw) for name, raw in outbox.items()}
        return confirming, states, dealt, {dealer: confirm}

    def confirm(self) -> tuple[Session, dict[str, Any], dict[str, bytes]]:
        confirming, states, dealt, confirms = self.meet()
        for name, raw in dealt.items():
            states[name], confirms[name] = states[name].receive(raw)
        for name, raw in confirms.items():
            confirming.receive(name, self.pass_on("up", "confirm", name, raw))
        self.states += states.values()
        session, outbox = confirming.close()
        return session, states, {n: self.pass_on("down", "confirmations", n, raw) for n, raw in outbox.items()}

    def open(self) -> Network:
        self.session, states, confirmations = self.confirm()
        self.holders = {name: states[name].enter(raw) for name, raw in confirmations.items()}
        return self

    def begin(self, number: int, names: Iterable[str] | None = None) -> tuple[Adding, dict[str, Any]]:
        keyed = {}
        for name in names or self.names:
            self.holders[name], keyed[name] = self.holders[name].begin(number)
        self.states += [*self.holders.values(), *keyed.values()]
        return self.session.begin(number), keyed

    def encrypt(self, keyed: Mapping[str, Any], vectors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        encrypted, messages = {}, {}
        for name, vector in vectors.items():
            encrypted[name], pieces = keyed[name].encrypt(vector)
            messages[name] = list(pieces)
            self.sent += messages[name]
        self.states += encrypted.values()
        return encrypted, messages

    def summed(self, number: int = 1, vectors: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """A closed round and the parties' states."""
        vectors = vectors or self.vectors()
        adding, keyed = self.begin(number, vectors)
        encrypted, messages = self.encrypt(keyed, vectors)
        for name, raws in messages.items():
            for raw in raws:
                adding.receive(name, raw)
        return adding.close(), encrypted

    def vectors(self, value: int = 0) -> dict[str, Any]:
        rng = np.random.default_rng(7)
        return {name: rng.integers(-BOUND, BOUND + 1, LENGTH) if not value else full(value) for name in self.names}


def full(value: int) -> Any:
    return np.full(LENGTH, value, np.int64)


def make_setup(
    names: tuple[str, ...], session: bytes, *, scheme: str, length: int = LENGTH, **changes: Any
) -> wire.KeySetup:
    plan: Any = bfv.choose(len(names), BOUND, length)
    sizes: dict[str, Any] = {"bound": BOUND, "magnitude": 0.0, "precision": 0.0}
    if scheme == "ckks":
        plan = ckks.choose(len(names), 1.0, length, 1e-5)
        sizes = {"bound": 0, "magnitude": 1.0, "precision": 1e-5}
    fields = {
        "session": session,
        "roster": names,
        "length": length,
        "scheme": scheme,
        **sizes,
        "min_survivors": 2,
        "degree": plan.parameters.degree,
        "primes": plan.parameters.primes,
        "special": plan.parameters.special,
        "plain_modulus": plan.parameters.plain_modulus,
        "encoding": "unit 1/7",
    }
    return wire.KeySetup(**(fields | changes))


def edited(kind: type[Any], raw: bytes, **changes: Any) -> bytes:
    message = wire.read(kind, raw, sender="test", limit=1 << 30)
    return base.encode(msgspec.structs.replace(message, **changes))


def one_entry(place: int, **changes: Any) -> Callable[[type[Any], bytes], bytes]:
    def edit(kind: type[Any], raw: bytes) -> bytes:
        entries = list(wire.read(kind, raw, sender="test", limit=1 << 30).entries)
        entries[place] = msgspec.structs.replace(entries[place], **changes)
        return edited(kind, raw, entries=tuple(entries))

    return edit


# -- the key ------------------------------------------------------------------------------------------------------


def test_a_session_opens_and_sums() -> None:
    network = Network().open()
    totalling, encrypted = network.summed()
    name, pieces = totalling.ask()
    for raw in encrypted[name].open(pieces):
        totalling.receive(name, raw)
    outcome = totalling.close()
    assert np.array_equal(outcome.total, sum(network.vectors().values()))
    assert (outcome.survivors, outcome.decryptor) == (network.names, "p0")


def test_a_swapped_public_key_is_found_by_everyone() -> None:
    """The server in the middle: it shows its own key as the dealer's, or as another party's to the dealer."""
    for place in (0, 2):
        network = Network()
        _, joining, hellos = network.join()
        mine = x25519_public(bytes(range(32)))
        for name in network.names:
            raw = one_entry(place, public=mine)(wire.KeyHellos, hellos[name])
            with pytest.raises(FaultyServerError, match=f"p{place} is not signed|another KeyHello"):
                joining[name].meet(raw, randomness=network.random[name])


def test_hellos_that_change_places_are_found() -> None:
    network = Network()
    _, joining, hellos = network.join()
    entries = list(wire.read(wire.KeyHellos, hellos["p0"], sender="", limit=10**6).entries)
    entries[1], entries[2] = entries[2], entries[1]
    with pytest.raises(FaultyServerError, match="not signed"):
        joining["p3"].meet(edited(wire.KeyHellos, hellos["p3"], entries=tuple(entries)), randomness=bytes)


def test_a_changed_nonce_or_a_missing_party_is_found() -> None:
    network = Network()
    _, joining, hellos = network.join()
    with pytest.raises(FaultyServerError, match="not signed"):
        joining["p1"].meet(one_entry(2, nonce=bytes(32))(wire.KeyHellos, hellos["p1"]), randomness=bytes)
    entries = wire.read(wire.KeyHellos, hellos["p2"], sender="", limit=10**6).entries
    with pytest.raises(FaultyServerError, match="expected 4"):
        joining["p2"].meet(edited(wire.KeyHellos, hellos["p2"], entries=entries[:3]), randomness=bytes)
    with pytest.raises(FaultyServerError, match="another session"):
        joining["p3"].meet(edited(wire.KeyHellos, hellos["p3"], session=bytes(16)), randomness=bytes)


def test_hellos_of_an_earlier_session_are_found_even_under_its_identifier() -> None:
    """All signatures are genuine; but this party's own nonce and key are not in it."""
    old = Network(seed=1)
    _, _, replayed = old.join()
    network = Network(seed=2)
    network.setup = msgspec.structs.replace(network.setup, session=old.setup.session)
    _, joining, _ = network.join()
    for name in network.names:
        with pytest.raises(FaultyServerError, match="another KeyHello of this party"):
            joining[name].meet(replayed[name], randomness=network.random[name])


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
    sealed = bytearray(wire.read(wire.KeyDealt, dealt["p2"], sender="", limit=10**4).sealed)
    sealed[5] ^= 1
    with pytest.raises(FaultyPartyOrServerError, match="does not open"):
        states["p2"].receive(edited(wire.KeyDealt, dealt["p2"], sealed=bytes(sealed)))
    with pytest.raises(FaultyServerError, match="another session"):
        states["p3"].receive(edited(wire.KeyDealt, dealt["p3"], session=bytes(16)))


def test_the_server_cannot_deal() -> None:
    """It makes a seed and seals it: but the key agreement needs the dealer's private key, and the deal its identity."""
    network = Network()
    _, states, dealt, _ = network.meet()
    commitment = bytes(32)
    forged = ed25519_sign(bytes(32), terms.deal(bytes(32), commitment))
    with pytest.raises(FaultyPartyOrServerError, match="not signed"):
        states["p1"].receive(edited(wire.KeyDealt, dealt["p1"], commitment=commitment, signature=forged))


class Dealer:
    """A dealer with a mind of its own."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def deal(self, states: Mapping[str, Any], dealt: bytes, receiver: int, seed: bytes, committed: bytes) -> bytes:
        network = self.network
        meeting = states[network.names[receiver]]._content[0]
        private = network.random["p0"].given[0]
        commitment = terms.key_commitment(meeting.session, committed)
        key = terms.seal_key(x25519_shared(private, meeting.publics[receiver]), meeting.session, receiver)
        sealed = seal(key, bytes(12), seed, terms.seal_data(meeting.session, receiver, commitment))
        signature = ed25519_sign(network.identities["p0"], terms.deal(meeting.session, commitment))
        return edited(wire.KeyDealt, dealt, commitment=commitment, sealed=sealed, signature=signature)


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
        message = wire.read(wire.KeyConfirm, confirms[name], sender="", limit=10**4)
        entries.append(wire.ConfirmEntry(message.commitment, message.signature))
    raw = base.encode(wire.KeyConfirmations(network.setup.session, tuple(entries)))
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
            states["p1"].enter(edit(wire.KeyConfirmations, confirmations["p1"]))


def test_a_confirmation_counts_for_its_sender_only() -> None:
    network = Network()
    _, states, confirmations = network.confirm()
    entries = list(wire.read(wire.KeyConfirmations, confirmations["p1"], sender="", limit=10**4).entries)
    entries[2] = entries[3]
    with pytest.raises(FaultyServerError, match="p2 is not signed"):
        states["p1"].enter(edited(wire.KeyConfirmations, confirmations["p1"], entries=tuple(entries)))


def test_what_one_party_has_checked_vouches_for_the_same_bytes_alone() -> None:
    """Parties of one process share what they verified; a forged list after a genuine one is refused all the same."""
    network = Network()
    _, joining, hellos = network.join()
    joining["p1"].meet(hellos["p1"], randomness=network.random["p1"])
    with pytest.raises(FaultyServerError, match="p0 is not signed"):
        joining["p2"].meet(one_entry(0, public=bytes(32))(wire.KeyHellos, hellos["p2"]), randomness=bytes)
    network = Network()
    _, states, confirmations = network.confirm()
    states["p1"].enter(confirmations["p1"])
    with pytest.raises(FaultyServerError, match="p3 is not signed"):
        states["p2"].enter(one_entry(3, signature=bytes(64))(wire.KeyConfirmations, confirmations["p2"]))


def test_a_public_key_of_small_order_is_refused_by_the_dealer() -> None:
    network = Network()

    def weak(name: str, raw: bytes) -> bytes:
        if name != "p2":
            return raw
        message = wire.read(wire.KeyHello, raw, sender="", limit=10**4)
        signed = terms.hello(setup_digest(base.encode(network.setup)), 2, bytes(32), message.nonce)
        signature = ed25519_sign(network.identities["p2"], signed)
        return edited(wire.KeyHello, raw, public=bytes(32), signature=signature)

    network.hooks["up", "hello"] = weak
    _, joining, hellos = network.join()
    with pytest.raises(FaultyPartyError, match="p2: its public key"):
        joining["p0"].meet(hellos["p0"], randomness=network.random["p0"])


def test_the_server_refuses_forged_and_surplus_messages() -> None:
    network = Network()
    opening = Opening(network.setup, network.directory, network.signatures)
    hellos = {}
    for name in network.names:
        _, hellos[name] = steps.join(
            opening.invitation,
            name=name,
            identity=network.identities[name],
            policy=network.policy,
            randomness=network.random[name],
        )
    with pytest.raises(FaultyPartyError, match="p2: its KeyHello is not signed"):
        opening.receive("p2", hellos["p1"])
    with pytest.raises(FaultyPartyError, match="not in the roster"):
        opening.receive("stranger", hellos["p1"])
    with pytest.raises(FaultyPartyError, match="another session"):
        opening.receive("p1", edited(wire.KeyHello, hellos["p1"], session=bytes(16)))
    opening.receive("p1", hellos["p1"])
    opening.receive("p1", hellos["p1"])  # a network that retries
    with pytest.raises(FaultyPartyError, match="one too many"):
        opening.receive("p1", edited(wire.KeyHello, hellos["p1"], nonce=bytes(32)))
    with pytest.raises(MessageError):
        opening.receive("p2", b"\x01garbage")
    assert opening.waiting == ("p0", "p2", "p3")
    with pytest.raises(TooFewSurvivorsError, match="p0, p2, p3"):
        opening.close()
    with pytest.raises(StateUsedError):
        opening.close()


def test_the_server_takes_the_deal_from_the_dealer_alone() -> None:
    network = Network()
    dealing, joining, hellos = network.join()
    _, (deal, confirm) = joining["p0"].meet(hellos["p0"], randomness=network.random["p0"])
    with pytest.raises(FaultyPartyError):
        dealing.receive("p1", deal)
    with pytest.raises(FaultyPartyError, match="not signed"):
        dealing.receive("p0", edited(wire.KeyDeal, deal, commitment=bytes(32)))
    short = wire.read(wire.KeyDeal, deal, sender="", limit=10**4).sealed[:-1]
    with pytest.raises(FaultyPartyError, match="expected 3"):
        dealing.receive("p0", edited(wire.KeyDeal, deal, sealed=short))
    dealing.receive("p0", deal)
    confirming, _ = dealing.close()
    with pytest.raises(FaultyPartyError, match="p1: its KeyConfirm is not signed"):
        confirming.receive("p1", confirm)


@pytest.mark.parametrize(
    ("changes", "policy", "message"),
    [
        ({"plain_modulus": 257}, {}, "ring"),
        ({"degree": 2048, "primes": (65537,)}, {}, "ring"),
        ({"bound": 2**40}, {}, "ring"),
        ({"bound": 0}, {}, "bound"),
        ({"bound": 2**61}, {}, "plain modulus"),
        ({"roster": ("p0", "p1", "p1", "p3")}, {}, "twice"),
        ({"roster": ("p0", "p1", "mallory", "p3")}, {}, "not pinned"),
        ({"min_survivors": 5}, {}, "never be made"),
        ({}, {"minimum_cohort": 3}, "at least 3"),
        ({}, {"maximum_bound": 999}, "bounds up to 999"),
        ({}, {"maximum_length": 19}, "19 values at most"),
        ({}, {"encoding": "unit 1/8"}, "encoding"),
        ({"scheme": "ckks"}, {}, "finite"),
    ],
    ids=str,
)
def test_setups_that_are_weak_or_inconsistent_are_refused(changes: Any, policy: Any, message: str) -> None:
    network = Network(policy=policy)
    setup = msgspec.structs.replace(network.setup, **changes)
    random = Stream("p0")
    with pytest.raises(PolicyError, match=message):
        steps.join(
            base.encode(setup),
            name="p0",
            identity=network.identities["p0"],
            policy=network.policy,
            randomness=random,
        )
    assert random.given == [], "nothing was made, so nothing was sent"


def test_parties_join_as_themselves_only() -> None:
    network = Network()
    for name, identity, error in (("p0", "p1", SpecError), ("stranger", "p1", PolicyError)):
        with pytest.raises(error):
            steps.join(
                base.encode(network.setup),
                name=name,
                identity=network.identities[identity],
                policy=network.policy,
                randomness=network.random["p0"],
            )


def test_policies_are_checked() -> None:
    key = bytes(32)
    for wrong in ({"minimum_cohort": 1}, {"directory": {"a": key[1:]}}, {"directory": {"a": key, "b": key}}):
        with pytest.raises(SpecError):
            SharedPolicy(**({"directory": {"a": key}} | wrong))


# -- rounds -------------------------------------------------------------------------------------------------------


def opened(totalling: Totalling, encrypted: Mapping[str, Any], name: str | None = None) -> list[int]:
    name, pieces = totalling.ask(name)
    for raw in encrypted[name].open(pieces):
        totalling.receive(name, raw)
    return list(totalling.close().total)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"session": bytes(16)}, "another session"),
        ({"round": 2}, "of round 2, not 1"),
        ({"key": bytes(16)}, "another key"),
        ({"index": 1}, "out of order"),
        ({"body": b"x"}, "expected 1 ciphertexts"),
    ],
    ids=str,
)
def test_other_ciphertexts_are_refused_and_change_nothing(change: Any, message: str) -> None:
    network = Network().open()
    adding, keyed = network.begin(1)
    vectors = network.vectors()
    encrypted, messages = network.encrypt(keyed, vectors)
    for name in network.names:
        (raw,) = messages[name]
        with pytest.raises(FaultyPartyError, match=message) as found:
            adding.receive(name, edited(Ciphertext, raw, **change))
        assert found.value.party == name
        adding.receive(name, raw)
        with pytest.raises(FaultyPartyError, match="twice"):
            adding.receive(name, raw)
    assert adding.complete == network.names
    assert opened(adding.close(), encrypted) == list(sum(vectors.values()))


def test_bodies_that_are_no_ciphertexts_are_refused_and_change_nothing() -> None:
    network = Network().open()
    adding, keyed = network.begin(1)
    vectors = network.vectors()
    encrypted, messages = network.encrypt(keyed, vectors)
    (raw,) = messages["p1"]
    body = wire.read(Ciphertext, raw, sender="", limit=10**6).body
    unreduced = body[:-4] + b"\xff" * 4
    full_size = body[64:] * 2  # what a ciphertext without a seed has
    for wrong in (body[:-1], body + b"\0", body * 2, full_size, unreduced):
        with pytest.raises((FaultyPartyError, MessageError)) as found:
            adding.receive("p1", edited(Ciphertext, raw, body=wrong))
        assert found.value.blame == "p1"
    for garbage in (b"", raw[:-1], raw + b"\0", raw * 2, bytes(10**7)):
        with pytest.raises(MessageError):
            adding.receive("p1", garbage)
    with pytest.raises(FaultyPartyError, match="roster"):
        adding.receive("stranger", raw)
    for name in network.names:
        adding.receive(name, messages[name][0])
    assert opened(adding.close(), encrypted) == list(sum(vectors.values()))


def test_vectors_after_the_close_are_thrown_away() -> None:
    network = Network().open()
    adding, keyed = network.begin(1)
    vectors = network.vectors()
    encrypted, messages = network.encrypt(keyed, vectors)
    for name in ("p0", "p3"):
        adding.receive(name, messages[name][0])
    totalling = adding.close()
    with pytest.raises(LateVectorError):
        adding.receive("p1", messages["p1"][0])
    with pytest.raises(StateUsedError):
        adding.close()
    assert totalling.survivors == ("p0", "p3")
    assert opened(totalling, encrypted) == list(vectors["p0"] + vectors["p3"])


def test_half_a_vector_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """p2 vanishes after some of its pieces: those are subtracted again, and the noise they brought with them."""
    monkeypatch.setattr(terms, "PIECE_BYTES", 10_000)
    length = 60_000
    network = Network(length=length).open()
    adding, keyed = network.begin(1)
    vectors = {name: np.full(length, BOUND if name == "p2" else 5) for name in network.names}
    encrypted, messages = network.encrypt(keyed, vectors)
    assert len(messages["p2"]) > 2
    for raw in messages["p2"][:-1]:
        adding.receive("p2", raw)
    for name in ("p0", "p1", "p3"):
        for raw in messages[name]:
            adding.receive(name, raw)
    with pytest.raises(FaultyPartyError, match="out of order"):
        adding.receive("p2", messages["p2"][0])
    totalling = adding.close()
    assert totalling.survivors == ("p0", "p1", "p3")
    assert opened(totalling, encrypted) == [15] * length


def test_ciphertexts_of_an_earlier_round_do_not_pass_for_this_one() -> None:
    """Relabelled by a party, which the server cannot see; but they are under another key, and that shows."""
    network = Network().open()
    _, keyed = network.begin(1)
    _, old = network.encrypt(keyed, network.vectors())
    adding, keyed = network.begin(2)
    encrypted, messages = network.encrypt(keyed, network.vectors())
    with pytest.raises(FaultyPartyError, match="of round 1"):
        adding.receive("p1", old["p1"][0])
    new = wire.read(Ciphertext, messages["p1"][0], sender="", limit=10**6)
    with pytest.raises(FaultyPartyError, match="another key"):
        adding.receive("p1", edited(Ciphertext, old["p1"][0], round=2))
    adding.receive("p1", edited(Ciphertext, old["p1"][0], round=2, key=new.key))
    adding.receive("p0", messages["p0"][0])
    totalling = adding.close()
    with pytest.raises(GarbledSumError, match="noise"):
        opened(totalling, encrypted)


@pytest.mark.parametrize("scheme", ["bfv", "ckks"])
def test_a_wrong_key_or_changed_bytes_give_no_sum(scheme: str) -> None:
    """What is encrypted under another session's key, and what was changed in one residue, spoil the sum visibly."""
    vectors = {f"p{place}": full(1) if scheme == "bfv" else np.ones(LENGTH) for place in range(4)}
    other = Network(seed=9, scheme=scheme).open()
    _, keyed = other.begin(1)
    _, strange = other.encrypt(keyed, vectors)
    network = Network(scheme=scheme).open()
    for number, kind in enumerate(("wrong key", "changed"), 1):
        adding, keyed = network.begin(number)
        encrypted, messages = network.encrypt(keyed, vectors)
        mine = wire.read(Ciphertext, messages["p2"][0], sender="", limit=10**6)
        theirs = wire.read(Ciphertext, strange["p2"][0], sender="", limit=10**6)
        body = bytearray(theirs.body if kind == "wrong key" else mine.body)
        if kind == "changed":
            body[64 + 2] ^= 0x10  # a high byte of one coefficient
        messages["p2"] = [edited(Ciphertext, messages["p2"][0], body=bytes(body))]
        for name, (raw,) in messages.items():
            adding.receive(name, raw)
        closed = adding.close()
        pieces = closed.ask()[1] if isinstance(closed, Totalling) else closed.pieces()
        with pytest.raises(GarbledSumError):
            encrypted["p0"].read(pieces)


def test_a_vector_counted_twice_is_seen_where_it_passes_the_bound() -> None:
    network = Network().open()
    adding, keyed = network.begin(1)
    encrypted, messages = network.encrypt(keyed, network.vectors(BOUND))
    for name in ("p0", "p1"):
        adding.receive(name, messages[name][0])
    adding._ring.evaluator.add_inplace(adding._sum[0], adding._sum[0])
    with pytest.raises(GarbledSumError, match="outside"):
        opened(adding.close(), encrypted)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"session": bytes(16)}, FaultyServerError, "another session"),
        ({"round": 2}, FaultyServerError, "another session's or round's"),
        ({"key": bytes(16)}, FaultyServerError, "another key"),
        ({"index": 1}, FaultyServerError, "expected piece 0"),
        ({"survivors": b"\x0e"}, FaultyServerError, "not to have this party's vector"),
        ({"survivors": b"\x01"}, TooFewSurvivorsError, "1 of the 2"),
        ({"survivors": b"\xff"}, FaultyServerError, "no set"),
        ({"survivors": b"\x0f\x00"}, FaultyServerError, "no set"),
        ({"body": b"x"}, FaultyServerError, "expected 1 ciphertexts"),
    ],
    ids=str,
)
def test_parties_open_no_other_sum(change: Any, error: type[ProtocolError], message: str) -> None:
    network = Network().open()
    totalling, encrypted = network.summed()
    name, pieces = totalling.ask()
    with pytest.raises(error, match=message):
        encrypted[name].open(edited(wire.SumPiece, raw, **change) for raw in pieces)
    with pytest.raises(StateUsedError):
        encrypted[name].open(totalling.ask()[1])


def test_parties_open_one_sum_of_a_round_and_none_of_a_round_before() -> None:
    network = Network().open()
    totalling, encrypted = network.summed()
    assert len(opened(totalling, encrypted)) == LENGTH
    with pytest.raises(StateUsedError):
        opened(totalling, encrypted)
    assert opened(totalling, encrypted, "p2") == list(sum(network.vectors().values()))
    network.summed(2)
    with pytest.raises(StateUsedError, match="round 1 ended"):
        opened(totalling, encrypted, "p3")


def test_sums_with_pieces_missing_or_unreduced_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "PIECE_BYTES", 10_000)
    length = 60_000
    network = Network(length=length).open()
    totalling, encrypted = network.summed(1, {name: np.ones(length, np.int64) for name in network.names})
    pieces = list(totalling.ask()[1])
    assert len(pieces) > 2
    with pytest.raises(FaultyServerError, match="ciphertexts of the sum, got"):
        encrypted["p0"].open(pieces[:-1])
    with pytest.raises(FaultyServerError, match="different survivors"):
        encrypted["p1"].open([pieces[0], edited(wire.SumPiece, pieces[1], survivors=b"\x07")])
    body = wire.read(wire.SumPiece, pieces[0], sender="", limit=10**6).body
    with pytest.raises(FaultyServerError, match="no ciphertext"):
        encrypted["p2"].open([edited(wire.SumPiece, pieces[0], body=b"\xff" * len(body))])
    assert encrypted["p3"].read(pieces)[0].tolist() == [4] * length


def test_the_server_takes_the_sum_from_whom_it_asked_and_in_range() -> None:
    network = Network().open()
    totalling, encrypted = network.summed(1, {name: full(3) for name in network.names[:3]})
    with pytest.raises(StateUsedError):
        totalling.close()
    with pytest.raises(SpecError, match="no survivor"):
        totalling.ask("p3")
    name, pieces = totalling.ask("p1")
    (raw,) = encrypted[name].open(pieces)
    with pytest.raises(FaultyPartyError, match="not asked"):
        totalling.receive("p0", raw)
    body = wire.read(wire.TotalPiece, raw, sender="", limit=10**6).body
    for change in (
        {"session": bytes(16)},
        {"round": 2},
        {"index": 1},
        {"body": body[:-1]},
        {"body": b"\xff\x0f" + body[2:]},  # 4095 of 13 bits: more than three vectors can give
    ):
        with pytest.raises(FaultyPartyError):
            totalling.receive("p1", edited(wire.TotalPiece, raw, **change))
    with pytest.raises(StateUsedError):
        totalling.close()
    totalling.receive("p1", raw)
    with pytest.raises(FaultyPartyError, match="out of order"):
        totalling.receive("p1", raw)
    assert totalling.close().total.tolist() == [9] * LENGTH


def test_sums_of_floats_are_never_reported_to_the_server() -> None:
    network = Network(scheme="ckks").open()
    relayed, encrypted = network.summed(1, {name: np.full(LENGTH, 0.5) for name in network.names})
    assert isinstance(relayed, Relayed)
    with pytest.raises(SpecError, match="never reported"):
        encrypted["p0"].open(relayed.pieces())
    total, survivors = encrypted["p0"].read(relayed.pieces())
    assert np.abs(total - 2).max() < 1e-5
    assert survivors == network.names


def test_rounds_go_forward_and_missed_ones_do_not_part_the_parties() -> None:
    network = Network().open()
    holder = network.holders["p0"]
    for wrong in (0, -1, terms.MAX_SKIPPED, 1 << 32):
        with pytest.raises(FaultyServerError, match="asked for round"):
            holder.begin(wrong)
    assert opened(*network.summed(1)) == list(sum(network.vectors().values()))
    two = {name: full(2) for name in ("p0", "p1")}
    assert opened(*network.summed(2, two)) == [4] * LENGTH
    assert opened(*network.summed(7)) == list(sum(network.vectors().values()))
    with pytest.raises(FaultyServerError, match="round 7 after round 7"):
        network.holders["p1"].begin(7)
    with pytest.raises(SpecError, match="expected a round after"):
        network.session.begin(7)


def test_a_wrong_vector_leaves_the_key_for_a_right_one() -> None:
    network = Network().open()
    _, keyed = network.begin(1)
    with pytest.raises(ProtocolError):
        keyed["p0"].encrypt(full(BOUND + 1))
    keyed["p0"].encrypt(full(BOUND))
    with pytest.raises(StateUsedError):
        keyed["p0"].encrypt(full(BOUND))


def test_nothing_of_a_past_round_can_be_made_again() -> None:
    """After a round's key is made, a party keeps the next link only; the one before is not in any state of it."""
    network = Network().open()
    (chain,) = network.holders["p0"]._content
    link, session = chain.link, chain.session
    network.begin(1)
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
    make, step, first = terms.round_seed, terms.next_link, terms.first_link
    monkeypatch.setattr(terms, "round_seed", lambda *a: seeds.append(make(*a)) or seeds[-1])
    monkeypatch.setattr(terms, "next_link", lambda *a: links.append(step(*a)) or links[-1])
    monkeypatch.setattr(terms, "first_link", lambda *a: links.append(first(*a)) or links[-1])
    network = Network(scheme=scheme).open()
    value = full(3) if scheme == "bfv" else np.full(LENGTH, 0.5)
    for number in (1, 2):
        closed, encrypted = network.summed(number, dict.fromkeys(network.names, value))
        pieces = list(closed.ask()[1] if isinstance(closed, Totalling) else closed.pieces())
        network.sent += pieces
        if scheme == "bfv":
            network.sent += list(encrypted["p0"].open(pieces))
        with pytest.raises(ProtocolError) as found:
            encrypted["p1"].read([edited(wire.SumPiece, pieces[0], key=bytes(16))])
        network.states.append(found.value)
    ring = terms.ring_of(terms.plan_of(network.setup).parameters)
    secrets: dict[str, bytes] = {}
    for place, seed in enumerate(sorted(set(seeds))):
        for form, raw in serialisations(RingKey.from_seed(ring, seed), seed).items():
            secrets[f"round key {place}, {form}"] = raw
    for place, link in enumerate(sorted(set(links))):
        secrets[f"link {place}"] = link
    for name in network.names:
        given = network.random[name].given
        private, nonce, *rest = given  # the nonce is public
        assert any(nonce in raw for raw in network.sent)
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
    adding, keyed = network.begin(1)
    encrypted, messages = network.encrypt(keyed, vectors)
    for name, (raw,) in messages.items():
        adding.receive(name, raw)
    body = wire.read(Ciphertext, messages["p2"][0], sender="", limit=10**6).body
    adding._sum[0] = adding._ring.load_fresh(body)
    assert opened(adding.close(), encrypted) == list(vectors["p2"])


def test_a_party_that_shows_its_key_opens_the_vectors_of_all() -> None:
    network = Network().open()
    _, keyed = network.begin(1)
    vectors = network.vectors()
    _, messages = network.encrypt(keyed, vectors)
    seed = terms.round_seed(*_chain_of(network))
    key = RingKey.from_seed(terms.ring_of(terms.plan_of(network.setup).parameters), seed)
    plan: Any = terms.plan_of(network.setup)
    for name, (raw,) in messages.items():
        plain = sealapi.Plaintext()
        body = wire.read(Ciphertext, raw, sender="", limit=10**6).body
        key.decryptor().decrypt(key.ring.load_fresh(body), plain)
        assert np.array_equal(plan.decode(key.ring, plain, LENGTH), vectors[name])


def _chain_of(network: Network) -> tuple[bytes, bytes, int]:
    """Session, link and number of round 1, from what p0 dealt: its third draw is the seed."""
    digest = setup_digest(base.encode(network.setup))
    publics = b"".join(x25519_public(network.random[name].given[0]) for name in network.names)
    nonces = b"".join(network.random[name].given[1] for name in network.names)
    session = terms.session_digest(digest, publics, nonces)
    return session, terms.first_link(session, network.random["p0"].given[2]), 1
