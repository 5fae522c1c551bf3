"""Corrections of a user's training loop that it does not notice: terms added to the gradient before each step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from choral.trainers.algorithms.seam import Train
from choral.trainers.flat import Layout
from choral.trainers.task import TaskError


@dataclass
class Steps:
    """What the optimizer of a party did. count: its steps. path: the sum of their learning rates; None if not SGD."""

    count: int = 0
    path: float | None = 0.0


@contextmanager
def corrected(optimizer: torch.optim.Optimizer, layout: Layout, work: Train, start: torch.Tensor) -> Iterator[Steps]:
    """Count the optimizer's steps, and before each turn its gradient g into g + shift + pull (w - start).

    With differential privacy this is the optimizer inside the private one, so that g is noisy already, and what is
    added must be known without the records. A parameter without a gradient has g = 0.
    Raises: TaskError for an optimizer that evaluates gradients within its step (LBFGS), if there is a correction.
    """
    if work.corrects and isinstance(optimizer, torch.optim.LBFGS):
        raise TaskError(
            "the algorithm corrects each step's gradient, and LBFGS computes gradients within its step",
            hint="use SGD or Adam, or FedAvg",
        )
    steps = Steps()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    anchors, shifts = layout.pieces(start), None if work.shift is None else layout.pieces(work.shift)

    @torch.no_grad()
    def before(stepped: torch.optim.Optimizer, *_: Any) -> None:
        steps.count += 1
        rate = sgd_rate(stepped)
        steps.path = None if rate is None or steps.path is None else steps.path + rate
        if not work.corrects:
            return
        for index, parameter in enumerate(layout.parameters):
            if id(parameter) not in held:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if work.pull:
                parameter.grad.add_(parameter - anchors[index], alpha=work.pull)
            if shifts is not None:
                parameter.grad.add_(shifts[index])

    handle = optimizer.register_step_pre_hook(before)
    try:
        yield steps
    finally:
        handle.remove()


def sgd_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate of plain SGD with a single one, whose step is that rate times the gradient; else None."""
    if type(optimizer) is not torch.optim.SGD:
        return None
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) != 1 or any(group["momentum"] or group["maximize"] for group in optimizer.param_groups):
        return None
    return rates.pop()
