"""A model's trainable parameters as one flat vector, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import is_
from typing import Any, TypeVar

import torch
from torch import nn

from choral.trainers.task.task import TaskError

_Item = TypeVar("_Item")
_TOGETHER, _COORDINATES = 16, 1 << 18  # parties that are taken together, and the coordinates of all of these


class Layout:
    """Where each trainable parameter of ``model`` lies in the flat vector; computed once.

    length: coordinates d. Shared (tied) parameters appear once, in the order of ``model.named_parameters()``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules, self._known = list(model.modules()), list(model.parameters())  # kept, so that ids stay theirs
        self._held, self._seen = _held(self._modules), _seen(self._known)
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
        if model is not self._modules[0] or self._seen != _seen(self._known):
            return False
        # By identity: parameters have no plain equality. Neither can be a part of the other: they have as many ends.
        return all(map(is_, _held(self._modules), self._held))

    def begin_training(self, model: nn.Module) -> None:
        """``model.train()``, which is skipped where all of it is in training and no class has a method of its own."""
        if not (self.unchanged(model) and self.in_training()):
            model.train()

    def in_training(self) -> bool:
        """Whether ``train()`` would leave each module as it is."""
        return all(map(_in_training, self._modules))

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


_END = object()  # of a list, so that no two models are the same row of objects


def _held(modules: Sequence[nn.Module]) -> list[Any]:
    """What modules hold themselves, by name: children, parameters, and the names of buffers."""
    found: list[Any] = []
    for module in modules:
        own = vars(module)
        for held in (own["_modules"], own["_parameters"]):
            if held:
                found += held.values()
                found += held
            found.append(_END)
        found += own["_buffers"]
        found.append(_END)
    return found


def _seen(parameters: Sequence[nn.Parameter]) -> list[tuple[bool, torch.Size]]:
    return [(parameter.requires_grad, parameter.shape) for parameter in parameters]


def _in_training(module: nn.Module) -> bool:
    kind, own = type(module), vars(module)
    if own.get("training") is not True or "train" in own:
        return False
    return kind.train is nn.Module.train and kind.__setattr__ is nn.Module.__setattr__


def several(items: Iterable[_Item], length: int) -> Iterator[_Item]:
    """The same, some taken together before the first is used, where a vector of each, of that length, is little: code
    that has just run runs again in a third of the time that it takes after a training.
    """
    iterator = iter(items)
    while together := list(islice(iterator, max(1, min(_TOGETHER, _COORDINATES // max(length, 1))))):
        yield from together


def all_finite(vector: torch.Tensor) -> bool:
    """Whether no coordinate is infinite or NaN: either makes the sum so, and a sum takes a twentieth of the time.

    A sum may also be infinite for being large; then each coordinate is looked at.
    """
    return math.isfinite(float(vector.sum())) or bool(torch.isfinite(vector).all())
