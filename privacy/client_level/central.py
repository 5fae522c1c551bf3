"""Client-level noise that the server adds to the sum: the yardstick for noise inside the secure sum.

Each client clips its vector and rounds it *towards zero* to a grid of about 2^-10 / sqrt(d) clipping norms, which makes
no vector longer; the integers are added exactly; the server adds one Gaussian on the same grid
(:func:`choral.privacy.noise.gaussian.grid_gaussian`). The server, or whoever opens the sum, is trusted: it sees the sum
itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.privacy.accounting.events import ClientRelease, SampledClientRelease
from choral.privacy.client_level.client_noise_shares import clipping_factor
from choral.privacy.errors import EncodingError
from choral.privacy.noise.gaussian import Source, grid_gaussian, noise_grid

if TYPE_CHECKING:
    import torch

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CentralScheme:
    """Vectors of `length` coordinates, and noise of `ratio` times the clipping norm that the server adds to their sum.

    sample_rate: of the clients, whose cohorts are secret; None, and who is in a sum is known.
    Has the same methods as :class:`choral.privacy.client_level.client_noise_shares.DistributedScheme`.
    Raises: ConfigError (ratio not > 0).
    """

    length: int
    ratio: float
    sample_rate: float | None = None

    bits = None  # the sum is exact

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio > 0.0) or self.length < 1:
            raise ConfigError(
                f"the ratio of noise to clipping norm is {self.ratio} and length is {self.length}, expected both > 0"
            )

    @property
    def padded(self) -> int:
        """Coordinates of an encoded vector: nothing is padded."""
        return self.length

    @cached_property
    def grid(self) -> float:
        """The step of the integers, in clipping norms: a power of two."""
        return noise_grid(1.0, self.length)

    @property
    def bound(self) -> int:
        """The largest absolute value of a coordinate that a client sends."""
        return math.ceil(1.0 / self.grid)

    def signs(self, seed: bytes) -> None:
        """Nothing is rotated."""

    def release(self, shares: int, *, settles: bool = False) -> ClientRelease:
        """One sum with the server's noise, as an event; `shares` does not matter."""
        del shares
        release = ClientRelease(
            mechanism="gaussian",
            sensitivity_squared=1,
            share_variance=self.ratio**2,
            shares=1,
            length=self.length,
            settles=settles,
        )
        if self.sample_rate is None:
            return release
        return SampledClientRelease(**msgspec.structs.asdict(release), sample_rate=self.sample_rate)

    def encode(self, vector: npt.NDArray[Any] | torch.Tensor, clip: float, signs: None, source: Source) -> Int64Array:
        """Clip `vector` to norm `clip` and return it as integers, int64, shape (length,). No noise yet.

        Raises: EncodingError (shape, type, NaN or infinity); ConfigError (clip).
        """
        del signs, source
        factor = clipping_factor(vector, self.length, clip) / self.grid
        if not isinstance(vector, np.ndarray):
            vector = vector.detach().double().cpu().numpy()
        return np.trunc(vector.astype(np.float64) * factor).astype(np.int64)

    def decode(self, total: Int64Array, clip: float, signs: None, source: Source) -> npt.NDArray[np.float64]:
        """Return the sum of the clipped vectors plus the server's noise, shape (length,).

        Guarantee: one Gaussian release with this `ratio`. Fresh noise each time: call it once for each sum.
        Raises: EncodingError for another shape or type.
        """
        del signs
        if total.shape != (self.length,) or total.dtype != np.int64:
            raise EncodingError(f"total is {total.dtype} of shape {total.shape}, expected int64 of ({self.length},)")
        noisy = total * self.grid + grid_gaussian(self.length, self.ratio, 1.0, self.grid, source)
        return np.asarray(noisy * clip)
