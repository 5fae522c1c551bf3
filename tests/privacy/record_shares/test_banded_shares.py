"""Correlated noise in shares, which is refused: what is proved of its Gaussian part in docs/noise-in-shares.md.

h(t) of the parties that are left in row t add noise (C^-1 z_i)_t each, C lower triangular with b bands. Of a record
that takes part in rows at least b apart, with values x_t, the sums know no more than sum x_t^2 (C^T C)_tt / h(t).
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


def cases(bands: int, apart: int) -> list[float]:
    """What the sums know over what is claimed, for survivors of each row, strategies and records at random."""
    generator, found = np.random.default_rng(bands), []
    for _ in range(200):
        c = np.tril(generator.normal(size=(ROWS, ROWS)))
        c[np.subtract.outer(np.arange(ROWS), np.arange(ROWS)) >= bands] = 0.0
        np.fill_diagonal(c, 1.0)
        there = generator.random((PARTIES, ROWS)) < 0.6
        there[generator.integers(PARTIES, size=ROWS), np.arange(ROWS)] = True  # somebody is left in each row
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
