"""Banded correlated noise in shares: what is proved of it in docs/noise-in-shares.md, computed.

h(t) of the parties that are left in row t add noise (C^-1 z_i)_t each, C lower triangular with b bands. Of a record
that takes part in rows at least b apart, with values x_t, the sums know no more than sum x_t^2 (C^T C)_tt / h(t), also
where who is left follows from earlier rows; and rounding costs what it does without correlation, at r / |C|.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

ROWS, PARTIES = 12, 5


def information(c: npt.NDArray[np.float64], there: npt.NDArray[np.bool_], x: npt.NDArray[np.float64]) -> float:
    """x^T S^-1 x, S the covariance of the sums' noise where party i is in the rows there[i]."""
    one = np.linalg.inv(c.T @ c)
    whole = np.einsum("st,is,it->st", one, there, there)
    return float(x @ np.linalg.solve(whole, x))


def strategy(
    generator: np.random.Generator, bands: int, rows: int = ROWS
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """C, and which parties are there in which rows, at random."""
    c = np.tril(generator.normal(size=(rows, rows)))
    c[np.subtract.outer(np.arange(rows), np.arange(rows)) >= bands] = 0.0
    np.fill_diagonal(c, 1.0)
    there = generator.random((PARTIES, rows)) < 0.6
    there[generator.integers(PARTIES, size=rows), np.arange(rows)] = True  # somebody is left in each row
    return c, there


def cases(bands: int, apart: int) -> list[float]:
    """What the sums know over what is claimed, for survivors of each row, strategies and records at random."""
    generator, found = np.random.default_rng(bands), []
    for _ in range(200):
        c, there = strategy(generator, bands)
        rows, x = np.arange(generator.integers(apart), ROWS, apart), np.zeros(ROWS)
        x[rows] = generator.normal(size=len(rows))
        claimed = float(np.sum(x**2 * np.diag(c.T @ c) / there.sum(0)))
        found.append(information(c, there, x) / claimed)
    return found


@pytest.mark.parametrize("bands", [2, 3, 4])
def test_banded_shares_hide_records_that_take_part_as_far_apart_as_there_are_bands(bands: int) -> None:
    assert max(cases(bands, bands)) <= 1.0 + 1e-9


def test_closer_than_that_they_do_not() -> None:
    """A record in every row, four equal bands, and all parties there: three times as much."""
    c = np.tril(np.ones((ROWS, ROWS))) - np.tril(np.ones((ROWS, ROWS)), -4)
    x, there = np.ones(ROWS), np.ones((PARTIES, ROWS), bool)
    assert information(c, there, x) > 3.0 * np.sum(np.diag(c.T @ c)) / PARTIES


def test_what_each_row_tells_after_those_before_it_adds_up_whoever_is_left() -> None:
    """Of row t what it tells of a record, given the rows before it, from nobody but who was there up to then."""
    generator = np.random.default_rng(5)
    for _ in range(50):
        c, there = strategy(generator, 3)
        one, x = np.linalg.inv(c.T @ c), generator.normal(size=ROWS)
        told = 0.0
        for t in range(ROWS):
            m = np.einsum("st,is,it->st", one[: t + 1, : t + 1], there[:, : t + 1], there[:, : t + 1])
            weights = np.linalg.solve(m[:t, :t], m[:t, t])
            told += (x[t] - weights @ x[:t]) ** 2 / (m[t, t] - weights @ m[:t, t])
        assert told == pytest.approx(information(c, there, x))


def test_rounding_is_as_uniform_as_without_correlation_at_a_share_less_by_the_norm() -> None:
    """k^T V k against its bound, V the covariance of all shares but one in each row, given the sums: 2,000 random k."""
    generator, rows, least = np.random.default_rng(7), 4, np.inf
    for _ in range(20):
        c, there = strategy(generator, 2, rows)
        one, norm = np.linalg.inv(c.T @ c), np.linalg.norm(c, 2)
        pairs = [(i, t) for t in range(rows) for i in np.flatnonzero(there[:, t])]
        shares = np.array([[one[t, u] * (i == j) for j, u in pairs] for i, t in pairs])
        sums = np.array([[float(t == row) for _, t in pairs] for row in range(rows)])
        across = sums @ shares
        given = shares - across.T @ np.linalg.solve(across @ sums.T, across)
        last = {t: n for n, (_, t) in enumerate(pairs)}
        free = [n for n in range(len(pairs)) if n not in last.values()]
        for k in generator.integers(-2, 3, (100, len(free))):
            whole = np.zeros(len(pairs))
            whole[free] = k
            bound = (whole @ whole - np.sum((sums @ whole) ** 2 / sums.sum(1))) / norm**2
            if k.any():
                least = min(least, float(whole @ given @ whole) / bound)
    assert least >= 1.0 - 1e-9
    assert least < 3.0  # no idle bound


def blocks(column: npt.NDArray[np.float64], rows: list[int]) -> npt.NDArray[np.float64]:
    """C of a party that makes these rows and begins anew after each gap: its noise in them is C^-1 z."""
    c = np.zeros((len(rows), len(rows)))
    for a, row in enumerate(rows):
        for b, earlier in enumerate(rows[: a + 1]):
            if row - earlier == a - b and row - earlier < len(column):  # all rows in between were made
                c[a, b] = column[row - earlier]
    return c


def told(
    column: npt.NDArray[np.float64],
    made: npt.NDArray[np.bool_],
    opened: npt.NDArray[np.bool_],
    x: npt.NDArray[np.float64],
    *,
    own_count: bool = False,
) -> float:
    """What the sums know over what is claimed: parties make rows and begin anew after gaps; some rows are lost.

    own_count: parties take what they made before for the rows before, and never begin anew.
    """
    whole = np.zeros((ROWS, ROWS))
    for i in range(PARTIES):
        rows = [int(t) for t in np.flatnonzero(made[i])]
        c = blocks(column, list(range(len(rows))) if own_count else rows)
        inverse = np.zeros((ROWS, ROWS))
        inverse[np.ix_(rows, rows)] = np.linalg.inv(c.T @ c)
        whole += inverse * np.outer(opened[i], opened[i])
    claimed = float(column @ column) * float(np.sum(x**2 / opened.sum(0)))
    return float(x @ np.linalg.solve(whole, x)) / claimed


@pytest.mark.parametrize("bands", [2, 3, 4])
def test_whoever_misses_rows_and_begins_anew_and_whatever_is_lost_no_more_is_told(bands: int) -> None:
    """300 random columns, rows that parties miss or that are lost after they were made, and records: at most 1."""
    generator, most = np.random.default_rng(bands), 0.0
    for _ in range(300):
        column = np.sort(generator.random(bands))[::-1] + 0.1
        column /= column[0]
        made = generator.random((PARTIES, ROWS)) < 0.7
        opened = made & (generator.random((PARTIES, ROWS)) < 0.8)
        sure = generator.integers(PARTIES, size=ROWS)
        made[sure, np.arange(ROWS)] = opened[sure, np.arange(ROWS)] = True
        x, rows = np.zeros(ROWS), np.arange(generator.integers(bands), ROWS, bands)
        x[rows] = generator.normal(size=len(rows))
        most = max(most, told(column, made, opened, x))
    assert 0.7 < most <= 1.0 + 1e-9


def test_parties_that_counted_their_own_vectors_would_tell_more() -> None:
    """Of five parties four are in rows 0 and 3 alone, a record's: their noise of the two would not be independent."""
    column = np.array([1.0, 0.9, 0.8])
    made = np.ones((PARTIES, ROWS), bool)
    made[1:, [1, 2]] = False
    x = np.zeros(ROWS)
    x[[0, 3]] = 1.0
    assert told(column, made, made, x) <= 1.0
    assert told(column, made, made, x, own_count=True) > 1.2
