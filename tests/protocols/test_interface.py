"""Every kind of sum through the interface, as trainers use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from choral.protocols import Homomorphic, Masked, Plain, SumSpec
from choral.protocols.errors import InputError, SpecError, StateUsedError, TooFewSurvivorsError
from choral.protocols.interface import STEPS, Step

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "secure-sums.md"
KINDS = pytest.mark.parametrize("kind", [Plain(), Masked(), Homomorphic()], ids=["plain", "masked", "split"])
EVERY_KIND = pytest.mark.parametrize(
    "kind",
    [Plain(), Masked(), Homomorphic(), Homomorphic(key="shared")],
    ids=["plain", "masked", "split", "shared"],
)
SPEC = SumSpec(parties=("north", "south", "east"), length=4, bound=100)
VECTORS = {"north": [1, -2, 100, 0], "south": [5, 5, -100, 1], "east": [7, 0, 0, 0]}


def run(session: Any, vectors: dict[str, Any]) -> Any:
    summing = session.begin()
    for party, vector in vectors.items():
        summing.submit(party, np.asarray(vector, np.int64))
    return summing.finish()


@EVERY_KIND
def test_the_sum_over_all_and_over_the_survivors(kind: Any) -> None:
    session = kind.open(SPEC)
    assert run(session, VECTORS).total.tolist() == [13, 3, 0, 1]
    for dropped in (*SPEC.parties, None):
        left = {party: vector for party, vector in VECTORS.items() if party != dropped}
        result = run(session, left)
        assert result.total.tolist() == np.sum(list(left.values()), axis=0).tolist()
        assert result.total.dtype == np.int64
        assert result.survivors == tuple(left)
        assert set(result.bytes_up) == set(result.bytes_down) == set(SPEC.parties)


FIVE = ("a", "b", "c", "d", "e")


@EVERY_KIND
def test_a_party_may_be_lost_at_any_step(kind: Any) -> None:
    """Before its vector it is not in the sum, after it it is; the session goes on, and the next round has all."""
    session = kind.open(SumSpec(parties=FIVE, length=2, bound=100))
    for lost in FIVE[:2]:
        for step in STEPS:
            summing = session.begin({lost: step})
            counted = [party for party in FIVE if party != lost or step in ("confirmation", "unmasking")]
            for party in counted:
                summing.submit(party, np.array([1, FIVE.index(party)]))
            result = summing.finish()
            assert result.survivors == tuple(counted)
            assert result.total.tolist() == [len(counted), sum(map(FIVE.index, counted))]
        assert run(session, {party: [1, 0] for party in FIVE}).total.tolist() == [5, 0]


@EVERY_KIND
def test_who_is_lost_before_its_vector_is_refused(kind: Any) -> None:
    for step in STEPS[:3]:
        summing = kind.open(SPEC).begin({"east": step})
        with pytest.raises(SpecError, match="'east' drops out of this round"):
            summing.submit("east", np.array(VECTORS["east"]))
    for lost in ({"west": "keys"}, {"east": "later"}):
        with pytest.raises(SpecError, match="cannot be lost"):
            kind.open(SPEC).begin(lost)


@pytest.mark.parametrize("kind", [Masked(), Homomorphic()], ids=["masked", "split"])
@pytest.mark.parametrize("step", STEPS)
def test_too_many_losses_end_the_round_at_their_step_and_not_the_session(kind: Any, step: Step) -> None:
    """Of five parties, four must be left at each step: their secrets are shared four out of five."""
    session = kind.open(SumSpec(parties=FIVE, length=2, bound=100))
    assert session.statement["threshold"] == 4
    said = {
        "keys": "advertised",
        "shares": "shared their secrets",
        "vector": "sent a vector",
        "confirmation": "confirmed",
        "unmasking": "helped to unmask",
    }
    with pytest.raises(TooFewSurvivorsError, match=said[step]):
        lose_two(session, step)
    sizes = {party: [1, 0] for party in FIVE}
    assert run(session, sizes).total.tolist() == [5, 0]
    if step == "keys":  # which came along with the round before, so that it is their shares that are missing
        with pytest.raises(TooFewSurvivorsError, match="shared their secrets"):
            lose_two(session, step)


def lose_two(session: Any, step: Step) -> None:
    summing = session.begin({"b": step, "d": step})
    for party in FIVE if step in ("confirmation", "unmasking") else ("a", "c", "e"):
        summing.submit(party, np.array([1, 0]))
    summing.finish()


def test_a_shared_key_needs_one_survivor_to_open_the_sum() -> None:
    session = Homomorphic(key="shared").open(SPEC)
    summing = session.begin(dict.fromkeys(SPEC.parties, "unmasking"))
    for party in SPEC.parties:
        summing.submit(party, np.array(VECTORS[party]))
    with pytest.raises(TooFewSurvivorsError, match="nobody is left"):
        summing.finish()
    assert run(session, VECTORS).total.tolist() == [13, 3, 0, 1]


@pytest.mark.parametrize("n", range(2, 11))
def test_masked_without_arguments_withstands_a_dropout_from_three_parties_on(n: int) -> None:
    names = tuple(f"party {i}" for i in range(n))
    session = Masked().open(SumSpec(parties=names, length=3, bound=2**40))
    present = names[:-1] if n >= 3 else names
    result = run(session, {name: [2**40, -(2**40), place] for place, name in enumerate(present)})
    assert result.total.tolist() == [len(present) * 2**40, -len(present) * 2**40, sum(range(len(present)))]


@KINDS
def test_extremes_of_the_bound_do_not_wrap(kind: Any) -> None:
    bound = (2**64 - 1) // 6
    spec = SumSpec(parties=SPEC.parties, length=2, bound=bound)
    assert spec.modulus_bits == 64
    assert run(kind.open(spec), {party: [bound, -bound] for party in SPEC.parties}).total.tolist() == [
        3 * bound,
        -3 * bound,
    ]


@KINDS
@pytest.mark.parametrize(
    "vector",
    [
        np.array([1.0, 2, 3, 4]),
        np.array([np.nan, 2, 3, 4]),
        np.array([np.inf, 2, 3, 4]),
        np.array([1, 2, 3, 4], np.int32),
        np.array([1, 2, 3, 4], np.uint64),
        np.array([True, False, True, True]),
        np.array([1, 2, 3, 101]),
        np.array([1, 2, 3, -101]),
        np.array([1, 2, 3, np.iinfo(np.int64).min]),
        np.array([1, 2, 3]),
        np.array([[1, 2, 3, 4]]),
        np.array([], np.int64),
        [1, 2, 3, 4],
        None,
        torch.tensor([1.0, 2, 3, 4]),
        torch.tensor([1, 2, 3, 101]),
        torch.tensor([1, 2, 3], dtype=torch.int64),
        torch.tensor([1, 2, 3, 4]).to_sparse(),
        np.ma.array([1, 2, 3, 101], mask=[False, False, False, True]),
    ],
    ids=str,
)
def test_a_vector_that_was_not_agreed_on_is_refused_and_harms_nothing(kind: Any, vector: Any) -> None:
    summing = kind.open(SPEC).begin()
    with pytest.raises(InputError) as caught:
        summing.submit("north", vector)
    assert "101" not in str(caught.value)  # no data value in an error
    for party in SPEC.parties:
        summing.submit(party, np.array(VECTORS[party]))
    assert summing.finish().total.tolist() == [13, 3, 0, 1]


@KINDS
def test_torch_tensors_and_strided_arrays_are_summed_as_they_are(kind: Any) -> None:
    summing = kind.open(SPEC).begin()
    summing.submit("north", torch.tensor(VECTORS["north"]))
    summing.submit("south", np.array(VECTORS["south"])[::-1][::-1])
    summing.submit("east", np.repeat(np.array(VECTORS["east"]), 2)[::2])
    assert summing.finish().total.tolist() == [13, 3, 0, 1]


@KINDS
def test_nothing_is_used_twice(kind: Any) -> None:
    summing = kind.open(SPEC).begin()
    with pytest.raises(SpecError, match="unknown party"):
        summing.submit("west", np.array(VECTORS["north"]))
    for party in SPEC.parties:
        summing.submit(party, np.array(VECTORS[party]))
        with pytest.raises(StateUsedError):
            summing.submit(party, np.array(VECTORS[party]))
    summing.finish()
    with pytest.raises(StateUsedError, match="this round is finished"):
        summing.finish()
    with pytest.raises(StateUsedError, match="this round is finished"):
        summing.submit("north", np.array(VECTORS["north"]))


def test_a_round_ends_when_the_next_begins() -> None:
    session = Masked().open(SPEC)
    first = session.begin()
    first.submit("north", np.array(VECTORS["north"]))
    session.begin()
    with pytest.raises(StateUsedError):
        first.submit("south", np.array(VECTORS["south"]))
    with pytest.raises(StateUsedError):
        first.finish()
    assert run(session, VECTORS).total.tolist() == [13, 3, 0, 1]


def test_too_few_survivors_are_named_and_the_session_goes_on() -> None:
    session = Masked(min_survivors=3).open(SPEC)
    with pytest.raises(TooFewSurvivorsError) as caught:
        run(session, {party: VECTORS[party] for party in ("north", "south")})
    assert (caught.value.survivors, caught.value.needed, caught.value.missing) == (2, 3, ("east",))
    assert run(session, VECTORS).total.tolist() == [13, 3, 0, 1]
    with pytest.raises(TooFewSurvivorsError):
        run(session, {})
    assert run(session, VECTORS).total.tolist() == [13, 3, 0, 1]


def test_the_statement_is_json_and_says_who_is_trusted() -> None:
    plain, masked = Plain().open(SPEC).statement, Masked().open(SPEC).statement
    assert json.loads(json.dumps(plain)) == plain
    assert json.loads(json.dumps(masked)) == masked
    assert "sees each one" in plain["trust"]
    assert (masked["threshold"], masked["neighbours"], masked["graph"]) == (2, 2, "complete")
    big = Masked().open(SumSpec(parties=tuple(map(str, range(100))), length=1, bound=1)).statement
    assert json.loads(json.dumps(big)) == big
    assert (big["neighbours"], big["threshold"], big["graph"]) == (32, 22, "Harary")  # of the golden table, .1/.1
    assert 40 <= big["security_bits"] <= 128
    assert big["correctness_bits"] is None  # certain: 11 of 32 neighbours can drop, and only 10 parties do


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Masked, {"min_survivors": 1}),
        (Masked, {"min_survivors": 4}),
        (Masked, {"corrupt": 2}),
        (Masked, {"corrupt": 1, "dropouts": 1}),
        (Masked, {"dropouts": 2}),
        (Masked, {"corrupt": 0.99}),
        (Homomorphic, {"min_survivors": 1}),
        (Homomorphic, {"corrupt": 2}),
        (Homomorphic, {"key": "shared", "min_survivors": 4}),
        (Homomorphic, {"key": "shared", "corrupt": 1}),
        (Homomorphic, {"key": "shared", "dropouts": 0}),
        (Homomorphic, {"key": "shared", "server": "malicious"}),
        (Homomorphic, {"key": "none"}),
    ],
    ids=repr,
)
def test_what_cannot_be_withstood_is_refused_at_opening(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        kind(**settings).open(SPEC)


@pytest.mark.parametrize(
    ("n", "colluders", "dropouts", "neighbours", "threshold", "smallest"),
    [
        (2, 0, 0, 1, 2, 2),
        (3, 0, 0, 2, 2, 2),
        (4, 1, 1, 3, 3, 3),
        (7, 2, 2, 6, 5, 5),
        (10, 3, 3, 9, 7, 7),
        (50, 5, 5, 49, 28, 28),
        (100, 10, 10, 32, 22, 51),
        (1000, 100, 100, 102, 72, 501),
    ],
)
def test_the_table_of_defaults_in_the_guide(
    n: int, colluders: int, dropouts: int, neighbours: int, threshold: int, smallest: int
) -> None:
    setup = Masked().setup(SumSpec(parties=tuple(map(str, range(n))), length=1, bound=1), session=bytes(16))
    found = (setup.corrupt, setup.dropouts, setup.neighbours, setup.threshold, setup.min_survivors)
    assert found == (colluders, dropouts, neighbours, threshold, smallest)
    note = " (one is withstood)" if n == 3 else ""
    row = f"| {n} | {colluders} | {dropouts}{note} | {neighbours} | {threshold} | {smallest} |"
    assert row in GUIDE.read_text()


def test_a_sum_may_not_come_down_to_one_honest_vector() -> None:
    parties = tuple(map(str, range(10)))
    spec = SumSpec(parties=parties, length=1, bound=1)
    with pytest.raises(SpecError, match="one honest vector"):
        Masked(corrupt=4, dropouts=5, server="semi-honest").open(spec)
    session = Masked(corrupt=4, dropouts=4, min_survivors=2, server="semi-honest").open(spec)
    assert session.statement["min_survivors"] == 6


def test_names_that_do_not_fit_a_message_are_refused_at_opening() -> None:
    with pytest.raises(SpecError, match="255 characters"):
        Masked().open(SumSpec(parties=("a", "b" * 256), length=1, bound=1))
    session = Masked().open(SumSpec(parties=("ä" * 255, "b" * 255), length=np.int64(1), bound=np.int64(3)))
    assert run(session, {"ä" * 255: [3], "b" * 255: [3]}).total.tolist() == [6]


def test_a_name_that_has_no_bytes_is_refused() -> None:
    for changes in ({"parties": ("a", "b\ud800", "c")}, {"encoding": "\ud800"}, {"encoding": "x" * 256}):
        with pytest.raises(SpecError):
            SumSpec(**({"parties": ("a", "b", "c"), "length": 1, "bound": 1} | changes))


@pytest.mark.parametrize("bits", [15, 31, 64])
def test_vectors_of_up_to_2_to_the_31_coordinates(bits: int) -> None:
    bound = ((1 << bits) - 1) // 4
    assert SumSpec(parties=("a", "b"), length=2**31, bound=bound).modulus_bits == bits
    with pytest.raises(SpecError):
        SumSpec(parties=("a", "b"), length=2**31 + 1, bound=bound)


def test_the_encoding_is_agreed_on() -> None:
    names = ("a", "b", "c")
    session = Masked().open(SumSpec(parties=names, length=1, bound=1, encoding="FixedPoint(bound=1.0)"))
    assert session.statement["encoding"] == "FixedPoint(bound=1.0)"
    assert run(session, {name: [1] for name in names}).total.tolist() == [3]


def test_the_dropouts_that_are_stated_can_be_withstood() -> None:
    def setup(**config: Any) -> Any:
        names = tuple(map(str, range(60)))
        return Masked(**config).setup(SumSpec(parties=names, length=1, bound=1), session=bytes(16))

    many = setup(corrupt=0, dropouts=0.6, server="semi-honest")
    assert (many.dropouts, many.min_survivors) == (36, 24)
    assert setup(min_survivors=57).dropouts == 3  # not the 6 it would plan for by itself
    assert setup(min_survivors=60).dropouts == 0
    with pytest.raises(SpecError, match="fewer than min_survivors = 58"):
        setup(min_survivors=58, dropouts=3)
    for n in range(2, 200):
        made = Masked().setup(SumSpec(parties=tuple(map(str, range(n))), length=1, bound=1), session=bytes(16))
        assert made.min_survivors <= n - made.dropouts


def test_a_semi_honest_server_allows_more_dropouts() -> None:
    parties = ("a", "b", "c", "d")
    with pytest.raises(SpecError):
        Masked(corrupt=0, dropouts=2).open(SumSpec(parties=parties, length=1, bound=1))
    session = Masked(corrupt=0, dropouts=2, min_survivors=2, server="semi-honest").open(
        SumSpec(parties=parties, length=1, bound=1)
    )
    assert run(session, {"a": [1], "d": [1]}).total.tolist() == [2]


def test_keys_that_ride_along_make_later_rounds_cheaper_even_after_a_failed_one() -> None:
    session = Masked().open(SPEC)
    sizes = [run(session, VECTORS).bytes_up["north"] for _ in range(3)]
    assert sizes[0] > sizes[1] == sizes[2]
    missing = run(session, {party: VECTORS[party] for party in ("south", "east")})
    assert missing.survivors == ("south", "east")
    assert run(session, VECTORS).total.tolist() == [13, 3, 0, 1]  # north advertises anew
