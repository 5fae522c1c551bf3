"""Two sums that publish no coordinate of fewer than t contributors, through the real masked sums."""

from __future__ import annotations

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
    SpecError,
    StateUsedError,
    SumResult,
    SumSpec,
    TooFewSurvivorsError,
)
from choral.protocols.contributors import ContributorSession
from choral.protocols.crypto.modular_integers import unpack
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
