"""A party's records seen through the user's per-record loss: values and gradients at any weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate

from choral.trainers.task.device_batches import moved_to
from choral.trainers.task.flat_vector import Layout
from choral.trainers.task.task import Loss, TaskError

BATCH = 256


class Records:
    """The records of one party. The model is in eval mode: no dropout, so that F_k is a function.

    All vectors are float32, shape (d,), on the model's device. Raises (any method): TaskError if ``loss`` does not
    return one finite-or-not float per record with a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        dataset: Any,
        loader: Any,
        loss: Loss,
        device: torch.device,
        party: str,
    ) -> None:
        self.model, self.layout, self.dataset, self.party = model, layout, dataset, party
        self._loss, self._device = loss, device
        self._collate = loader.collate_fn if isinstance(loader, DataLoader) else default_collate
        model.eval()

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> Any:
        return moved_to(self._collate([self.dataset[index] for index in indices]), self._device)

    def batches(self) -> Iterator[tuple[Any, int]]:
        """All records in order, with how many there are in each batch."""
        for first in range(0, len(self), BATCH):
            indices = range(first, min(first + BATCH, len(self)))
            yield self.batch(indices), len(indices)

    def losses(self, batch: Any, count: int) -> torch.Tensor:
        """One loss per record, shape (n,), at the model's present weights."""
        losses = self._loss(self.model, batch)
        if not isinstance(losses, torch.Tensor) or losses.shape != (count,) or not losses.is_floating_point():
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise TaskError(
                f"loss returned {got} for a batch of {count} records of party {self.party!r}; expected one float per"
                f" record, shape ({count},)",
                hint='use reduction="none"',
            )
        return losses

    def gradient_here(self, batch: Any, count: int) -> torch.Tensor:
        """The gradient of the batch's mean loss at the model's present weights."""
        return self._flat(self._grad(self.losses(batch, count).mean()))

    def gradient(self, weights: torch.Tensor) -> torch.Tensor:
        """grad F_k(weights): the mean over all records."""
        self.layout.write(weights)
        total = torch.zeros_like(weights, dtype=torch.float64)
        for batch, count in self.batches():
            total += self.gradient_here(batch, count).double() * count
        return (total / len(self)).to(weights.dtype)

    def curvature(self, weights: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """The Hessian of F_k at weights, times direction."""
        self.layout.write(weights)
        total = torch.zeros_like(weights, dtype=torch.float64)
        along = direction.to(weights.dtype)
        for batch, count in self.batches():
            slopes = self._grad(self.losses(batch, count).sum(), create_graph=True)
            for name, slope in zip(self.layout.shapes, slopes, strict=True):
                if slope.layout is not torch.strided:
                    raise TaskError(
                        f"the exact solver needs the curvature, and the gradient of {name!r} is sparse",
                        hint='build the layer with sparse=False, or take solver = "svrg"',
                    )
            product = sum((slope * piece).sum() for slope, piece in zip(slopes, self.layout.pieces(along), strict=True))
            if isinstance(product, torch.Tensor) and product.requires_grad:
                total += self._flat(self._grad(product)).double()
        return total / len(self)

    def _grad(self, value: torch.Tensor, create_graph: bool = False) -> tuple[torch.Tensor, ...]:
        if not value.requires_grad:
            raise TaskError(
                f"loss at party {self.party!r} does not depend on the model's parameters",
                hint="compute it from model(...), without torch.no_grad or detach",
            )
        return torch.autograd.grad(
            value, self.layout.parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )

    @staticmethod
    def _flat(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([piece.detach().to_dense().reshape(-1).float() for piece in pieces])
