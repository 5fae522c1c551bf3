"""Sums in two and three trips: equal to those in four, and the attacks that two trips must withstand."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from choral.protocols import Identity, Masked, NeedsVector, SumSpec
from choral.protocols.crypto.shamir import Combiner
from choral.protocols.driver import Trip
from choral.protocols.errors import (
    FaultyPartyError,
    FaultyServerError,
    LateVectorError,
    MessageError,
    PolicyError,
    ProtocolError,
    SpecError,
    StateUsedError,
    TooFewSurvivorsError,
)
from choral.protocols.masking import mask_addition, messages, party, party_round, signing
from choral.protocols.masking.ahead import messages as ahead
from choral.protocols.masking.ahead.floor import check_floor, honest_floor
from choral.protocols.masking.messages import encode
from choral.protocols.masking.server import unmasking
from choral.protocols.wire_format import LAST_ROUND, MAX_PARTIES, read

with_ = msgspec.structs.replace
RIDING = (messages.Advertise, ahead.SignedRoster, messages.DealtShares)


def down(raw: bytes) -> Any:
    return read(ahead.ToParty, raw, sender="test", limit=1 << 30)


def up(raw: bytes) -> Any:
    return read(ahead.ToServer, raw, sender="test", limit=1 << 30)


def parts(raw: bytes) -> list[Any]:
    message = down(raw)
    return [down(part) for part in message.parts] if isinstance(message, messages.Bundle) else [message]


def bundled(*found: Any) -> bytes:
    return encode(messages.Bundle(tuple(map(encode, found)))) if len(found) > 1 else encode(found[0])


class Network:
    """Parties and an honest server, with what passes between them in hand."""

    def __init__(self, config: Masked, parties: int, length: int = 3) -> None:
        names = tuple(f"p{place}" for place in range(parties))
        self.config, self.spec = config, SumSpec(parties=names, length=length, bound=1000)
        self.identities = {name: Identity(bytes([place + 1]) * 32) for place, name in enumerate(names)}
        directory = {name: identity.public for name, identity in self.identities.items()}
        self.policy = replace(config.policy(self.spec), directory=directory)
        self.stored: dict[str, bytes] = {}
        self.parties = {name: self.party(name) for name in names}
        self.server = config.server_driver(self.spec, directory=directory)
        self.sent: list[tuple[str, str, bytes]] = []
        self.trips: list[str] = []
        for trip in self.server.open():
            self.pass_(trip)

    def party(self, name: str, **more: Any) -> Any:
        keep = lambda state: self.stored.__setitem__(name, state)  # noqa: E731
        identity = self.identities[name]
        return self.config.party_driver(self.spec, name=name, identity=identity, policy=self.policy, store=keep, **more)

    @property
    def session(self) -> bytes:
        return self.server.digest

    def vector(self, name: str) -> Any:
        return np.array([self.spec.parties.index(name) * 10 + 1, -5, 7], np.int64)

    def hand(self, name: str, raw: bytes) -> list[bytes]:
        """What a party answers, its vector supplied."""
        answer = self.parties[name].handle(raw)
        if isinstance(answer, NeedsVector):
            answer = self.parties[name].supply(self.vector(name))
        return list(answer)

    def pass_(self, trip: Trip, lost: tuple[str, ...] = ()) -> None:
        self.trips.append(trip.step)
        for name, raw in trip.outbox.items():
            if name in lost:
                continue
            for answer in self.hand(name, raw):
                self.sent.append((trip.step, name, answer))
                trip.receive(name, answer)
                if name in trip.faults:
                    raise trip.faults[name]

    def round(self, lost: Mapping[str, tuple[str, ...]] | None = None) -> Any:
        self.sent, self.trips = [], []
        for trip in self.server.round():
            self.pass_(trip, tuple(name for name, steps in (lost or {}).items() if trip.step in steps))
        return self.server.result

    def until(self, step: str) -> tuple[Any, Trip]:
        """A new round up to that trip, which is not passed yet: the trips that are left, and it."""
        trips = self.server.round()
        for trip in trips:
            if trip.step == step:
                return trips, trip
            self.pass_(trip)
        raise AssertionError(step)


TWO = Masked(corrupt=1, trips=2)


@pytest.fixture
def net() -> Network:
    """Five parties, one of them corrupt, t = v = 4, after a first round: all have dealt for the second."""
    found = Network(TWO, 5)
    found.round()
    return found


def survey(net: Network, views: Mapping[str, bytes], bitmap: bytes, receiver: str, number: int) -> Any:
    """The set of survivors as a server may show it. views: signatures by name."""
    roster = net.spec.parties
    alive = sorted(messages.from_bitmap(bitmap, len(roster)) or ())
    entries = tuple(messages.Confirmation(place, views[roster[place]]) for place in alive if roster[place] != receiver)
    return ahead.SignedSurvivors(net.session[:16], number, bitmap, entries)


def signatures(net: Network, trip: Trip) -> tuple[dict[str, bytes], int]:
    """Pass a trip of vectors; the signatures on the roster."""
    net.sent = []
    net.pass_(trip)
    views = {name: up(raw) for _, name, raw in net.sent if isinstance(up(raw), ahead.SignedRoster)}
    return {name: view.signature for name, view in views.items()}, next(iter(views.values())).round


# ------------------------------------------------------------------------------------------------------- what it sums


@pytest.mark.parametrize("trips", [2, 3])
@pytest.mark.parametrize("parties", [2, 3, 5, 10])
def test_sums_are_those_of_four_trips_bit_by_bit(trips: Any, parties: int) -> None:
    spec = SumSpec(parties=tuple(f"p{place}" for place in range(parties)), length=50, bound=1 << 20)
    draw = np.random.default_rng(parties)
    few, four = Masked(trips=trips).open(spec), Masked().open(spec)
    for number in range(4):
        vectors = {name: draw.integers(-(1 << 20), 1 << 20, 50) for name in spec.parties}
        gone = {} if parties == 2 else {spec.parties[number % parties]: ("vector", "unmasking", "keys")[number % 3]}
        totals = []
        for session in (few, four):
            summing = session.begin(gone)
            for name, vector in vectors.items():
                if gone.get(name) not in ("keys", "vector"):
                    summing.submit(name, vector)
            totals.append(summing.finish())
        assert totals[0].survivors == totals[1].survivors
        assert np.array_equal(totals[0].total, totals[1].total)
        assert np.array_equal(totals[0].total, sum(vectors[name] for name in totals[0].survivors))


@pytest.mark.parametrize(
    ("trips", "last"), [(2, ["vector", "unmasking"]), (3, ["vector", "confirmation", "unmasking"])]
)
def test_a_round_takes_so_many_trips_once_all_have_dealt(trips: Any, last: list[str]) -> None:
    net = Network(Masked(corrupt=1, trips=trips), 5)
    net.round()
    assert net.trips == ["keys", "shares", *last]
    net.round()
    assert net.trips == last
    net.round({"p2": ("vector",)})
    assert net.server.result.survivors == ("p0", "p1", "p3", "p4")
    net.round()  # p2 has not dealt: all deal anew, and it is back
    assert net.trips == ["keys", "shares", *last]
    assert net.server.result.survivors == net.spec.parties
    net.round({"p1": ("unmasking",)})  # in the sum, as its vector came
    assert net.server.result.survivors == net.spec.parties
    net.round()
    assert net.trips[0] == "keys"
    net.round()
    assert net.trips == last


def test_who_is_known_to_be_gone_is_not_waited_for() -> None:
    net = Network(TWO, 5)
    for number in range(3):
        net.trips = []
        for trip in net.server.round(lost=("p4",)):
            assert "p4" not in trip.outbox
            net.pass_(trip)
        assert net.trips == [*(["keys", "shares"] if not number else []), "vector", "unmasking"]
        assert net.server.result.survivors == ("p0", "p1", "p2", "p3")


def test_a_party_sends_no_more_bytes_than_in_four_trips() -> None:
    spec = SumSpec(parties=tuple(f"p{place}" for place in range(10)), length=100_000, bound=1 << 17)
    most = {}
    for trips in (2, 3, 4):
        session = Masked(corrupt=2, dropouts=1, trips=trips).open(spec)
        for _ in range(2):
            summing = session.begin()
            for name in spec.parties:
                summing.submit(name, np.ones(100_000, np.int64))
            result = summing.finish()
        most[trips] = max(result.bytes_up.values()), max(result.bytes_down.values())
    assert all(up <= 1.005 * most[4][0] for up, _ in most.values())  # 1.0004 and less; 1.05 was asked for
    assert all(down <= 1.2 * most[4][1] for _, down in most.values())  # of 4 KB, beside the model


def test_nor_does_it_compute_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key agreements, signatures verified (each once), and masks expanded, of a round dealt for in the one before."""
    counts: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        real = getattr(module, name)

        def counted(*given: Any, **named: Any) -> Any:
            counts[name] += 1
            return real(*given, **named)

        monkeypatch.setattr(module, name, counted)

    count(party_round, "agree")
    count(signing, "ed25519_verify")
    count(mask_addition, "add_mask")
    count(unmasking, "add_mask")
    spec = SumSpec(parties=tuple(f"p{place}" for place in range(7)), length=10, bound=10)
    found = {}
    for trips in (2, 3, 4):
        session = Masked(trips=trips).open(spec)
        for _ in range(3):
            counts.clear()
            summing = session.begin()
            for name in spec.parties:
                summing.submit(name, np.ones(10, np.int64))
            summing.finish()
        found[trips] = dict(counts)
    assert found[2] == found[3] == found[4]
    assert set(found[4]) == {"agree", "ed25519_verify", "add_mask"}


# ----------------------------------------------------------------------------------------------------- what it states


def test_setup_and_statement_say_how_many_honest_vectors_a_sum_has_at_least() -> None:
    spec = SumSpec(parties=tuple(f"p{place}" for place in range(10)), length=3, bound=10)
    session = Masked(corrupt=3, dropouts=1, min_survivors=9, trips=2).open(spec)
    setup: Any = session.server.setup  # type: ignore[attr-defined]
    assert (setup.trips, setup.floor, setup.min_survivors, setup.threshold) == (2, 6, 9, 7)
    stated = session.statement
    assert (stated["trips"], stated["honest_floor"], stated["min_survivors"]) == (2, 6, 9)
    assert "one sum over at least 6 of the others" in stated["trust"]
    assert "trips" not in Masked().open(spec).statement


def test_no_sum_of_fewer_than_the_smallest_is_opened_in_two_trips_either() -> None:
    """Eight survivors could be made a sum of five honest and two corrupt: so nine are asked for."""
    spec = SumSpec(parties=tuple(f"p{place}" for place in range(10)), length=3, bound=10)
    assert honest_floor(10, 2, 7, 8) + 2 == 7
    setup: Any = Masked(corrupt=2, dropouts=1, min_survivors=8, trips=2).setup(spec, session=bytes(16))
    assert (setup.min_survivors, setup.floor) == (9, 7)
    with pytest.raises(SpecError, match="two trips need 9 of 10 survivors for 6 honest vectors"):
        Masked(corrupt=2, dropouts=2, min_survivors=8, trips=2).setup(spec, session=bytes(16))


def test_by_default_as_many_are_asked_for_as_the_dropouts_leave() -> None:
    """More cost nothing: the rows of the table, the one for thirty with nothing given but the trips."""
    rows = [({}, 30, 27, 22), ({"corrupt": 3, "dropouts": 3}, 10, 7, 2), ({"corrupt": 3, "dropouts": 1}, 10, 9, 6)]
    for given, parties, smallest, floor in rows:
        spec = SumSpec(parties=tuple(f"p{place}" for place in range(parties)), length=1, bound=1)
        setup: Any = Masked(trips=2, **given).setup(spec, session=bytes(16))  # type: ignore[arg-type]
        assert (setup.min_survivors, setup.floor) == (smallest, floor)
        assert setup.min_survivors == parties - setup.dropouts


@pytest.mark.parametrize("corrupt", range(4))
@pytest.mark.parametrize("dropouts", range(4))
def test_the_floor_of_a_counted_number_of_dropouts_does_not_fall_with_the_parties(corrupt: int, dropouts: int) -> None:
    floors = []
    for parties in range(3, 41):
        threshold = max(2, (parties + corrupt) // 2 + 1)
        if threshold <= parties - dropouts:
            floors.append(honest_floor(parties, corrupt, threshold, parties - dropouts))
    assert floors == sorted(floors)
    assert floors[-1] > 20


def test_states_on_their_own_hold_the_floor_too(net: Network) -> None:
    """Whoever has the states without the driver is told the same: `join` refuses."""
    setup: Any = net.server.setup  # type: ignore[attr-defined]
    given: dict[str, Any] = {"identity": bytes([1]) * 32, "randomness": os.urandom, "known": ahead.ToParty}
    with pytest.raises(PolicyError, match="was not told how to check"):
        party.join(encode(setup), name="p0", policy=net.policy, **given)
    given["further"] = check_floor
    party.join(encode(setup), name="p0", policy=net.policy, **given)
    with pytest.raises(PolicyError, match="says 4 honest vectors in a sum at least, and it is 3"):
        party.join(encode(with_(setup, floor=4)), name="p0", policy=net.policy, **given)


def test_what_two_and_three_trips_are_refused_for() -> None:
    with pytest.raises(SpecError, match="semi-honest"):
        Masked(trips=2, server="semi-honest")
    with pytest.raises(SpecError, match="contributors in two or three trips"):
        Masked(trips=3, corrupt=1, contributors=3)
    with pytest.raises(SpecError, match="trips"):
        Masked(trips=5)  # type: ignore[arg-type]
    many = SumSpec(parties=tuple(f"p{place}" for place in range(100)), length=3, bound=10)
    for trips in (2, 3):
        with pytest.raises(SpecError, match="sparse graph"):
            Masked(trips=trips).setup(many, session=bytes(16))  # type: ignore[arg-type]


def refused(net: Network, setup: messages.SumSetup, **policy: Any) -> str:
    party = net.config.party_driver(
        net.spec, name="p0", identity=Identity(bytes([1]) * 32), policy=replace(net.policy, **policy)
    )
    with pytest.raises(ProtocolError) as error:
        party.handle(encode(setup))
    return str(error.value)


def test_a_party_works_the_floor_out_itself() -> None:
    net = Network(TWO, 5)
    setup: Any = net.server.setup  # type: ignore[attr-defined]
    assert (setup.floor, setup.min_survivors) == (3, 4)
    assert "says 4 honest vectors in a sum at least, and it is 3" in refused(net, with_(setup, floor=4))
    assert "may have 3 honest vectors, this party accepts 4" in refused(net, setup, minimum_cohort=5)
    assert "2 t >" in refused(net, with_(setup, threshold=3))
    assert "on a complete graph only" in refused(net, with_(setup, neighbours=2))
    assert "sums of 2 trips" in refused(net, with_(setup, trips=3))
    plain = Masked(corrupt=1).setup(net.spec, session=bytes(16))
    assert "no message of this protocol" in refused(net, plain)
    four = Masked(corrupt=1).party_driver(net.spec, name="p0", identity=net.identities["p0"], policy=net.policy)
    with pytest.raises(MessageError):
        four.handle(encode(setup))
    seven = Network(Masked(corrupt=2, dropouts=2, trips=2), 7)
    low = with_(seven.server.setup, threshold=5, min_survivors=5, corrupt=3, floor=2)  # type: ignore[attr-defined]
    assert "2 t >" in refused(seven, low)


# --------------------------------------------------------------------------------------------------------- mixed views


def test_every_mixture_of_survivors_leaves_one_secret_of_each_party_closed(net: Network) -> None:
    """Three of four honest parties leave somebody out each; what they give out, with the corrupt p4's shares."""
    trips, trip = net.until("vector")
    views, number = signatures(net, trip)
    shown = {"p0": {0, 1, 2, 4}, "p1": {0, 1, 2, 4}, "p2": {0, 1, 2, 4}, "p3": {0, 1, 3, 4}}
    given = {}
    for name, alive in shown.items():
        message = survey(net, views, messages.to_bitmap(alive, 5), name, number)
        (raw,) = net.hand(name, encode(message))
        given[name] = up(raw)
    threshold, colluders = 4, 1
    opened = []
    for place in range(4):
        kinds = [
            sum(any(entry.party == place for entry in getattr(answer, kind)) for answer in given.values()) + colluders
            for kind in ("seeds", "keys")
        ]
        assert min(kinds) < threshold
        opened.append(kinds[0] >= threshold)
    assert opened == [True, True, True, False]  # three honest vectors in the sum: the floor
    del trips


@pytest.mark.parametrize("seed", range(3))
def test_no_mixture_opens_both_secrets_of_anyone(seed: int) -> None:
    """As in the search, but with the parties themselves: all that they answer to views drawn at random."""
    draw = np.random.default_rng(seed)
    net = Network(Masked(corrupt=1, dropouts=1, trips=2), 6)
    setup: Any = net.server.setup  # type: ignore[attr-defined]
    for _ in range(6):
        net.round()
        trips, trip = net.until("vector")
        views, number = signatures(net, trip)
        given = []
        for name in net.spec.parties[:5]:
            alive = set(draw.permutation(6)[: draw.integers(3, 7)].tolist()) | {net.spec.parties.index(name)}
            message = survey(net, views, messages.to_bitmap(alive, 6), name, number)
            if len(alive) < setup.min_survivors:
                with pytest.raises(TooFewSurvivorsError):
                    net.hand(name, encode(message))
            else:
                given.append(up(net.hand(name, encode(message))[0]))
        for place in range(6):
            kinds = [
                sum(any(entry.party == place for entry in getattr(answer, kind)) for answer in given) + 1
                for kind in ("seeds", "keys")
            ]
            assert min(kinds) < setup.threshold
        del trips


@pytest.mark.parametrize(
    ("alive", "error", "match"),
    [
        ({1, 2, 3, 4}, FaultyServerError, "this party dropped out"),
        ({0, 1, 2}, TooFewSurvivorsError, "too few"),
    ],
)
def test_a_set_that_no_party_answers_for(net: Network, alive: set[int], error: Any, match: str) -> None:
    _, trip = net.until("vector")
    views, number = signatures(net, trip)
    with pytest.raises(error, match=match):
        net.hand("p0", encode(survey(net, views, messages.to_bitmap(alive, 5), "p0", number)))


def test_of_two_sets_a_party_answers_for_the_first_alone(net: Network) -> None:
    _, trip = net.until("vector")
    views, number = signatures(net, trip)
    net.hand("p0", encode(survey(net, views, messages.to_bitmap({0, 1, 2, 3}, 5), "p0", number)))
    with pytest.raises(StateUsedError):
        net.hand("p0", encode(survey(net, views, messages.to_bitmap({0, 1, 2, 4}, 5), "p0", number)))


@pytest.mark.parametrize("spoilt", ["left out", "twice", "forged", "another's"])
def test_survivors_are_signed_for_one_by_one(net: Network, spoilt: str) -> None:
    _, trip = net.until("vector")
    views, number = signatures(net, trip)
    whole = survey(net, views, messages.to_bitmap(range(5), 5), "p0", number)
    *others, last = whole.entries
    entries, match = {
        "left out": (others, "not one for each other survivor"),
        "twice": ([*others, last, last], "not one for each other survivor"),
        "forged": ([*others, with_(last, signature=bytes(64))], "what p4 signed"),
        "another's": ([*others, with_(last, signature=others[0].signature)], "what p4 signed"),
    }[spoilt]
    with pytest.raises(FaultyServerError, match=match):
        net.hand("p0", encode(with_(whole, entries=tuple(entries))))
    with pytest.raises(StateUsedError):
        net.hand("p0", encode(whole))


# ------------------------------------------------------------------------------------------------------- mixed rosters


def without_dealers(raw: bytes, *places: int) -> bytes:
    *before, deliveries = parts(raw)
    packets = tuple(packet for packet in deliveries.packets if packet.party not in places)
    return bundled(*before, with_(deliveries, packets=packets))


def views_where_p0_is_not_shown_p1(net: Network) -> tuple[dict[str, bytes], int]:
    """Everybody's signature on the roster that it was shown; and the round."""
    _, trip = net.until("vector")
    trip.outbox["p0"] = without_dealers(trip.outbox["p0"], 1)
    views, number = {}, 0
    for name, raw in trip.outbox.items():
        found = [up(answer) for answer in net.hand(name, raw)]
        signed = next(one for one in found if isinstance(one, ahead.SignedRoster))
        views[name], number = signed.signature, signed.round
    return views, number


def test_holders_refuse_whoever_signed_another_roster(net: Network) -> None:
    """p0 is shown a roster without p1: it has no mask with it; and nobody who was shown all opens its mask."""
    views, number = views_where_p0_is_not_shown_p1(net)
    for name in ("p1", "p2", "p3"):
        with pytest.raises(FaultyServerError, match="what p0 signed is not the roster shown to this party"):
            net.hand(name, encode(survey(net, views, messages.to_bitmap(range(5), 5), name, number)))
    with pytest.raises(FaultyServerError, match="p1 survives and was not in the roster shown to this party"):
        net.hand("p0", encode(survey(net, views, messages.to_bitmap(range(5), 5), "p0", number)))


def test_nor_does_that_party_answer_for_those_who_were_shown_all(net: Network) -> None:
    views, number = views_where_p0_is_not_shown_p1(net)
    with pytest.raises(FaultyServerError, match="what p2 signed is not the roster"):
        net.hand("p0", encode(survey(net, views, messages.to_bitmap({0, 2, 3, 4}, 5), "p0", number)))


def test_a_roster_of_colluders_is_no_roster(net: Network) -> None:
    _, trip = net.until("vector")
    with pytest.raises(TooFewSurvivorsError, match="to hold this party's shares"):
        net.hand("p0", without_dealers(trip.outbox["p0"], 1, 2))


def test_a_colluder_with_two_keys_makes_two_rosters() -> None:
    """p4 signs another mask key for p0 alone: who masks with that has signed another roster."""
    net = Network(TWO, 5)
    trips = net.server.round()
    net.pass_(next(trips))
    shares = next(trips)
    other = messages.Advertise(net.session[:16], 1, Identity(bytes([77]) * 32).public, bytes([9]) * 32, bytes(64))
    roster = down(shares.outbox["p0"])
    entry = roster.entries[-1]
    assert entry.party == 4
    signed = signing.advertise(net.session, 1, 4, other.mask, entry.transport)
    forged = with_(entry, mask=other.mask, signature=signing.sign(bytes([5]) * 32, signed))
    shares.outbox["p0"] = encode(with_(roster, entries=(*roster.entries[:-1], forged)))
    net.pass_(shares)
    vectors = next(trips)
    found = {}
    for name, raw in vectors.outbox.items():
        found[name] = next(up(one) for one in net.hand(name, raw) if isinstance(up(one), ahead.SignedRoster))
    vectors.receive("p0", encode(found["p0"]))
    assert isinstance(vectors.faults["p0"], FaultyPartyError)
    views = {name: view.signature for name, view in found.items()}
    with pytest.raises(FaultyServerError, match="what p0 signed"):
        net.hand("p1", encode(survey(net, views, messages.to_bitmap(range(5), 5), "p1", 1)))


def test_two_models_are_two_rosters(net: Network) -> None:
    _, trip = net.until("vector")
    begin, *rest = parts(trip.outbox["p0"])
    trip.outbox["p0"] = bundled(with_(begin, weights=bytes([1]) * 32), *rest)
    views = {}
    for name, raw in trip.outbox.items():
        found = [up(answer) for answer in net.hand(name, raw)]
        views[name] = next(one.signature for one in found if isinstance(one, ahead.SignedRoster))
    with pytest.raises(FaultyServerError, match="what p0 signed is not the roster shown to this party"):
        net.hand("p1", encode(survey(net, views, messages.to_bitmap(range(5), 5), "p1", begin.round)))


# ------------------------------------------------------------------------------------------------------------- packets


def garbled(raw: bytes, *dealers: int) -> bytes:
    *before, deliveries = parts(raw)
    packets = tuple(
        with_(packet, sealed=bytes(82)) if packet.party in dealers else packet for packet in deliveries.packets
    )
    return bundled(*before, with_(deliveries, packets=packets))


def test_a_packet_that_does_not_open_is_said_so_and_costs_nobody_the_sum(net: Network) -> None:
    trips, trip = net.until("vector")
    trip.outbox["p0"] = garbled(trip.outbox["p0"], 3)
    net.sent = []
    net.pass_(trip)
    view = next(up(raw) for _, name, raw in net.sent if name == "p0" and isinstance(up(raw), ahead.SignedRoster))
    assert view.unopened == (3,)
    for rest in trips:
        net.pass_(rest)
    assert net.server.result.survivors == net.spec.parties
    assert net.server.disputes == {"p3": ("p0",)}
    assert net.server.result.total[0] == sum(net.vector(name)[0] for name in net.spec.parties)


def test_a_dealer_that_too_many_accuse_is_named_before_anything_is_revealed(net: Network) -> None:
    trips, trip = net.until("vector")
    for name in ("p0", "p1"):
        trip.outbox[name] = garbled(trip.outbox[name], 3)
    net.pass_(trip)
    with pytest.raises(FaultyPartyError, match="p3: the shares that it dealt do not open") as error:
        next(trips)
    assert error.value.party == "p3"
    assert net.round().survivors == net.spec.parties


def test_an_old_packet_opens_in_its_own_round_alone(net: Network) -> None:
    _, trip = net.until("vector")
    old = parts(trip.outbox["p0"])[-1]
    net.pass_(trip)
    net.round()
    trips, trip = net.until("vector")
    begin, deliveries = parts(trip.outbox["p0"])
    assert deliveries.round > old.round
    with pytest.raises(FaultyServerError, match="of round"):
        net.parties["p0"].handle(encode(old))
    packets = (old.packets[0], *deliveries.packets[1:])
    trip.outbox["p0"] = bundled(begin, with_(deliveries, packets=packets))
    found = [up(raw) for raw in net.hand("p0", trip.outbox["p0"])]
    assert next(one.unopened for one in found if isinstance(one, ahead.SignedRoster)) == (1,)
    del trips


def test_a_packet_for_somebody_else_does_not_open(net: Network) -> None:
    _, trip = net.until("vector")
    others = parts(trip.outbox["p1"])[-1].packets[1]  # of p2 for p1
    begin, deliveries = parts(trip.outbox["p0"])
    packets = (deliveries.packets[0], others, *deliveries.packets[2:])
    found = [up(raw) for raw in net.hand("p0", bundled(begin, with_(deliveries, packets=packets)))]
    assert next(one.unopened for one in found if isinstance(one, ahead.SignedRoster)) == (2,)


# -------------------------------------------------------------------------------------------- late, replayed, restarted


def test_a_late_vector_is_thrown_away(net: Network) -> None:
    trips, trip = net.until("vector")
    late = net.hand("p3", trip.outbox["p3"])
    del trip.outbox["p3"]
    net.pass_(trip)
    last = next(trips)
    last.receive("p3", late[-1])
    assert isinstance(last.faults["p3"], LateVectorError)
    net.pass_(last)
    for _ in trips:
        pass
    assert net.server.result.survivors == ("p0", "p1", "p2", "p4")


def test_what_a_network_repeats_changes_nothing(net: Network) -> None:
    trips, trip = net.until("vector")
    net.sent = []
    net.pass_(trip)
    for _, name, raw in list(net.sent):
        trip.receive(name, raw)
    assert net.parties["p0"].handle(trip.outbox["p0"]) == tuple(raw for _, name, raw in net.sent if name == "p0")
    last = next(trips)
    for _, name, raw in list(net.sent):
        last.receive(name, raw)
    net.pass_(last)
    for _, name, raw in list(net.sent):
        last.receive(name, raw)
    assert (trip.faults, last.faults) == ({}, {})
    assert list(trips) == []
    assert net.server.result.survivors == net.spec.parties


def test_nothing_of_one_round_serves_in_the_next(net: Network) -> None:
    _, trip = net.until("vector")
    old, number = signatures(net, trip)
    net.round()
    _, trip = net.until("vector")
    views, now = signatures(net, trip)
    assert now > number
    stale = survey(net, {**views, "p1": old["p1"]}, messages.to_bitmap(range(5), 5), "p0", now)
    with pytest.raises(FaultyServerError, match="what p1 signed"):
        net.hand("p0", encode(stale))
    with pytest.raises(FaultyServerError, match="of round"):
        net.hand("p1", encode(survey(net, old, messages.to_bitmap(range(5), 5), "p1", number)))


def test_dealing_for_the_next_round_ends_the_one_before(net: Network) -> None:
    """A server that has a party deal before it asks for its shares gets no shares any more."""
    trips, trip = net.until("vector")
    net.pass_(trip)
    last = next(trips)
    survivors, roster = parts(last.outbox["p0"])
    party = net.parties["p0"]
    state = party._round.state
    (dealt,) = net.hand("p0", encode(roster))
    assert isinstance(up(dealt), messages.DealtShares)
    with pytest.raises(StateUsedError):
        net.hand("p0", encode(survivors))
    assert party._round.state is None
    with pytest.raises(StateUsedError, match="ended for this party"):  # whoever kept it
        state.unmask(encode(survivors))


def test_a_vector_needs_the_signature_of_its_party_first(net: Network) -> None:
    _, trip = net.until("vector")
    keys, view, vector = net.hand("p0", trip.outbox["p0"])
    trip.receive("p0", vector)  # which is held, and not counted
    assert (trip.faults, "p0" in trip.waiting) == ({}, True)
    trip.receive("p0", encode(with_(up(vector), round=1)))
    assert "is of round 1, not 2" in str(trip.faults["p0"])
    trip.receive("p0", vector[:-1] + bytes([vector[-1] ^ 1]))
    assert "sent a second Upload, and not the same" in str(trip.faults["p0"])
    trip.receive("p0", encode(with_(up(view), signature=bytes(64))))
    assert "signed another roster" in str(trip.faults["p0"])
    trip.receive("p0", encode(with_(up(view), unopened=(0,))))
    assert "dealt it nothing" in str(trip.faults["p0"])
    trip.receive("p0", encode(with_(up(view), unopened=(3, 2))))
    assert "ascending" in str(trip.faults["p0"])
    assert "p0" in trip.waiting
    for raw in (keys, view):
        trip.receive("p0", raw)
    assert "p0" not in trip.waiting


def test_a_vector_that_was_held_is_in_the_sum_with_its_signature_alone(net: Network) -> None:
    """All answers come in the order opposite to the one they were sent in; p3's signature never comes."""
    trips, trip = net.until("vector")
    for name, raw in trip.outbox.items():
        for answer in reversed(net.hand(name, raw)):
            if name != "p3" or not isinstance(up(answer), ahead.SignedRoster):
                trip.receive(name, answer)
    assert (trip.faults, trip.waiting) == ({}, ("p3",))
    for trip in trips:
        net.pass_(trip)
    assert net.server.result.survivors == ("p0", "p1", "p2", "p4")
    assert (net.server.result.total == sum(net.vector(name) for name in ("p0", "p1", "p2", "p4"))).all()


@pytest.mark.parametrize("trips", [2, 3])
def test_what_is_repeated_a_round_later_is_known_in_its_own_round(trips: Any) -> None:
    """Keys and shares of a round come again in each of its trips, with those of the next one on the way."""
    net = Network(Masked(corrupt=1, trips=trips), 5)
    net.round()
    dealt = [(name, raw) for _, name, raw in net.sent if isinstance(up(raw), messages.Advertise | messages.DealtShares)]
    dealt = [(name, raw) for name, raw in dealt if up(raw).round == 2]
    assert len(dealt) == 10
    for trip in net.server.round():
        for name, raw in dealt:
            trip.receive(name, raw)
        assert trip.faults == {}
        net.pass_(trip)
        for name, raw in dealt:
            trip.receive(name, raw)
        assert trip.faults == {}
    assert net.server.result.survivors == net.spec.parties
    assert net.server.number == 2


def restarted(net: Network, name: str) -> None:
    net.parties[name] = net.party(name, state=net.stored[name])


def test_a_restarted_party_holds_its_setup_against_the_floor_that_it_asks_for_now() -> None:
    net = Network(TWO, 5)
    net.round()
    net.policy = replace(net.policy, minimum_cohort=5)
    with pytest.raises(PolicyError, match="may have 3 honest vectors, this party accepts 4"):
        restarted(net, "p2")


@pytest.mark.parametrize("step", ["vector", "unmasking"])
def test_a_party_restarted_between_dealing_and_answering(net: Network, step: str) -> None:
    """It has no secret of the round, nor of the one that it sent keys for, and sits both out."""
    trips, trip = net.until(step)
    restarted(net, "p2")
    with pytest.raises(ProtocolError):
        net.hand("p2", trip.outbox["p2"])
    del trip.outbox["p2"]
    net.pass_(trip)
    for rest in trips:
        net.pass_(rest, ("p2",))
    in_sum = step == "unmasking"
    assert ("p2" in net.server.result.survivors) is in_sum
    assert net.server.forget("p2")
    assert net.round().survivors == net.spec.parties


def test_a_party_restarted_between_rounds_is_in_the_next_one(net: Network) -> None:
    restarted(net, "p2")
    assert net.server.forget("p2")
    assert net.round().survivors == net.spec.parties
    assert net.trips[0] == "keys"


def test_a_restarted_party_answers_no_round_that_it_sent_keys_for(net: Network) -> None:
    _, trip = net.until("vector")
    begin, _ = parts(trip.outbox["p2"])
    net.hand("p2", trip.outbox["p2"])  # with keys for the round after it
    restarted(net, "p2")
    for number in (begin.round, begin.round + 1):
        with pytest.raises(FaultyServerError, match="asked for round"):
            net.hand("p2", encode(with_(begin, round=number)))
    (keys,) = net.hand("p2", encode(with_(begin, round=begin.round + 2)))
    assert up(keys).round == begin.round + 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("step", ["vector", "unmasking"])
def test_a_forked_party_answers_nothing(net: Network, step: str) -> None:
    _, trip = net.until(step)
    child = os.fork()
    if not child:
        try:
            net.hand("p2", trip.outbox["p2"])
        except StateUsedError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert net.hand("p2", trip.outbox["p2"])


def test_a_round_that_failed_is_followed_by_one_that_all_deal_for(net: Network) -> None:
    with pytest.raises(TooFewSurvivorsError):
        net.round({"p0": ("vector",), "p1": ("vector",)})
    assert net.round().survivors == net.spec.parties
    assert net.trips[0] == "keys"
    with pytest.raises(TooFewSurvivorsError):
        net.round({"p0": ("unmasking",), "p1": ("unmasking",)})
    assert net.round().survivors == net.spec.parties


def test_nothing_that_was_dealt_serves_in_another_session(net: Network) -> None:
    _, trip = net.until("vector")
    old = trip.outbox["p0"]
    for opening in net.server.open():
        net.pass_(opening)
    assert net.round().survivors == net.spec.parties
    assert net.trips[0] == "keys"
    with pytest.raises(FaultyServerError, match="of another session"):
        net.hand("p0", old)
    net.round()
    assert net.trips == ["vector", "unmasking"]


def test_a_party_that_deals_garbage_ahead_is_left_out_of_the_next_round(net: Network) -> None:
    trips, trip = net.until("vector")
    net.pass_(trip)
    last = next(trips)
    for name, raw in last.outbox.items():
        for answer in net.hand(name, raw):
            message = up(answer)
            if name == "p3" and isinstance(message, messages.DealtShares):
                answer = encode(with_(message, packets=message.packets[1:]))
            last.receive(name, answer)
    assert "not one for each neighbour" in str(last.faults["p3"])
    assert list(trips) == []
    assert net.server.result.survivors == net.spec.parties
    assert net.round().survivors == net.spec.parties
    assert net.trips[0] == "keys"


def test_no_coalition_below_the_threshold_opens_a_seed(net: Network) -> None:
    """Three of four shares give another secret than the seed that was committed to; four give it."""
    trips, trip = net.until("unmasking")
    net.sent = []
    net.pass_(trip)
    answers = {name: up(raw) for _, name, raw in net.sent if isinstance(up(raw), messages.Unmask)}
    shares = {
        net.spec.parties.index(name): next(entry.share for entry in answer.seeds if entry.party == 1)
        for name, answer in answers.items()
    }
    four = [
        Combiner([place + 1 for place in some], 4).combine([shares[place] for place in some])
        for some in itertools.combinations(sorted(shares), 4)
    ]
    assert len(set(four)) == 1
    del trips


def test_no_bundle_of_a_round_is_longer_than_a_setup_may_be() -> None:
    """So what a party reads at most, which is as long as a setup, is long enough for all that comes ahead."""
    for parties in range(2, 65):
        around, limit = parties - 1, messages.limit
        begin = limit(messages.Reveals, parties) + limit(messages.Begin) + limit(messages.Deliveries, around)
        told = max(ahead.survivors_limit(parties), limit(messages.Confirmations, around))
        for size in (begin, limit(messages.Roster, around) + told):
            assert limit(messages.Bundle, size) < limit(messages.SumSetup, parties)


@pytest.mark.parametrize("parties", [2, 9, 64, 1000])
def test_the_largest_messages_are_as_large_as_is_said(parties: int) -> None:
    """But for what an envelope may take of its 64 bytes: a message is refused unread that is larger."""
    places = [MAX_PARTIES - place for place in range(parties, 0, -1)]
    head = b"\xff" * 16, LAST_ROUND
    view = ahead.SignedRoster(*head, b"\xff" * 64, tuple(places))
    signed = tuple(messages.Confirmation(place, b"\xff" * 64) for place in places)
    told = ahead.SignedSurvivors(*head, b"\xff" * -(-parties // 8), signed)
    for most, message in ((ahead.roster_limit(parties), view), (ahead.survivors_limit(parties), told)):
        assert 20 <= most - len(encode(message)) <= 25


def test_what_is_stated_of_two_trips_is_the_floor_and_of_three_what_is_said_of_four() -> None:
    spec = SumSpec(parties=tuple(f"p{place}" for place in range(10)), length=1, bound=1)
    stated = {trips: Masked(corrupt=3, dropouts=2, trips=trips).open(spec).statement for trips in (2, 3, 4)}  # type: ignore[arg-type]
    assert stated[3] == {**stated[4], "trips": 3, "honest_floor": 4}
    two = {key: value for key, value in stated[2].items() if stated[4].get(key) != value}
    assert two.pop("trust").startswith("The server may do whatever it likes and may collude with up to 3 of 10 parties:"
                                       " together they learn one sum over at least 4 of the others")  # fmt: skip
    assert two == {"trips": 2, "honest_floor": 4, "asked_survivors": 8}
    asked = Masked(corrupt=3, dropouts=2, min_survivors=6, trips=2).open(spec).statement
    assert (asked["min_survivors"], asked["honest_floor"], asked["asked_survivors"]) == (6, 3, 8)
