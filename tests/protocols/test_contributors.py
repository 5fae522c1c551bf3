"""Two sums that publish no coordinate of fewer than t contributors, through the real masked sums."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from choral.protocols import (
    Identity,
    Masked,
    Plain,
    PolicyError,
    SpecError,
    StateUsedError,
    SumResult,
    SumSpec,
    TooFewSurvivorsError,
)
from choral.protocols.contributors import ContributorSession, Digits
from choral.protocols.crypto.modular_integers import unpack
from choral.protocols.interface import SumSession
from choral.protocols.tap import watched_by

NAMES = tuple("abcdef")
SPEC = SumSpec(parties=NAMES, length=5, bound=1000, encoding="test")
FEW = Masked(corrupt=1, dropouts=1, min_survivors=4, contributors=3)


def summed(vectors: Mapping[str, np.ndarray], sums: Masked = FEW, spec: SumSpec = SPEC) -> SumResult:
    summing = sums.open(spec).begin()
    for name, vector in vectors.items():
        summing.submit(name, vector)
    return summing.finish()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=6, max_size=6))
def test_equal_to_the_plain_sum_with_the_same_coordinates_left_out(rows: list[list[int]]) -> None:
    table = np.array(rows)
    result = summed(dict(zip(NAMES, table, strict=True)))
    counts = (table != 0).sum(axis=0)
    expected = np.where((counts > 0) & (counts < 3), 0, table.sum(axis=0))
    assert result.total.tolist() == expected.tolist()
    assert result.survivors == NAMES


def only_a() -> dict[str, np.ndarray]:
    """Coordinate 0 is a's alone, 1 is of two, 2 of three, 3 of all, 4 of nobody."""
    table = np.zeros((6, 5), dtype=np.int64)
    table[0] = [777, 5, 5, 5, 0]
    table[1, 1:4] = table[2, 2:4] = 5
    table[3:, 3] = 5
    return dict(zip(NAMES, table, strict=True))


def test_what_one_party_alone_has_is_not_in_the_sum() -> None:
    bare = summed(only_a(), replace(FEW, contributors=None))
    assert bare.total.tolist() == [777, 10, 15, 30, 0]  # which is the experiment: a's own value, for everybody
    kept = summed(only_a())
    assert kept.total.tolist() == [0, 0, 15, 30, 0]
    assert kept.bytes_up["a"] > bare.bytes_up["a"]


def test_it_is_never_sent_either() -> None:
    """With plain sums in the place of the masked ones, which show what a party hands over."""
    seen: dict[str, list[bytes]] = {}

    def watch(way: str, party: str, raw: bytes) -> None:
        seen.setdefault(party, []).append(raw)

    session = ContributorSession(SPEC, 3, corrupt=1, counting=Plain().open, adding=Plain().open)
    with watched_by(watch):
        summing = session.begin()
        for name, vector in only_a().items():
            summing.submit(name, vector)
        assert summing.finish().total.tolist() == [0, 0, 15, 30, 0]
    counted, added = seen["a"]
    assert unpack(counted, 5, 3).tolist() == [1, 1, 1, 1, 0]
    assert unpack(added, 5, SPEC.modulus_bits).tolist() == [0, 0, 5, 5, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 1000), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_counts_of_many_coordinates_share_a_word_and_never_carry(parties: int, length: int, seed: int) -> None:
    digits, generator = Digits.of(parties, length), np.random.default_rng(seed)
    chances = generator.choice([0.0, 0.01, 0.5, 1.0], size=length)  # some have all, which is the largest digit
    total = np.zeros(-(-length // digits.count), dtype=np.int64)
    there = generator.random((parties, length)) < chances
    for row in there:
        words = digits.words(row)
        assert words.min() >= 0
        assert words.max() <= digits.bound
        total += words
    lifted = np.where(total >> (digits.bits - 1) > 0, total - (1 << digits.bits), total)  # as a sum lifts it
    for opened in (total, lifted):
        assert digits.counts(opened, length).tolist() == there.sum(axis=0).tolist()


@pytest.mark.parametrize("parties", [3, 20, 50, 100, 1000])
def test_a_count_takes_a_tenth_of_a_bit_more_than_it_must(parties: int) -> None:
    digits = Digits.of(parties, 10_000)
    assert math.log2(parties + 1) <= digits.bits / digits.count < math.log2(parties + 1) + 0.1


def test_where_few_coordinates_are_left_the_second_sum_is_of_those_alone() -> None:
    """Of 4,000 coordinates 40 are of all, 400 of one party: both sums together are below one of all the values."""
    generator = np.random.default_rng(4)
    spec = replace(SPEC, length=4000, bound=2**40, weight_bound=7)
    vectors = {name: np.zeros(4000, dtype=np.int64) for name in NAMES}
    for vector in vectors.values():
        vector[:40] = generator.integers(1, 2**40, 40)
        vector[-1] = 7
    vectors["b"][100:500] = 5
    bare = summed(vectors, replace(FEW, contributors=None), spec)
    kept = summed(vectors, FEW, spec)
    assert kept.total[:40].tolist() == bare.total[:40].tolist()
    assert not kept.total[40:-1].any()
    assert kept.total[-1] == 42
    assert max(kept.bytes_up.values()) < 0.3 * max(bare.bytes_up.values())
    assert max(kept.bytes_down.values()) < max(bare.bytes_down.values()) + 4000 // 8 + 6000  # keys of another sum


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 2), min_size=8, max_size=8), min_size=6, max_size=6), st.integers(1, 4))
def test_every_coordinate_of_a_published_block_has_as_many_contributors(rows: list[list[int]], block: int) -> None:
    """Against plain numpy: who touches a block in part is not in it, neither in the count nor in the sum."""
    table = np.array([[*row, 3] for row in rows])
    spec = replace(SPEC, length=9, weight_bound=3)
    total = summed(dict(zip(NAMES, table, strict=True)), replace(FEW, block=block), spec).total
    for start in range(0, 8, block):
        part = table[:, start : min(start + block, 8)]
        whole = (part != 0).all(axis=1)
        expected = part[whole].sum(axis=0) if whole.sum() >= 3 else np.zeros(part.shape[1])
        assert total[start : start + part.shape[1]].tolist() == expected.tolist()
    assert total[-1] == 18


def test_counts_by_rows_take_a_fraction_of_a_bit() -> None:
    """An embedding of 500 rows of 16, of which each party touches some; 16 times fewer counts."""
    spec = replace(SPEC, length=8001, bound=2**20, weight_bound=1)
    table = np.zeros((6, 8001), dtype=np.int64)
    table[:, -1] = 1
    generator = np.random.default_rng(8)
    for row, words in zip(table, generator.random((6, 500)) < 0.7, strict=True):
        row[:-1] = np.repeat(words, 16) * 7
    up = {}
    for block in (1, 16):
        result = summed(dict(zip(NAMES, table, strict=True)), replace(FEW, block=block), spec)
        counts = (table != 0).sum(axis=0)
        assert result.total.tolist() == np.where(counts < 3, 0, table.sum(axis=0)).tolist()
        up[block] = max(result.bytes_up.values())
    per_count = Digits.of(6, 500).bits / Digits.of(6, 500).count
    assert (up[1] - up[16]) * 8 / 8000 == pytest.approx(per_count * 15 / 16, abs=0.05)
    with pytest.raises(SpecError, match="block without contributors"):
        Masked(block=2)


def test_the_parties_sign_which_coordinates_are_left() -> None:
    """Two sets of as many coordinates are two sums; the same again is the same session, whose keys are there."""
    opened: list[SumSpec] = []

    def adding(spec: SumSpec) -> SumSession:
        opened.append(spec)
        return Plain().open(spec)

    whole = replace(SPEC, length=2000)
    session = ContributorSession(whole, 3, corrupt=1, counting=Plain().open, adding=adding)
    for places in ([1, 2], [1, 2], [1, 3], range(1990)):
        summing = session.begin()
        for name in NAMES:
            vector = np.zeros(2000, dtype=np.int64)
            vector[places] = 9
            summing.submit(name, vector)
        expected = np.zeros(2000, dtype=np.int64)
        expected[places] = 54
        assert summing.finish().total.tolist() == expected.tolist()
    assert [spec.length for spec in opened] == [2, 2, 2000]  # ten zeros do not pay for keys
    assert len({spec.encoding for spec in opened}) == 3
    assert opened[-1] == whole


def test_a_policy_of_values_takes_words_of_counts() -> None:
    """Which are larger than any value, and no values."""
    spec = replace(SPEC, length=60, weight_bound=9)
    session = FEW.open(spec, policy=replace(FEW.policy(spec), encoding=spec.encoding))
    assert session.counting.spec.bound > 2**40  # type: ignore[attr-defined]
    summing = session.begin()
    for name, vector in only_a().items():
        summing.submit(name, np.append(np.repeat(vector, [1, 1, 1, 1, 55]), 9))
    assert summing.finish().total.tolist() == [0, 0, 15, 30, *[0] * 55, 54]


def test_the_last_coordinate_stays_the_weight() -> None:
    """Also where it is dropped itself: what would be last is a value, beyond what a weight may be."""
    spec = replace(SPEC, length=2000, weight_bound=7)
    summing = FEW.open(spec).begin()
    for name in NAMES:
        vector = np.zeros(2000, dtype=np.int64)
        vector[3], vector[-1] = 900, name == "a"
        summing.submit(name, vector)
    total = summing.finish().total
    assert (total[3], total[-1], int((total != 0).sum())) == (5400, 0, 1)


def test_a_policy_that_refuses_the_values_does_so_before_anything_is_counted() -> None:
    with pytest.raises(PolicyError, match="bound"):
        FEW.open(SPEC, policy=replace(FEW.policy(SPEC), maximum_bound=999))
    with pytest.raises(PolicyError, match="encoding"):
        FEW.open(SPEC, policy=replace(FEW.policy(SPEC), encoding="another"))


def test_who_drops_out_before_is_not_counted_and_the_rest_is_summed_over_exactly_those() -> None:
    vectors = only_a()
    del vectors["c"]  # one of the three of coordinate 2: two are left, so it goes as well
    session = FEW.open(SPEC)
    for _ in range(2):  # a later round of the session, with everybody again
        summing = session.begin()
        for name, vector in vectors.items():
            summing.submit(name, vector)
        result = summing.finish()
        assert result.survivors == ("a", "b", "d", "e", "f")
        assert result.total.tolist() == [0, 0, 0, 25, 0]
    summing = session.begin()
    for name, vector in only_a().items():
        summing.submit(name, vector)
    assert summing.finish().total.tolist() == [0, 0, 15, 30, 0]


def test_who_drops_out_after_it_was_counted_ends_the_round() -> None:
    summing = FEW.open(SPEC).begin({"c": "unmasking"})
    for name, vector in only_a().items():
        summing.submit(name, vector)
    with pytest.raises(TooFewSurvivorsError, match="have dropped out before they sent"):
        summing.finish()


def test_a_round_is_used_once() -> None:
    session = FEW.open(SPEC)
    first = session.begin()
    session.begin()
    with pytest.raises(StateUsedError):
        first.submit("a", only_a()["a"])


@pytest.mark.parametrize("least", [2, 7])
def test_so_few_that_colluders_may_be_all_but_one_are_refused(least: int) -> None:
    with pytest.raises(SpecError, match="expected 3 to 6"):
        replace(FEW, contributors=least).open(SPEC)


def test_sums_with_noise_are_refused() -> None:
    with pytest.raises(SpecError, match="noise is not zero"):
        FEW.open(replace(SPEC, bits=8))


def test_at_sites_it_is_refused_by_both_halves() -> None:
    with pytest.raises(SpecError, match="processes of their own"):
        FEW.party_driver(SPEC, name="a", identity=Identity(bytes(32)), policy=FEW.policy(SPEC))
    with pytest.raises(SpecError, match="processes of their own"):
        FEW.server_driver(SPEC, directory={})
    with pytest.raises(SpecError, match="processes of their own"):
        FEW.setup(SPEC, session=bytes(16))


def test_the_statement_says_what_is_released_besides() -> None:
    statement = FEW.open(SPEC).statement
    assert statement["contributors"] == 3
    assert statement["min_survivors"] == 4
    assert "how many contribute to each is known" in statement["trust"]
