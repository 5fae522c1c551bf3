"""The shared-key sum behind its drivers: bytes in, bytes out, over a network that does what it likes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from choral.protocols import Homomorphic, Policy, SumSpec
from choral.protocols.crypto.identity import Identity
from choral.protocols.driver import NeedsVector, RoundTerms
from choral.protocols.errors import (
    FaultyPartyError,
    FaultyServerError,
    GarbledSumError,
    InputError,
    KeyDisputeError,
    MessageError,
    PolicyError,
    ProtocolError,
    SpecError,
    StateUsedError,
    TooFewSurvivorsError,
)
from choral.protocols.homomorphic.shared import key_messages
from choral.protocols.masking import messages
from choral.protocols.stored_state import PublicState
from choral.protocols.wire_format import encode, read

NAMES = ("p0", "p1", "p2", "p3")
VECTORS = {name: np.arange(5) * (place + 1) - 3 for place, name in enumerate(NAMES)}
SHARED = Homomorphic(key="shared", min_survivors=2)
TRAINED = RoundTerms(0, b"w" * 32, b"t" * 32)
Hook = Callable[[str, str, bytes], list[bytes]]


class Deployment:
    """hook: (way, party, bytes) -> what arrives of it. silent: who gets nothing and says nothing."""

    def __init__(self, **more: Any) -> None:
        self.spec = SumSpec(**{"parties": NAMES, "length": 5, "bound": 100, "encoding": "step 1"} | more)
        self.identities = {name: Identity(name.encode() * 16) for name in NAMES}
        self.directory = {name: identity.public for name, identity in self.identities.items()}
        self.policy = Policy(
            corrupt=0,
            server="semi-honest",
            directory=self.directory,
            encoding="step 1",
            terms=self.spec.terms,
            maximum_bound=self.spec.bound,
        )
        self.stored: dict[str, list[bytes]] = {name: [] for name in NAMES}
        self.parties = {name: self.party(name) for name in NAMES}
        self.server: Any = SHARED.server_driver(self.spec, directory=self.directory, patience=1.0)
        self.silent: set[str] = set()
        self.hook: Hook = lambda way, party, raw: [raw]
        self.refused: dict[str, ProtocolError] = {}
        self.steps: list[str] = []

    def party(self, name: str, **more: Any) -> Any:
        store = self.stored[name].append
        given = {"identity": self.identities[name], "policy": self.policy, "store": store} | more
        return SHARED.party_driver(self.spec, name=name, **given)

    def go(self, trips: Iterator[Any], absent: tuple[str, ...] = ()) -> None:
        """absent: who sends no vector."""
        for trip in trips:
            self.steps.append(trip.step)
            for party, raw in trip.outbox.items():
                if party not in self.silent:
                    for arrived in self.hook("down", party, raw):
                        self.hand_over(trip, party, arrived, absent)
            assert trip.enough(1.0) or trip.step in ("hello", "reveal", "vector")
            self.refused |= trip.faults

    def hand_over(self, trip: Any, party: str, raw: bytes, absent: tuple[str, ...]) -> None:
        try:
            answer = self.parties[party].handle(raw)
        except ProtocolError as error:
            self.refused[party] = error
            return
        if isinstance(answer, NeedsVector):
            answer = self.parties[party].supply(VECTORS[party]) if party not in absent else ()
        for sent in answer:
            for arrived in self.hook("up", party, sent):
                trip.receive(party, arrived)

    def open(self) -> Deployment:
        self.go(self.server.open())
        return self

    def round(self, absent: tuple[str, ...] = (), terms: RoundTerms = TRAINED) -> Any:
        self.go(self.server.round(terms), absent)
        result = self.server.result
        assert result.total.tolist() == sum(VECTORS[name] for name in result.survivors).tolist()
        return result

    def begin(self) -> dict[str, bytes]:
        """What each party is sent at the beginning of the next round."""
        return dict(next(self.server.round(TRAINED)).outbox)


def test_a_sum_through_the_drivers_whoever_drops_out() -> None:
    deployed = Deployment().open()
    assert deployed.steps == ["hello", "reveal", "keys", "confirmation"]
    assert deployed.round().survivors == NAMES
    assert deployed.steps[4:] == ["vector", "unmasking"]
    assert deployed.round(absent=("p0", "p2")).survivors == ("p1", "p3")
    deployed.silent = {"p3"}
    assert deployed.round().survivors == ("p0", "p1", "p2")
    deployed.silent = set()
    assert deployed.round().survivors == NAMES
    assert deployed.refused == {}


def test_who_misses_the_end_of_the_opening_gets_it_with_a_begin() -> None:
    """The confirmations ride on each Begin until the party is heard; the same messages twice change nothing."""
    deployed = Deployment().open()
    deployed.silent = {"p1"}
    assert deployed.round().survivors == ("p0", "p2", "p3")
    deployed.silent = set()
    assert deployed.round(absent=("p2",)).survivors == ("p0", "p1", "p3")
    begins = [read(key_messages.ToParty, raw, sender="", limit=10**6) for raw in deployed.begin().values()]
    assert {type(message) for message in begins} == {messages.Begin}


def test_another_survivor_opens_the_sum_when_the_first_is_gone() -> None:
    deployed = Deployment().open()
    asked = []

    def lose_answers(way: str, party: str, raw: bytes) -> list[bytes]:
        if way == "up" and isinstance(read(key_messages.ToServer, raw, sender="", limit=10**6), key_messages.OpenedSum):
            asked.append(party)
            return [raw] if party == "p2" else []
        return [raw]

    deployed.hook = lose_answers
    assert deployed.round().survivors == NAMES
    assert asked == ["p0", "p1", "p2"]
    deployed.hook = lambda way, party, raw: [] if b"openedsum" in raw[:20] else [raw]
    with pytest.raises(TooFewSurvivorsError, match="nobody is left to open"):
        deployed.round()
    deployed.hook = lambda way, party, raw: [raw]
    assert deployed.round().survivors == NAMES


def test_a_session_opens_with_those_who_are_present_and_names_who_ends_it() -> None:
    deployed = Deployment()
    deployed.policy = replace(deployed.policy, directory_size=4)
    deployed.silent = {"p1"}
    deployed.open()
    assert deployed.server.setup.roster == ("p0", "p2", "p3")
    assert (deployed.server.setup.cohort, deployed.server.setup.directory) == ("chosen", 4)
    assert deployed.round().survivors == ("p0", "p2", "p3")
    deployed = Deployment()
    deployed.hook = lambda way, party, raw: [] if b"keydeal" in raw[:20] and way == "up" else [raw]
    with pytest.raises(TooFewSurvivorsError, match="missing: p0"):
        deployed.open()
    deployed.hook = lambda way, party, raw: [] if b"keyconfirm" in raw[:20] and party == "p2" else [raw]
    with pytest.raises(TooFewSurvivorsError, match="missing: p2"):
        deployed.open()
    deployed.hook = lambda way, party, raw: [raw]
    deployed.open()
    assert deployed.round().survivors == NAMES


def test_the_same_begin_gets_the_same_answer_alone_and_in_a_bundle() -> None:
    deployed = Deployment().open()
    bundle = deployed.begin()["p1"]
    confirmations, begin = read(messages.Bundle, bundle, sender="", limit=10**6).parts
    party = deployed.parties["p1"]
    asked = party.handle(bundle)
    assert asked == NeedsVector(read(messages.Begin, begin, sender="", limit=200).session, 1, 0, b"w" * 32, b"t" * 32)
    assert party.handle(begin) == party.handle(bundle) == asked
    with pytest.raises(InputError):
        party.supply(VECTORS["p1"] * 100)
    (upload,) = party.supply(VECTORS["p1"])
    assert party.handle(begin) == party.handle(bundle) == (upload,)
    assert party.handle(confirmations) == ()
    for again in (lambda: party.supply(VECTORS["p1"]), party.decline):
        with pytest.raises(StateUsedError, match="no vector is asked for"):
            again()


def test_a_begin_that_is_replayed_after_its_round_is_refused() -> None:
    """No vector is asked for, encrypted or sent again: not while the next round lasts, and not under other weights."""
    deployed = Deployment().open()
    seen: list[bytes] = []

    def remember(way: str, party: str, raw: bytes) -> list[bytes]:
        if (way, party) == ("down", "p1"):
            seen.append(raw)
        return [raw]

    deployed.hook = remember
    deployed.round()
    old = list(seen)
    following = deployed.begin()["p1"]
    party = deployed.parties["p1"]
    asked = party.handle(following)
    for raw in old:
        with pytest.raises((FaultyServerError, StateUsedError)):
            party.handle(raw)
    assert party.handle(following) == asked  # and the round that is under way is still there
    assert len(party.supply(VECTORS["p1"])) == 1


def test_who_declines_sends_nothing_and_answers_the_next_begin() -> None:
    deployed = Deployment().open()
    first = deployed.begin()["p2"]
    deployed.parties["p2"].handle(first)
    deployed.parties["p2"].decline()
    assert deployed.parties["p2"].handle(first) == ()
    with pytest.raises(StateUsedError):
        deployed.parties["p2"].supply(VECTORS["p2"])
    assert deployed.round().survivors == NAMES


def test_a_party_that_is_shown_two_models_says_so() -> None:
    deployed = Deployment().open()
    begin = read(messages.Bundle, deployed.begin()["p1"], sender="", limit=10**6).parts[1]
    party = deployed.parties["p1"]
    party.handle(deployed_confirmations(deployed))
    party.handle(begin)
    message = read(messages.Begin, begin, sender="", limit=200)
    for change in ({"weights": b"x" * 32}, {"terms": b"x" * 32}, {"exchange": 1}):
        with pytest.raises(FaultyServerError, match="two models"):
            party.handle(encode(msgspec.structs.replace(message, **change)))
    for change in ({"session": bytes(16)}, {"round": 1 << 20}):
        with pytest.raises(FaultyServerError):
            party.handle(encode(msgspec.structs.replace(message, **change)))
    assert deployed.round().survivors == NAMES


def deployed_confirmations(deployed: Deployment) -> bytes:
    return bytes(deployed.server._reveals)


def test_parties_that_are_shown_different_models_have_no_sum() -> None:
    """Each party's key of the round comes from the Begin that it was shown."""
    deployed = Deployment().open()

    def show_another(way: str, party: str, raw: bytes) -> list[bytes]:
        if way == "up" or party != "p3" or b"begin" not in raw:
            return [raw]
        return [raw.replace(b"w" * 32, b"x" * 32)]

    deployed.hook = show_another
    with pytest.raises(TooFewSurvivorsError, match="nobody is left to open"):
        deployed.round()
    assert set(deployed.refused) == set(NAMES)
    assert {type(error) for error in deployed.refused.values()} == {GarbledSumError}


def test_terms_that_change_after_signing_are_refused() -> None:
    deployed = Deployment(terms=b"t" * 32).open()
    assert deployed.round().survivors == NAMES
    with pytest.raises(TooFewSurvivorsError):
        deployed.round(terms=RoundTerms(0, b"w" * 32, b"u" * 32))
    assert all("not those that the session was signed with" in str(error) for error in deployed.refused.values())
    assert deployed.round().survivors == NAMES
    other = Deployment(terms=b"u" * 32)
    other.policy = replace(other.policy, terms=b"t" * 32)
    other.parties = {name: other.party(name) for name in NAMES}
    with pytest.raises(TooFewSurvivorsError):
        other.open()
    assert all(isinstance(error, PolicyError) for error in other.refused.values())


def test_a_weight_has_a_bound_of_its_own() -> None:
    deployed = Deployment(weight_bound=10).open()
    party = deployed.parties["p0"]
    party.handle(deployed.begin()["p0"])
    with pytest.raises(InputError, match="weight"):
        party.supply(np.array([100, 100, 100, 100, 11]))
    party.supply(np.array([100, 100, 100, 100, 10]))


def test_a_later_session_ends_the_one_before_it() -> None:
    """The server has a vector encrypted, opens another session with the same identities, and asks in the old one."""
    deployed = Deployment().open()
    old, begin = deployed.parties["p1"], deployed.begin()["p1"]
    old.handle(begin)
    (upload,) = old.supply(VECTORS["p1"])
    deployed.parties["p1"] = deployed.party("p1")
    deployed.open()
    for late in (lambda: old.handle(begin), lambda: old.handle(deployed.begin()["p1"])):
        with pytest.raises((StateUsedError, FaultyServerError)):
            late()
    assert deployed.round().survivors == NAMES
    trip = next(deployed.server.round(TRAINED))
    trip.receive("p1", upload)
    assert isinstance(trip.faults["p1"], FaultyPartyError)


def test_a_superseded_driver_encrypts_nothing_any_more() -> None:
    deployed = Deployment().open()
    old = deployed.parties["p1"]
    old.handle(deployed.begin()["p1"])
    deployed.parties["p1"] = deployed.party("p1")
    deployed.open()
    with pytest.raises(StateUsedError, match="ended when it joined"):
        old.supply(VECTORS["p1"])


def test_a_party_that_restarts_has_no_key_and_answers_with_the_next_session() -> None:
    deployed = Deployment().open()
    deployed.round()
    state = deployed.stored["p2"][-1]
    for secret in (deployed.identities["p2"].seed, deployed.parties["p2"]._holder._content[0].link):
        assert secret not in state
    begin = deployed.begin()["p2"]
    deployed.identities["p2"] = Identity(deployed.identities["p2"].seed)
    deployed.parties["p2"] = deployed.party("p2", state=state)
    with pytest.raises(FaultyServerError, match="before the session was open to this party"):
        deployed.parties["p2"].handle(begin)
    deployed.open()
    assert deployed.round().survivors == NAMES
    kept = msgspec.msgpack.decode(state, type=PublicState)
    assert (kept.setup, kept.session, kept.last) == (b"", b"", 0)
    with pytest.raises(SpecError, match="no stored state"):
        deployed.party("p2", state=b"\x00")


def test_messages_out_of_order_cost_nothing() -> None:
    deployed = Deployment()
    seen: dict[str, list[bytes]] = {name: [] for name in NAMES}

    def remember(way: str, party: str, raw: bytes) -> list[bytes]:
        if way == "down":
            seen[party].append(raw)
        return [raw]

    deployed.hook = remember
    deployed.open()
    deployed.round()
    party = deployed.parties["p1"]
    for raw in (seen["p1"][1], seen["p1"][3]):  # Hellos, KeyDeal: each was answered, and is not waited for
        with pytest.raises((StateUsedError, FaultyServerError)):
            party.handle(raw)
    with pytest.raises(MessageError, match="at most"):
        party.handle(bytes(10**7))
    last, up = seen["p1"][-1], encode(messages.Reveal(bytes(16), bytes(32)))
    for garbage in (b"", b"\x02", b"\x01" + last[1:], last + b"\0", up):
        with pytest.raises(MessageError):
            party.handle(garbage)
    with pytest.raises(MessageError):
        party.handle("text")
    assert deployed.round().survivors == NAMES


@pytest.mark.parametrize("kind", ["hellos", "reveals", "keydeal", "keyconfirmations"])
def test_messages_of_another_session_spend_no_state(kind: str) -> None:
    deployed = Deployment()

    def stray(way: str, party: str, raw: bytes) -> list[bytes]:
        if way == "up":
            return [raw]
        message = read(key_messages.ToParty, raw, sender="", limit=10**6)
        first = message.parts[0] if isinstance(message, messages.Bundle) else raw
        if type(read(key_messages.ToParty, first, sender="", limit=10**6)).__name__.lower() != kind:
            return [raw]
        other = read(key_messages.ToParty, first, sender="", limit=10**6)
        return [encode(msgspec.structs.replace(other, session=bytes(16))), raw]

    deployed.hook = stray
    deployed.open()
    assert deployed.round().survivors == NAMES
    assert len(deployed.refused) >= 3
    assert all("another session" in str(error) for error in deployed.refused.values())


def test_a_dealer_that_deals_two_keys_is_named_and_nothing_is_encrypted() -> None:
    deployed = Deployment()
    deals: dict[str, bytes] = {}

    def swap(way: str, party: str, raw: bytes) -> list[bytes]:
        if way == "up" and b"keyconfirm" in raw[:20] and party == "p2":
            message = read(key_messages.KeyConfirm, raw, sender="", limit=10**4)
            other = bytes(32)
            from choral.protocols.homomorphic.shared import setup as terms
            from choral.protocols.masking.signing import sign

            session = deployed.server.session.terms.session
            signature = sign(deployed.identities["p2"].seed, terms.confirm(session, 2, other))
            deals[party] = encode(msgspec.structs.replace(message, commitment=other, signature=signature))
            return [deals[party]]
        return [raw]

    deployed.hook = swap
    with pytest.raises(TooFewSurvivorsError, match="missing: p2"):
        deployed.open()
    assert isinstance(deployed.refused["p2"], KeyDisputeError)


@pytest.mark.parametrize("seed", range(12))
def test_a_network_that_loses_repeats_and_delays(seed: int) -> None:
    """The exact sum or a named refusal, nobody hangs, and who was lost is back in the next round."""
    deployed = Deployment().open()
    rng = random.Random(seed)
    late: list[tuple[str, bytes]] = []

    def unreliable(way: str, party: str, raw: bytes) -> list[bytes]:
        fate = rng.choice(["ok", "ok", "ok", "lost", "twice", "late"])
        if fate == "late" and way == "down":
            late.append((party, raw))
        arrived = {"lost": [], "late": [], "twice": [raw, raw]}.get(fate, [raw])
        if late and way == "down" and rng.random() < 0.5:
            arrived = [late.pop()[1] for _ in range(1) if late[-1][0] == party] + arrived
        return arrived

    for _ in range(3):
        deployed.hook = unreliable
        with suppress(TooFewSurvivorsError):
            deployed.round()
        deployed.hook = lambda way, party, raw: [raw]
        assert deployed.round().survivors == NAMES


def test_settings_that_a_shared_key_does_not_give_are_refused_at_the_drivers_too() -> None:
    spec, identity = Deployment().spec, Identity(bytes(32))
    for kind in (Homomorphic(key="shared", corrupt=1), Homomorphic(key="shared", server="malicious")):
        with pytest.raises(SpecError, match="withstands no corrupt party"):
            kind.server_driver(spec, directory={})
        with pytest.raises(SpecError, match="withstands no corrupt party"):
            kind.party_driver(spec, name="p0", identity=identity, policy=Policy(corrupt=0))
    with pytest.raises(SpecError, match="not the one in its own directory"):
        SHARED.party_driver(spec, name="p0", identity=identity, policy=Policy(corrupt=0))
    server = SHARED.server_driver(spec, directory=Deployment().directory)
    with pytest.raises(StateUsedError, match="not open"):
        next(server.round())
