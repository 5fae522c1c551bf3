"""Noise inside the secure sum: each client's vector becomes bounded integers plus a share of integer noise.

    clip to norm c  ->  pad and rotate  ->  scale by s  ->  round at random, norm <= D  ->  add a noise share  ->  sum

and after the sum: reduce modulo 2^bits to the centred representative, unscale, rotate back (Kairouz, Liu, Steinke 2021,
algorithms 1 and 2; Agarwal, Kairouz, Liu 2021). All lengths here are in units of the clipping norm, so that an
adaptive norm changes nothing in the integers' domain: sensitivity, noise, table and cost stay the same.

**What privacy rests on**: that each integer vector has L2 norm at most D, which is *measured on the integers* in
exact arithmetic, and that the noise has its law (:mod:`choral.privacy.noise.integer_tables`). Rotation, scale and
rounding may err as they like; they are for accuracy.

**Rounding.** Each coordinate goes up or down with the probabilities that keep its mean (to 2^-17). The vector is
rounded again until its norm is at most D, D^2 = min{(s + sqrt d)^2, s^2 + d/4 + sqrt(2 ln(1/beta)) (s + sqrt d / 2)},
beta = e^(-1/2) (their conditional rounding): one try in 2.5 passes at worst, nearly each one in practice. After 20
tries the vector is rounded towards zero instead, which can only shorten it: no input loops for ever or raises.

**The modulus wraps on purpose.** The sum is taken modulo 2^bits and s is chosen so that a coordinate of the sum leaves
the range at `TAIL` = 4 deviations only. Reducing the *sum* is post-processing: a wrapped coordinate is wrong by 2^bits
and hurts accuracy, never privacy. Shares are never reduced or cut by a client on its own: a table's draws end at
`reach`, about 17 deviations, which is 2^-200 from the law and counted there, so each value is at most `bound` =
floor(D) + reach, and no share can be out of range. A sum that cannot wrap (homomorphic) may return the exact sum of
such values instead; the result is reduced here either way. It must not add up *reduced* shares as plain integers: how
often clients wrapped is no function of the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.privacy.accounting.events import ClientRelease
from choral.privacy.dpsgd.clip_settings import check_clip
from choral.privacy.errors import EncodingError
from choral.privacy.noise.gaussian import Source
from choral.privacy.noise.integer_tables import LARGEST_DEVIATION, SMALLEST_VARIANCE, CumulativeTable, Law, table
from choral.privacy.noise.rotation import padded_length, random_signs, rotate, unrotate

if TYPE_CHECKING:
    import torch

TAIL = 4  # deviations of a coordinate of the sum at which it wraps
TRIES = 20
LARGEST_BITS = 24
_BETA_TERM = 1.0  # sqrt(2 ln(1 / beta)) for beta = e^(-1/2)
_CHUNK = 1 << 15
_LARGEST_SCALE = 2.0**25  # then squared norms of integers are below 2^53, where float64 adds them exactly

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DistributedScheme:
    """How clients' vectors become integers with noise, and how their sum comes back. Made by :func:`design`.

    mechanism: the law of the noise. bits: of the modulus. length: coordinates of a client's vector, d. clients: most
        in one sum.
    scale: s, integer steps per clipping norm. share_variance: variance parameter of one client's noise, in steps^2.
    """

    mechanism: Law
    bits: int
    length: int
    clients: int
    scale: float
    share_variance: Fraction

    @property
    def padded(self) -> int:
        """Coordinates of an encoded vector: the power of two that `length` is padded to."""
        return padded_length(self.length)

    def signs(self, seed: bytes) -> npt.NDArray[np.float32]:
        """The rotation of one round, from a seed that all clients have."""
        return random_signs(seed, self.padded)

    @property
    def sensitivity_squared(self) -> int:
        """D^2: the largest squared L2 norm of an encoded vector, before noise."""
        return squared_norm_bound(self.scale, self.padded)

    @cached_property
    def noise(self) -> CumulativeTable:
        """The table that noise is drawn from."""
        return table(self.mechanism, self.share_variance)

    @property
    def bound(self) -> int:
        """The largest absolute value of a coordinate that a client sends."""
        return math.isqrt(self.sensitivity_squared) + self.noise.reach

    def release(self, shares: int, *, settles: bool = False) -> ClientRelease:
        """One sum with `shares` noise shares that the adversary does not know, as an event."""
        return ClientRelease(
            mechanism=self.mechanism,
            sensitivity_squared=self.sensitivity_squared,
            share_variance=float(self.share_variance),
            shares=shares,
            length=self.padded,
            settles=settles,
        )

    def encode(
        self, vector: npt.NDArray[Any] | torch.Tensor, clip: float, signs: Any, source: Source, *, noisy: bool = True
    ) -> Int64Array:
        """Clip `vector` to norm `clip` and return it as integers with one share of noise.

        Guarantee: without the noise, the integers' squared norm is at most `sensitivity_squared`, whatever the vector;
        the noise is one draw per coordinate of the law `mechanism`, independent of everything.
        vector: floating point, shape (length,); a torch tensor is rotated where it lives. signs: from
            :func:`choral.privacy.noise.rotation.random_signs`, shape (padded,), like the vector. Returns int64, shape
            (padded,), each at most `bound`. noisy: False leaves the noise out, for tests and measurements.
        Raises: EncodingError (shape, type, NaN or infinity); ConfigError (clip).
        """
        factor = clipping_factor(vector, self.length, clip) * self.scale
        rotated = rotate(vector, signs)
        if not isinstance(rotated, np.ndarray):
            rotated = rotated.detach().cpu().numpy()
        result = self._round(rotated, factor, source)
        if noisy:
            for start in range(0, len(result), _CHUNK):
                piece = result[start : start + _CHUNK]
                piece += self.noise.draw(len(piece), source)
        return result

    def decode(self, total: Int64Array, clip: float, signs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return the sum of the clipped vectors, with the noise, shape (length,), from the sum of encodings.

        total: int64, shape (padded,), modulo 2^bits or exact. Raises: EncodingError for another shape or type.
        """
        if total.shape != (self.padded,) or total.dtype != np.int64:
            raise EncodingError(
                f"total has shape {total.shape} and type {total.dtype}, expected int64 and ({self.padded},)"
            )
        half = 1 << (self.bits - 1)
        centred = (((total + half) & (2 * half - 1)) - half).astype(np.float64)
        return unrotate(centred * (clip / self.scale), signs.astype(np.float64), self.length)

    def _round(self, rotated: npt.NDArray[Any], factor: float, source: Source) -> Int64Array:
        result = np.empty(len(rotated), dtype=np.int64)
        limit = float(self.sensitivity_squared)
        for _ in range(TRIES):
            if _round_at_random(rotated, factor, source, result) <= limit:
                return result
        # Rounded towards zero no coordinate grows; a thousandth less than the clipping norm covers what floats rounded.
        result[:] = np.trunc(rotated.astype(np.float64) * (factor * (1.0 - 2.0**-10)))
        if float(np.dot(result.astype(np.float64), result.astype(np.float64))) > limit:
            raise EncodingError("the rotated vector is longer than the clipped one", hint="signs must be +1 or -1.")
        return result


def design(
    *, mechanism: Law, bits: int, length: int, clients: int, holders: int, ratio: float, deviations: float = TAIL
) -> DistributedScheme:
    """Choose scale and noise share such that `holders` shares together have `ratio` times the clipping norm.

    s = sqrt(2^(2 bits) - n k^2) / (2 k sqrt(n^2 / d + n sigma^2)), sigma^2 = ratio^2 / holders, n = clients, for a
    clipping norm of 1 (Kairouz, Liu, Steinke 2021, section 5): then n clients' vectors, were they all alike, and n
    shares of noise pass the modulus at k = `deviations`. It is lowered where the noise would be larger than a table,
    2^14 steps, which is finer than accuracy has a use for.

    Raises: ConfigError (a number out of range, or too few bits: 2^(2 bits) <= n k^2, or a noise share below 2 steps of
    deviation, where discrete Gaussians do not add up to one).
    """
    check_bits(bits)
    if not (math.isfinite(ratio) and ratio > 0.0):
        raise ConfigError(f"the ratio of noise to clipping norm is {ratio}, expected a finite number > 0")
    if length < 1 or not 1 <= holders <= clients:
        raise ConfigError(f"length is {length} and holders are {holders} of {clients}, expected >= 1 and 1 to clients")
    room = 4.0**bits - clients * deviations**2
    if room <= 0.0:
        raise ConfigError(
            f"{bits} bits are too few for the sum of {clients} clients: 2^(2 bits) must exceed n k^2 with k = {TAIL}",
            hint=f"Use at least {math.floor(math.log2(clients * deviations**2) / 2.0) + 1} bits; 16 to 20 are usual.",
        )
    deviation = ratio / math.sqrt(holders)
    spread = math.sqrt(clients**2 / padded_length(length) + clients * deviation**2)
    scale = math.sqrt(room) / (2.0 * deviations * spread)
    scale = min(scale, LARGEST_DEVIATION / deviation, _LARGEST_SCALE)
    variance = min((scale * deviation) ** 2, float(LARGEST_DEVIATION) ** 2)
    if variance < (4.0 if mechanism == "discrete_gaussian" and holders > 1 else float(SMALLEST_VARIANCE)):
        raise ConfigError(
            f"{bits} bits leave a noise share of {math.sqrt(variance):.3g} steps, expected at least 2",
            hint="Use more bits, fewer clients, or Skellam noise, whose shares may be small.",
        )
    return DistributedScheme(
        mechanism=mechanism, bits=bits, length=length, clients=clients, scale=scale, share_variance=Fraction(variance)
    )


def squared_norm_bound(scale: float, padded: int) -> int:
    """D^2 for vectors of norm `scale` in `padded` coordinates, rounded at random (module docstring)."""
    root = math.sqrt(padded)
    first = (scale + root) ** 2
    second = scale**2 + padded / 4.0 + _BETA_TERM * (scale + root / 2.0)
    return math.floor(min(first, second))


def clipping_factor(vector: Any, length: int, clip: float) -> float:
    """Return min(1, clip / |vector|) / clip, what brings the vector to at most norm 1.

    Raises: EncodingError (shape, type, NaN or infinity); ConfigError (clip).
    """
    check_clip(clip)
    floating = vector.dtype.kind == "f" if isinstance(vector, np.ndarray) else vector.is_floating_point()
    if tuple(vector.shape) != (length,) or not floating:
        raise EncodingError(
            f"update has shape {tuple(vector.shape)} and type {vector.dtype}, expected ({length},) floating point"
        )
    norm = norm_of(vector)
    return min(1.0 / clip, 1.0 / norm) if norm > 0.0 else 1.0 / clip


def norm_of(vector: Any) -> float:
    """The L2 norm, in float64, without overflow. Raises: EncodingError for NaN or infinity."""
    if isinstance(vector, np.ndarray):
        with np.errstate(over="ignore", invalid="ignore"):
            norm = float(np.linalg.norm(vector.astype(np.float64, copy=False)))
    else:
        norm = float(vector.detach().double().norm())
    if math.isfinite(norm):
        return norm
    largest = float(abs(vector).max())
    if not math.isfinite(largest):
        raise EncodingError(
            "the update is not finite", hint="Training diverged; lower the learning rate. Nothing was sent."
        )
    return largest * norm_of(vector / largest)


def check_bits(bits: int) -> None:
    """Raise ConfigError unless `bits` is an integer from 4 to LARGEST_BITS."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 4 <= bits <= LARGEST_BITS:
        raise ConfigError(f"bits is {bits}, expected an integer from 4 to {LARGEST_BITS}", hint="16 to 20 are usual.")


def _round_at_random(rotated: npt.NDArray[Any], factor: float, source: Source, out: Int64Array) -> float:
    """Write floor(factor * x + u), u uniform on (0, 1), and return its squared norm."""
    squared = 0.0
    buffer, uniform = np.empty(_CHUNK), np.empty(_CHUNK)
    for start in range(0, len(rotated), _CHUNK):
        piece = rotated[start : start + _CHUNK]
        size = len(piece)
        values, random = buffer[:size], uniform[:size]
        np.multiply(piece, factor, out=values)
        np.multiply(np.frombuffer(source(2 * size), "<u2"), 2.0**-16, out=random)
        values += random
        values += 2.0**-17
        np.floor(values, out=values)
        squared += float(np.dot(values, values))
        out[start : start + size] = values
    return squared
