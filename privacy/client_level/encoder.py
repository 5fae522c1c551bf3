"""A client's half of a sum with client-level privacy: it clips its update and adds its share of the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from choral.privacy.client_level.central import CentralScheme
from choral.privacy.client_level.client_noise_shares import DistributedScheme, Int64Array, norm_of
from choral.privacy.dpsgd.clip_settings import AdaptiveClip
from choral.privacy.errors import EncodingError
from choral.privacy.noise.gaussian import Source

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, repr=False)
class ClientEncoder:
    """What every client of one sum is told alike, and what makes its own noise.

    length: coordinates of an update. clip: the largest norm. adaptive: how that moves, None where it does not. scheme:
    of the noise. signs: of the rotation, public and the same for all. source: of this client's own noise and rounding.
    """

    length: int
    clip: float
    adaptive: AdaptiveClip | None
    scheme: DistributedScheme | CentralScheme
    signs: Any
    source: Source

    def encode(self, update: torch.Tensor | np.ndarray[Any, Any]) -> Int64Array:
        """Return one client's update, shape (length,), floating point, as integers for the secure sum.

        int64, shape (scheme.padded,), each at most scheme.bound, with this client's noise unless it is central.
        Raises: EncodingError (shape, type, NaN or infinity). Nothing is sent then; the client counts as dropped out.
        """
        import torch

        if isinstance(update, np.ndarray):
            update = torch.from_numpy(update)
        if tuple(update.shape) != (self.length,) or not update.is_floating_point():
            raise EncodingError(
                f"update has shape {tuple(update.shape)} and type {update.dtype}, expected ({self.length},)"
                " floating point"
            )
        vector = update.detach() if update.dtype in (torch.float32, torch.float64) else update.detach().float()
        clip, adaptive = self.clip, self.adaptive
        if adaptive:
            norm = norm_of(vector)
            # The zero vector says nothing of its norm: a neighbour that says "longer" would be too far from "shorter".
            within = 0.0 if norm == 0.0 else 1.0 if norm <= clip else -1.0
            factor = math.sqrt(1.0 - adaptive.share) * min(1.0 / clip, 1.0 / norm if norm > 0.0 else math.inf)
            vector = torch.cat([vector * factor, vector.new_tensor([within * math.sqrt(adaptive.share)])])
            clip = 1.0
        signs = self.signs
        if signs is not None:
            signs = torch.from_numpy(signs).to(device=vector.device, dtype=vector.dtype)
        return self.scheme.encode(vector, clip, signs, self.source)
