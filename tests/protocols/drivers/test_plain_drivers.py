"""The plain sum behind the same doors: exact over whoever sends, whatever the network does; it hides nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from choral.protocols import Masked, Plain
from choral.protocols.driver import NeedsVector, RoundTerms
from choral.protocols.errors import (
    FaultyPartyError,
    FaultyServerError,
    InputError,
    LateVectorError,
    MessageError,
    PolicyError,
    SpecError,
    StateUsedError,
    TooFewSurvivorsError,
)
from choral.protocols.masking import messages

TRAINED = RoundTerms(0, b"w" * 32, b"t" * 32)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_fate_of_every_message(deployed: Any, n: int) -> None:
    net = deployed(n, kind=Plain()).open()
    for way in ("down", "up"):
        for number, fates in enumerate(itertools.product(("ok", "lost", "late", "twice"), repeat=n)):
            chosen = {("vector", way, name): fate for name, fate in zip(net.names, fates, strict=True)}
            there = tuple(name for name, fate in zip(net.names, fates, strict=True) if fate in ("ok", "twice"))
            if there:
                assert net.round(chosen, seed=number).survivors == there
            else:
                with pytest.raises(TooFewSurvivorsError):
                    net.round(chosen, seed=number)
            assert net.round(seed=number).survivors == net.names


def test_a_round_shows_one_model_once_and_its_own_terms(deployed: Any) -> None:
    net = deployed(2, kind=Plain(), terms=b"t" * 32, weight_bound=5).open()
    trip = next(net.server.round(TRAINED))
    raw = trip.outbox["p0"]
    party = net.parties["p0"]
    for again in (party.handle(raw), party.handle(raw)):
        assert again == NeedsVector(net.server._session, 1, 0, b"w" * 32, b"t" * 32)
    other = messages.encode(messages.Begin(net.server._session, 1, 0, b"W" * 32, b"t" * 32))
    with pytest.raises(FaultyServerError, match="two models in round 1"):
        party.handle(other)
    for wrong in ([1, 2, 6], [1001, 0, 0], [1, 2]):
        with pytest.raises(InputError):
            party.supply(np.array(wrong))
    sent = party.supply(np.array([1, 2, 3]))
    assert party.handle(raw) == sent
    with pytest.raises(StateUsedError, match="no vector is asked for"):
        party.supply(np.array([1, 2, 3]))
    for refused in (b"", b"\x01\x90", bytes(1000), None, messages.encode(messages.Survivors(b"s" * 16, 1, b"\x01"))):
        with pytest.raises(MessageError):
            party.handle(refused)
    with pytest.raises(FaultyServerError, match="training terms of round 2"):
        party.handle(messages.encode(messages.Begin(net.server._session, 2, 0, b"w" * 32, b"T" * 32)))
    later = messages.encode(messages.Begin(net.server._session, 3, 0, b"w" * 32, b"t" * 32))
    assert isinstance(party.handle(later), NeedsVector)
    party.decline()
    assert party.handle(later) == ()
    with pytest.raises(FaultyServerError, match="asked again for round 1"):
        party.handle(raw)


def test_what_the_server_refuses_is_recorded_by_name(deployed: Any) -> None:
    net = deployed(3, kind=Plain()).open()
    net.fresh_vectors(0)
    (session,) = {net.server._session}
    for trip in net.server.round(TRAINED, lost={"p2"}):
        assert set(trip.outbox) == {"p0", "p1"}
        for sender, raw, kind in (
            ("mallory", b"", FaultyPartyError),
            ("p0", b"garbage", MessageError),
            ("p0", messages.encode(messages.Upload(b"x" * 16, 1, (b"x",))), FaultyPartyError),
            ("p0", messages.encode(messages.Upload(session, 2, (b"x",))), LateVectorError),
            ("p0", messages.encode(messages.Upload(session, 1, (b"x",))), FaultyPartyError),
            ("p0", messages.encode(messages.Reveal(session, b"n" * 32)), FaultyPartyError),
        ):
            trip.receive(sender, raw)
            assert type(trip.faults.pop(sender)) is kind
        assert trip.waiting == ("p0", "p1")
        for name in trip.outbox:
            net.down(name, trip, trip, {})
    assert net.server.result.survivors == ("p0", "p1")


def test_doors_of_the_plain_sum(deployed: Any) -> None:
    net = deployed(2, kind=Plain())
    with pytest.raises(StateUsedError, match="not open"):
        next(net.server.round(TRAINED))
    with pytest.raises(PolicyError, match="no policy allows"):
        Plain().party_driver(net.spec, name="p0", policy=Masked().policy(net.spec))
    with pytest.raises(SpecError, match="unknown party"):
        Plain().party_driver(net.spec, name="p9")
    with pytest.raises(SpecError, match="expected a SumSpec"):
        Plain().party_driver(5, name="p0")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="expected a SumSpec"):
        Plain().server_driver(5)  # type: ignore[arg-type]
    net.open()
    with pytest.raises(SpecError, match="RoundTerms"):
        next(net.server.round(None))
    assert net.parties["p0"].public_state() == b""
