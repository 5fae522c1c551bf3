"""Robust means against plain formulas, and how often random groups are spoiled against counting and simulation."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize

from choral.protocols.robust.rules import RULES, robust_mean, spoiled, trimmed_at, withstands

TABLES = st.integers(3, 9).flatmap(
    lambda rows: st.lists(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), min_size=rows, max_size=rows)
).map(np.array)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(TABLES)
def test_median_and_trimmed_mean_are_numpys(table: np.ndarray) -> None:
    ordered, count = np.sort(table, axis=0), len(table)
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    assert np.allclose(robust_mean(table, "median"), middle, rtol=1e-15, atol=0)
    cut = trimmed_at(count)
    expected = [np.mean(sorted(column)[cut : count - cut]) for column in table.T]
    assert np.allclose(robust_mean(table, "trimmed"), expected, rtol=1e-12, atol=1e-9)


def distances(table: np.ndarray, point: np.ndarray) -> float:
    return float(np.linalg.norm(table - point, axis=1).sum())


@settings(max_examples=40, deadline=None)
@example(
    np.array([[0.0, 0.0], [0.0, -357536.0], [2706.0, -6.1e-5]])
)  # the median lies beside a row, and steps are small
@given(TABLES)
def test_no_point_is_nearer_to_all_than_the_geometric_median(table: np.ndarray) -> None:
    """Against another minimiser, started at the mean and at every row."""
    found = distances(table, robust_mean(table, "geometric"))
    others = [optimize.minimize(lambda p: distances(table, p), start, method="Nelder-Mead").fun for start in
              (table.mean(axis=0), table[0])]  # fmt: skip
    rows = [distances(table, row) for row in table]
    assert found <= min(*others, *rows) * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [3, 4, 20, 21])
def test_as_many_spoiled_rows_as_stated_move_it_no_further_than_the_others_reach(rule: str, count: int) -> None:
    generator = np.random.default_rng(count)
    rows = generator.normal(size=(count, 4))
    bad = withstands(rule, count)  # type: ignore[arg-type]
    assert 0 < bad < count / 2
    rows[:bad] = 1e9
    far = np.abs(robust_mean(rows, rule)).max()  # type: ignore[arg-type]
    assert far < 100.0
    assert np.abs(rows.mean(axis=0)).max() > 1e6
    if rule != "geometric":  # one more, and nothing is left
        rows[: bad + 1] = 1e9
        assert np.abs(robust_mean(rows, rule)).max() > 1e6  # type: ignore[arg-type]


@pytest.mark.parametrize(("sizes", "attackers"), [((2, 2, 3), 2), ((3, 3), 0), ((2, 3, 2), 5), ((1, 1, 1), 3)])
def test_spoiled_groups_are_counted_right(sizes: tuple[int, ...], attackers: int) -> None:
    owner = [group for group, size in enumerate(sizes) for _ in range(size)]
    every = list(itertools.combinations(range(len(owner)), attackers))
    counts = [len({owner[place] for place in chosen}) for chosen in every]
    expected = [Fraction(counts.count(k), len(every)) for k in range(len(sizes) + 1)]
    assert spoiled(sizes, attackers) == expected


def test_at_a_tenth_of_a_hundred_in_groups_of_five() -> None:
    chances = spoiled([5] * 20, 10)
    assert sum(chances) == 1
    assert float(sum(k * chance for k, chance in enumerate(chances))) == pytest.approx(8.3248, abs=1e-3)
    average = 20 * (1 - np.prod([(90 - i) / (100 - i) for i in range(5)]))
    assert float(sum(k * chance for k, chance in enumerate(chances))) == pytest.approx(average, rel=1e-12)
