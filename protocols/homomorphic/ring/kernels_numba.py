"""The ring's bulk arithmetic in compiled code for the CPU; :mod:`choral.protocols.homomorphic.ring.arithmetic` says
what it does.

All lanes of a coefficient lie next to each other in memory, so that every step of every stage is the same operation on
a run of numbers, which the compiler turns into vector instructions. ``contract`` lets it fuse a product and a sum into
one
instruction: the products are exact either way. No other rule of floating point is relaxed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from choral.protocols.homomorphic.ring.arithmetic import Ring, balanced

# The compiled code is kept on disk until this file changes, so what it is compiled with must stand in this file, not
# only where it is documented: in arithmetic.py, whose values a test compares.
REDUCE = 7
LIMB = 24
WIDTH = 64
GROUP = 32 * WIDTH
_CHUNK = 256
_ROUND = float(3 << 51)
"""Adding and taking away 1.5 * 2^52 rounds a number below 2^51 in magnitude to the nearest integer."""

_compiled = numba.njit(fastmath={"contract"}, boundscheck=False, cache=True, nogil=True)


class NumbaKernels:
    """See :class:`choral.protocols.homomorphic.ring.arithmetic.Kernels`."""

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

    def digits(self, vector: Any, count: int, layout: Sequence[Any], bits: int) -> Any:
        out = np.empty((len(layout), count))
        for row, digit in zip(out, layout, strict=True):
            for j in reversed(range(digit.first, digit.first + digit.count)):
                piece = vector[j * count : (j + 1) * count]
                scale = 0.0 if j == digit.first + digit.count - 1 else 2.0**bits
                _append(row, piece, scale, {"": 0, "low": 1, "high": 2}[digit.half])
        return out

    def pack(self, residues: NDArray[np.int32], bits: int) -> bytes:
        words = np.zeros(residues.size // 32 * bits, np.uint32)
        _pack(residues.view(np.uint32), np.uint32(bits), words)
        return words.astype("<u4", copy=False).tobytes()

    def add(self, packed: NDArray[np.uint32], bits: int, sums: NDArray[np.uint32]) -> None:
        _add(packed, np.uint32(bits), sums)

    def limbs(self, ring: Ring, residues: Any, offset: int) -> NDArray[np.int64]:
        count = -(-ring.modulus.bit_length() // LIMB) + 1
        out = np.empty((count, residues.shape[1]), np.int64)
        offsets = np.array([offset % prime for prime in ring.primes], np.float64)
        inverses = np.array(
            [
                [balanced(pow(other, -1, prime), prime) if other != prime else 0 for other in ring.primes]
                for prime in ring.primes
            ],
            np.float64,
        )
        _limbs(residues, np.array(ring.primes, np.float64), offsets, inverses, out)
        return out


@_compiled
def _reduce(x: Any, prime: float) -> None:
    """Balanced residues of integers below 2^52 in magnitude, off by one multiple of the prime at most."""
    inverse = 1.0 / prime
    for z in range(x.size):
        value = x[z]
        x[z] = value - ((value * inverse + _ROUND) - _ROUND) * prime  # x - round(x / p) p


@_compiled
def _forward(x: Any, roots: Any, quotients: Any, prime: float, lanes: int) -> None:
    """Longa and Naehrig 2016, algorithm 1: there n is N, m is ``blocks``, t is ``half``, i is ``block``."""
    half = x.size // lanes
    blocks = 1
    stage = 0
    while half > 1:
        half //= 2
        run = half * lanes
        for block in range(blocks):
            root = roots[blocks + block]  # S = Psi_rev[m + i]
            quotient = quotients[blocks + block]
            low = x[2 * block * run : (2 * block + 1) * run]
            high = x[(2 * block + 1) * run : (2 * block + 2) * run]
            for z in range(run):  # Cooley and Tukey's butterfly: (U, V) -> (U + S V, U - S V)
                value = high[z]
                product = value * root - ((value * quotient + _ROUND) - _ROUND) * prime
                kept = low[z]
                low[z] = kept + product
                high[z] = kept - product
        blocks *= 2
        stage += 1
        if stage == REDUCE:  # (k + 1) 2^50 + 2^30 < 2^53 only for k <= 6: see "Magnitudes" in arithmetic.py
            _reduce(x, prime)


@_compiled
def _backward(x: Any, roots: Any, quotients: Any, prime: float, lanes: int) -> None:
    """The stages of :func:`_forward` in reverse; without the division by N. Reduces the sums in each stage.

    Longa and Naehrig 2016, algorithm 2: there h is ``blocks``.
    """
    inverse = 1.0 / prime
    run = lanes
    blocks = x.size // (2 * lanes)
    while blocks >= 1:
        for block in range(blocks):
            root = roots[blocks + block]  # S = Psi_rev^-1[h + i]
            quotient = quotients[blocks + block]
            low = x[2 * block * run : (2 * block + 1) * run]
            high = x[(2 * block + 1) * run : (2 * block + 2) * run]
            for z in range(run):  # Gentleman and Sande's butterfly: (U, V) -> (U + V, (U - V) S)
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
        for digit in range(digits.shape[0]):  # e + sum_g scale_g digit_g
            _add_scaled(x, digits[digit], scales[row, digit], prime)
        _reduce(x, prime)
        _forward(x, roots[row], quotients[row], prime, lanes)
        _add_product(x, public[row], key[row], prime, out[row])  # c = a s + NTT(e + sum_g scale_g digit_g)


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
            x[z] = np.float64(sums[row, z]) - np.float64(public[row, z]) * np.float64(key[row, z])  # c - a s
        _reduce(x, prime)
        _backward(x, roots[row], quotients[row], prime, lanes)
        _reduce(x, prime)
        for z in range(x.size):
            value = x[z] * last[row]  # N^-1 of the inverse transform
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
                above[z] += values[z] < threshold  # the magnitude is #{k: u < P(|x| >= k)}
                equal[z] |= values[z] == threshold
        for z in range(size):
            counts[first + z] = above[z]
            ties[first + z] = equal[z]


@_compiled
def _append(row: Any, values: Any, scale: float, half: int) -> None:
    """row = row * scale + values, or their low 32 bits, or the rest; places beyond the values' end count as 0."""
    if scale == 0.0:
        row[:] = 0.0
    size = values.size
    if half == 0:
        for z in range(size):
            row[z] = row[z] * scale + np.float64(values[z])
    elif half == 1:
        for z in range(size):
            row[z] = np.float64(values[z] & np.int64(0xFFFFFFFF))
    else:
        for z in range(size):
            row[z] = np.float64(values[z] >> np.int64(32))
    for z in range(size, row.size):
        row[z] *= scale


@_compiled
def _pack(residues: Any, bits: Any, words: Any) -> None:
    for group in range(residues.size // GROUP):
        source = residues[group * GROUP : (group + 1) * GROUP]
        target = words[group * bits * WIDTH : (group + 1) * bits * WIDTH]
        for i in range(32):
            word = i * bits >> 5
            shift = np.uint32(i * bits & 31)
            low = target[word * WIDTH : (word + 1) * WIDTH]
            values = source[i * WIDTH : (i + 1) * WIDTH]
            for lane in range(WIDTH):
                low[lane] |= values[lane] << shift
            if shift + bits > 32:
                back = np.uint32(32) - shift
                high = target[(word + 1) * WIDTH : (word + 2) * WIDTH]
                for lane in range(WIDTH):
                    high[lane] = values[lane] >> back


@_compiled
def _add(words: Any, bits: Any, sums: Any) -> None:
    mask = (np.uint32(1) << bits) - np.uint32(1)
    for group in range(sums.size // GROUP):
        for i in range(32):
            first = (group * bits + (i * bits >> 5)) * WIDTH
            shift = np.uint32(i * bits & 31)
            low = words[first : first + WIDTH]
            target = sums[group * GROUP + i * WIDTH : group * GROUP + (i + 1) * WIDTH]
            if shift + bits > 32:
                back = np.uint32(32) - shift
                high = words[first + WIDTH : first + 2 * WIDTH]
                for lane in range(WIDTH):
                    target[lane] += (low[lane] >> shift | high[lane] << back) & mask
            else:
                for lane in range(WIDTH):
                    target[lane] += low[lane] >> shift & mask


@_compiled
def _limbs(residues: Any, primes: Any, offsets: Any, inverses: Any, out: Any) -> None:
    """Garner's algorithm, then Horner's, for _CHUNK coefficients at a time.

    Garner: Menezes, van Oorschot and Vanstone, Handbook of Applied Cryptography, algorithm 14.71; with the digits in
    the mixed radix p_0, p_0 p_1, ... one after another and not through the number itself.
    """
    rows = primes.size
    digits = np.empty((rows, _CHUNK))
    limbs = np.empty((out.shape[0], _CHUNK))
    carry = np.empty(_CHUNK)
    for first in range(0, residues.shape[1], _CHUNK):
        size = min(_CHUNK, residues.shape[1] - first)
        for row in range(rows):
            digit = digits[row]
            for z in range(size):
                digit[z] = np.float64(residues[row, first + z]) + offsets[row]
            for earlier in range(row):  # d_i = (...((x_i - d_0) p_0^-1 - d_1) p_1^-1 - ...) mod p_i
                _times_difference(digit, digits[earlier], inverses[row, earlier], primes[row])
            _to_range(digit, primes[row])
        limbs[:] = 0.0
        for row in range(rows - 1, -1, -1):  # x = d_0 + p_0 (d_1 + p_1 (d_2 + ...))
            carry[:] = digits[row]
            for place in range(limbs.shape[0]):
                _carry_on(limbs[place], carry, primes[row])
        for place in range(limbs.shape[0]):
            for z in range(size):
                out[place, first + z] = np.int64(limbs[place, z])


@_compiled
def _times_difference(x: Any, other: Any, factor: float, prime: float) -> None:
    """x = (x - other) * factor, balanced."""
    inverse = 1.0 / prime
    for z in range(x.size):
        value = x[z] - other[z]
        value -= ((value * inverse + _ROUND) - _ROUND) * prime
        value *= factor
        x[z] = value - ((value * inverse + _ROUND) - _ROUND) * prime


@_compiled
def _to_range(x: Any, prime: float) -> None:
    inverse = 1.0 / prime
    for z in range(x.size):
        value = x[z]
        value -= ((value * inverse + _ROUND) - _ROUND) * prime
        x[z] = value + (prime if value < 0.0 else 0.0)


@_compiled
def _carry_on(limb: Any, carry: Any, prime: float) -> None:
    """limb, carry = the low and high parts of limb * prime + carry."""
    for z in range(limb.size):
        value = limb[z] * prime + carry[z]
        high = np.floor(value * (1.0 / (1 << LIMB)))
        limb[z] = value - high * (1 << LIMB)
        carry[z] = high
