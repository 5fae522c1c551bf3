"""Float updates as integers and back: what lets a secure sum add weighted updates exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from choral.errors import ConfigError
from choral.privacy.errors import EncodingError

Int64Array = npt.NDArray[np.int64]


class FixedPoint:
    """Weighted fixed-point encoding of update vectors: refuses what does not fit, never clips, never wraps.

    A coordinate v in [-bound, bound] becomes the integer k = round(v / step), half to even, with
    step = bound / (2^(value_bits - 1) - 1), so |k| < 2^(value_bits - 1). A party of weight w sends
    (w k_1, ..., w k_d, w): the weight is one more coordinate, so that a secure sum hides it too.

    The weighted mean decodes to within `error_bound` = step / 2 per coordinate: |k_i step - v_i| <= step / 2
    for each party i, hence |sum w_i k_i step / sum w_i - sum w_i v_i / sum w_i| is at most a weighted mean of
    numbers <= step / 2. (Float64 arithmetic adds relative 2^-52 to this; keep value_bits <= 48.)

    Args:
        bound: largest absolute value of a coordinate, in the update's unit, finite and > 0.
        value_bits: bits of one encoded value with its sign, 2 to 48.
        max_weight: largest weight of one party, such as its number of examples, >= 1.

    Raises: ConfigError if a setting is out of range or max_weight * 2^(value_bits - 1) exceeds 2^62.
    """

    def __init__(self, *, bound: float, value_bits: int, max_weight: int) -> None:
        if not (math.isfinite(bound) and bound > 0.0):
            raise ConfigError(f"bound is {bound}, expected a finite number > 0")
        if not 2 <= value_bits <= 48:
            raise ConfigError(f"value_bits is {value_bits}, expected 2 to 48", hint="24 bits suit float32 updates.")
        if max_weight < 1 or max_weight << (value_bits - 1) > 2**62:
            raise ConfigError(
                f"max_weight is {max_weight}, expected 1 to {2**62 >> (value_bits - 1)} with {value_bits} value bits",
                hint="Use fewer value bits or smaller weights.",
            )
        self.bound = float(bound)
        self.value_bits = int(value_bits)
        self.max_weight = int(max_weight)
        self._largest: int = (1 << (self.value_bits - 1)) - 1
        self.step: float = self.bound / self._largest

    def __repr__(self) -> str:
        return f"FixedPoint(bound={self.bound}, value_bits={self.value_bits}, max_weight={self.max_weight})"

    @property
    def integer_bound(self) -> int:
        """The largest absolute value of any coordinate of one party's encoding."""
        return self.max_weight * self._largest

    @property
    def error_bound(self) -> float:
        """The largest error of a coordinate of the decoded weighted mean: step / 2."""
        return self.step / 2.0

    def encode(self, update: torch.Tensor | npt.NDArray[Any], weight: int) -> Int64Array | torch.Tensor:
        """Encode `update` (shape (d,), floating point) with its `weight` as int64 integers, shape (d + 1,).

        A tensor on CUDA is encoded where it lives and comes back as a torch.int64 tensor there, so that masks can be
        added before anything leaves the device.

        Raises: EncodingError if the update is not a float vector, holds NaN or infinity or a coordinate
        beyond `bound`, or if the weight is not an integer from 1 to `max_weight`.
        """
        if isinstance(weight, bool) or not isinstance(weight, int | np.integer) or not 1 <= weight <= self.max_weight:
            raise EncodingError(f"weight is {weight}, expected an integer from 1 to {self.max_weight}")
        if isinstance(update, torch.Tensor) and update.is_cuda:
            return self._encode_tensor(update, weight)
        given = update
        if isinstance(update, torch.Tensor):
            update = update.detach().cpu().to(torch.float64 if update.is_floating_point() else update.dtype).numpy()
        if update.ndim != 1 or update.dtype.kind != "f":
            raise EncodingError(f"update has shape {update.shape} and type {update.dtype}, expected one float vector")
        values = update.astype(np.float64, copy=False)
        # No absolute values, which would be one more vector; NaN goes through both.
        largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
        self._check_range(largest)
        encoded = np.empty(len(values) + 1, dtype=np.int64)
        own = given.dtype not in (torch.float64, np.float64)  # then these are a copy, and no second one is needed
        whole = np.divide(values, self.step, out=values if own else None)
        np.rint(whole, out=whole)
        if largest / self.step > self._largest:  # by a rounding of the division, which keeps the order, at most
            np.clip(whole, -self._largest, self._largest, out=whole)
        encoded[:-1] = whole
        encoded[:-1] *= int(weight)
        encoded[-1] = weight
        return encoded

    def _encode_tensor(self, update: torch.Tensor, weight: int) -> torch.Tensor:
        """The same integers, computed on the tensor's device."""
        if update.ndim != 1 or not update.is_floating_point():
            raise EncodingError(
                f"update has shape {tuple(update.shape)} and type {update.dtype}, expected one float vector"
            )
        values = update.detach().to(torch.float64)
        self._check_range(float(values.abs().max()) if len(values) else 0.0)
        encoded = torch.empty(len(values) + 1, dtype=torch.int64, device=update.device)
        encoded[:-1] = (values / self.step).round_().clamp_(-self._largest, self._largest).long() * weight
        encoded[-1] = weight
        return encoded

    def _check_range(self, largest: float) -> None:
        if not largest <= self.bound:  # also NaN
            what = "not finite" if not math.isfinite(largest) else f"{largest:.6g}"
            raise EncodingError(
                f"the largest coordinate is {what}, expected at most the bound {self.bound:.6g}",
                hint="Lower the learning rate or clip the update; raise the bound only if the parties agree on it.",
            )

    def decode(self, total: Int64Array, parties: int | None = None) -> tuple[torch.Tensor, int]:
        """Return the weighted mean, shape (d,), float64, and the total weight, of a sum of encodings, shape (d + 1,).

        parties: how many encodings are in the sum; each weighs from 1 to ``max_weight``, and so their sum. A party that
        sends a weight of its own making (a negative one makes the others' weights, by which all is divided, small)
        can then move the mean no further than by what is left of that range. None only where nobody knows.

        Raises: EncodingError if the total is not an int64 vector, its weight is not one that so many parties can have,
        or a coordinate is larger than that weight allows (parties disagree on the settings, or the sum wrapped).
        """
        if total.ndim != 1 or total.dtype != np.int64 or len(total) < 1:
            raise EncodingError(f"total has shape {total.shape} and type {total.dtype}, expected one int64 vector")
        weight = int(total[-1])
        least, most = (1, 2**62) if parties is None else (parties, parties * self.max_weight)
        if parties is not None and parties < 1:
            raise EncodingError(f"a sum of {parties} encodings has no mean, expected >= 1")
        if not least <= weight <= most:
            raise EncodingError(
                f"the total weight is {weight}, expected {least} to {most}",
                hint="some party sent a weight of its own making, or other settings than agreed on",
            )
        sums = total[:-1]
        if len(sums) and max(int(sums.max()), -int(sums.min())) > weight * self._largest:
            raise EncodingError(
                "a coordinate of the sum is larger than its weight allows",
                hint="All parties must use the same bound, value bits and modulus.",
            )
        return torch.from_numpy(sums.astype(np.float64) * (self.step / weight)), weight
