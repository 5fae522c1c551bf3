"""The best strategy of a kind: coefficients of C that minimise the noise in the model at a given epsilon.

What is minimised is the mean over all steps of the squared noise in the prefix sums, times the squared sensitivity
of C under the participation schema of :mod:`choral.privacy.accounting.matrix_strategies`: the usual objective of the
matrix mechanism (Denisov et al. 2022, equation 6). With n steps in all, c the first column of C,
d that of C^-1, and p_s = d_0 + ... + d_s, the first column of A C^-1, its logarithm is, but for a constant,

    log E + log S,   E = sum_{s < n} (n - s) / n p_s^2,   S = the squared sensitivity.                            (1)

As power series c(x) d(x) = 1 and p(x) = d(x) / (1 - x), so

    d p(x) / d c_j = -x^j p(x) d(x),                                                                               (2)
    d E / d c_j = -2 sum_{s >= j} (n - s) / n p_s [p d]_{s - j},                                                   (3)
    d S / d c_j = 2 sum_{q >= p} (c_t + c_{t + m} + ... + c_{t + q m}),  j = t + p m, t < m steps of a pass.       (4)

Gradients are exact; the optimiser is SciPy's L-BFGS-B.

>>> round(error(Banded((1.0,)), 100, 10) / error(buffered(100, 10), 100, 10), 1)
5.8
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import expit

from choral.errors import ConfigError
from choral.privacy.accounting.matrix_strategies import Banded, Buffered, Floats, error

BUFFERS = 2
_FINEST = 2e-6  # how near to 1 a decay may come: beyond, the buffer is a plain sum


def square_root(count: int) -> Floats:
    """Return the first column of the square root of the prefix-sum matrix, shape (count,): binom(2t, t) / 4^t.

    Reference: Fichtenberger, Henzinger, Upadhyay 2023, "Constant matters", where C = B = A^(1/2).
    """
    t = np.arange(1, count)
    return np.concatenate([[1.0], np.cumprod((2.0 * t - 1.0) / (2.0 * t))])


@lru_cache(maxsize=64)
def banded(steps: int, passes: int, bands: int) -> Banded:
    """Return the best banded strategy for `passes` passes of `steps`.

    Raises: ConfigError (bands below 1, or above `steps`: then one record's columns would overlap).
    """
    _check(steps, passes)
    if not 1 <= bands <= steps:
        raise ConfigError(
            f"bands is {bands}, expected 1 to {steps}, the steps of a pass",
            hint="Fewer bands, smaller batches, or mechanism='buffered'.",
        )
    start = square_root(bands)
    if bands == 1:
        return Banded((1.0,))

    def strategy(ratios: Floats) -> Banded:
        # Coefficients that do not increase keep C^-1 stable: no zero inside the unit circle (Enestroem and Kakeya).
        return Banded((1.0, *np.cumprod(ratios).tolist()))

    def objective(ratios: Floats) -> tuple[float, Floats]:
        value, slope = _objective(strategy(ratios), steps, passes)
        weighted = np.cumprod(ratios) * slope[1:bands]
        return value, np.cumsum(weighted[::-1])[::-1] / ratios

    ratios = _least(objective, start[1:] / start[:-1], [(1e-4, 1.0)] * (bands - 1))
    return strategy(ratios)


@lru_cache(maxsize=64)
def buffered(steps: int, passes: int, buffers: int = BUFFERS) -> Buffered:
    """Return the best strategy with `buffers` buffers that a search from several starts finds.

    Raises: ConfigError (buffers below 1).
    """
    _check(steps, passes)
    if buffers < 1:
        raise ConfigError(f"buffers is {buffers}, expected >= 1", hint="Two are near the best.")
    count = steps * passes
    ages = np.arange(count - 1, dtype=np.float64)[:, None]  # entry t + 1 of the column has decays to the power t

    def strategy(x: Floats) -> Buffered:
        return Buffered(tuple(_decays(x[:buffers]).tolist()), tuple(np.exp(x[buffers:]).tolist()))

    def objective(x: Floats) -> tuple[float, Floats]:
        decays, weights = _decays(x[:buffers]), np.exp(x[buffers:])
        value, slope = _objective(strategy(x), steps, passes)
        powers = decays**ages
        by_weight = slope[1:] @ powers
        by_decay = (slope[1:] * ages[:, 0]) @ powers * weights / decays
        by_x = (1.0 - 2.0 * _FINEST) * expit(x[:buffers]) * expit(-x[:buffers])
        return value, np.concatenate([by_decay * by_x, by_weight * weights])

    starts = [np.linspace(0.5, reach, buffers) for reach in (2.0, 5.0, 8.0)]
    # Weights that sum to at most 1 keep C^-1 stable: the zeros of the series of C are real, and it is > 0 at -1.
    bounds = [(-6.0, 13.0)] * buffers + [(-14.0, -math.log(buffers))] * buffers
    found = [_least(objective, np.concatenate([s, np.full(buffers, -2.0)]), bounds) for s in starts]
    return min((strategy(x) for x in found), key=lambda s: error(s, steps, passes))


def _decays(x: Floats) -> Floats:
    decays: Floats = _FINEST + (1.0 - 2.0 * _FINEST) * expit(x)
    return decays


def _objective(strategy: Banded | Buffered, steps: int, passes: int) -> tuple[float, Floats]:
    """Return log(sum of squared errors * squared sensitivity) and its gradient in all entries of C's column."""
    count = steps * passes
    inverse = strategy.inverse(count)
    prefix = np.cumsum(inverse)
    share = (count - np.arange(count)) / count  # entry i of the column of A C^-1 is in the last count - i sums
    squares = float(share @ prefix**2)  # E
    spread = _convolved(prefix, inverse)  # p d, of (2)
    by_error = -2.0 * _convolved((share * prefix)[::-1], spread)[::-1]  # (3)
    sums = np.cumsum(strategy.column(count).reshape(passes, steps), axis=0)
    cost = float((sums**2).sum())  # S
    by_cost = 2.0 * np.cumsum(sums[::-1], axis=0)[::-1].reshape(-1)  # (4)
    return float(np.log(squares) + np.log(cost)), by_error / squares + by_cost / cost  # (1)


def _convolved(a: Floats, b: Floats) -> Floats:
    size = int(next_fast_len(2 * len(a), real=True))
    result: Floats = irfft(rfft(a, size) * rfft(b, size), size)[: len(a)]
    return result


def _least(
    objective: Callable[[Floats], tuple[float, Floats]], start: Floats, bounds: list[tuple[float, float]]
) -> Floats:
    from scipy.optimize import minimize  # here, since it takes long to load

    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500})
    best: Floats = found.x if found.fun <= objective(start)[0] else start
    return best


def _check(steps: int, passes: int) -> None:
    if steps < 1 or passes < 1:
        raise ConfigError(f"steps is {steps} and passes {passes}, expected both >= 1")
