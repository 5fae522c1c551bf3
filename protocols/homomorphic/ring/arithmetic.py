"""The ring Z_q[X]/(X^N + 1) with q a product of primes of at most 26 bits, and its number-theoretic transform.

N is a power of two and every prime p is 1 mod 2N, so that the ring splits into N copies of Z_p for each prime. A ring
element is kept by its residues modulo each prime (the Chinese remainder theorem) and, after the transform, by its
values at the primitive 2N-th roots of unity, where products are taken place by place.

Residues are **float64 numbers that hold integers**. With p below 2^26 and balanced residues every product stays below
2^53, hence exact; the quotient is rounded from a precomputed inverse and may be off by one, the remainder is exact. So
one formula serves vectorised processor code (numba) and torch on the CPU or a GPU, and all agree bit by bit. The
transform is that of Longa and Naehrig 2016 (algorithm 1: decimation in time, roots in bit-reversed order, no
permutation); its output order is bit-reversed and nobody needs it otherwise.

Magnitudes. A stage adds to each value a product of magnitude p/2 at most, so after k stages they are below
(k + 1) p/2 + 3 k; the next product with a balanced root is below (k + 1) 2^50 + 2^30, exact for k <= 6. So values are
reduced after REDUCE stages, of 11 to 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from choral.protocols.errors import SpecError

MAX_PRIME_BITS = 26
REDUCE = 7
"""Stages between two reductions; see above."""

DEGREES = (2048, 4096, 8192)

LIMB = 24
"""Bits of a limb of a whole coefficient: a limb times a prime, and a carry, are exact as float64 too."""

WIDTH = 64
GROUP = 32 * WIDTH
"""Residues that are packed together: WIDTH bit strings side by side, as vector instructions like them.

Residue ``32 WIDTH g + WIDTH i + w`` takes bits ``i * bits`` to ``(i + 1) * bits - 1`` of string w of group g; a string
is ``bits`` words of 32 bits, least significant first, and word k of string w is word ``(g * bits + k) * WIDTH + w``,
little-endian.
"""


@dataclass(frozen=True, eq=False)
class Ring:
    """degree: N. primes: distinct, shape (L,). The tables are float64, shape (L, N), each root balanced in +-p/2.

    roots[i, m + j]: the root of stage m, block j, modulo prime i; quotients: the same over the prime.
    inverse_roots, inverse_quotients: their inverses. last, last_quotients: 1/N modulo each prime, shape (L,).
    """

    degree: int
    primes: tuple[int, ...]
    roots: NDArray[np.float64]
    quotients: NDArray[np.float64]
    inverse_roots: NDArray[np.float64]
    inverse_quotients: NDArray[np.float64]
    last: NDArray[np.float64]

    @property
    def modulus(self) -> int:
        """q, the product of the primes."""
        product = 1
        for prime in self.primes:
            product *= prime
        return product


@lru_cache(maxsize=8)
def ring(degree: int, primes: tuple[int, ...]) -> Ring:
    """The ring with its tables. Raises: SpecError for another degree, or a number that is no such prime."""
    if not 8 <= degree <= 1 << 2 * REDUCE or degree & degree - 1:
        raise SpecError(f"expected a ring degree that is a power of two from 8 to {1 << 2 * REDUCE}, got {degree}")
    for prime in primes:
        if prime >= 1 << MAX_PRIME_BITS or prime % (2 * degree) != 1 or not _is_prime(prime):
            raise SpecError(f"{prime} is no prime below 2^{MAX_PRIME_BITS} that is 1 mod {2 * degree}")
    if not primes or len(set(primes)) != len(primes):
        raise SpecError("expected distinct primes, at least one")
    forward = np.array([_powers(degree, prime, _root(degree, prime)) for prime in primes])
    inverse = np.array([_powers(degree, prime, pow(_root(degree, prime), -1, prime)) for prime in primes])
    over = 1.0 / np.array(primes, np.float64)[:, None]
    last = np.array([balanced(pow(degree, -1, prime), prime) for prime in primes], np.float64)  # N^-1 mod p
    return Ring(degree, primes, forward, forward * over, inverse, inverse * over, last)


@lru_cache(maxsize=1024)
def largest_primes(bits: int, degree: int, count: int) -> tuple[int, ...]:
    """The ``count`` largest primes below 2^bits that are 1 mod 2 degree, descending. Raises SpecError if too few."""
    found: list[int] = []
    candidate = (1 << bits) + 1
    while len(found) < count:
        candidate -= 2 * degree
        if candidate < 1 << bits - 1:
            raise SpecError(f"fewer than {count} primes of {bits} bits are 1 mod {2 * degree}")
        if _is_prime(candidate):
            found.append(candidate)
    return tuple(found)


def balanced(value: int, prime: int) -> int:
    """The representative of ``value`` in (-p/2, p/2)."""
    value %= prime
    return value - prime if value > prime // 2 else value


def _is_prime(number: int) -> bool:
    """By trial division: 2^26 has divisors to 2^13 only."""
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _root(degree: int, prime: int) -> int:
    """A primitive 2N-th root of unity: its N-th power is -1."""
    for base in range(2, prime):
        # Of psi = g^((p - 1) / 2N) the order divides 2N, and is 2N exactly if psi^N = -1.
        root = pow(base, (prime - 1) // (2 * degree), prime)
        if pow(root, degree, prime) == prime - 1:
            return root
    raise SpecError(f"{prime} has no root of unity of order {2 * degree}")


def _powers(degree: int, prime: int, root: int) -> list[float]:
    """root^bitreverse(i) for i below N, balanced."""
    bits = degree.bit_length() - 1
    powers = [1]  # Longa and Naehrig 2016: the table Psi_rev of algorithm 1, Psi_rev^-1 of algorithm 2
    for _ in range(degree - 1):
        powers.append(powers[-1] * root % prime)
    return [float(balanced(powers[int(f"{i:0{bits}b}"[::-1], 2)], prime)) for i in range(degree)]


class Kernels(Protocol):
    """What runs in bulk, for ``lanes`` blocks side by side: place i of block l is element i * lanes + l of M = N lanes.

    numpy arrays in and out; residues are int32 in [0, p), a row for each of the L primes.
    """

    def encrypt(
        self, ring: Ring, digits: Any, scales: Any, errors: Any, public: Any, key: Any, *, lanes: int
    ) -> NDArray[np.int32]:
        """public * key + transform(errors + sum_g scales[:, g] digits[g]): residues, shape (L, M).

        digits: float64, shape (G, M), integers below 2^52 in magnitude, G <= 7; on a GPU a tensor there. scales:
        float64, shape (L, G), balanced. errors: int8, shape (M,). public: residues, shape (L, M). key: int32, shape
        (L, N), transformed and balanced.
        """
        ...

    def transform(self, ring: Ring, polynomial: NDArray[np.float64]) -> NDArray[np.int32]:
        """polynomial: shape (N,), integers below 2^52 in magnitude -> its values, shape (L, N), balanced."""
        ...

    def remove(self, ring: Ring, sums: Any, public: Any, key: Any, *, lanes: int) -> NDArray[np.int32]:
        """The inverse transform of sums - public * key: residues, shape (L, M), as sums and public are."""
        ...

    def accept(self, words: NDArray[np.uint32], prime: int, count: int) -> NDArray[np.int32] | None:
        """The first ``count`` of ``words`` that are below ``prime`` once cut to its bits; None if there are fewer."""
        ...

    def magnitudes(self, words: Any, thresholds: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
        """For each word (uint64) how many thresholds are above its upper 63 bits, and whether one equals them.

        Looks at every threshold for every word, so that the time says nothing about the outcome.
        """
        ...

    def digits(self, vector: Any, count: int, layout: Sequence[Any], bits: int) -> Any:
        """Values as what :meth:`encrypt` takes: float64, shape (G, count), one row for each digit of ``layout``.

        vector: int64, ``count`` values of each slot after another; what is missing counts as 0. layout: how slots
        become digits (:class:`choral.protocols.homomorphic.split.parameters.Digit`), a slot being ``bits`` wide.
        """
        ...

    def pack(self, residues: NDArray[np.int32], bits: int) -> bytes:
        """Flat residues, a multiple of GROUP, as they travel: see :data:`GROUP`."""
        ...

    def add(self, packed: NDArray[np.uint32], bits: int, sums: NDArray[np.uint32]) -> None:
        """Add the residues that :meth:`pack` packed to ``sums`` in place, mod 2^32."""
        ...

    def limbs(self, ring: Ring, residues: Any, offset: int) -> NDArray[np.int64]:
        """What numbers in [0, q) have these residues, plus ``offset``, mod q: shape (limbs, M), LIMB bits each.

        residues: shape (L, M). The limbs are little-endian, enough for q and one more.
        """
        ...
