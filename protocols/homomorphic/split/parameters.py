"""The smallest ring for a split-key sum: how values lie in coefficients, and how much room noise and carries need.

A coefficient holds ``slots`` values, each ``slot_bits`` wide so that no sum of all parties' values carries into the
next, and below them ``scale_bits`` for the errors:

    bit 0        scale_bits    + slot_bits   + 2 slot_bits                  log2 q
    | sum of errors | sum of value 0 | sum of value 1 | ...                 |

Sum of errors. Each error is discrete Gaussian, hence sub-Gaussian with its sigma, and so is a sum of m independent ones
with sqrt(m) sigma: it passes ``error_bound(m)`` = T sqrt(m) sigma with probability at most 2 exp(-T^2 / 2). T, the
property ``tails``, makes that 2^-64 for all coefficients of vector and keys together: 10.3 to 11.6. ``scale_bits``
leaves ``MARGIN_BITS`` beyond the bound at the largest number of parties, so that a sum whose errors are larger can be
told from a true one and is refused.

What a vector does not fill. Of the last block only those coefficients travel that hold values (:attr:`tail`), as
coefficients: a part of a ring-LWE sample says no more than the whole. The sum of keys is small as the sum of errors is,
and for the same reason: so the masked sum of the keys wraps at ``key_bits``, just above ``error_bound``, and not where
no sum of any keys could. A sum beyond it does not open.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from choral.protocols.errors import SpecError
from choral.protocols.homomorphic.ring.arithmetic import DEGREES, MAX_PRIME_BITS, Ring, largest_primes, ring
from choral.protocols.homomorphic.ring.gaussian import SIGMA
from choral.protocols.interface import SumSpec

MODULUS_LIMIT = {2048: 53, 4096: 106, 8192: 212}
"""The largest log2 q by ring degree. Below what the homomorphic encryption standard (Albrecht et al. 2018, table 1)
allows at 128 bits, classical, for secrets from the error distribution (56, 111, 220) and for ternary ones (54, 109,
218)."""

SECURITY_BITS = 128
FAILURE_BITS = 64
"""A true sum passes the room for its errors, and is refused, with probability at most 2^-FAILURE_BITS."""

MARGIN_BITS = 1
MESSAGE_BYTES = 1 << 22
"""About how much of a ciphertext travels in one message."""

BATCH = 8
"""Blocks that are encrypted side by side: with eight float64 numbers a cache line and two vector registers are full."""

MIN_PRIME_BITS = 20
LEAST_TAIL = 64
"""Coefficients of the last block that travel at least: so many that garbage among them shows, but for 2^-64."""
TAIL_STEP = 8
"""And what their number is a multiple of, so that they end on bytes."""
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
    """spec: what is summed. degree, prime_bits, prime_count: the ring, whose first ``wide`` primes have one bit more.
    slots, slot_bits, scale_bits: see the module.
    """

    spec: SumSpec
    degree: int
    prime_bits: int
    prime_count: int
    slots: int
    slot_bits: int
    scale_bits: int
    wide: int = 0

    @cached_property
    def ring(self) -> Ring:
        return ring(self.degree, _largest(self.degree, self.prime_bits, self.prime_count, self.wide))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The bits of each prime, as which its residues travel."""
        return tuple(self.prime_bits + (row < self.wide) for row in range(self.prime_count))

    @property
    def modulus_bits(self) -> int:
        """The bits of q."""
        return sum(self.widths)

    @property
    def block_values(self) -> int:
        return self.degree * self.slots

    @property
    def blocks(self) -> int:
        return -(-self.spec.length // self.block_values)

    @cached_property
    def tail(self) -> int:
        """How many coefficients of the last block travel, as coefficients; 0, and it is a block like the others."""
        used = -(-(self.spec.length - (self.blocks - 1) * self.block_values) // self.slots)
        used = max(LEAST_TAIL, -(-used // TAIL_STEP) * TAIL_STEP)
        return used if used < self.degree else 0

    @property
    def whole(self) -> int:
        """Blocks that travel whole, and transformed."""
        return self.blocks - (self.tail > 0)

    @property
    def batches(self) -> int:
        """Of up to BATCH whole blocks; a block that is cut is a batch of its own, the last."""
        return -(-self.whole // BATCH) + (self.tail > 0)

    def is_cut(self, batch: int) -> bool:
        """Whether it is the block that is cut."""
        return self.tail > 0 and batch == self.batches - 1

    def before(self, batch: int) -> int:
        """Blocks before a batch."""
        return min(BATCH * batch, self.whole)

    def coefficients(self, batch: int) -> int:
        """How many of a batch travel."""
        return self.tail if self.is_cut(batch) else self.degree * self.lanes(batch)

    @property
    def tails(self) -> float:
        """How many times its own sigma a sum of errors, or of keys, keeps within, but for 2^-FAILURE_BITS."""
        return _tails(self.degree, self.blocks)

    @property
    def block_bytes(self) -> int:
        """One block on the wire; N is a multiple of 8, so blocks end on bytes."""
        return self.degree * self.modulus_bits // 8

    @property
    def ciphertext_bytes(self) -> int:
        """All of a ciphertext, without the headers of its messages."""
        return self.whole * self.block_bytes + self.tail * self.modulus_bits // 8

    @property
    def key_bits(self) -> int:
        """Of the modulus of the masked sum of keys: as many as a sum within ``error_bound`` needs."""
        return (2 * self.error_bound(len(self.spec.parties))).bit_length()

    @property
    def message_blocks(self) -> int:
        return max(BATCH, MESSAGE_BYTES // self.block_bytes // BATCH * BATCH)

    @property
    def messages(self) -> int:
        return -(-self.batches // (self.message_blocks // BATCH))

    @property
    def bytes_per_value(self) -> float:
        """Of a long vector's ciphertext; the keys add N ``key_bits`` bits in all."""
        return self.modulus_bits / 8 / self.slots

    def words(self, count: int) -> int:
        """32-bit words of the public stream for ``count`` residues modulo one prime: one that is not below it is
        skipped.

        By the Chernoff-Hoeffding bound fewer than ``count`` of so many are accepted with probability below 2^-100.
        """
        return _words(min(prime / (1 << prime.bit_length()) for prime in self.ring.primes), count)

    def lanes(self, batch: int) -> int:
        """How many blocks lie side by side in a batch: BATCH, but in the last two, of which one may be cut."""
        return 1 if self.is_cut(batch) else min(BATCH, self.whole - BATCH * batch)

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
        """What the sum of so many errors does not pass in any coefficient, but with probability 2^-FAILURE_BITS."""
        return math.ceil(self.tails * float(SIGMA) * math.sqrt(parties))

    def terms(self) -> str:
        """Everything that two parties must have alike for their ciphertexts to be summed."""
        return (
            f"split 2: degree {self.degree}, {self.prime_count} primes of {self.prime_bits} bits, {self.wide} of one"
            f" more, sigma {SIGMA}, {self.slots} slots of {self.slot_bits} bits over {self.scale_bits},"
            f" {self.message_blocks} blocks each, {self.tail} coefficients of the last, keys of {self.key_bits} bits,"
            f" length {self.spec.length}, bound {self.spec.bound}, weight bound {self.spec.weight_bound}, encoding"
            f" {self.spec.encoding}"
        )


def choose(spec: SumSpec) -> SplitParameters:
    """The fewest bytes on the wire for this vector, keys included, of any ring with as few primes as will do.

    More primes of fewer bits would save up to 1.5 % of bytes for an eighth more work. The smaller ring among equals.

    Raises: SpecError when no ring has room for one sum of these values and the errors.
    """
    found = list(_candidates(spec))
    if not found:
        raise SpecError(
            f"{len(spec.parties)} parties with values up to {spec.bound} do not fit the largest ring",
            hint="use fewer bits per value, a smaller weight cap, or fewer parties",
        )
    return min(found, key=lambda one: (one.ciphertext_bytes + one.degree * one.key_bits / 8, one.degree))


def _candidates(spec: SumSpec) -> Iterator[SplitParameters]:
    slot_bits = spec.exact_bits  # a sum that may wrap is added exactly: a carry must not reach the next slot
    for degree in DEGREES:
        for slots in range(1, MODULUS_LIMIT[degree] // slot_bits + 1):
            noise = _tails(degree, -(-spec.length // (degree * slots))) * float(SIGMA) * math.sqrt(len(spec.parties))
            # 2^scale_bits >= 2^(1 + margin) times what error_bound makes of it
            scale_bits = math.ceil(math.log2(math.ceil(noise))) + 1 + MARGIN_BITS
            needed = slots * slot_bits + scale_bits  # q > 2^needed: no sum wraps
            prime_count, prime_bits, wide = _primes(degree, needed)
            if prime_count:
                found = SplitParameters(
                    spec=spec,
                    degree=degree,
                    prime_bits=prime_bits,
                    prime_count=prime_count,
                    slots=slots,
                    slot_bits=slot_bits,
                    scale_bits=scale_bits,
                    wide=wide,
                )
                if len(found.digits) <= MAX_DIGITS:
                    yield found


def _tails(degree: int, blocks: int) -> float:
    # Pr[|e_1 + ... + e_m| > T sqrt(m) sigma] <= 2 exp(-T^2 / 2), in each of so many coefficients, and of the keys
    return math.sqrt(2.0 * math.log(2.0 ** (FAILURE_BITS + 1) * degree * (blocks + 1)))


def _largest(degree: int, bits: int, count: int, wide: int) -> tuple[int, ...]:
    """``wide`` primes of one bit more, then the rest. Raises: SpecError if there are too few."""
    return largest_primes(bits + 1, degree, wide) + largest_primes(bits, degree, count - wide)


def _primes(degree: int, needed: int) -> tuple[int, int, int]:
    """The fewest primes whose product passes 2^needed, of the fewest bits in all, spread evenly: how many, their bits,
    how many have one bit more; (0, 0, 0) if there are none."""
    limit = MODULUS_LIMIT[degree]
    for count in range(-(-needed // MAX_PRIME_BITS), limit // MIN_PRIME_BITS + 1):
        for total in range(max(needed, MIN_PRIME_BITS * count), min(limit, MAX_PRIME_BITS * count) + 1):
            bits, wide = divmod(total, count)
            try:
                primes = _largest(degree, bits, count, wide)
            except SpecError:
                continue
            if math.prod(primes) > 1 << needed:
                return count, bits, wide
    return 0, 0, 0


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
