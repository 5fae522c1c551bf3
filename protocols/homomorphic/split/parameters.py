"""The smallest ring for a split-key sum: how values lie in coefficients, and how much room noise and carries need.

A coefficient holds ``slots`` values, each ``slot_bits`` wide so that no sum of all parties' values carries into the
next, and below them ``scale_bits`` for the errors:

    bit 0        scale_bits    + slot_bits   + 2 slot_bits                  log2 q
    | sum of errors | sum of value 0 | sum of value 1 | ...                 |

Sum of errors. Each error is discrete Gaussian, hence sub-Gaussian with its sigma, and so is a sum of m independent ones
with sqrt(m) sigma: it passes ``error_bound(m)`` = TAIL_SIGMAS sqrt(m) sigma with probability below 2
exp(-TAIL_SIGMAS^2 / 2) < 2^-95 per coefficient, 2^-64 for the longest vector. ``scale_bits`` leaves ``MARGIN_BITS``
beyond the bound at the largest number of parties, so that a sum whose errors are larger can be told from a true one
and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from choral.protocols.errors import SpecError
from choral.protocols.homomorphic.ring.arithmetic import DEGREES, MAX_PRIME_BITS, Ring, largest_primes, ring
from choral.protocols.homomorphic.ring.gaussian import SIGMA, TAIL
from choral.protocols.interface import SumSpec

MODULUS_LIMIT = {2048: 53, 4096: 106, 8192: 212}
"""The largest log2 q by ring degree. Below what the homomorphic encryption standard (Albrecht et al. 2018, table 1)
allows at 128 bits, classical, for secrets from the error distribution (56, 111, 220) and for ternary ones (54, 109,
218)."""

SECURITY_BITS = 128
TAIL_SIGMAS = 11.6
MARGIN_BITS = 1
MESSAGE_BYTES = 1 << 22
"""About how much of a ciphertext travels in one message."""

BATCH = 8
"""Blocks that are encrypted side by side: with eight float64 numbers a cache line and two vector registers are full."""

MIN_PRIME_BITS = 20
_DIGIT_BITS = 52
MAX_DIGITS = 7


@dataclass(frozen=True, kw_only=True)
class Digit:
    """A number below 2^52 in magnitude that stands for ``count`` values from slot ``first`` on, or for half of one.

    half: "" for whole values, "low" for a value's lowest 32 bits, "high" for the rest.
    """

    first: int
    count: int = 1
    half: str = ""


@dataclass(frozen=True, kw_only=True)
class SplitParameters:
    """spec: what is summed. degree, prime_bits, prime_count: the ring. slots, slot_bits, scale_bits: see the module."""

    spec: SumSpec
    degree: int
    prime_bits: int
    prime_count: int
    slots: int
    slot_bits: int
    scale_bits: int

    @cached_property
    def ring(self) -> Ring:
        return ring(self.degree, largest_primes(self.prime_bits, self.degree, self.prime_count))

    @property
    def modulus_bits(self) -> int:
        """The bits of q."""
        return self.prime_bits * self.prime_count

    @property
    def block_values(self) -> int:
        return self.degree * self.slots

    @property
    def blocks(self) -> int:
        return -(-self.spec.length // self.block_values)

    @property
    def batches(self) -> int:
        return -(-self.blocks // BATCH)

    @property
    def block_bytes(self) -> int:
        """One block on the wire; N is a multiple of 8, so blocks end on bytes."""
        return self.degree * self.modulus_bits // 8

    @property
    def message_blocks(self) -> int:
        return max(BATCH, MESSAGE_BYTES // self.block_bytes // BATCH * BATCH)

    @property
    def messages(self) -> int:
        return -(-self.blocks // self.message_blocks)

    @property
    def bytes_per_value(self) -> float:
        """Of a long vector's ciphertext; the sum of keys adds a few kilobytes in all."""
        return self.modulus_bits / 8 / self.slots

    def words(self, count: int) -> int:
        """32-bit words of the public stream for ``count`` residues modulo one prime: one that is not below it is
        skipped.

        By the Chernoff-Hoeffding bound fewer than ``count`` of so many are accepted with probability below 2^-100.
        """
        return _words(min(self.ring.primes) / (1 << self.prime_bits), count)

    def lanes(self, batch: int) -> int:
        """How many blocks lie side by side in a batch: BATCH, but in the last."""
        return min(BATCH, self.blocks - BATCH * batch)

    @property
    def margin_bits(self) -> float:
        """By how many bits the room for errors passes their bound when all parties are in the sum."""
        return self.scale_bits - 1 - math.log2(self.error_bound(len(self.spec.parties)))

    @cached_property
    def digits(self) -> tuple[Digit, ...]:
        """How a coefficient's values become at most 7 exactly representable numbers."""
        bits = self.spec.bound.bit_length() + 1
        if bits > _DIGIT_BITS:
            halves = [(Digit(first=j, half="low"), Digit(first=j, half="high")) for j in range(self.slots)]
            return tuple(digit for pair in halves for digit in pair)
        together = (_DIGIT_BITS - bits) // self.slot_bits + 1
        return tuple(Digit(first=j, count=min(together, self.slots - j)) for j in range(0, self.slots, together))

    def error_bound(self, parties: int) -> int:
        """What the sum of so many errors does not pass, but with probability 2^-95 per coefficient."""
        # Pr[|e_1 + ... + e_m| > T sqrt(m) sigma] <= 2 exp(-T^2 / 2) = 2^-96 for T = 11.6
        return math.ceil(TAIL_SIGMAS * float(SIGMA) * math.sqrt(parties))

    def terms(self) -> str:
        """Everything that two parties must have alike for their ciphertexts to be summed."""
        return (
            f"split 1: degree {self.degree}, {self.prime_count} primes of {self.prime_bits} bits, sigma {SIGMA},"
            f" {self.slots} slots of {self.slot_bits} bits over {self.scale_bits}, {self.message_blocks} blocks each,"
            f" length {self.spec.length}, bound {self.spec.bound}, weight bound {self.spec.weight_bound}, encoding"
            f" {self.spec.encoding}"
        )


def choose(spec: SumSpec) -> SplitParameters:
    """The fewest bytes on the wire for this vector, keys included, of any ring with as few primes as will do.

    One more prime of fewer bits would save up to 1.3 % of bytes for an eighth more work. The smaller ring among equals.

    Raises: SpecError when no ring has room for one sum of these values and the errors.
    """
    found = list(_candidates(spec))
    if not found:
        raise SpecError(
            f"{len(spec.parties)} parties with values up to {spec.bound} do not fit the largest ring",
            hint="use fewer bits per value, a smaller weight cap, or fewer parties",
        )
    return min(found, key=lambda one: (one.blocks * one.block_bytes + _key_bytes(one), one.degree))


def _key_bytes(parameters: SplitParameters) -> float:
    return parameters.degree * (2 * len(parameters.spec.parties) * TAIL).bit_length() / 8


def _candidates(spec: SumSpec) -> Iterator[SplitParameters]:
    slot_bits = spec.exact_bits  # a sum that may wrap is added exactly: a carry must not reach the next slot
    noise = TAIL_SIGMAS * float(SIGMA) * math.sqrt(len(spec.parties))
    scale_bits = math.ceil(math.log2(noise)) + 1 + MARGIN_BITS  # 2^scale_bits >= 2^(1 + margin) T sqrt(m) sigma
    for degree in DEGREES:
        for slots in range(1, MODULUS_LIMIT[degree] // slot_bits + 1):
            needed = slots * slot_bits + scale_bits  # q > 2^needed: no sum wraps
            prime_count, prime_bits = _primes(degree, needed)
            if prime_count:
                found = SplitParameters(
                    spec=spec,
                    degree=degree,
                    prime_bits=prime_bits,
                    prime_count=prime_count,
                    slots=slots,
                    slot_bits=slot_bits,
                    scale_bits=scale_bits,
                )
                if len(found.digits) <= MAX_DIGITS:
                    yield found


def _primes(degree: int, needed: int) -> tuple[int, int]:
    """The fewest primes whose product passes 2^needed, and their bits, the fewest again; (0, 0) if there are none."""
    for count in range(-(-needed // MAX_PRIME_BITS), MODULUS_LIMIT[degree] // MIN_PRIME_BITS + 1):
        for bits in range(max(MIN_PRIME_BITS, -(-needed // count)), MAX_PRIME_BITS + 1):
            if count * bits > MODULUS_LIMIT[degree]:
                break
            try:
                primes = largest_primes(bits, degree, count)
            except SpecError:
                continue
            if math.prod(primes) > 1 << needed:
                return count, bits
    return 0, 0


@lru_cache(maxsize=64)
def _words(accepted: float, count: int) -> int:
    words = count
    # Hoeffding 1963, theorem 1: Pr[accepted of n <= a n] <= exp(-n D(a || b)) for a < b, each accepted with b
    while words * _divergence(count / words, accepted) < 100 * math.log(2):
        words += 16
    return words


def _divergence(a: float, b: float) -> float:
    """Of Bernoulli(a) from Bernoulli(b), in nats; 0 for a >= b, where the bound says nothing."""
    if a >= b:
        return 0.0
    return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
