from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.trainers import Task

SIZES = {"north": 60, "south": 41, "east": 29, "west": 20, "middle": 10}
RECORDS = sum(SIZES.values())


def datasets() -> dict[str, TensorDataset]:
    """Five unequal parties of a separable two-class problem in 5 dimensions."""
    generator = torch.Generator().manual_seed(7)
    made = {}
    for name, count in SIZES.items():
        points = torch.randn(count, 5, generator=generator)
        made[name] = TensorDataset(points, (points @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0]) > 0).long())
    return made


def build(dataset: Any) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    model = nn.Linear(5, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10, shuffle=True)


def fit(*_: Any) -> None:
    raise AssertionError("federated SGD does not call fit")


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def evaluate(model: nn.Module) -> float:
    points = torch.cat([dataset.tensors[0] for dataset in datasets().values()])
    labels = torch.cat([dataset.tensors[1] for dataset in datasets().values()])
    return (model(points).argmax(dim=1) == labels).float().mean().item()


def make_task(**changes: Any) -> Task:
    given: dict[str, Any] = {"build": build, "fit": fit, "evaluate": evaluate, "parties": datasets(), "loss": loss}
    return Task(**given | changes)


@pytest.fixture
def task() -> Callable[..., Task]:
    """Five parties; keyword arguments replace its parts."""
    return make_task
