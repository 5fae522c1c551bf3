"""A declared search for settings, on records held out of the training data: the same budget for any kind of training.

Every combination of the grid is trained once, as the run itself is, on the rest of each party's records; the one with
the smallest mean loss on the held-out ones is chosen, and the run then trains on all records. The test set is not
looked at. The tries and what they took are recorded in run.json and stand in the bill.

Nothing here is private: the tries read the records without noise, so that a private run does not take their result
(``choral.privacy.private_search`` is for that).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from choral.errors import ConfigError
from choral.trainers.run_folder.run import Run
from choral.trainers.task.device_batches import moved_to
from choral.trainers.task.task import DivergedError, Loss, Task, TaskError

Grid = Mapping[str, Sequence[float | int]]
_AT_ONCE = 1024
_METRIC = "validation loss"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """chosen: the settings with the smallest validation loss. record: every try, for ``tuning=`` of the run itself."""

    chosen: Mapping[str, float | int]
    record: Mapping[str, Any]


def tune(
    make: Callable[..., Task],
    grid: Grid,
    train: Callable[[Task], Run],
    *,
    seed: int = 0,
    validation_fraction: float = 0.2,
) -> Tuned:
    """Train every combination of the grid once, and choose by the mean loss on held-out records.

    make: ``make(**settings)`` gives the task with these settings; it must have a ``loss``. train: trains a task as the
    run will be, such as ``lambda task: centralize(task, rounds=20)``; the loss after its last round counts.
    seed: decides which records are held out: of each party, ``validation_fraction`` of them, but not its only one.
    Raises: ConfigError for an empty grid, a repeated or non-finite value, a fraction outside (0, 1), or a private run;
        TaskError for a task without a loss, or if every try diverged; what ``train`` raises.
    """
    check_grid(grid, validation_fraction)
    tries: list[dict[str, Any]] = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        tries.append(settings | _attempt(_held_out(make(**settings), seed, validation_fraction), train))
    finished = [entry for entry in tries if entry["loss"] is not None]
    if not finished:
        raise TaskError("every try of the grid diverged", hint="lower the learning rates")
    best = min(finished, key=lambda entry: float(entry["loss"]))
    chosen = {name: best[name] for name in grid}
    record = {
        "grid": {name: list(values) for name, values in grid.items()},
        "validation_fraction": validation_fraction,
        "tries": tries,
        "chosen": chosen,
        "seconds": math.fsum(entry["seconds"] for entry in tries),
    }
    return Tuned(chosen=chosen, record=record)


def check_grid(grid: Grid, validation_fraction: float) -> None:
    """Raises: ConfigError, as :func:`tune` does."""
    if not grid or not all(len(values) for values in grid.values()):
        raise ConfigError("there is nothing to tune", hint="e.g. learning_rate = [0.1, 0.5]")
    for name, values in grid.items():
        if len(set(values)) < len(values) or not all(math.isfinite(value) and value > 0 for value in values):
            raise ConfigError(f"expected different finite values > 0 of {name}, got {list(values)}")
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"expected 0 < validation_fraction < 1, got {validation_fraction:g}", hint="e.g. 0.2")


def _attempt(task: Task, train: Callable[[Task], Run]) -> dict[str, Any]:
    """The loss of one try, None if it diverged, and the seconds that it trained, in all of its processes."""
    started = time.perf_counter()
    try:
        run = train(task)
    except DivergedError:
        return {"loss": None, "seconds": time.perf_counter() - started, "rounds": None}
    if run.info.privacy is not None:
        raise ConfigError(
            "a private training is not tuned by tries that nobody charges for", hint="use choral.privacy.private_search"
        )
    seconds = run.info.processes * math.fsum(entry.seconds for entry in run.history)
    return {"loss": run.metrics[_METRIC], "seconds": seconds, "rounds": run.history[-1].round}


def _held_out(task: Task, seed: int, fraction: float) -> Task:
    """The task on the rest of the records, evaluated by the mean loss on the held-out ones."""
    if task.loss is None:
        raise TaskError(
            "tuning needs the loss of held-out records, and the task has none",
            hint="give loss(model, batch) -> tensor of one loss per record, shape (n,)",
        )
    rest, held = {}, []
    for number, (name, dataset) in enumerate(task.parties.items()):
        order = np.random.default_rng((seed, number)).permutation(len(dataset))
        count = min(max(1, round(fraction * len(dataset))), len(dataset) - 1)
        rest[name] = _part(dataset, order[count:])
        if count:
            held.append(_part(dataset, order[:count]))
    if not held:
        raise TaskError("no party has a record to hold out", hint="tuning needs parties of two records or more")
    loss = task.loss
    return dataclasses.replace(task, parties=rest, evaluate=lambda model: {_METRIC: _mean_loss(model, loss, held)})


def _part(dataset: Any, indices: np.ndarray[Any, Any]) -> Any:
    chosen = np.sort(indices)
    if type(dataset) is TensorDataset:
        return TensorDataset(*(tensor[torch.from_numpy(chosen)] for tensor in dataset.tensors))
    return Subset(dataset, chosen.tolist())


def _mean_loss(model: nn.Module, loss: Loss, held: Sequence[Any]) -> float:
    device = next(model.parameters()).device
    total, records = 0.0, 0
    for dataset in held:
        for batch in DataLoader(dataset, batch_size=_AT_ONCE):
            losses = loss(model, moved_to(batch, device))
            total, records = total + float(losses.double().sum()), records + losses.numel()
    if not math.isfinite(total):
        raise DivergedError("the validation loss is not finite", hint="lower the learning rate")
    return total / records
