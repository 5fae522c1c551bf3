"""BFV for exact sums: the smallest parameters, and how integers stand in a plaintext.

Guarantee: the decrypted sum of up to ``parties`` vectors is exact, always, not just likely. BFV is "exact" only as long
as decryption cannot fail: a failure tells whoever sees it something linear about the secret key, and adversaries can
raise its probability (Cheon, Choe, Passelegue, Stehle and Suvanto 2024, *Attacks against the IND-CPA^D security of
exact FHE schemes*; Checri, Sirdey, Boudguiga and Bultel 2024, *On the practical CPA^D security of "exact" and threshold
FHE schemes and libraries*). For a scheme that decrypts correctly without exception, IND-CPA^D is IND-CPA (Li and
Micciancio 2021). So the bound below is on the worst case, and no tail of a distribution enters it.

Noise. SEAL's symmetric ciphertext of m has c0 + c1 s = round(q m / t) + e (mod q): |e| <= 21 per coefficient, since
SEAL draws it from a centred binomial distribution, and the rounding, in each coefficient by itself, adds at most 1/2.
The sum of n of them is q/t (sum of m) + v with |v| <= 21.5 n; where the sum of m passes t it wraps by multiples of q,
which vanish. Decryption is right while |v| < q / (2 t) (Fan and Vercauteren 2012, section 3; SEAL's decryption in
residues asks for a share of 2^-59 more: Bajard et al. 2016, lemma 1). The margin is what is left of that, in bits,

    log2(q / (2 t * 21.5 n)),

at least MARGIN_BITS here. ``invariant_noise_budget`` of a sum is never below it, and is checked when a sum is opened,
so that a sum with anything in it that was encrypted under another key, or changed, is refused rather than decrypted.

Packing. Values lie in the *coefficients* of the plaintext. A sum needs no products of slots, hence no batching: that
would cost a transform modulo t for each block, and restrict t to primes that are 1 modulo 2 degree; here t is just what
the values need. Several share a coefficient: value j is digit j in the radix B = 2 n bound + 1, t = B^k, and since each
digit of the sum stays within (B - 1) / 2 of zero, no carry is lost and the balanced digits of the centred lift are the
sums. Nothing is added to make values positive. The limit of the encoding is log2(B) / 8 bytes per value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from choral.protocols.errors import SpecError
from choral.protocols.homomorphic.shared.seal import ERROR_BOUND, RingParameters, SealRing

MARGIN_BITS = 2
"""No parameters are chosen that leave less."""

MAX_PLAIN_BITS = 60
"""SEAL's largest plain modulus."""

RINGS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1024, (24,)),
    (2048, (32,)),
    (2048, (40,)),
    (2048, (48,)),
    (4096, (56,)),
    (4096, (60,)),
    (4096, (32, 32, 20)),
    (4096, (40, 32, 20)),
    (4096, (40, 40, 20)),
    (4096, (48, 40, 20)),
)
"""Degrees and bits of primes to choose from: those that fill whole bytes. A third prime is the special one.

All are within the 128-bit level of the standard, which SEAL checks, and the moduli that anything is encrypted under, of
at most 24, 48 and 88 bits, also within the 26, 53 and 106 of newer estimates of the same classical attacks (Bossuat et
al. 2024, *Security guidelines for implementing homomorphic encryption*: ternary secrets, 128 bits)."""


@dataclass(frozen=True)
class BfvPlan:
    """Parameters for one sum; the same (parties, bound, length) give the same plan to everyone.

    radix: B. values_per_slot: k, how many share a slot, which is a coefficient. block: values per ciphertext.
    """

    parameters: RingParameters
    parties: int
    bound: int
    radix: int
    values_per_slot: int

    scheme: ClassVar[Literal["bfv"]] = "bfv"
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.int64)
    error_bound: ClassVar[int] = 0

    @property
    def block(self) -> int:
        return self.values_per_slot * self.parameters.degree

    @property
    def margin_bits(self) -> int:
        """The least noise budget that a sum of all parties has: floor(log2(q / (2 t 21.5 n)))."""
        spare = self.parameters.modulus // (self.parameters.plain_modulus * (2 * ERROR_BOUND + 1) * self.parties)
        return spare.bit_length() - 1

    @property
    def bytes_per_value(self) -> float:
        """On the wire, up, where the last block is full."""
        return self.parameters.seeded_bytes / self.block

    def encode(self, ring: SealRing, values: NDArray[np.int64]) -> Any:
        """values: int64, shape (at most ``block``,), within the bound; value j degree + i is digit j of slot i."""
        degree, modulus = self.parameters.degree, self.parameters.plain_modulus
        if values.size < self.block:
            values = np.concatenate([values, np.zeros(self.block - values.size, np.int64)])
        digits = values.reshape(self.values_per_slot, degree)
        packed = digits[-1].copy()
        for row in digits[-2::-1]:
            packed *= self.radix
            packed += row
        packed += (packed >> 63) & modulus  # where negative
        return ring.plaintext(packed.view(np.uint64))

    def decode(self, ring: SealRing, plaintext: Any, count: int) -> NDArray[np.int64]:
        """The first ``count`` values of the block, lifted centred: int64."""
        modulus, half = self.parameters.plain_modulus, (self.radix - 1) // 2
        rest = ring.coefficients(plaintext).view(np.int64)
        rest[rest > modulus // 2] -= modulus
        out = np.empty((self.values_per_slot, rest.size), np.int64)
        for row in out:
            quotient = (rest + half) // self.radix
            np.subtract(rest, quotient * self.radix, out=row)
            rest = quotient
        return out.reshape(-1)[:count]


@lru_cache(maxsize=64)
def choose(parties: int, bound: int, length: int) -> BfvPlan:
    """The plan with the fewest bytes for a vector of ``length`` values of at most ``bound`` from ``parties`` parties.

    Raises: SpecError when no coefficient holds the sum of one value: 2 n bound + 1 must not pass 2^60.
    """
    radix = 2 * parties * bound + 1
    plans = [plan for degree, bits in RINGS if (plan := _fitting(degree, bits, parties, bound, radix))]
    if not plans:
        raise SpecError(
            f"{parties} parties with values up to {bound} need a plain modulus of {radix.bit_length()} bits with its"
            f" noise, over the {MAX_PLAIN_BITS} there are",
            hint="use fewer bits per value, a smaller weight cap, or fewer parties",
        )
    return min(plans, key=lambda plan: (-(-length // plan.block) * plan.parameters.seeded_bytes, plan.block))


def _fitting(degree: int, bits: tuple[int, ...], parties: int, bound: int, radix: int) -> BfvPlan | None:
    ring = RingParameters.of("bfv", degree, bits)
    room = min(ring.modulus // ((2 * ERROR_BOUND + 1) * parties << MARGIN_BITS), 2**MAX_PLAIN_BITS - 1)
    count = 0
    while radix ** (count + 1) <= room:
        count += 1
    if not count or any(radix % prime == 0 for prime in ring.primes):
        return None
    return BfvPlan(replace(ring, plain_modulus=radix**count), parties, bound, radix, count)
