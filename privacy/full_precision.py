"""Where clipping is computed, autocast is off, and products of float32 matrices are those of float32, or of float64.

Norms rounded to bfloat16, or of products that torch was told to round, would be too small by more than any margin.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Leave torch.autocast, if it is on."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda", "mps"):
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def exact_float32(device: torch.device) -> bool:
    """Return whether torch multiplies float32 matrices there as what they are.

    ``torch.set_float32_matmul_precision("high")`` and its like have it round them to TensorFloat-32 or bfloat16, for
    speed: 2^-11 and 2^-8 where float32 has 2^-24.
    """
    if device.type not in ("cpu", "cuda") or os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        return False
    backend = torch.backends.cuda.matmul if device.type == "cuda" else getattr(torch.backends.mkldnn, "matmul", None)
    told = getattr(backend, "fp32_precision", None)  # since torch 2.9, and then the older question may be refused
    return torch.get_float32_matmul_precision() == "highest" if told is None else told in ("none", "ieee")
