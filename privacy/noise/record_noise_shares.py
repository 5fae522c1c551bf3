"""One party's share of the noise of a sum: its value and its noise as integers, rounded to a coarse grid.

The grid u = C 2^-k is that of the opened sum; the share's deviation r = s C / u lies in [8, 16), so that rounding adds
at most 1 / (12 * 64), .13 per cent, to the variance of the noise, and theta is below 10^-268 for up to a million
parties (:mod:`choral.privacy.noise.share_rounding`). The value is rounded to a finer grid v = u 2^-m, the noise too,
and the two are added as integers. Then the sum is rounded to u by a shift,

    (value + noise + 2^(m-1)) >> m,                                                                                (1)

which is floor(w / u + 1/2): **equivariant**, unlike numpy's rint, which rounds ties to even, so that neighbouring steps
of the grid differ. Not one floating-point number is the sum of a value and of noise.

Noise before rounding means that u costs no sensitivity; v does, v sqrt(d) <= 2^-10 C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.privacy.noise.gaussian import STRETCH, Source, gaussian

Int64Array = npt.NDArray[np.int64]

LEAST_STEPS, MOST_STEPS = 8.0, 16.0  # r, the deviation of a share in steps of the coarse grid
REACH = 13.5  # deviations that :func:`choral.privacy.noise.gaussian.gaussian` never passes: its radii end at 2^-129
MOST_ROWS = 1 << 20
_CHUNK = 1 << 15


@dataclass(frozen=True, kw_only=True)
class ShareGrid:
    """Two grids, in units of the clipping norm C. Made by :func:`share_grid`.

    coarse: k, u = C 2^-k; negative for shares larger than 16 C. fine: v = C 2^-fine.
    """

    coarse: int
    fine: int

    def __post_init__(self) -> None:
        for name in ("coarse", "fine"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or abs(value) > 60:
                raise ConfigError(f"{name} is {value!r}, expected an integer from -60 to 60")
        if self.shift < 1:
            raise ConfigError(f"the fine grid 2^-{self.fine} is no finer than the coarse one, 2^-{self.coarse}")

    @property
    def shift(self) -> int:
        """The m of (1)."""
        return self.fine - self.coarse

    def deviation(self, share: float) -> float:
        """Return r, the deviation in coarse steps of a share of `share` clipping norms."""
        return math.ldexp(share, self.coarse)

    def stretch(self, length: int, rows: int) -> float:
        """Return eta: how much further apart than C two neighbours' values may be, relative to C.

        By rounding to the fine grid, at most half a step in each of `length` coordinates of each; and by adding up
        `rows` numbers in float64, in any order, rows^2 2^-53 C at most in each of the two.
        """
        return math.ldexp(math.sqrt(length), -self.fine) + rows * rows * 2.0**-52

    def bound(self, share: float, rows: int) -> int:
        """Return the largest absolute value of a coordinate that a party with up to `rows` records in a step sends."""
        return math.ceil(math.ldexp(rows * (1.0 + 2.0**-20), self.coarse) + REACH * self.deviation(share)) + 1


def share_grid(share: float, length: int) -> ShareGrid:
    """Return the grids for shares of deviation `share` clipping norms, of vectors of `length` coordinates.

    Raises: ConfigError (a number out of range).
    """
    if not (math.isfinite(share) and 2.0**-30 <= share <= 2.0**30):
        raise ConfigError(f"the share of the noise is {share} clipping norms, expected 2^-30 to 2^30")
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length < 1 << 40:
        raise ConfigError(f"length is {length}, expected an integer from 1 to 2^40")
    coarse = math.ceil(math.log2(LEAST_STEPS / share))
    while math.ldexp(share, coarse) < LEAST_STEPS:  # log2 rounds
        coarse += 1
    while math.ldexp(share, coarse - 1) >= LEAST_STEPS:
        coarse -= 1
    fine = -math.floor(math.log2(STRETCH / math.sqrt(length)))
    return ShareGrid(coarse=coarse, fine=max(fine, coarse + 1))


def noisy_share(
    value: npt.NDArray[np.float64], clip: float, share: float, grid: ShareGrid, rows: int, source: Source
) -> Int64Array:
    """Return `value`, a sum of clipped gradients, and this party's share of the noise, in steps of the coarse grid.

    Guarantee: together with the shares of h - 1 other parties whom the adversary cannot look at, the Gaussian mechanism
    of noise multiplier share * sqrt(h) / (1 + eta) on the sum of the values, eta = grid.stretch(...), but for
    :func:`choral.privacy.noise.share_rounding.widening`. Alone, or with noise that others know, far less.
    Unit and neighbours: those for which one record moves `value` by at most C = `clip`.
    Shapes: value (d,), float64; returns (d,), int64, each at most grid.bound(share, rows) in size, whatever the value:
    what is not finite in it counts as zero, and what is beyond rows * C as that. Nothing is raised.
    **A result must be sent once, or never.** Reference: module docstring.
    """
    return share_with(value, clip, share, grid, rows, lambda here: gaussian(here.stop - here.start, source))


def share_with(
    value: npt.NDArray[np.float64],
    clip: float,
    share: float,
    grid: ShareGrid,
    rows: int,
    noise_of: Callable[[slice], npt.NDArray[np.float64]],
) -> Int64Array:
    """Return the same with noise that the caller made: `noise_of` some coordinates, over `share`, in a new array.

    Guarantee: none by itself; see who calls it. Shapes and bounds as of :func:`noisy_share`, for noise within REACH.
    """
    result = np.empty(len(value), dtype=np.int64)
    scale = math.ldexp(1.0 / clip, grid.fine)
    deviation = math.ldexp(share, grid.fine)
    half, most = np.int64(1 << (grid.shift - 1)), math.ldexp(float(rows), grid.fine)
    for start in range(0, len(value), _CHUNK):
        piece = value[start : start + _CHUNK] * scale
        np.nan_to_num(piece, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        np.clip(piece, -most, most, out=piece)
        noise = noise_of(slice(start, start + len(piece)))
        noise *= deviation
        whole = np.rint(piece, out=piece).astype(np.int64)
        whole += np.floor(np.add(noise, 0.5, out=noise), out=noise).astype(np.int64)
        whole += half
        np.right_shift(whole, grid.shift, out=result[start : start + _CHUNK])
    return result
