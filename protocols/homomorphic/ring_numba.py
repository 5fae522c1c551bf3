"""The ring's bulk arithmetic in compiled code for the CPU; :mod:`choral.protocols.homomorphic.ring` says what it does.

LANES blocks are transformed side by side, the same coefficient of all of them next to each other in memory, so that
every step of every stage is the same operation on a run of numbers, which the compiler turns into vector instructions.
``contract`` lets it fuse a product and a sum into one instruction: the products are exact either way. No other rule of
floating point is relaxed.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from choral.protocols.homomorphic.ring import REDUCE, Ring

LANES = 8
_CHUNK = 256
_ROUND = float(3 << 51)
"""Adding and taking away 1.5 * 2^52 rounds a number below 2^51 in magnitude to the nearest integer."""

_compiled = numba.njit(fastmath={"contract"}, boundscheck=False, cache=True, nogil=True)


class NumbaKernels:
    """See :class:`choral.protocols.homomorphic.ring.Kernels`."""

    def encrypt(self, ring: Ring, digits: Any, scales: Any, errors: Any, public: Any, key: Any) -> NDArray[np.uint32]:
        out = np.empty(public.shape, np.uint32)
        primes = np.array(ring.primes, np.float64)
        _encrypt(digits, scales, errors, public, key, ring.roots, ring.quotients, primes, out)
        return out

    def transform(self, ring: Ring, polynomial: NDArray[np.float64]) -> NDArray[np.float64]:
        values = np.empty((len(ring.primes), ring.degree))
        for row, prime in enumerate(ring.primes):
            values[row] = polynomial
            _reduce(values[row], float(prime))
            _forward(values[row], ring.roots[row], ring.quotients[row], float(prime), 1)
            _reduce(values[row], float(prime))
        return values

    def remove(self, ring: Ring, sums: Any, public: Any, key: Any) -> NDArray[np.uint32]:
        out = np.empty(public.shape, np.uint32)
        primes = np.array(ring.primes, np.float64)
        _remove(sums, public, key, ring.inverse_roots, ring.inverse_quotients, ring.last, primes, out)
        return out

    def accept(self, words: NDArray[np.uint32], prime: int, count: int) -> NDArray[np.uint32] | None:
        out = np.empty(count, np.uint32)
        mask = (1 << prime.bit_length()) - 1
        return out if _accept(words, np.uint32(mask), np.uint32(prime), out) == count else None

    def magnitudes(self, words: Any, thresholds: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
        counts, ties = np.empty(words.shape, np.int8), np.empty(words.shape, np.bool_)
        _magnitudes(words, thresholds, counts, ties)
        return counts, ties


@_compiled
def _reduce(x: Any, prime: float) -> None:
    """Balanced residues of integers below 2^52 in magnitude, off by one multiple of the prime at most."""
    inverse = 1.0 / prime
    for z in range(x.size):
        value = x[z]
        x[z] = value - ((value * inverse + _ROUND) - _ROUND) * prime


@_compiled
def _forward(x: Any, roots: Any, quotients: Any, prime: float, lanes: int) -> None:
    half = x.size // lanes
    blocks = 1
    stage = 0
    while half > 1:
        half //= 2
        run = half * lanes
        for block in range(blocks):
            root = roots[blocks + block]
            quotient = quotients[blocks + block]
            low = x[2 * block * run : (2 * block + 1) * run]
            high = x[(2 * block + 1) * run : (2 * block + 2) * run]
            for z in range(run):
                value = high[z]
                product = value * root - ((value * quotient + _ROUND) - _ROUND) * prime
                kept = low[z]
                low[z] = kept + product
                high[z] = kept - product
        blocks *= 2
        stage += 1
        if stage == REDUCE:
            _reduce(x, prime)


@_compiled
def _backward(x: Any, roots: Any, quotients: Any, prime: float, lanes: int) -> None:
    """The stages of :func:`_forward` in reverse; without the division by N. Reduces the sums in each stage."""
    inverse = 1.0 / prime
    run = lanes
    blocks = x.size // (2 * lanes)
    while blocks >= 1:
        for block in range(blocks):
            root = roots[blocks + block]
            quotient = quotients[blocks + block]
            low = x[2 * block * run : (2 * block + 1) * run]
            high = x[(2 * block + 1) * run : (2 * block + 2) * run]
            for z in range(run):
                total = low[z] + high[z]
                value = low[z] - high[z]
                low[z] = total - ((total * inverse + _ROUND) - _ROUND) * prime
                high[z] = value * root - ((value * quotient + _ROUND) - _ROUND) * prime
        blocks //= 2
        run *= 2


@_compiled
def _encrypt(
    digits: Any,
    scales: Any,
    errors: Any,
    public: Any,
    key: Any,
    roots: Any,
    quotients: Any,
    primes: Any,
    out: Any,
) -> None:
    count, blocks, degree = digits.shape
    x = np.zeros(degree * LANES)
    for first in range(0, blocks, LANES):
        lanes = min(LANES, blocks - first)
        for row in range(primes.size):
            prime = primes[row]
            inverse = 1.0 / prime
            for lane in range(lanes):
                for place in range(degree):
                    x[place * LANES + lane] = errors[first + lane, place]
                for digit in range(count):
                    scale = scales[row, digit]
                    for place in range(degree):
                        value = digits[digit, first + lane, place]
                        value -= ((value * inverse + _ROUND) - _ROUND) * prime
                        x[place * LANES + lane] += value * scale
            _reduce(x, prime)
            _forward(x, roots[row], quotients[row], prime, LANES)
            for lane in range(lanes):
                for place in range(degree):
                    product = public[first + lane, row, place] * key[row, place]
                    value = x[place * LANES + lane] + product
                    value -= ((value * inverse + _ROUND) - _ROUND) * prime
                    out[first + lane, row, place] = np.uint32(np.int64(value + (value < 0) * prime))


@_compiled
def _remove(sums: Any, public: Any, key: Any, roots: Any, quotients: Any, last: Any, primes: Any, out: Any) -> None:
    blocks, _, degree = public.shape
    x = np.zeros(degree * LANES)
    for first in range(0, blocks, LANES):
        lanes = min(LANES, blocks - first)
        for row in range(primes.size):
            prime = primes[row]
            inverse = 1.0 / prime
            for lane in range(lanes):
                for place in range(degree):
                    product = public[first + lane, row, place] * key[row, place]
                    value = sums[first + lane, row, place] - product
                    x[place * LANES + lane] = value - ((value * inverse + _ROUND) - _ROUND) * prime
            _backward(x, roots[row], quotients[row], prime, LANES)
            for lane in range(lanes):
                for place in range(degree):
                    value = x[place * LANES + lane]
                    value -= ((value * inverse + _ROUND) - _ROUND) * prime
                    value *= last[row]
                    value -= ((value * inverse + _ROUND) - _ROUND) * prime
                    out[first + lane, row, place] = np.uint32(np.int64(value + (value < 0) * prime))


@_compiled
def _accept(words: Any, mask: Any, prime: Any, out: Any) -> int:
    found = 0
    for word in words:
        value = word & mask
        if value < prime:
            out[found] = value
            found += 1
            if found == out.size:
                break
    return found


@_compiled
def _magnitudes(words: Any, thresholds: Any, counts: Any, ties: Any) -> None:
    """By chunks that stay in the first-level cache, all words of one against one threshold at a time."""
    values = np.empty(_CHUNK, np.int64)
    above = np.empty(_CHUNK, np.int64)
    equal = np.empty(_CHUNK, np.int64)
    for first in range(0, words.size, _CHUNK):
        size = min(_CHUNK, words.size - first)
        for z in range(size):
            values[z] = np.int64(words[first + z] >> np.uint64(1))
            above[z] = 0
            equal[z] = 0
        for threshold in thresholds:
            for z in range(_CHUNK):
                above[z] += values[z] < threshold
                equal[z] |= values[z] == threshold
        for z in range(size):
            counts[first + z] = above[z]
            ties[first + z] = equal[z]
