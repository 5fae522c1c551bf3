"""The ring's bulk arithmetic in compiled code for the CPU; :mod:`choral.protocols.homomorphic.ring` says what it does.

All lanes of a coefficient lie next to each other in memory, so that every step of every stage is the same operation on
a run of numbers, which the compiler turns into vector instructions. ``contract`` lets it fuse a product and a sum into
one
instruction: the products are exact either way. No other rule of floating point is relaxed.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from choral.protocols.homomorphic.ring import REDUCE, Ring

_CHUNK = 256
_ROUND = float(3 << 51)
"""Adding and taking away 1.5 * 2^52 rounds a number below 2^51 in magnitude to the nearest integer."""

_compiled = numba.njit(fastmath={"contract"}, boundscheck=False, cache=True, nogil=True)


class NumbaKernels:
    """See :class:`choral.protocols.homomorphic.ring.Kernels`."""

    def encrypt(
        self, ring: Ring, digits: Any, scales: Any, errors: Any, public: Any, key: Any, *, lanes: int
    ) -> NDArray[np.int32]:
        out = np.empty(public.shape, np.int32)
        primes = np.array(ring.primes, np.float64)
        spread = np.repeat(key, lanes, axis=1)
        _encrypt(digits, scales, errors, public, spread, ring.roots, ring.quotients, primes, lanes, out)
        return out

    def transform(self, ring: Ring, polynomial: NDArray[np.float64]) -> NDArray[np.int32]:
        values = np.empty((len(ring.primes), ring.degree))
        for row, prime in enumerate(ring.primes):
            values[row] = polynomial
            _reduce(values[row], float(prime))
            _forward(values[row], ring.roots[row], ring.quotients[row], float(prime), 1)
            _reduce(values[row], float(prime))
        return values.astype(np.int32)

    def remove(self, ring: Ring, sums: Any, public: Any, key: Any, *, lanes: int) -> NDArray[np.int32]:
        out = np.empty(public.shape, np.int32)
        primes = np.array(ring.primes, np.float64)
        spread = np.repeat(key, lanes, axis=1)
        roots, quotients = ring.inverse_roots, ring.inverse_quotients
        _remove(sums, public, spread, roots, quotients, ring.last, primes, lanes, out)
        return out

    def accept(self, words: NDArray[np.uint32], prime: int, count: int) -> NDArray[np.int32] | None:
        out = np.empty(count, np.int32)
        mask = (1 << prime.bit_length()) - 1
        return out if _accept(words.view(np.int32), np.int32(mask), np.int32(prime), out) == count else None

    def magnitudes(self, words: Any, thresholds: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
        counts, ties = np.empty(words.shape, np.int8), np.empty(words.shape, np.bool_)
        _magnitudes(words, thresholds, counts, ties)
        return counts, ties

    def pack(self, residues: NDArray[np.int32], bits: int) -> bytes:
        words = np.zeros(residues.size * bits // 32 + 1, np.uint32)
        _pack(residues, bits, words)
        return words[:-1].astype("<u4", copy=False).tobytes()

    def unpack(self, data: bytes, count: int, bits: int) -> NDArray[np.int32]:
        out = np.empty(count, np.int32)
        words = np.frombuffer(data, "<u4").astype(np.uint32, copy=False)
        _unpack(words, bits, out)
        return out


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
    lanes: int,
    out: Any,
) -> None:
    x = np.empty(errors.size)
    for row in range(primes.size):
        prime = primes[row]
        for z in range(x.size):
            x[z] = errors[z]
        for digit in range(digits.shape[0]):
            _add_scaled(x, digits[digit], scales[row, digit], prime)
        _reduce(x, prime)
        _forward(x, roots[row], quotients[row], prime, lanes)
        _add_product(x, public[row], key[row], prime, out[row])


@_compiled
def _add_scaled(x: Any, values: Any, scale: float, prime: float) -> None:
    inverse = 1.0 / prime
    for z in range(x.size):
        value = values[z]
        x[z] += (value - ((value * inverse + _ROUND) - _ROUND) * prime) * scale


@_compiled
def _add_product(x: Any, public: Any, key: Any, prime: float, out: Any) -> None:
    inverse = 1.0 / prime
    for z in range(x.size):
        value = x[z] + np.float64(public[z]) * np.float64(key[z])
        value -= ((value * inverse + _ROUND) - _ROUND) * prime
        out[z] = np.int32(value + (prime if value < 0.0 else 0.0))


@_compiled
def _remove(
    sums: Any, public: Any, key: Any, roots: Any, quotients: Any, last: Any, primes: Any, lanes: int, out: Any
) -> None:
    x = np.empty(sums.shape[1])
    for row in range(primes.size):
        prime = primes[row]
        inverse = 1.0 / prime
        for z in range(x.size):
            x[z] = np.float64(sums[row, z]) - np.float64(public[row, z]) * np.float64(key[row, z])
        _reduce(x, prime)
        _backward(x, roots[row], quotients[row], prime, lanes)
        _reduce(x, prime)
        for z in range(x.size):
            value = x[z] * last[row]
            value -= ((value * inverse + _ROUND) - _ROUND) * prime
            out[row, z] = np.int32(value + (prime if value < 0.0 else 0.0))


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


@_compiled
def _pack(residues: Any, bits: int, words: Any) -> None:
    position = 0
    for residue in residues:
        word = position >> 5
        shifted = np.uint64(residue) << np.uint64(position & 31)
        words[word] |= np.uint32(shifted)
        words[word + 1] = np.uint32(shifted >> np.uint64(32))
        position += bits


@_compiled
def _unpack(words: Any, bits: int, out: Any) -> None:
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    position = 0
    for z in range(out.size):
        word = position >> 5
        double = np.uint64(words[word])
        if word + 1 < words.size:
            double |= np.uint64(words[word + 1]) << np.uint64(32)
        out[z] = np.int32(double >> np.uint64(position & 31) & mask)
        position += bits
