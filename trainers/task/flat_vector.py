"""A model's trainable parameters as one flat vector, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from choral.trainers.task.task import TaskError


class Layout:
    """Where each trainable parameter of ``model`` lies in the flat vector; computed once.

    length: coordinates d. Shared (tied) parameters appear once, in the order of ``model.named_parameters()``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules, self._known = list(model.modules()), list(model.parameters())  # kept, so that ids stay theirs
        self._held = [_held(module) for module in self._modules]
        self.parameters = [parameter for parameter in self._known if parameter.requires_grad]
        self._tensors: list[torch.Tensor] = [*self.parameters]
        self.shapes = shapes(model)
        self.length = sum(parameter.numel() for parameter in self.parameters)
        self.holds_more = any(True for _ in model.buffers()) or len(self.parameters) < len(self._known)
        self._latest: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        """The current weights: float32, shape (d,), on the model's device."""
        flat: torch.Tensor = torch._utils._flatten_dense_tensors(self._tensors).float()  # type: ignore[no-untyped-call]
        return flat.clone() if len(self.parameters) == 1 else flat  # of one it is the tensor's own memory

    @torch.no_grad()
    def write(self, flat: torch.Tensor) -> None:
        """Copy ``flat``, shape (d,), into the model in one fused operation."""
        if self._latest is None or self._latest[0] is not flat:  # the same one for all parties of a round
            self._latest = flat, self.pieces(flat)
        torch._foreach_copy_(self._tensors, self._latest[1])

    def pieces(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of ``flat``, shape (d,), in the shapes of the trainable parameters."""
        pieces = torch.split(flat, [parameter.numel() for parameter in self.parameters])
        return [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def unchanged(self, model: nn.Module) -> bool:
        """Whether ``model`` is the very one that this was made of, and all its modules hold what they held then: the
        same modules and parameters, of the same shapes and trained or not, and buffers of the same names.

        One walk in the place of five, since every party's training is followed by them.
        """
        return model is self._modules[0] and self._held == [_held(module) for module in self._modules]

    def begin_training(self, model: nn.Module) -> None:
        """``model.train()``, which is skipped where all of it is in training and no class has a method of its own."""
        if self.unchanged(model) and all(map(_in_training, self._modules)):
            return
        model.train()

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


def _held(module: nn.Module) -> tuple[Any, ...]:
    """What a module holds itself, by name and identity."""
    children, parameters = module._modules, module._parameters
    return (
        [(name, id(child)) for name, child in children.items()],
        [(name, id(p), None if p is None else (p.requires_grad, p.shape)) for name, p in parameters.items()],
        list(module._buffers),
    )


def _in_training(module: nn.Module) -> bool:
    """Whether ``train()`` would leave the module as it is."""
    kind, own = type(module), vars(module)
    plain = kind.train is nn.Module.train and kind.__setattr__ is nn.Module.__setattr__ and "train" not in own
    return plain and own.get("training") is True


def all_finite(vector: torch.Tensor) -> bool:
    """Whether no coordinate is infinite or NaN: either makes the sum so, and a sum takes a twentieth of the time.

    A sum may also be infinite for being large; then each coordinate is looked at.
    """
    return math.isfinite(float(vector.sum())) or bool(torch.isfinite(vector).all())
