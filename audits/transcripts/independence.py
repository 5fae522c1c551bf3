"""Whether masked vectors say anything: of another masked vector, or of a vector that the auditor knows.

Under the null hypothesis a masked vector y is uniform modulo 2^b and independent of everything it is held against. Each
test gives an upper bound on the probability of what was seen, by a Chernoff bound, exact for any length:

- *difference* (and *sum*): T = sum over k of cos(2 pi (y_k -+ v_k) / 2^b). E exp(t cos) = I_0(t) <= exp(t^2 / 4), so
  P[T >= s] <= exp(-s^2 / d). Finds y = v + something small, in all coordinates or in a share of them.
- *linear*: L = sum over k of w_k u_k for u = y / 2^(b-1) lifted to [-1, 1) and w = v centred, of norm 1. E exp(t u) =
  sinh(t) / t <= exp(t^2 / 6), so P[|L| >= s] <= 2 exp(-3 s^2 / 2). Finds y that follows v at any scale.

Both take 2^b as continuous; at b >= 8 bits the error is beyond double precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST = 16_384  # coordinates that are looked at, evenly spaced: enough to see a share of 5 % of them
FEWEST_BITS = 8


class SmallestPValue(NamedTuple):
    """The smallest bound on a p-value over several tests. one, other: places in what was compared. tests: how many."""

    p_value: float
    one: int
    other: int
    tests: int


def thinned(values: NDArray[Any]) -> NDArray[Any]:
    """At most MOST coordinates, evenly spaced."""
    return values[:: max(1, -(-values.size // MOST))]


def phases(vectors: Sequence[NDArray[Any]], bits: int) -> NDArray[np.complex128]:
    """exp(2 pi i v / 2^bits), shape (vectors, coordinates); integers of any type."""
    rows = [(thinned(vector).astype(np.uint64) << np.uint64(64 - bits)).view(np.int64) for vector in vectors]
    turns: NDArray[np.float64] = np.stack(rows).astype(np.float64) / 2.0**64
    return np.asarray(np.exp(2j * math.pi * turns), np.complex128)


def smallest_of_pairs(rows: NDArray[np.complex128], *, sums: bool) -> SmallestPValue:
    """Every two of ``rows``, by their difference and, with ``sums``, their sum."""
    count, length = rows.shape
    if count < 2:
        return SmallestPValue(1.0, 0, 0, 0)
    statistic = (rows @ rows.conj().T).real
    if sums:
        statistic = np.maximum(statistic, (rows @ rows.T).real)
    np.fill_diagonal(statistic, -np.inf)
    place = int(statistic.argmax())
    tests = count * (count - 1) // 2 * (2 if sums else 1)
    return SmallestPValue(_cosine_bound(float(statistic.flat[place]), length), place // count, place % count, tests)


def turns(residues: NDArray[Any], modulus: int) -> NDArray[np.complex128]:
    """exp(2 pi i r / modulus) for residues, of any shape."""
    return np.asarray(np.exp(2j * math.pi / modulus * residues.astype(np.float64)), np.complex128)


def smallest_by_difference(rows: NDArray[np.complex128], known: NDArray[np.complex128]) -> SmallestPValue:
    """Every one of ``rows`` against every one of ``known``, both as phases, by their difference."""
    statistic = (rows @ known.conj().T).real
    place = int(statistic.argmax())
    one = place // known.shape[0]
    bound = _cosine_bound(float(statistic.flat[place]), rows.shape[1])
    return SmallestPValue(bound, one, _nearest(rows[one], known), statistic.size)


def smallest_of_known(rows: NDArray[np.complex128], known: Sequence[NDArray[np.int64]], bits: int) -> SmallestPValue:
    """Every one of ``rows`` against every vector of ``known``, by their difference and by the linear test."""
    first = smallest_by_difference(rows, phases(known, bits))
    lifted = np.angle(rows) / math.pi  # in (-1, 1], as y / 2^(b-1)
    directions = np.stack([_direction(thinned(vector)) for vector in known])
    by_line = np.abs(lifted @ directions.T)
    place = int(by_line.argmax())
    second = SmallestPValue(_line_bound(float(by_line.flat[place])), *divmod(place, len(known)), 0)
    return min(first, second)._replace(tests=2 * by_line.size)


def _nearest(row: NDArray[np.complex128], known: NDArray[np.complex128]) -> int:
    """Which of ``known`` it is: vectors that are all small differ little from each other at the scale of 2^bits.

    Coordinates that are equal, or nearly so, weigh most in the mean logarithm of the distance.
    """
    distance = np.abs(np.angle(row * known.conj()))
    return int(np.log(distance + 1e-18).mean(axis=1).argmin())


def detectable_share(length: int, tests: int, level: float) -> float:
    """The share of coordinates, left unmasked, that the difference test finds: d f reaches its threshold there."""
    seen = min(length, len(range(0, length, max(1, -(-length // MOST)))))
    return min(1.0, math.sqrt(math.log(max(tests, 1) / level) / seen))


def _direction(vector: NDArray[np.int64]) -> NDArray[np.float64]:
    """Centred, of norm 1; zero for a constant vector, which nothing can follow."""
    centred = vector.astype(np.float64) - float(vector.astype(np.float64).mean())
    norm = float(np.linalg.norm(centred))
    return centred / norm if norm > 0 else centred


def _cosine_bound(statistic: float, length: int) -> float:
    return math.exp(-(max(statistic, 0.0) ** 2) / length)


def _line_bound(statistic: float) -> float:
    return min(1.0, 2.0 * math.exp(-1.5 * statistic**2))
