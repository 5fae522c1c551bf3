"""The usual local loop as data: passes of minibatch steps on a criterion, which engines may do in other ways.

A user's own ``fit`` is a black box that must run as it is, one party after the other. `Epochs` is a ``fit`` that says
what it does, so that an engine can gather batches from tensors at once, use closed-form gradients, or train many
parties as one stack of models, with the same result up to the rounding of floats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset, default_collate

from choral.errors import ConfigError
from choral.trainers.local_steps.corrections import OptimizerSteps


class Criterion(Protocol):
    """A loss in the manner of ``torch.nn.functional``, such as ``cross_entropy``."""

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor, /, *, reduction: str) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Epochs:
    """``fit`` as data: `epochs` passes over the loader, one optimizer step on the criterion's mean per batch.

    criterion: ``criterion(outputs, targets, reduction=...)``, with reductions "mean" and "none", as those of
        ``torch.nn.functional``. A batch is a pair (inputs, targets), and the model is called with the inputs. Both must
        be functions of what they are given: an engine may call them more often, or for several parties at once.
    Raises: ConfigError for epochs < 1.
    """

    criterion: Criterion = F.cross_entropy
    epochs: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs}, expected an integer >= 1")

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        for _ in range(self.epochs):
            for inputs, targets in loader:
                optimizer.zero_grad()
                self.criterion(model(inputs), targets, reduction="mean").backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """One loss per record, shape (n,), for ``Task(loss=...)``.

        Their mean is what a step descends, unless the criterion weighs or ignores classes.
        """
        inputs, targets = batch
        return per_record(self.criterion, model(inputs), targets)


def per_record(criterion: Criterion, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The criterion of each record, shape (n,); of several values per record, their mean."""
    losses = criterion(outputs, targets, reduction="none")
    return losses if losses.ndim == 1 else losses.flatten(1).mean(dim=1)


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """What `Epochs` does at one party, in tensors.

    inputs, targets: of all records, a record per row. learning_rate, momentum, weight_decay, nesterov: of its SGD.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    batch_size: int
    shuffle: bool
    drop_last: bool
    epochs: int
    learning_rate: float
    momentum: float
    weight_decay: float
    nesterov: bool

    @property
    def records(self) -> int:
        return len(self.inputs)

    @property
    def steps(self) -> int:
        """Of all epochs."""
        n, size = self.records, self.batch_size
        return self.epochs * (n // size if self.drop_last else -(-n // size))

    def orders(self, drawn: torch.Generator | None = None) -> Iterator[torch.Tensor]:
        """The order of the records in each epoch: what the loader would draw next from torch's generator.

        drawn: another generator, in the state that torch's would be in.
        """
        for _ in range(self.epochs):
            torch.empty((), dtype=torch.int64).random_(generator=drawn)  # the loader's seed for workers
            if not self.shuffle:
                yield torch.arange(self.records)
                continue
            generator = torch.Generator()
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_(generator=drawn).item()))
            yield torch.randperm(self.records, generator=generator)

    def batches(self, drawn: torch.Generator | None = None) -> Iterator[torch.Tensor]:
        """The indices of each step's batch, in the order of the steps. drawn: as for `orders`."""
        for order in self.orders(drawn):
            yield from self._split(order)

    def data(self, drawn: torch.Generator | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each step's inputs and targets: views of the epoch's records, gathered once. drawn: as for `orders`."""
        for order in self.orders(drawn):
            order = order.to(self.inputs.device)
            inputs, targets = self.inputs.index_select(0, order), self.targets.index_select(0, order)
            yield from zip(self._split(inputs), self._split(targets), strict=True)

    def _split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pieces = torch.split(rows, self.batch_size)
        return pieces[:-1] if self.drop_last and len(pieces[-1]) < self.batch_size else pieces


def plan_of(
    fit: Any, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, device: torch.device
) -> EpochPlan | None:
    """What `fit` does with these, if it is known in full; else None, and `fit` itself must run.

    Known are `Epochs` with torch's SGD over all trainable parameters in one group, and a plain ``DataLoader`` of a
    ``TensorDataset`` of inputs and targets. The tensors are moved to `device`, where they stay.
    """
    if not isinstance(fit, Epochs) or type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) != 1:
        return None
    if _hooked(optimizer) or any(p._post_accumulate_grad_hooks for p in model.parameters()):
        return None
    group = optimizer.param_groups[0]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    if sorted(id(p) for p in group["params"] if p.requires_grad) != sorted(trainable):
        return None
    if group["dampening"] or group["maximize"] or isinstance(group["lr"], torch.Tensor):
        return None
    if type(loader) is not DataLoader or loader.num_workers or loader.batch_size is None:
        return None
    if loader.collate_fn is not default_collate or loader.generator is not None:
        return None
    sampler, dataset = loader.sampler, loader.dataset
    if type(dataset) is not TensorDataset or len(dataset.tensors) != 2:
        return None
    if type(sampler) is RandomSampler:
        # num_samples is what it draws, of data_source
        if sampler.replacement or sampler.generator is not None or sampler.num_samples != len(sampler.data_source):
            return None
    elif type(sampler) is not SequentialSampler:
        return None
    if len(sampler.data_source) != len(dataset):
        return None
    inputs, targets = (tensor.to(device) for tensor in dataset.tensors)
    return EpochPlan(
        inputs=inputs,
        targets=targets,
        batch_size=loader.batch_size,
        shuffle=type(sampler) is RandomSampler,
        drop_last=loader.drop_last,
        epochs=fit.epochs,
        learning_rate=float(group["lr"]),
        momentum=float(group["momentum"]),
        weight_decay=float(group["weight_decay"]),
        nesterov=bool(group["nesterov"]),
    )


def _hooked(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the user's code runs within the optimizer's step: hooks, a scheduler's or another replaced ``step``."""
    before = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()]
    theirs = any(not isinstance(holder, OptimizerSteps) for holder in before)  # all but what counts the steps
    return theirs or bool(optimizer._optimizer_step_post_hooks) or "step" in vars(optimizer)


def has_hooks(model: nn.Module) -> bool:
    """Whether the user's code runs in, before or after some module's or gradient's computation."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_modules = any("forward" in vars(part) or any(getattr(part, name) for name in names) for part in model.modules())
    return on_modules or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
