"""A network that loses, delays, repeats and reorders: the exact sum or a named refusal, and back in the next round."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from choral.protocols import Homomorphic, Masked
from choral.protocols.driver import TRIP_STEPS
from choral.protocols.errors import DisputedSharesError, ProtocolError, TooFewSurvivorsError

STEPS = TRIP_STEPS[2:]
OPENING = TRIP_STEPS[:2]
MOST_TRIPS = len(STEPS)
WAYS = ("down", "up")


def every(steps: Any, names: tuple[str, ...], fates: tuple[str, ...]) -> Iterator[dict[Any, str]]:
    """At each step and way each party's message has each fate, all combinations but that of nothing amiss."""
    for step, way in itertools.product(steps, WAYS):
        for chosen in itertools.product(fates, repeat=len(names)):
            if set(chosen) != {"ok"}:
                yield {(step, way, name): fate for name, fate in zip(names, chosen, strict=True)}


def amiss(net: Any, fates: Any, seed: int) -> bool:
    """One round with these fates, then one of a network that works, which must have everybody; whether it had a sum."""
    net.trips = 0
    refusal: ProtocolError | None = None
    try:
        net.round(fates, seed=seed)
    except TooFewSurvivorsError as error:
        refusal = error
    assert not isinstance(refusal, DisputedSharesError), fates
    assert net.trips <= MOST_TRIPS
    assert net.round(seed=seed + 1).survivors == net.names, fates
    assert net.server.disputes == {}
    return refusal is None


@pytest.mark.parametrize(
    ("n", "corrupt", "fates"),
    [
        (2, 0, ("ok", "lost", "late", "twice")),
        (3, 0, ("ok", "lost", "late", "twice")),
        (4, 1, ("ok", "lost", "late")),
        pytest.param(4, 1, ("ok", "lost", "late", "twice"), marks=pytest.mark.slow),
    ],
)
def test_every_fate_of_every_message_at_every_step(deployed: Any, n: int, corrupt: int, fates: tuple[str, ...]) -> None:
    net = deployed(n, kind=Masked(corrupt=corrupt), length=1).open()
    summed = cases = 0
    for chosen in every(STEPS, net.names, fates):
        cases += 1
        summed += amiss(net, chosen, 2 * cases)
    assert cases == len(STEPS) * 2 * (len(fates) ** n - 1)
    assert 0 < summed < cases


def test_one_message_amiss_in_a_sum_under_a_split_key(deployed: Any) -> None:
    """Its ciphertexts are in pieces, each of which may be lost or come twice."""
    net = deployed(3, kind=Homomorphic(), length=40).open()
    for place, (step, way) in enumerate(itertools.product(STEPS, WAYS)):
        for fate in ("lost", "late", "twice"):
            assert amiss(net, {(step, way, "p1"): fate}, 7 * place) or fate != "twice"


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_fate_while_a_session_opens(deployed: Any, n: int) -> None:
    """It opens with those who answered, where enough did; a round then has just these."""
    opened = refused = 0
    for fates in every(OPENING, tuple(f"p{place}" for place in range(n)), ("ok", "lost", "twice")):
        net = deployed(n, length=1)
        (step, way, _), *_ = fates
        there = tuple(name for name in net.names if fates[step, way, name] != "lost")
        # The fates are of the first attempt: what is lost in it is passed on in the next one.
        left = dict(fates)
        once = net.pass_on

        def pass_on(_: Any, trip: Any, way: str, name: str, deliver: Any, left: Any = left, once: Any = once) -> None:
            once({(trip.step, way, name): left.pop((trip.step, way, name), "ok")}, trip, way, name, deliver)

        net.pass_on = pass_on
        missing: tuple[str, ...] = ()
        try:
            net.open()
        except TooFewSurvivorsError as error:
            missing = error.missing
        if missing:
            assert set(missing) == set(net.names) - set(there)
            refused += 1
            continue
        opened += 1
        assert net.server.setup.roster == there
        assert net.server.setup.cohort == ("everyone" if there == net.names else "chosen")
        assert net.server.setup.population == n
        assert net.round().survivors == there
    assert opened
    assert refused


@st.composite
def troubles(draw: st.DrawFn) -> dict[str, Any]:
    n = draw(st.integers(2, 7))
    names = [f"p{place}" for place in range(n)]
    places = st.tuples(st.sampled_from(STEPS), st.sampled_from(WAYS), st.sampled_from(names))
    rounds = st.dictionaries(places, st.sampled_from(["lost", "late", "twice"]), max_size=12)
    return {"n": n, "rounds": draw(st.lists(rounds, min_size=1, max_size=4)), "tries": draw(st.integers(1, 2))}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trouble=troubles())
def test_any_troubles_over_several_rounds(deployed: Any, trouble: dict[str, Any]) -> None:
    """With messages of round after round still under way, and some asked for twice."""
    net = deployed(trouble["n"], length=2).open()
    for number, fates in enumerate(trouble["rounds"]):
        net.trips = 0
        net.fresh_vectors(number)
        try:
            net.go(net.server.round(), fates, trouble["tries"])
        except TooFewSurvivorsError:
            continue
        assert net.trips <= MOST_TRIPS
        survivors = net.server.result.survivors
        assert net.server.result.total.tolist() == sum(net.vectors[name] for name in survivors).tolist()
    assert net.round(seed=99).survivors == net.names


def test_asking_again_recovers_what_was_lost(deployed: Any) -> None:
    """The outbox again, to those who are waited for: the same bytes get the same answer, and nobody drops out."""
    net = deployed(4, kind=Masked(corrupt=1)).open()
    for step, way in itertools.product(STEPS, WAYS):
        lost = {(step, way, name): "lost" for name in net.names}
        original = net.pass_on

        def once(_: Any, trip: Any, way: str, name: str, deliver: Any, lost: Any = lost, go: Any = original) -> None:
            go({(trip.step, way, name): lost.pop((trip.step, way, name), "ok")}, trip, way, name, deliver)

        net.pass_on = once
        net.fresh_vectors(5)
        net.go(net.server.round(), {}, tries=2)
        net.pass_on = original
        assert net.server.result.survivors == net.names
        assert net.server.result.total.tolist() == sum(net.vectors.values()).tolist()
        assert not net.refused


def test_messages_in_any_order(deployed: Any) -> None:
    """Each party's answers arrive in another order in each trip."""
    net = deployed(4, kind=Masked(corrupt=1)).open()
    for order in itertools.permutations(net.names):
        net.fresh_vectors(1)
        for trip in net.server.round():
            answers = []
            for name in order:
                if name in trip.outbox:
                    net.down(name, trip, trip, {(trip.step, "up", name): "late"})
            answers, net.late = net.late, []
            for arrive in reversed(answers):
                arrive(trip)
            assert trip.enough()
        assert net.server.result.survivors == net.names
        assert net.server.result.total.tolist() == sum(net.vectors.values()).tolist()


@pytest.mark.parametrize("kind", [Masked(corrupt=1), Homomorphic(corrupt=1)], ids=["masked", "split"])
def test_everything_that_was_ever_sent_may_come_again(deployed: Any, kind: Any) -> None:
    """Before each trip of a third round every message of the opening and of all rounds arrives once more, newest first:
    none changes anything, and what is answered is answered as it was.
    """
    net = deployed(4, kind=kind, length=5).open()
    for number in range(3):
        net.fresh_vectors(number)
        for trip in net.server.round():
            for way, _, name, raw in reversed(list(net.sent)):
                if way == "down":
                    again(net, name, raw)
                else:
                    trip.receive(name, raw)
            for name in trip.outbox:
                net.down(name, trip, trip, {})
            assert trip.enough()
        assert net.server.result.survivors == net.names
        assert net.server.result.total.tolist() == sum(net.vectors.values()).tolist()
    assert any("joined the session of that setup before" in str(error) for _, error in net.refused)


def again(net: Any, name: str, raw: bytes) -> None:
    """A message that comes once more is refused by name, or answered with bytes that were sent before."""
    try:
        answer = net.parties[name].handle(raw)
    except ProtocolError as error:
        net.refused.append((name, error))
    else:
        assert set(answer) <= {part for way, _, sender, part in net.sent if (way, sender) == ("up", name)}


def test_who_was_sent_what_is_counted(deployed: Any) -> None:
    """By the driver, for whoever has no other count: all messages of a round, those of the opening with the first."""
    for kind in (Masked(), Homomorphic()):
        net = deployed(3, kind=kind, length=30).open()
        for _ in range(2):
            result = net.round()
            for way, counted in (("up", result.bytes_up), ("down", result.bytes_down)):
                sent = {
                    name: sum(len(raw) for at, _, to, raw in net.sent if (at, to) == (way, name)) for name in net.names
                }
                assert counted == sent
            net.sent.clear()
