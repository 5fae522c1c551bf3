"""A model's trainable parameters as one flat vector, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from choral.trainers.task.task import TaskError


class Layout:
    """Where each trainable parameter of ``model`` lies in the flat vector; computed once.

    length: coordinates d. Shared (tied) parameters appear once, in the order of ``model.named_parameters()``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.shapes = shapes(model)
        self.length = sum(parameter.numel() for parameter in self.parameters)

    def read(self) -> torch.Tensor:
        """The current weights: float32, shape (d,), on the model's device."""
        return torch.cat([parameter.detach().reshape(-1).float() for parameter in self.parameters])

    @torch.no_grad()
    def write(self, flat: torch.Tensor) -> None:
        """Copy ``flat``, shape (d,), into the model in one fused operation."""
        torch._foreach_copy_([parameter.data for parameter in self.parameters], self.pieces(flat))

    def pieces(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of ``flat``, shape (d,), in the shapes of the trainable parameters."""
        pieces = torch.split(flat, [parameter.numel() for parameter in self.parameters])
        return [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def stale(self, model: nn.Module) -> bool:
        """Whether ``model`` now has other trainable parameters, of whatever shape, than those read and written here."""
        now = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [id(parameter) for parameter in now] != [id(parameter) for parameter in self.parameters]

    def check(self, model: nn.Module, owner: str) -> None:
        """Raises: TaskError if ``model`` does not have the same trainable parameters."""
        if (found := shapes(model)) != self.shapes:
            odd = sorted(dict(found.items() ^ self.shapes.items()))
            raise TaskError(
                f"the model built for {owner} differs from the first party's in {', '.join(odd[:3])}",
                hint="build must return the same architecture for every dataset (fix the number of classes)",
            )


def shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def all_finite(vector: torch.Tensor) -> bool:
    """Whether no coordinate is infinite or NaN: either makes the sum so, and a sum takes a twentieth of the time.

    A sum may also be infinite for being large; then each coordinate is looked at.
    """
    return math.isfinite(float(vector.sum())) or bool(torch.isfinite(vector).all())
