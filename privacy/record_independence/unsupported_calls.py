"""Ways of calling layers and of going backward that per-sample gradients do not follow, or that tell of one record."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from choral.privacy.errors import PrivacyError, UnsupportedModelError


def refuse_anomaly_detection() -> None:
    """Raise PrivacyError where torch would end a backward pass in which one record's gradient is NaN."""
    if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
        raise PrivacyError(
            "torch.autograd's anomaly detection stops training at a NaN, and so tells of a single record without noise",
            hint="Leave it out; it may be used on public data, or with check_nan=False.",
        )


def refuse_reentrant(layer: nn.Module) -> None:
    """Raise UnsupportedModelError if a layer runs within torch's older kind of checkpointing, without gradients."""
    if not layer.training or torch.is_grad_enabled():
        return
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            raise UnsupportedModelError(
                "checkpoint(use_reentrant=True) makes a backward pass of its own for each part, in which it is not "
                "seen whether records are treated one by one",
                hint="Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False): same memory, same results.",
            )
        frame = frame.f_back


def refuse_inputs(name: str, layer: nn.Module, given: Any) -> None:
    """Raise UnsupportedModelError unless a layer that functorch runs for each record was given one tensor."""
    if len(given) != 1 or not isinstance(given[0], torch.Tensor):
        kinds = ", ".join(type(value).__name__ for value in given) or "keyword arguments alone"
        raise UnsupportedModelError(
            f"layer {name} ({type(layer).__name__}) holds parameters of its own and was given {kinds}, expected one "
            "tensor",
            hint="Let the module that holds parameters take one tensor, batch first (torch.cat joins several), or put "
            "its parameters into torch's own layers.",
        )


def refuse_bent(
    some: Sequence[torch.Tensor | None], others: Sequence[torch.Tensor | None], twice: Sequence[torch.Tensor | None]
) -> None:
    """Raise UnsupportedModelError unless gradients of some and of other records add up to half of those of twice all.

    Backward passes are linear, but for hooks and Functions that clip or normalise: then what is made of one record
    depends on how many others there are, or on their gradients.
    """
    for a, b, c in zip(some, others, twice, strict=True):
        if a is None or b is None or c is None:
            continue
        half, total = c / 2, a + b
        finite = half.isfinite() & total.isfinite()
        off, size = (half - total)[finite].abs(), half[finite].abs()
        if off.numel() and bool(off.max() > (1e-3 if c.element_size() >= 4 else 3e-2) * size.max()):
            raise UnsupportedModelError(
                "gradients in the model's backward pass do not add up over records: a hook or a Function changes them",
                hint="Clip and scale no gradients in hooks or Functions; Privacy(max_grad_norm=...) clips each "
                "record's.",
            )


def warn_of_clipping(frame: FrameType | None) -> bool:
    """Warn where the loop that made a step, `frame`, or one of its two callers, clips gradients itself: it clips none.

    Returns whether it was so.
    """
    for _ in range(3):
        if frame is None or frame.f_globals.get("__name__", "").split(".")[0] in _FRAMEWORKS:
            return False
        found = {"clip_grad_norm_", "clip_grad_value_"} & set(frame.f_code.co_names)
        if found:
            warnings.warn(
                f"{min(found)} does nothing in a private loop: there are no gradients before optimizer.step(), which "
                "clips each record's to Privacy(max_grad_norm=...). Leave it out.",
                stacklevel=4,
            )
            return True
        frame = frame.f_back
    return False


_FRAMEWORKS = ("lightning", "pytorch_lightning", "transformers", "accelerate")  # whose own clipping is refused
