"""Batches from one device to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def moved_to(batch: Any, device: torch.device) -> Any:
    """``batch`` with its tensors on ``device``, whatever they are nested in."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: moved_to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved_to(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(moved_to(value, device) for value in batch)
    return batch
