"""Features that are standardised inside the model: it takes records as they are, and so does whoever gets it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from choral.errors import ConfigError
from choral.trainers.task.task import Built, Task


@dataclass(frozen=True, kw_only=True)
class Standardisation:
    """What a feature x becomes: (x - mean) / deviation; one of each for every feature, 0 and 1 where it stays.

    how: they were computed, for the run's record; see :class:`~choral.trainers.run_folder.info.RunInfo`.
    Raises: ConfigError for numbers that are not finite, a deviation that is not above 0, or other lengths.
    """

    means: tuple[float, ...]
    deviations: tuple[float, ...]
    how: dict[str, float | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("means", "deviations"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if not self.means or len(self.means) != len(self.deviations):
            raise ConfigError(f"{len(self.means)} means and {len(self.deviations)} deviations, expected as many")
        if not all(map(math.isfinite, self.means)) or not all(0 < each < math.inf for each in self.deviations):
            raise ConfigError("means are finite, and deviations finite and above 0")

    @classmethod
    def none(cls, features: int) -> Standardisation:
        """Of so many features, all of which stay."""
        return cls(means=(0.0,) * features, deviations=(1.0,) * features)


class Standardised(nn.Module):
    """A model of standardised features. Input: shape (n, features), then whatever else the model takes."""

    means: torch.Tensor
    deviations: torch.Tensor

    def __init__(self, model: nn.Module, by: Standardisation) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("means", torch.tensor(by.means))
        self.register_buffer("deviations", torch.tensor(by.deviations))

    def forward(self, features: torch.Tensor, *more: Any) -> Any:
        return self.model((features - self.means) / self.deviations, *more)


def standardised_task(task: Task, by: Standardisation) -> Task:
    """The task whose ``build`` returns its model with the standardisation in front, and in its state."""

    @functools.wraps(task.build)
    def build(dataset: Any) -> Built:
        model, optimizer, loader = task.build(dataset)
        return Standardised(model, by), optimizer, loader

    return replace(task, build=build, engine=None, standardised=by.how)


def bounds_of_features(task: Task) -> Sequence[tuple[float, float] | None]:
    """Raises: ConfigError for a task that says none."""
    if task.bounds is None or not any(each is not None for each in task.bounds):
        raise ConfigError(
            "data.standardise needs public bounds of the features, and the task says none",
            hint="return Task(..., bounds=[(0, 120), ...]), one for each feature, or None where it stays as it is; of a"
            " table, [data.bounds]",
        )
    return task.bounds
