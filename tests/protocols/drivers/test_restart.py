"""What a party stores, when, and what it answers after a restart: the next Begin, and no round that it may have."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from choral.protocols import Homomorphic, Identity, Masked
from choral.protocols.driver import TRIP_STEPS, RoundTerms
from choral.protocols.errors import FaultyServerError, PolicyError, SpecError, StateUsedError, TooFewSurvivorsError
from choral.protocols.stored_state import PublicState
from choral.protocols.wire_format import LAST_ROUND

STEPS = TRIP_STEPS[2:]
TRAINED = RoundTerms(0, b"w" * 32, b"t" * 32)


def until(net: Any, step: str, then: Callable[[], None]) -> None:
    """One round, and ``then`` when everybody has answered in the trip ``step``."""
    net.fresh_vectors(0)
    for trip in net.server.round(TRAINED):
        for name in trip.outbox:
            net.down(name, trip, trip, {})
        if trip.step == step:
            then()


@pytest.mark.parametrize("kind", [Masked(corrupt=1), Homomorphic(corrupt=1)], ids=["masked", "split"])
@pytest.mark.parametrize("step", STEPS)
def test_a_party_that_restarts_in_mid_round_is_back_in_the_next(deployed: Any, kind: Any, step: str) -> None:
    """Without a new session; what was begun before the restart it does not answer, whatever it is sent of it."""
    net = deployed(4, kind=kind, length=5).open()
    if step != "keys":  # which rode ahead in every round but the first
        net.round()
    until(net, step, lambda: net.restart("p1"))
    survived = step in ("vector", "confirmation", "unmasking")
    assert net.server.result.survivors == (net.names if survived else ("p0", "p2", "p3"))
    digest, before = net.server.digest, list(net.sent)
    for raw in [raw for way, at, name, raw in before if (way, name) == ("down", "p1") and at not in TRIP_STEPS[:2]]:
        with pytest.raises((FaultyServerError, StateUsedError)):
            net.parties["p1"].handle(raw)
    # Once it has helped to unmask, its keys for the next round are with the server, and their secrets are gone.
    assert net.round(seed=1).survivors == (("p0", "p2", "p3") if step == "unmasking" else net.names)
    assert net.round(seed=2).survivors == net.names
    assert net.server.digest == digest


def test_the_state_is_stored_before_any_message_that_depends_on_it_leaves(deployed: Any) -> None:
    """A store that fails stops the message, and the round is lost to the party; it is never answered afterwards."""
    net = deployed(4, kind=Masked(corrupt=1)).open()
    stored = [msgspec.msgpack.decode(raw, type=PublicState) for raw in net.stored["p0"]]
    assert [(state.sessions, state.last, bool(state.setup)) for state in stored] == [(1, 0, False)]
    net.round()
    stored = [msgspec.msgpack.decode(raw, type=PublicState) for raw in net.stored["p0"]]
    assert [(state.last, bool(state.session)) for state in stored] == [(0, False), (0, True), (1, True), (2, True)]

    full = [True]

    def failing(_: bytes) -> None:
        if full[0]:
            raise OSError("no space left")

    net.parties["p0"]._store = failing
    begin = next(net.server.round(TRAINED))  # keys rode ahead: the Begin comes with the Roster
    assert begin.step == "shares"
    net.parties["p0"]._early = None
    with pytest.raises(FaultyServerError, match="asked for round 2 after round 2"):  # its keys for it are gone
        net.parties["p0"].handle(begin.outbox["p0"])
    trip = next(net.server.round(TRAINED))
    with pytest.raises(OSError, match="no space"):
        net.parties["p0"].handle(trip.outbox["p0"])
    full[0] = False
    with pytest.raises(FaultyServerError, match="asked for round 3 after round 3"):
        net.parties["p0"].handle(trip.outbox["p0"])
    assert net.round().survivors == net.names


def test_a_restart_from_an_older_state_ends_what_was_restored_before(deployed: Any) -> None:
    net = deployed(4, kind=Masked(corrupt=1)).open()
    net.round()
    first = net.parties["p0"]
    second = net.parties["p0"] = net.party("p0", state=net.stored["p0"][-1])
    trip = next(net.server.round(TRAINED))
    with pytest.raises(StateUsedError, match="session 1 of this identity ended when it joined session 2"):
        first.handle(trip.outbox["p0"])
    assert msgspec.msgpack.decode(second.public_state(), type=PublicState).sessions == 2
    net.round()
    assert net.round().survivors == net.names


def test_sessions_are_counted_across_restarts(deployed: Any) -> None:
    """The number is stored ahead: a restarted identity begins above it."""
    net = deployed().open()
    for restarts in range(1, 4):
        net.restart("p0")
        state = msgspec.msgpack.decode(net.stored["p0"][-1], type=PublicState)
        assert state.sessions == 1 + restarts
        assert net.identities["p0"].sessions().last == 1 + restarts


def test_a_party_that_restarts_before_its_session_is_open_waits_for_the_next(deployed: Any) -> None:
    net = deployed(4, kind=Masked(corrupt=1))
    for trip in net.server.open():
        for name in trip.outbox:
            net.down(name, trip, trip, {})
    net.restart("p0")
    assert net.round().survivors == net.names[1:]
    net.server = net.kind.server_driver(net.spec, directory=net.directory)
    net.open()
    assert net.round().survivors == net.names


def test_a_stored_state_is_held_against_the_policy_again(deployed: Any) -> None:
    net = deployed(4, kind=Masked(corrupt=1)).open()
    net.round()
    net.policy = replace(net.policy, minimum_threshold=4)
    with pytest.raises(PolicyError, match="threshold of at least 4"):
        net.party("p0", state=net.stored["p0"][-1])


def _with(field: str, value: Any) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        state = msgspec.msgpack.decode(raw, type=PublicState)
        return msgspec.msgpack.encode(msgspec.structs.replace(state, **{field: value}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-1], "no stored state"),
        (lambda raw: b"", "no stored state"),
        (lambda raw: "text", "no stored state"),
        (lambda raw: msgspec.msgpack.encode([2, "what", {"comes": "later"}]), "of another version than 1"),
        (lambda raw: msgspec.msgpack.encode([]), "of another version than 1"),
        (_with("sessions", -1), "no stored state"),
        (_with("last", 1 << 32), "no stored state"),
        (_with("setup", b"\x02\x90"), "no stored state"),
        (_with("setup", b"\x01\x90"), "no stored state"),
        (_with("setup", b""), "no stored state"),
        (_with("session", b"s" * 31), "no stored state"),
        (_with("name", "p1"), "of another party"),
        (_with("purpose", "another"), "of another purpose"),
    ],
)
def test_bytes_that_are_no_stored_state_are_refused(
    deployed: Any, change: Callable[[bytes], Any], message: str
) -> None:
    """By name, blaming no server for a file of the party's own; and no live session ends for it."""
    net = deployed().open()
    net.round()
    with pytest.raises(SpecError, match=message):
        net.party("p0", state=change(net.stored["p0"][-1]))
    assert net.round().survivors == net.names


def test_a_state_of_another_party_of_the_session_is_refused(deployed: Any) -> None:
    """Its last round may lie before one that this party has answered."""
    net = deployed(4, kind=Masked(corrupt=1)).open()
    net.stopped = {"p1"}
    net.round()
    net.round()
    with pytest.raises(SpecError, match="of another party"):
        net.party("p0", state=net.stored["p1"][-1])


@pytest.mark.parametrize("number", [LAST_ROUND - 1, LAST_ROUND])
def test_a_server_that_uses_up_all_round_numbers_locks_no_party_out(deployed: Any, number: int) -> None:
    """The round is summed, the party's state is one that it can restart from, and the next session begins at 1."""
    net = deployed().open()
    net.server.number = number - 1
    assert net.round().survivors == net.names
    for name in net.names:
        assert msgspec.msgpack.decode(net.stored[name][-1], type=PublicState).last == LAST_ROUND
        net.restart(name)
    with pytest.raises((TooFewSurvivorsError, SpecError)):
        net.round()
    net.server = net.kind.server_driver(net.spec, directory=net.directory)
    assert net.open().round().survivors == net.names


# ------------------------------------------------------------------------------------------------------------ secrets


class Drawn:
    """Every secret that a party draws, by when; as numbers, so that a search does not find this list."""

    def __init__(self) -> None:
        self.when = ""
        self.numbers: dict[str, list[int]] = {}
        self._count = 0

    def __call__(self, size: int) -> bytes:
        import secrets

        raw = secrets.token_bytes(size)
        self.numbers.setdefault(self.when, []).append(int.from_bytes(raw[:32], "little"))
        return raw

    def among(self, values: list[bytes]) -> set[str]:
        pool = b"\0".join(values)
        return {when for when, held in self.numbers.items() for one in held if one.to_bytes(32, "little") in pool}


def reachable(value: Any) -> list[bytes]:
    """All bytes that can be reached from an object, as the garbage collector sees it."""
    import types

    found, seen, left = [], set(), [value]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType | types.FunctionType | Drawn):
            continue
        seen.add(id(one))
        if isinstance(one, bytes | bytearray):
            found.append(bytes(one))
        elif isinstance(one, np.ndarray):
            found.append(one.tobytes())
        left.extend(gc.get_referents(one))
    return found


@pytest.mark.parametrize("kind", [Masked(corrupt=1), Homomorphic(corrupt=1)], ids=["masked", "split"])
def test_no_secret_is_stored_shown_or_kept_for_repeated_requests(deployed: Any, kind: Any) -> None:
    net = deployed(4, kind=kind, length=40)
    drawn = Drawn()
    net.parties["p0"] = net.party("p0", randomness=drawn)
    for trip in net.server.open():
        drawn.when = f"opening {trip.step}"  # a nonce, which everybody is shown
        for name in trip.outbox:
            net.down(name, trip, trip, {})
    driver = net.parties["p0"]
    net.fresh_vectors(0)
    for trip in net.server.round(TRAINED):
        drawn.when = f"round 1 {trip.step}"
        for name in trip.outbox:
            net.down(name, trip, trip, {})
        outside = [*net.stored["p0"], driver.public_state(), repr(driver).encode(), repr(vars(driver)).encode()]
        cached = [part for answer in driver._replies._answers.values() if isinstance(answer, tuple) for part in answer]
        assert cached or trip.step == "keys"
        assert not [when for when in drawn.among([*outside, *cached]) if when.startswith("round")]
        assert net.identities["p0"].seed not in b"\0".join([*outside, *cached])
        assert net.vectors["p0"].tobytes()[:32] not in b"\0".join([*outside, *cached])
    assert {when for when in drawn.numbers if when.startswith("round 1")} >= {"round 1 keys", "round 1 shares"}
    # With the round over the driver holds its identity, and the keys that rode ahead; nothing of the round itself.
    held = reachable(driver)
    assert drawn.among(held) <= {"opening hello", "round 1 unmasking"}
    assert "round 1 unmasking" in drawn.among(held)  # the search finds what is there
    assert net.identities["p0"].seed in held


def test_an_identity_shows_nothing() -> None:
    identity = Identity(b"secret seed of 32 bytes, or more"[:32])
    for text in (repr(identity), str(identity), f"{identity}"):
        assert "secret" not in text


def test_too_few_after_restarts_is_a_refusal_and_not_a_wrong_sum(deployed: Any) -> None:
    net = deployed(3).open()
    net.round()
    for name in ("p0", "p1"):
        net.restart(name)
    with pytest.raises(TooFewSurvivorsError):
        net.round()
    assert net.round().survivors == net.names
