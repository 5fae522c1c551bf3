"""The attack zoo through the drivers: a server that shows two models, brings old messages back, or asks twice."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from choral.protocols import Homomorphic, Masked, SumSpec
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
from choral.protocols.homomorphic.messages import Ciphertext
from choral.protocols.masking import messages, signing

BOTH = pytest.mark.parametrize("kind", [Masked(corrupt=1), Homomorphic(corrupt=1)], ids=["masked", "split"])
"""The shared key's sum has the same attacks in ``tests/protocols/homomorphic/shared/test_shared_drivers.py``."""
OTHER = RoundTerms(0, b"W" * 32, b"t" * 32)
TRAINED = RoundTerms(0, b"w" * 32, b"t" * 32)


def parse(raw: bytes) -> Any:
    return messages.to_party(raw, limit=1 << 24)


def parts(raw: bytes) -> list[Any]:
    message = parse(raw)
    return [parse(part) for part in message.parts] if isinstance(message, messages.Bundle) else [message]


def shown(raw: bytes, terms: RoundTerms) -> bytes:
    """The same message, but its Begin is of another model."""
    changed = [
        msgspec.structs.replace(part, weights=terms.weights, terms=terms.terms, exchange=terms.exchange)
        if isinstance(part, messages.Begin)
        else part
        for part in parts(raw)
    ]
    if len(changed) == 1:
        return messages.encode(changed[0])
    return messages.encode(messages.Bundle(tuple(map(messages.encode, changed))))


class TwoModels:
    """A server that shows ``victims`` another model, and does all else as it should: it knows what each has signed."""

    def __init__(self, net: Any, victims: set[str], terms: RoundTerms = OTHER) -> None:
        self.net, self.victims, self.terms = net, victims, terms
        once = net.down

        def down(name: str, to: Any, trip: Any, fates: Any) -> None:
            if name in victims and trip.step in ("keys", "shares"):
                trip.outbox[name] = shown(trip.outbox[name], terms)
            once(name, to, trip, fates)

        net.down = down


@pytest.mark.parametrize("ahead", [False, True], ids=["keys asked for", "keys rode ahead"])
@pytest.mark.parametrize("victims", [{"p1"}, {"p0", "p2"}])
@BOTH
def test_two_models_are_found_by_whoever_checks_the_confirmations(
    deployed: Any, monkeypatch: pytest.MonkeyPatch, kind: Any, victims: set[str], ahead: bool
) -> None:
    """The server passes signatures on that it knows to be on another Begin. No honest party reveals a share."""
    net = deployed(4, kind=kind).open()
    if ahead:
        net.round()
    TwoModels(net, victims)
    monkeypatch.setattr("choral.protocols.masking.server_stages.SessionTerms.signed", lambda *_: True)
    net.sent.clear()
    with pytest.raises(TooFewSurvivorsError):
        net.round()
    assert {str(error.blame) for _, error in net.refused} == {"the server"}
    assert all(isinstance(error, FaultyServerError) for _, error in net.refused)
    assert all("different models" in str(error) for _, error in net.refused)
    assert len(net.refused) == 4  # those who saw the other one find the rest
    assert not [step for way, step, _, _ in net.sent if (way, step) == ("up", "unmasking")]


def test_leaving_out_the_confirmation_of_who_saw_another_model_opens_nothing(deployed: Any) -> None:
    """Three of four confirm the same model and are enough to unmask; the fourth's masks, made from another Begin, do
    not cancel with theirs: what the server ends up with is uniform, and says nothing of any vector."""
    net = deployed(4, kind=Masked(corrupt=1), length=2000, bound=2**20).open()
    TwoModels(net, {"p1"})
    net.fresh_vectors(0)
    net.go(net.server.round(TRAINED), {("confirmation", "up", "p1"): "lost"})
    assert not net.refused
    result = net.server.result
    assert result.survivors == net.names  # p1's vector is in it
    for chosen in itertools.product((0, 1), repeat=4):
        known = sum(net.vectors[name] for name, counted in zip(net.names, chosen, strict=True) if counted)
        left = (result.total - known) / 2.0 ** (net.server.setup.modulus_bits - 1)
        left = (left + 1) % 2 - 1
        # Uniform in [-1, 1): of 2,000 the mean is within .1 and the deviation within .54 to .615 of 1 / sqrt 3 = .577,
        # each by more than six standard errors (.013, .0058): a false alarm in 10^8.
        assert abs(float(np.mean(left))) < 0.1
        assert 0.54 < float(np.std(left)) < 0.615


def test_the_masks_are_bound_to_the_begin() -> None:
    one = signing.pair_seed(b"x" * 32, b"s" * 32, 1, 0, 1, signing.begun(b"one"))
    assert one == signing.pair_seed(b"x" * 32, b"s" * 32, 1, 1, 0, signing.begun(b"one"))
    assert one != signing.pair_seed(b"x" * 32, b"s" * 32, 1, 0, 1, signing.begun(b"other"))
    assert signing.confirm(b"s" * 32, 1, 0, b"\x03", b"1" * 32) != signing.confirm(b"s" * 32, 1, 0, b"\x03", b"2" * 32)


@pytest.mark.parametrize("field", ["exchange", "weights", "terms"])
@BOTH
def test_a_second_begin_of_a_round_with_anything_else_is_refused(deployed: Any, kind: Any, field: str) -> None:
    net = deployed(4, kind=kind).open()
    (trip, *_) = [next(net.server.round(TRAINED))]
    raw = trip.outbox["p0"]
    answer = net.parties["p0"].handle(raw)
    other = replace(TRAINED, **{field: 7 if field == "exchange" else b"o" * 32})
    with pytest.raises(FaultyServerError, match="two models in round 1"):
        net.parties["p0"].handle(shown(raw, other))
    assert net.parties["p0"].handle(raw) == answer  # and it is still there


@BOTH
def test_terms_that_change_after_they_were_signed_are_refused(deployed: Any, kind: Any) -> None:
    net = deployed(kind=kind, terms=b"t" * 32).open()
    assert net.round(terms=TRAINED).survivors == net.names
    for number in (2, 3):
        with pytest.raises(TooFewSurvivorsError):
            net.round(terms=RoundTerms(0, b"w" * 32, b"T" * 32))
        refusals = [str(error) for _, error in net.refused]
        assert len(refusals) == 3
        assert all(f"the training terms of round {number} are not those" in text for text in refusals)
        net.refused.clear()
    assert net.round(terms=TRAINED).survivors == net.names


def test_a_setup_for_other_training_terms_is_not_joined(deployed: Any) -> None:
    for mine, theirs in ((None, b"t" * 32), (b"t" * 32, None), (b"t" * 32, b"T" * 32)):
        net = deployed(terms=mine)
        net.server = net.kind.server_driver(replace(net.spec, terms=theirs), directory=net.directory)
        with pytest.raises(TooFewSurvivorsError):
            net.open()
        assert all(isinstance(error, PolicyError) and "training terms" in str(error) for _, error in net.refused)
        assert len(net.refused) == 3


@BOTH
def test_an_old_session_that_is_revived_is_not_answered(deployed: Any, kind: Any) -> None:
    """The server keeps session A's messages and driver, opens B with the same identities, and goes on with A."""
    net = deployed(kind=kind).open()
    net.round()
    old = net.server
    net.server = net.kind.server_driver(net.spec, directory=net.directory)
    net.open()
    net.round()
    new, net.server = net.server, old
    with pytest.raises(TooFewSurvivorsError):
        net.round()
    assert {type(error) for _, error in net.refused} == {FaultyServerError}
    assert all("of another session" in str(error) for _, error in net.refused)
    net.server = new
    assert net.round().survivors == net.names


@BOTH
def test_a_session_opened_while_a_round_is_open_ends_it(deployed: Any, kind: Any) -> None:
    """Session A's round has its vectors; the server opens B with the same identities minus one, gets the same vectors,
    and finishes both: the difference would be one vector. The round of A is dead when B is joined."""
    net = deployed(4, kind=kind).open()
    net.fresh_vectors(1)
    first = net.server
    trips = first.round(TRAINED)
    for trip in trips:
        for name in trip.outbox:
            net.down(name, trip, trip, {})
        if trip.step == "vector":
            break
    second = net.server = net.kind.server_driver(net.spec, directory=net.directory)
    net.stopped = {"p3"}
    net.open()  # with the three who are present
    assert second.setup.roster == net.names[:3]
    vectors = net.vectors
    net.fresh_vectors(1)
    assert {name: vector.tolist() for name, vector in vectors.items()} == {
        name: vector.tolist() for name, vector in net.vectors.items()
    }
    net.stopped = set()
    with pytest.raises(TooFewSurvivorsError, match="confirmed"):
        net.go(trips, {})
    refusals = {name: error for name, error in net.refused if name != "p3"}
    assert set(refusals) == set(net.names[:3])
    assert all("before the session was open to this party" in str(error) for error in refusals.values())
    assert net.round(seed=1).survivors == net.names[:3]


def test_a_dead_session_of_another_driver_of_the_same_identity_is_not_answered(deployed: Any) -> None:
    """Two drivers, one identity: the counter is the identity's, so that neither needs to know of the other."""
    net = deployed().open()
    trips = net.server.round(TRAINED)
    trip = next(trips)
    raw = trip.outbox["p0"]
    twin = net.party("p0")
    other = net.kind.server_driver(net.spec, directory=net.directory)
    twin.handle(next(other.open()).outbox["p0"])
    with pytest.raises(StateUsedError, match="session 1 of this identity ended"):
        net.parties["p0"].handle(raw)


@pytest.mark.parametrize("until", ["keys", "shares", "vector", "confirmation", "unmasking"])
def test_a_cached_answer_dies_with_its_session(deployed: Any, until: str) -> None:
    net = deployed().open()
    net.fresh_vectors(0)
    for trip in net.server.round(TRAINED):
        for name in trip.outbox:
            net.down(name, trip, trip, {})
        if trip.step == until:
            break
    assert net.parties["p0"].handle(trip.outbox["p0"])
    twin = net.party("p0")
    twin.handle(next(net.kind.server_driver(net.spec, directory=net.directory).open()).outbox["p0"])
    with pytest.raises(StateUsedError, match="ended"):
        net.parties["p0"].handle(trip.outbox["p0"])


def test_a_dead_session_does_not_even_repeat_its_keys(deployed: Any) -> None:
    """The Begin alone, which came in a bundle before, so that no cached answer stands for it."""
    net = deployed().open()
    bundle = next(net.server.round(TRAINED)).outbox["p0"]
    *_, begin = parse(bundle).parts
    assert net.parties["p0"].handle(bundle) == net.parties["p0"].handle(begin)
    net.party("p0").handle(next(net.kind.server_driver(net.spec, directory=net.directory).open()).outbox["p0"])
    with pytest.raises(StateUsedError, match="ended"):
        net.parties["p0"].handle(messages.encode(messages.Bundle((parse(bundle).parts[0], begin, begin))))


def test_no_vector_is_sent_into_a_dead_session(deployed: Any) -> None:
    """It was asked for before the later session was joined, and is ready only after."""
    net = deployed().open()
    needing(net)
    net.party("p0").handle(next(net.kind.server_driver(net.spec, directory=net.directory).open()).outbox["p0"])
    with pytest.raises(StateUsedError, match="ended when it joined"):
        net.parties["p0"].supply(np.array([1, 2, 3]))


def test_an_opening_is_dead_once_the_identity_has_joined_another(deployed: Any) -> None:
    """No nonce is shown for it, and it is not entered."""
    net = deployed()
    trips = net.server.open()
    for name, raw in (trip := next(trips)).outbox.items():
        trip.receive(name, *net.parties[name].handle(raw))
    hellos = next(trips).outbox["p0"]
    join_another(net)
    with pytest.raises(StateUsedError, match="ended when it joined"):
        net.parties["p0"].handle(hellos)
    net.open()
    reveals, _ = parse(next(net.server.round(TRAINED)).outbox["p0"]).parts
    join_another(net)
    with pytest.raises(StateUsedError, match="ended when it joined"):
        net.parties["p0"].handle(reveals)


def join_another(net: Any) -> None:
    """By another driver of p0's identity."""
    net.party("p0").handle(next(net.kind.server_driver(net.spec, directory=net.directory).open()).outbox["p0"])


def test_a_server_that_asks_in_ever_new_forms_fills_no_memory(deployed: Any) -> None:
    """The nonces are of no use once the session is open, so that each change of them is another message to remember."""
    net = deployed().open()
    reveals, begin = parse(next(net.server.round(TRAINED)).outbox["p0"]).parts
    driver = net.parties["p0"]
    answer = driver.handle(messages.encode(messages.Bundle((reveals, begin))))
    for number in range(50):
        other = msgspec.structs.replace(parse(reveals), nonces=(bytes([number]) * 32,))
        assert driver.handle(messages.encode(messages.Bundle((messages.encode(other), begin)))) == answer
    assert len(driver._replies._answers) <= 16


def test_sums_of_two_purposes_do_not_end_each_other(deployed: Any) -> None:
    net = deployed().open()
    twin = net.party("p0", purpose="counts")
    twin.handle(next(net.kind.server_driver(net.spec, directory=net.directory).open()).outbox["p0"])
    assert net.round().survivors == net.names


@BOTH
def test_a_begin_that_is_replayed_is_refused(deployed: Any, kind: Any) -> None:
    """The same bytes are answered while their round lasts, from the cache, and by name afterwards."""
    net = deployed(kind=kind).open()
    net.round()
    begins = [raw for way, step, name, raw in net.sent if (way, step, name) == ("down", "keys", "p0")]
    assert len(begins) == 1
    assert net.parties["p0"].handle(begins[0]) == net.parties["p0"]._round.answer
    net.round()
    for raw in [raw for way, _, name, raw in net.sent if (way, name) == ("down", "p0")][2:6]:
        with pytest.raises((FaultyServerError, StateUsedError)) as caught:
            net.parties["p0"].handle(raw)
        assert "round 1" in str(caught.value)
    assert net.round().survivors == net.names


def test_every_message_again_gets_the_same_bytes_and_a_changed_one_nothing(deployed: Any) -> None:
    net = deployed(4, kind=Masked(corrupt=1)).open()
    net.fresh_vectors(0)
    for trip in net.server.round(TRAINED):
        for name, raw in trip.outbox.items():
            before = len(net.sent)
            net.down(name, trip, trip, {})
            answer = tuple(part for way, _, _, part in net.sent[before:] if way == "up")
            for _ in range(3):
                assert net.parties[name].handle(raw) == answer
        if trip.step in ("vector", "confirmation", "unmasking"):
            for name, raw in trip.outbox.items():
                message = parts(raw)[-1]
                key = {"vector": "packets", "confirmation": "bitmap", "unmasking": "entries"}[trip.step]
                value = b"\x07" if key == "bitmap" else getattr(message, key)[:-1]
                with pytest.raises(StateUsedError, match="was not waited for"):
                    net.parties[name].handle(messages.encode(msgspec.structs.replace(message, **{key: value})))
    assert net.server.result.survivors == net.names


def test_two_sets_of_survivors_are_not_both_confirmed(deployed: Any) -> None:
    net = deployed(4, kind=Masked(corrupt=1)).open()
    net.fresh_vectors(0)
    for trip in net.server.round(TRAINED):
        if trip.step == "confirmation":
            first, other = (
                messages.encode(msgspec.structs.replace(parse(trip.outbox["p0"]), bitmap=bitmap))
                for bitmap in (b"\x0f", b"\x07")
            )
            assert len(net.parties["p0"].handle(first)) == 1
            with pytest.raises(StateUsedError, match="Survivors of round 1 was not waited for"):
                net.parties["p0"].handle(other)
            return
        for name in trip.outbox:
            net.down(name, trip, trip, {})


# ------------------------------------------------------------------------------------------------ refused before use


def test_what_is_too_long_is_refused_before_it_is_read(deployed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = deployed()
    read: list[int] = []
    original = messages.to_party

    def noted(raw: bytes, *, limit: int) -> Any:
        read.append(len(raw))
        return original(raw, limit=limit)

    monkeypatch.setattr(messages, "to_party", noted)
    most = messages.limit(messages.SumSetup, 3)
    with pytest.raises(MessageError, match=f"at most {most} bytes, got {most + 1}"):
        net.parties["p0"].handle(bytes(most + 1))
    assert not read
    net.open()
    read.clear()
    with pytest.raises(MessageError, match="at most"):
        net.parties["p0"].handle(b"\x02" + bytes(1 << 20))
    assert not read
    for nothing in (None, "text", 5, bytearray(b"\x02\x90"), [b""]):
        with pytest.raises(MessageError, match="as bytes"):
            net.parties["p0"].handle(nothing)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "version 2"),
        (b"\x01\x90", "version 2"),
        (b"\x02\x90", "no message"),
        (messages.encode(messages.Hello(b"s" * 16, b"h" * 32, b"g" * 64)), "no message"),
        (messages.encode(messages.Begin(b"s" * 16, 1, 0, b"w" * 32, b"t" * 32)), "of another session"),
        (messages.encode(messages.Survivors(b"s" * 16, 1, b"\x07")), "of another session"),
        (messages.encode(messages.Hellos(b"s" * 16, ())), "of another session"),
    ],
)
def test_unknown_messages_versions_and_sessions_are_refused_by_name_and_cost_nothing(
    deployed: Any, raw: bytes, match: str
) -> None:
    net = deployed().open()
    net.round()
    for name in net.names:
        with pytest.raises((MessageError, FaultyServerError), match=match):
            net.parties[name].handle(raw)
    assert net.round().survivors == net.names


def test_a_bundle_holds_messages_and_no_bundle(deployed: Any) -> None:
    net = deployed().open()
    begin = next(net.server.round(TRAINED)).outbox["p0"]
    inner = parse(begin)
    assert isinstance(inner, messages.Bundle)  # the nonces and the Begin
    nested = messages.encode(messages.Bundle((inner.parts[0], begin)))
    with pytest.raises(MessageError, match="no bundle"):
        net.parties["p0"].handle(nested)
    with pytest.raises(MessageError):
        net.parties["p0"].handle(messages.encode(messages.Bundle((inner.parts[0], b"\x02\x90"))))
    assert len(net.parties["p0"].handle(begin)) == 1


def test_messages_of_a_round_that_was_not_begun_are_refused(deployed: Any) -> None:
    net = deployed().open()
    net.round()
    identifier = net.server.digest[:16]
    for number, match in ((1, "was not waited for"), (2, "of round 2, not 1"), (9, "of round 9, not 1")):
        with pytest.raises((FaultyServerError, StateUsedError), match=match):
            net.parties["p0"].handle(messages.encode(messages.Survivors(identifier, number, b"\x03")))
    fresh = deployed(3).open()
    with pytest.raises(FaultyServerError, match="before the session was open"):
        fresh.parties["p0"].handle(messages.encode(messages.Survivors(fresh.server.digest[:16], 1, b"\x07")))


# --------------------------------------------------------------------------------------------------- the own vector


def needing(net: Any) -> NeedsVector:
    """Bring p0 to where it is asked for its vector, and p1, p2 through it."""
    for trip in net.server.round(TRAINED):
        if trip.step == "vector":
            asked = net.parties["p0"].handle(trip.outbox["p0"])
            assert isinstance(asked, NeedsVector)
            assert net.parties["p0"].handle(trip.outbox["p0"]) == asked  # and again, until it is answered
            return asked
        for name in trip.outbox:
            net.down(name, trip, trip, {})
    raise AssertionError


def test_the_party_is_told_what_to_train_from(deployed: Any) -> None:
    net = deployed().open()
    asked = needing(net)
    assert (asked.round, asked.exchange, asked.weights, asked.terms) == (1, 0, b"w" * 32, b"t" * 32)
    assert asked.session == net.server.digest[:16]


@pytest.mark.parametrize("kind", [Masked(), Homomorphic()], ids=["masked", "split"])
def test_a_vector_is_supplied_once_and_only_when_asked_for(deployed: Any, kind: Any) -> None:
    net = deployed(kind=kind, weight_bound=5).open()
    with pytest.raises(StateUsedError, match="no vector is asked for"):
        net.parties["p0"].supply(np.array([1, 2, 3]))
    with pytest.raises(StateUsedError, match="no vector is asked for"):
        net.parties["p0"].decline()
    needing(net)
    for wrong in ([1, 2, 3, 4], [1, 2, 1001], [1001, 2, 3], [0, 0, 6], [0, 0, -6]):
        with pytest.raises(InputError):
            net.parties["p0"].supply(np.array(wrong))
    assert net.parties["p0"].supply(np.array([1000, -1000, 5]))
    with pytest.raises(StateUsedError, match="no vector is asked for"):
        net.parties["p0"].supply(np.array([1, 2, 3]))


def test_who_declines_is_left_out_and_back_in_the_next_round(deployed: Any) -> None:
    net = deployed(4, kind=Masked(corrupt=1)).open()
    for decline in (True, False):
        net.fresh_vectors(0)
        for trip in net.server.round(TRAINED):
            for name in trip.outbox:
                if trip.step == "vector" and name == "p0" and decline:
                    assert isinstance(net.parties["p0"].handle(trip.outbox["p0"]), NeedsVector)
                    net.parties["p0"].decline()
                    assert net.parties["p0"].handle(trip.outbox["p0"]) == ()
                else:
                    net.down(name, trip, trip, {})
        assert net.server.result.survivors == net.names[decline:]


# ------------------------------------------------------------------------------------------------------- the server


def test_what_the_server_refuses_is_recorded_by_name_and_changes_nothing(deployed: Any) -> None:
    net = deployed(4, kind=Masked(corrupt=1)).open()
    net.fresh_vectors(0)
    taken: dict[str, tuple[bytes, ...]] = {}
    for trip in net.server.round(TRAINED):
        trip.receive("mallory", b"")
        assert isinstance(trip.faults.pop("mallory"), FaultyPartyError)
        trip.receive("p1", b"garbage")
        assert isinstance(trip.faults["p1"], MessageError)
        assert "p1" in trip.waiting
        for name in trip.outbox:
            if (trip.step, name) == ("vector", "p0"):
                net.parties["p0"].handle(trip.outbox["p0"])
                taken["p0"] = net.parties["p0"].supply(net.vectors["p0"])
                continue
            net.down(name, trip, trip, {})
        assert trip.enough() == (trip.step != "vector")
        if trip.step == "confirmation":
            trip.receive("p0", taken["p0"][0])
            assert isinstance(trip.faults["p0"], LateVectorError)
    assert net.server.result.survivors == net.names[1:]


def test_patience_and_quorum_say_when_a_trip_has_enough(deployed: Any) -> None:
    net = deployed(4, kind=Masked(corrupt=1))
    net.server = net.kind.server_driver(net.spec, directory=net.directory, patience={"keys": 5.0}, quorum=3)
    net.open()
    trip = next(net.server.round(TRAINED))
    assert not trip.enough(49.9)
    assert trip.enough(50.0)
    for count, name in enumerate(trip.outbox, start=1):
        net.down(name, trip, trip, {})
        assert trip.enough(5.0) == (count >= 3)
        assert trip.enough(4.9) == trip.enough() == (count == 4)
    for wrong in (0, -1.0, "5", {"key": 1.0}, {"keys": 0}):
        with pytest.raises(SpecError):
            net.kind.server_driver(net.spec, directory=net.directory, patience=wrong)
    for wrong in (0, 5, 1.5):
        with pytest.raises(SpecError):
            net.kind.server_driver(net.spec, directory=net.directory, quorum=wrong)


@pytest.mark.parametrize("silent", [1, 2, 4])
def test_a_loop_of_patience_ends_whoever_is_silent(deployed: Any, silent: int) -> None:
    """On a clock of the test's own: without a quorum by name, after ten times the patience."""
    net = deployed(4, kind=Masked(corrupt=1))
    net.server = net.kind.server_driver(net.spec, directory=net.directory, patience=1.0)
    net.open().fresh_vectors(0)
    lasted = []

    def play() -> None:
        for trip in net.server.round(TRAINED):
            for name in net.names[silent:]:
                net.down(name, trip, trip, {})
            lasted.append(next(half for half in range(100) if trip.enough(half / 2)) / 2)

    if silent == 1:
        play()
        assert net.server.result.survivors == net.names[1:]
        assert lasted == [1.0, 0.0, 0.0, 0.0, 0.0]
        return
    with pytest.raises(TooFewSurvivorsError, match="advertised keys"):
        play()
    assert lasted == [10.0]


def test_requests_in_many_forms_do_not_have_a_party_train_twice(deployed: Any) -> None:
    """A cache that is full of them still says what was supplied, and holds no more than a few."""
    net = deployed().open()
    net.fresh_vectors(0)
    for trip in net.server.round(TRAINED):
        for name, raw in trip.outbox.items():
            party = net.parties[name]
            if name == "p0" and trip.step == "vector":
                for place in range(1000):
                    party.handle(messages.encode(messages.Reveals(net.server.setup.session, (place.to_bytes(32),))))
                    if len(party._replies._answers) == 15:
                        break
                assert isinstance(party.handle(raw), NeedsVector)
                first = party.supply(net.vectors[name])
                assert party.handle(raw) == first
                for place in range(1000):
                    party.handle(messages.encode(messages.Reveals(net.server.setup.session, (place.to_bytes(33)[1:],))))
                assert len(party._replies._answers) <= 16
            net.down(name, trip, trip, {})
    assert net.server.result.survivors == net.names


def test_who_is_known_to_be_lost_is_not_asked_in_a_round_and_asked_in_the_next(deployed: Any) -> None:
    net = deployed(4, kind=Masked(corrupt=1)).open()
    for lost in ({"p2"}, set(), {"p0"}, set()):
        net.fresh_vectors(0)
        asked: set[str] = set()
        for trip in net.server.round(TRAINED, lost=lost):
            asked |= set(trip.outbox)
            for name in trip.outbox:
                net.down(name, trip, trip, {})
            assert trip.enough()
        assert asked == set(net.names) - lost
        assert net.server.result.survivors == tuple(name for name in net.names if name not in lost)


def test_a_round_before_the_session_is_open_or_of_no_terms_is_refused(deployed: Any) -> None:
    net = deployed()
    with pytest.raises(StateUsedError, match="not open"):
        next(net.server.round())
    net.open()
    for wrong in (None, 5, b"w" * 32):
        with pytest.raises(SpecError, match="expected RoundTerms"):
            next(net.server.round(wrong))
    for made in ({"exchange": -1}, {"weights": b"w"}, {"terms": None}, {"weights": "w" * 32}):
        with pytest.raises(SpecError):
            RoundTerms(**made)


def test_whoever_is_not_pinned_has_no_driver(deployed: Any) -> None:
    from choral.protocols import Identity

    net = deployed()
    given = {"name": "p0", "policy": net.policy}
    for identity, match in ((Identity(b"x" * 32), "not the one"), (b"x" * 32, "expected an Identity")):
        with pytest.raises(SpecError, match=match):
            net.kind.party_driver(net.spec, identity=identity, **given)
    for seed in (b"", b"x" * 31, "x" * 32, None):
        with pytest.raises(SpecError):
            Identity(seed)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="no key for 'p3'"):
        net.kind.server_driver(SumSpec(parties=("p0", "p3"), length=1, bound=1), directory=net.directory)


def test_a_weight_has_a_bound_of_its_own(deployed: Any) -> None:
    net = deployed(weight_bound=5)
    assert net.server.spec.modulus_bits == deployed().server.spec.modulus_bits  # never larger for it
    net.open()
    assert net.server.setup.weight_bound == 5
    stricter = replace(net.policy, maximum_weight=4)
    for bound in (5, None):  # and without one it is the bound of all
        setup = msgspec.structs.replace(net.server.setup, weight_bound=bound)
        with pytest.raises(PolicyError, match="weight of at most 4"):
            stricter.check(setup, "p0")
    with pytest.raises(PolicyError, match="pass the bound"):
        net.policy.check(msgspec.structs.replace(net.server.setup, weight_bound=1001), "p0")


def test_those_who_are_present_are_no_draw_whatever_the_roster_was(deployed: Any) -> None:
    """A server that says who is absent has chosen the rest: all colluders of the directory may be among them."""
    net = deployed(4, kind=Masked(cohort="random", corrupt=1))
    net.stopped = {"p3"}
    net.open()
    assert (net.server.setup.cohort, net.server.setup.population) == ("chosen", 4)
    assert net.server.setup.corrupt == 1


@pytest.mark.parametrize("kind", [Masked(), Masked(trips=3), Masked(dropouts=1), Homomorphic()])
def test_of_those_who_are_present_no_fewer_are_summed_than_is_stated_of_all(deployed: Any, kind: Any) -> None:
    """Of five parties four are the fewest; a setup of four that was made for itself would take three."""
    net = deployed(5, kind=kind)
    stated = net.server.setup.min_survivors
    net.stopped = {"p4"}
    net.open()
    assert (len(net.server.setup.roster), net.server.setup.min_survivors) == (4, stated) == (4, 4)


def test_pieces_of_a_ciphertext_that_come_again_are_no_fault_and_late_ones_are_late(deployed: Any) -> None:
    """Some of p3's ciphertext is lost, so that its key is not let in; what comes after the survivors is late."""
    net = deployed(4, kind=Homomorphic(corrupt=1), length=40).open()
    net.fresh_vectors(0)
    pieces: dict[str, tuple[bytes, ...]] = {}
    for trip in net.server.round(TRAINED):
        for name in trip.outbox:
            if trip.step == "vector":
                wrong = messages.encode(Ciphertext(net.server.digest[:16], 9, b"k" * 16, 0, b"body"))
                trip.receive(name, wrong)
                assert isinstance(trip.faults.pop(name), FaultyPartyError)
                net.parties[name].handle(trip.outbox[name])
                pieces[name] = net.parties[name].supply(net.vectors[name])
                for part in pieces[name][name == "p3" :]:
                    trip.receive(name, part)
                    trip.receive(name, part)
            else:
                net.down(name, trip, trip, {})
        if trip.step == "vector":
            assert {name: str(error) for name, error in trip.faults.items()} == {
                "p3": "p3: sent its key before its whole ciphertext"
            }
        if trip.step == "confirmation":
            for name in net.names:
                trip.receive(name, pieces[name][0])
            assert {name: type(error) for name, error in trip.faults.items()} == {"p3": LateVectorError}
    assert net.server.result.survivors == net.names[:3]


@pytest.mark.parametrize("smallest", [None, 6])
def test_a_server_that_says_that_most_are_absent_gets_down_to_what_the_policy_allows(
    deployed: Any, smallest: int | None
) -> None:
    """Of 10 parties three may collude: two honest ones beside them are the fewest that any policy is content with."""
    net = deployed(10)
    if smallest is not None:
        net.policy = replace(net.policy, minimum_cohort=smallest)
        net.parties = {name: net.party(name) for name in net.names}
    for present in (4, 5):
        roster = net.names[:present]
        left = SumSpec(parties=roster, length=3, bound=1000, directory=10)
        if present == 4:
            with pytest.raises(SpecError):
                Masked(corrupt=3, dropouts=0).setup(left, session=bytes(16))
            continue
        setup = Masked(corrupt=3, dropouts=0).setup(left, session=bytes(16))
        assert setup.min_survivors == 5
        if smallest is None:
            assert len(net.parties["p0"].handle(messages.encode(setup))) == 1
        else:
            with pytest.raises(PolicyError, match="smallest sum of at least 6, the setup says 5"):
                net.parties["p0"].handle(messages.encode(setup))
        for fewer in ({"corrupt": 0}, {"min_survivors": 4}, {"directory": 5}, {"cohort": "random"}):
            weaker = msgspec.structs.replace(setup, session=b"w" * 16, **fewer)
            with pytest.raises(PolicyError):
                net.parties["p1"].handle(messages.encode(weaker))


def test_rounds_that_are_left_once_the_vectors_are_there_open_nothing(deployed: Any) -> None:
    """A server that collects vectors under ever other weights, and finishes no round: each is masked by itself."""
    net = deployed(4, kind=Masked(corrupt=1)).open()
    net.fresh_vectors(0)
    survivors = []
    for weights in (b"a", b"b", b"c"):
        for trip in net.server.round(RoundTerms(0, weights * 32, b"t" * 32)):
            if trip.step == "confirmation":
                survivors.append(dict(trip.outbox))
                break
            for name in trip.outbox:
                net.down(name, trip, trip, {})
    for number, outbox in enumerate(survivors[:2], start=1):
        for name, raw in outbox.items():
            with pytest.raises(FaultyServerError, match=f"the Survivors is of round {number}, not 3"):
                net.parties[name].handle(raw)
    assert len(net.asked) == 12
    assert net.round().survivors == net.names


def test_a_setup_that_was_never_seen_ends_a_session_however_late_and_no_longer_than_to_the_next(deployed: Any) -> None:
    """A party cannot tell it from a new one. Nothing is summed twice for it: the session before is dead."""
    net = deployed(4, kind=Masked(corrupt=1))
    late = next(net.kind.server_driver(net.spec, directory=net.directory).open()).outbox["p0"]
    net.open()
    assert net.round().survivors == net.names
    net.parties["p0"].handle(late)
    assert net.round().survivors == net.names[1:]
    assert "before the session was open" in str(net.refused[-1][1])
    assert net.open().round().survivors == net.names
