"""CKKS for sums of floats: parameters for a wanted precision, and the error that is left, stated.

Use it where the parties, who hold the key, want the sum of floats for themselves. It is approximate, and costs more
bytes than integers of the same precision in BFV: prefer :mod:`choral.protocols.homomorphic.shared.bfv` where you can
say how floats become integers.

**Its decryptions stay with those who hold the key.** A decryption is message plus error, to full precision, and error
and ciphertext together are linear equations for the secret key: whoever sees the ciphertext of a sum and its decryption
solves them (Li and Micciancio 2021, *On the security of homomorphic encryption on approximate numbers*: IND-CPA^D).
Rounding what is shown is not a proof against it; the known remedy is to flood the error with much larger noise, which
costs the precision (Li, Micciancio, Schultz and Sorrell 2022). So here nobody but the parties gets the sum: the server
relays ciphertexts, and there is no message by which a party would report a total.

Error. Slot values z_i stand in one plaintext m with m(zeta^(5^i)) = scale z_i; only real parts are read. Per slot, the
sum of n ciphertexts differs from the true sum, in units of 1 / scale, by

- encryption: sum over coefficients of e_j cos(angle_ij), e_j the sum of n fresh errors. A fresh error is the sum of 42
  independent values of +-1/2, so e_j is sub-Gaussian with variance proxy 10.5 n, and the whole with 10.5 n N / 2, as
  the squared cosines add up to N / 2: by Hoeffding above sqrt(10.5 n N ln(2 length / p)) with probability at most p in
  any of ``length`` slots (high probability; p = 2^-FAILURE_BITS);
- rounding to integer coefficients, each at most 1/2: at most n N / (2 sqrt 2) by Cauchy-Schwarz (worst case);
- floating point: SEAL transforms in float64; an FFT of N points has relative error at most log2(N) * 4 * 2^-53 in the
  2-norm (Higham 2002, theorem 24.2, generously), n times when encoding and once of n bound when decoding (worst case).

``error_bound`` is the sum of the three. Wraps are impossible: coefficients are at most scale * bound, and the modulus
leaves GUARD_BITS above the sum of n of them and their errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, isfinite, log, log2, sqrt
from typing import Any, ClassVar, Literal

import numpy as np
import tenseal.sealapi as sealapi
from numpy.typing import NDArray

from choral.protocols.errors import SpecError
from choral.protocols.homomorphic.shared.bfv import RINGS
from choral.protocols.homomorphic.shared.seal import ERROR_BOUND, ERROR_VARIANCE, RingParameters, SealRing

FAILURE_BITS = 64
"""The error is above its bound with probability at most 2^-64 per round, over SEAL's errors."""

GUARD_BITS = 6
"""Between the largest honest sum and the modulus, so that a wrong key shows: its values are uniform over all of it."""


@dataclass(frozen=True)
class CkksPlan:
    """Parameters for one sum of floats; the same arguments to :func:`choose` give the same plan to everyone.

    scale_bits: values are multiplied by 2^scale_bits. length: of the whole vector, for the failure probability.
    """

    parameters: RingParameters
    parties: int
    bound: float
    length: int
    scale_bits: int

    scheme: ClassVar[Literal["ckks"]] = "ckks"
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float64)
    margin_bits: ClassVar[int] = 0

    @property
    def block(self) -> int:
        return self.parameters.degree // 2

    @property
    def bytes_per_value(self) -> float:
        return self.parameters.seeded_bytes / self.block

    @property
    def error_bound(self) -> float:
        """Absolute, of each coordinate of the sum, but for a probability of 2^-FAILURE_BITS per round."""
        degree = self.parameters.degree
        scaled = _scaled_error(degree, self.parties, self.length) / 2.0**self.scale_bits
        return scaled + _float_error(degree, self.parties, self.bound)

    def encode(self, ring: SealRing, values: NDArray[np.float64]) -> Any:
        """values: float64, shape (at most ``block``,), within the bound."""
        plain = sealapi.Plaintext()
        sealapi.CKKSEncoder(ring.context).encode(values.tolist(), 2.0**self.scale_bits, plain)
        return plain

    def decode(self, ring: SealRing, plaintext: Any, count: int) -> NDArray[np.float64]:
        """The first ``count`` values. Ciphertexts carry the scale 1, so that what SEAL decodes is still scaled."""
        scaled = sealapi.CKKSEncoder(ring.context).decode_double(plaintext)
        return np.array(scaled[:count], np.float64) / 2.0**self.scale_bits


@lru_cache(maxsize=64)
def choose(parties: int, bound: float, length: int, precision: float) -> CkksPlan:
    """The plan with the fewest bytes whose ``error_bound`` is at most ``precision``.

    bound: the largest absolute value of one party's coordinate. precision: absolute, of a coordinate of the sum.
    Raises: SpecError when no ring is large enough, or float64 itself cannot have that precision.
    """
    if not (isfinite(bound) and isfinite(precision) and bound > 0 and precision > 0):
        raise SpecError(f"expected a finite bound > 0 and precision > 0, got {bound} and {precision}")
    plans = [plan for degree, bits in RINGS if (plan := _fitting(degree, bits, parties, bound, length, precision))]
    if not plans:
        raise SpecError(
            f"no ring here sums values up to {bound} of {parties} parties to within {precision}",
            hint="ask for less precision, or encode to integers and use the exact sum",
        )
    return min(plans, key=lambda plan: (-(-length // plan.block) * plan.parameters.seeded_bytes, plan.block))


def _fitting(
    degree: int, bits: tuple[int, ...], parties: int, bound: float, length: int, precision: float
) -> CkksPlan | None:
    left = precision - _float_error(degree, parties, bound)
    if left <= 0:
        return None
    scale_bits = ceil(log2(_scaled_error(degree, parties, length) / left))
    if not 0 <= scale_bits <= 60:
        return None
    parameters = RingParameters.of("ckks", degree, bits)
    largest = parties * (bound * 2.0**scale_bits + ERROR_BOUND + 1)
    if largest * 2.0 ** (GUARD_BITS + 1) > parameters.modulus:
        return None
    return CkksPlan(parameters, parties, bound, length, scale_bits)


def _scaled_error(degree: int, parties: int, length: int) -> float:
    encryption = sqrt(ERROR_VARIANCE * parties * degree * (log(2 * length) + FAILURE_BITS * log(2)))
    rounding = parties * degree / (2 * sqrt(2))
    return encryption + rounding


def _float_error(degree: int, parties: int, bound: float) -> float:
    relative = 4 * log2(degree) * 2.0**-53 * sqrt(degree)
    return 2 * relative * parties * bound
