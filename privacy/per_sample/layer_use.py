"""One use of a layer: what is kept of its forward pass, and the per-sample gradients of its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from choral.privacy.per_sample import ghost_norms


@dataclass
class LayerCall:
    """One use of a layer in a forward pass."""

    layer: nn.Module
    a: torch.Tensor | None  # let go in the last backward pass
    version: int  # of `a`, when it was used
    trainable: list[nn.Parameter]
    batch: int  # its number
    inside: bool  # in a forward pass that is looked at


@dataclass(frozen=True)
class LayerUse:
    """Gradients of one parameter from one use of its layer, heard in one backward pass."""

    gradients: ghost_norms.PerSample
    backward: int


class OutputTap(torch.autograd.Function):
    """The output of a layer before which nothing is trained, made part of the graph: else no gradient would come."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, _anchor: torch.Tensor, hear: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        ctx.hear = hear
        ctx.mark_dirty(output)  # as if changed in place: a view would forbid in-place activations
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.hear(gradient)
        return None, None, None


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters that `module` holds itself."""
    return [p for p in module._parameters.values() if p is not None and p.requires_grad]
