from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture
def parties() -> dict[str, TensorDataset]:
    """Three unequal parties of a separable two-class problem in 5 dimensions."""
    generator = torch.Generator().manual_seed(7)
    made = {}
    for name, count in {"north": 60, "south": 33, "east": 21}.items():
        points = torch.randn(count, 5, generator=generator)
        made[name] = TensorDataset(points, (points @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0]) > 0).long())
    return made


@pytest.fixture
def job(parties: Mapping[str, TensorDataset]) -> Callable[..., dict[str, Any]]:
    """A task of three plain functions; keyword arguments replace its parts."""
    points = torch.cat([dataset.tensors[0] for dataset in parties.values()])
    labels = torch.cat([dataset.tensors[1] for dataset in parties.values()])

    def build(dataset: TensorDataset) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
        model = nn.Linear(5, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10, shuffle=True)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        for batch, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> float:
        return (model(points).argmax(dim=1) == labels).float().mean().item()

    def make(**replaced: Any) -> dict[str, Any]:
        return {"build": build, "fit": fit, "evaluate": evaluate, "parties": parties, "rounds": 3, "seed": 0} | replaced

    return make
