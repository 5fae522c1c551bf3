"""Corrections of a user's training loop that it does not notice: terms added to the gradient before each step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from choral.trainers.algorithms.interface import Train
from choral.trainers.task.flat_vector import Layout
from choral.trainers.task.task import TaskError


class OptimizerSteps:
    """What the optimizer of a party does in a round, seen by a hook that stays with it.

    count: its steps. path: the sum of their learning rates; None if not SGD. astray: the largest change of a weight
    outside those steps, where that was watched.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.count, self.astray = 0, 0.0
        self.path: float | None = 0.0
        self._optimizer = optimizer
        self._watch: _Watch | None = None
        self._correction: _Correction | None = None
        optimizer.register_step_pre_hook(self._before)

    @contextmanager
    def corrected(
        self, layout: Layout, work: Train, start: torch.Tensor, *, watched: bool = False
    ) -> Iterator[OptimizerSteps]:
        """Count the optimizer's steps, and before each turn its gradient g into g + shift + pull (w - start).

        With differential privacy this is the optimizer inside the private one, so that g is noisy already, and what is
        added must be known without the records. A parameter without a gradient has g = 0. A step that evaluates the
        loss itself (``step(closure)``) is corrected after each evaluation. watched: also see whether anything but these
        steps moves the weights; it is seen wherever the work says something of the steps.
        Raises: TaskError for an optimizer that searches along gradients within its step (LBFGS), or for gradients that
            are sparse, if there is a correction.
        """
        if work.corrects and isinstance(self._optimizer, torch.optim.LBFGS):
            raise TaskError(
                "the algorithm corrects each step's gradient, and LBFGS computes gradients within its step",
                hint="use SGD or Adam, or FedAvg",
            )
        self.count, self.path, self.astray = 0, 0.0, 0.0
        if not (watched or work.corrects or work.counts):
            yield self
            return
        self._correction = _Correction(self._optimizer, layout, work, start) if work.corrects else None
        self._watch = watch = _Watch(layout)
        handle = self._optimizer.register_step_post_hook(lambda *_: watch.note())
        try:
            yield self
            watch.compare()
            self.astray = watch.largest
        finally:
            handle.remove()
            self._watch = self._correction = None

    def _before(self, stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        self.count += 1
        if self.path is not None:
            rate = sgd_rate(stepped)
            self.path = None if rate is None else self.path + rate
        if self._watch is not None:
            self._watch.compare()
        if (correction := self._correction) is None:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            correction.apply()
            return None

        def evaluated() -> Any:
            loss = closure()
            correction.apply()
            return loss

        return args[:1], {**kwargs, "closure": evaluated}


class _Correction:
    """shift + pull (w - start), to be added to the gradients of the parameters that the optimizer holds."""

    def __init__(self, optimizer: torch.optim.Optimizer, layout: Layout, work: Train, start: torch.Tensor) -> None:
        self._held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._layout, self._pull, self._anchors = layout, work.pull, layout.pieces(start)
        self._shifts = None if work.shift is None else layout.pieces(work.shift)

    @torch.no_grad()
    def apply(self) -> None:
        for index, (name, parameter) in enumerate(zip(self._layout.shapes, self._layout.parameters, strict=True)):
            if id(parameter) not in self._held:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            refuse_sparse(name, parameter.grad)
            if self._pull:
                parameter.grad.add_(parameter - self._anchors[index], alpha=self._pull)
            if self._shifts is not None:
                parameter.grad.add_(self._shifts[index])


def refuse_sparse(name: str, gradient: torch.Tensor | None) -> None:
    """Raises: TaskError for a gradient that a correction cannot be added to."""
    if gradient is not None and gradient.layout is not torch.strided:
        raise TaskError(
            f"the algorithm corrects each step's gradient, and that of {name!r} is sparse",
            hint="build the layer with sparse=False, or use FedAvg",
        )


class _Watch:
    """Whether weights stay as they are between one noted moment and the next comparison."""

    def __init__(self, layout: Layout) -> None:
        self._data = [parameter.data for parameter in layout.parameters]
        self._kept = [data.clone() for data in self._data]
        self._seen: list[torch.Tensor] = []

    def note(self) -> None:
        torch._foreach_copy_(self._kept, self._data)

    def compare(self) -> None:
        norms = torch._foreach_norm(torch._foreach_sub(self._data, self._kept), torch.inf)
        largest = torch.stack([norm.float() for norm in norms]).max()
        self._seen = [torch.maximum(self._seen[0], largest)] if self._seen else [largest]

    @property
    def largest(self) -> float:
        """Of all comparisons; read once, since an accelerator is waited for."""
        return float(self._seen[0]) if self._seen else 0.0


def sgd_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate of plain SGD with a single one, whose step is that rate times the gradient; else None."""
    if type(optimizer) is not torch.optim.SGD:
        return None
    groups = optimizer.param_groups
    rate = groups[0]["lr"]
    for group in groups:  # at every step of every party: no generators
        if group["momentum"] or group["maximize"] or group["lr"] != rate:
            return None
    return float(rate)
