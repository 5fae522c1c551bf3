"""What a loss trains beside the wrapped model: nothing may, since its gradients are raw.

Its parameters have no per-sample gradients, no clipping and no noise; another optimizer would step by what one record
gives, and release it.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import nn

from choral.privacy.errors import UnsupportedModelError

LEAF = "torch::autograd::AccumulateGrad"
_MOST = 200_000  # nodes of a graph that are looked at


def refuse_stranger(variable: torch.Tensor, own: Set[torch.Tensor], rows: int) -> None:
    """Raise UnsupportedModelError if a loss is made of something trainable that is not of the batch or the model."""
    of_batch = not isinstance(variable, nn.Parameter) and variable.dim() > 0 and len(variable) == rows
    if variable not in own and not of_batch:
        raise _stranger(variable)


def refuse_strangers(losses: Sequence[torch.Tensor], own: Set[torch.Tensor]) -> None:
    """Raise UnsupportedModelError if the graph of a loss ends anywhere in a parameter that is not the model's."""
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn for loss in losses]
    while waiting and len(seen) < _MOST:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == LEAF and isinstance(node.variable, nn.Parameter) and node.variable not in own:
            raise _stranger(node.variable)
        waiting += [child for child, _ in node.next_functions]


def _stranger(variable: torch.Tensor) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the loss trains a tensor of shape {tuple(variable.shape)} that is not a parameter of the wrapped model, and "
        "whose gradient would be raw",
        hint="Make every layer and parameter that is trained part of the one model that you wrap; freeze the others, "
        "requires_grad_(False).",
    )
