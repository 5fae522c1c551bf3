"""Integer noise, drawn exactly from integers: discrete Gaussian, Poisson and Skellam.

Samplers that compute with floats have holes and ratios that the analysis does not know (Mironov 2012). The ones
here use integers and rationals only, driven by a *source* of uniform bytes
(:data:`choral.privacy.noise.gaussian.Source`;
:func:`~choral.privacy.noise.gaussian.os_stream` is the one to use):

- :func:`discrete_gaussian` is the algorithm of Canonne, Kamath, Steinke 2020 ("The discrete Gaussian for differential
  privacy", algorithms 1 to 3): its law is exactly N_Z(0, variance), for every rational variance.
- :func:`poisson` and :func:`skellam` have exactly those laws, for every rational mean.

They take microseconds per number. For training there are tables (:mod:`choral.privacy.noise.integer_tables`), some
hundred times faster, whose distance from the same laws is below 2^-200; each is the oracle of the other in the tests.

All are vectorised: each step of the algorithm is done for all numbers that still need it.
"""

from __future__ import annotations

from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.privacy.noise.gaussian import Source

Int64Array = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def discrete_gaussian(count: int, variance: Fraction, source: Source) -> Int64Array:
    """Return `count` draws from N_Z(0, `variance`): P(k) proportional to exp(-k^2 / (2 variance)). Exact.

    Shape (count,), int64. variance: rational, > 0 (the parameter; from 1 up it is the variance to 1e-7).
    Reference: Canonne, Kamath, Steinke 2020, algorithm 3.
    Raises: ConfigError (a number out of range).
    """
    _check(count, variance, "variance")
    # t = floor(sigma) + 1; propose y of scale t, accept it with exp(-(|y| - variance / t)^2 / (2 variance)).
    t = isqrt(variance.numerator // variance.denominator) + 1
    a, b = variance.numerator, variance.denominator
    result = np.empty(count, dtype=np.int64)
    wanted = np.arange(count)
    while len(wanted):
        proposed = _discrete_laplace(len(wanted), t, source)
        distance = np.abs(proposed.astype(object) * (t * b)) - a  # times 1 / (t b)
        # (|y| t b - a)^2 / (2 t^2 a b) = (|y| - v / t)^2 / (2 v) for v = a / b
        accepted = _bernoulli_exp(distance * distance, 2 * t * t * a * b, source)
        result[wanted[accepted]] = proposed[accepted]
        wanted = wanted[~accepted]
    return result


def poisson(count: int, mean: Fraction, source: Source) -> Int64Array:
    """Return `count` draws from Poisson(`mean`), exact for every rational mean >= 0. Time grows with the mean.

    Shape (count,), int64. A sum of independent pieces of mean <= 1/2; a piece with mean g proposes the number of the
    first failure in a series of Bernoulli(g / k), k = 1, 2, ..., which is n + 1 with probability
    g^n / n! (1 - g / (n + 1)) (von Neumann 1951), and accepts it with probability (1 - g) / (1 - g / (n + 1)): what is
    left is proportional to g^n / n!.
    Raises: ConfigError (a number out of range).
    """
    if mean == 0 and count >= 0:
        return np.zeros(count, dtype=np.int64)
    _check(count, mean, "mean")
    pieces = -(-2 * mean.numerator // mean.denominator)
    total = np.zeros(count, dtype=np.int64)
    for start in range(0, pieces, 64):
        many = min(64, pieces - start)
        total += _small_poisson(count * many, mean / pieces, source).reshape(many, count).sum(0)
    return total


def skellam(count: int, variance: Fraction, source: Source) -> Int64Array:
    """Return `count` draws from Skellam of this `variance`: Poisson(variance / 2) - Poisson(variance / 2). Exact.

    Sums of independent ones are again Skellam; their variances add. Shape (count,), int64.
    Raises: ConfigError (a number out of range).
    """
    _check(count, variance, "variance")
    both = poisson(2 * count, variance / 2, source)
    return both[:count] - both[count:]


def _small_poisson(count: int, mean: Fraction, source: Source) -> Int64Array:
    result = np.empty(count, dtype=np.int64)
    wanted = np.arange(count)
    while len(wanted):
        number = _first_failure(np.full(len(wanted), mean.numerator, object), mean.denominator, source) - 1
        # (1 - g) / (1 - g / (n + 1)) with g = a / b is (n + 1) (b - a) / ((n + 1) b - a)
        times = number.astype(object) + 1
        a, b = mean.numerator, mean.denominator
        accepted = _bernoulli(times * (b - a), times * b - a, source)
        result[wanted[accepted]] = number[accepted]
        wanted = wanted[~accepted]
    return result


def _discrete_laplace(count: int, t: int, source: Source) -> Int64Array:
    """P(y) proportional to exp(-|y| / t), exact (Canonne, Kamath, Steinke 2020, algorithm 2 with s = 1)."""
    result = np.empty(count, dtype=np.int64)
    wanted = np.arange(count)
    while len(wanted):
        low = _uniform_below(t, len(wanted), source)
        accepted = _bernoulli_exp(low.astype(object), t, source)
        wanted_now, low = wanted[accepted], low[accepted]
        high = _geometric(len(low), source)
        magnitude = low + t * high
        negative = (np.frombuffer(source(len(low)), np.uint8) & 1).astype(np.bool_)
        kept = ~(negative & (magnitude == 0))
        result[wanted_now[kept]] = np.where(negative, -magnitude, magnitude)[kept]
        left = np.ones(len(wanted), dtype=np.bool_)
        left[np.flatnonzero(accepted)[kept]] = False
        wanted = wanted[left]
    return result


def _geometric(count: int, source: Source) -> Int64Array:
    """How many times Bernoulli(exp(-1)) succeeds before it fails."""
    result = np.zeros(count, dtype=np.int64)
    going = np.arange(count)
    while len(going):
        going = going[_bernoulli_exp(np.ones(len(going), object), 1, source)]
        result[going] += 1
    return result


def _bernoulli_exp(numerators: npt.NDArray[Any], denominator: int, source: Source) -> Bools:
    """True with probability exp(-numerator / denominator), for each numerator >= 0 (their algorithm 1)."""
    result = np.ones(len(numerators), dtype=np.bool_)
    left = numerators.copy()
    while True:  # exp(-g) = exp(-1)^floor(g) exp(-(g - floor(g)))
        whole = np.flatnonzero(result & (left > denominator))
        if not len(whole):
            break
        result[whole] = _below_one(np.full(len(whole), denominator, object), denominator, source)
        left[whole] -= denominator
    open_ = np.flatnonzero(result)
    result[open_] = _below_one(left[open_], denominator, source)
    return result


def _below_one(numerators: npt.NDArray[Any], denominator: int, source: Source) -> Bools:
    """True with probability exp(-g), g = numerator / denominator in [0, 1]: the first failure is at an odd place."""
    return np.asarray(_first_failure(numerators, denominator, source) % 2 == 1)


def _first_failure(numerators: npt.NDArray[Any], denominator: int, source: Source) -> Int64Array:
    """The least k >= 1 at which Bernoulli(g / k) fails, g = numerator / denominator in [0, 1]."""
    place = np.ones(len(numerators), dtype=np.int64)
    going = np.arange(len(numerators))
    while len(going):
        k = int(place[going[0]])  # the same for all that are still going
        going = going[_bernoulli(numerators[going], np.full(len(going), denominator * k, object), source)]
        place[going] += 1
    return place


def _bernoulli(numerators: npt.NDArray[Any], denominators: npt.NDArray[Any], source: Source) -> Bools:
    """True with probability numerator / denominator in [0, 1], by binary expansion: 32 bits at a time until decided."""
    result = numerators >= denominators
    open_ = np.flatnonzero(~result.astype(np.bool_))
    result = result.astype(np.bool_)
    rest, below = numerators[open_].astype(object), denominators[open_].astype(object)
    while len(open_):
        shifted = rest * 2**32
        digit, rest = shifted // below, shifted % below
        word = np.frombuffer(source(4 * len(open_)), dtype="<u4")
        result[open_[word < digit]] = True
        tied = (word == digit) & (rest > 0)  # with nothing left of the expansion, equal means not below
        tied = tied.astype(np.bool_)
        open_, rest, below = open_[tied], rest[tied], below[tied]
    return result


def _uniform_below(bound: int, count: int, source: Source) -> Int64Array:
    """Uniform on 0, ..., bound - 1, exact: words masked to the bound's bits, and drawn again when they exceed it."""
    mask = np.uint64((1 << (bound - 1).bit_length()) - 1)
    result = np.empty(count, dtype=np.int64)
    wanted = np.arange(count)
    while len(wanted):
        words = np.frombuffer(source(8 * len(wanted)), dtype="<u8") & mask
        good = words < bound
        result[wanted[good]] = words[good].astype(np.int64)
        wanted = wanted[~good]
    return result


def _check(count: int, parameter: Fraction, name: str) -> None:
    if count < 0:
        raise ConfigError(f"count is {count}, expected >= 0")
    if isinstance(parameter, bool) or not isinstance(parameter, int | Fraction):
        raise ConfigError(
            f"{name} is a {type(parameter).__name__}, expected an integer or a Fraction",
            hint="Fraction(x) is exactly the float x; integer noise is drawn from rationals only.",
        )
    if not 0 < parameter < 2**60:
        raise ConfigError(f"{name} is {parameter}, expected a number > 0 and below 2^60")
