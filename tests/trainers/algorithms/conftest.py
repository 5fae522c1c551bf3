from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.trainers.local_steps.resident_model import initial_model
from choral.trainers.task.seeding import seeded

RATE = 0.4
BATCH = 8


class Numpy:
    """Binary logistic regression over parties in float64 numpy: what the algorithms are compared with.

    w has the weights first, then the bias. Each party's records stay in their order; where an algorithm draws one, it
    is the trainer's.
    """

    def __init__(self, parties: dict[str, TensorDataset], start: np.ndarray, seed: int) -> None:
        self.data = {}
        for name, dataset in parties.items():
            x, y = dataset.tensors[0].double().numpy(), dataset.tensors[1].numpy()
            self.data[name] = (np.hstack([x, np.ones((len(x), 1))]), 2.0 * y - 1.0)
        self.start, self.seed = start, seed
        self.counts = {name: len(y) for name, (_, y) in self.data.items()}
        self.total = sum(self.counts.values())

    def gradient(self, name: str, w: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
        x, y = self.data[name][0][rows], self.data[name][1][rows]
        return -(x * (y / (1 + np.exp(y * (x @ w))))[:, None]).mean(0)

    def hessian(self, name: str, w: np.ndarray) -> np.ndarray:
        x, y = self.data[name]
        p = 1 / (1 + np.exp(-(x @ w)))
        return (x * (p * (1 - p))[:, None]).T @ x / len(y)

    def mean(self, vectors: dict[str, np.ndarray]) -> np.ndarray:
        return sum(self.counts[name] * vector for name, vector in vectors.items()) / sum(
            self.counts[name] for name in vectors
        )

    def sgd(self, name: str, w: np.ndarray, correction: Callable[[np.ndarray], Any] = lambda w: 0.0) -> Any:
        """One pass in the order of the data; the weights after it, and the number of steps."""
        steps = 0
        for first in range(0, self.counts[name], BATCH):
            w = w - RATE * (self.gradient(name, w, slice(first, first + BATCH)) + correction(w))
            steps += 1
        return w, steps

    def order(self, name: str, number: int) -> list[int]:
        with seeded(self.seed, number, name):
            return torch.randperm(self.counts[name]).tolist()

    def objective(self, w: np.ndarray, ridge: float) -> float:
        losses = sum(np.logaddexp(0, -y * (x @ w)).sum() for x, y in self.data.values())
        return float(losses / self.total + ridge / 2 * w @ w)

    def optimum(self, ridge: float) -> np.ndarray:
        w = np.zeros_like(self.start)
        for _ in range(30):
            slope = self.mean({name: self.gradient(name, w) for name in self.data}) + ridge * w
            curved = self.mean({name: self.hessian(name, w) for name in self.data}) + ridge * np.eye(len(w))
            w = w - np.linalg.solve(curved, slope)
        return w


def build(dataset: TensorDataset) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    model = nn.Linear(6, 1)
    return model, torch.optim.SGD(model.parameters(), lr=RATE), DataLoader(dataset, batch_size=BATCH)


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    points, labels = batch
    return nn.functional.binary_cross_entropy_with_logits(model(points)[:, 0], labels.to(points), reduction="none")


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    for batch in loader:
        optimizer.zero_grad()
        loss(model, batch).mean().backward()
        optimizer.step()


@pytest.fixture
def shards() -> dict[str, TensorDataset]:
    """Four unequal parties; features 3 to 5 are rare, and each is unknown to some party."""
    draw = torch.Generator().manual_seed(11)
    made = {}
    for index, (name, count) in enumerate({"north": 30, "south": 17, "east": 9, "west": 24}.items()):
        points = torch.randn(count, 6, generator=draw)
        points[:, 3:] *= torch.rand(count, 3, generator=draw) < 0.4
        points[:, 3 + index % 3] = 0.0
        shift = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, 0.7])
        noise = 0.5 * torch.randn(count, generator=draw)
        made[name] = TensorDataset(points, (points @ shift + noise + 0.3 * index - 0.4 > 0).long())
    return made


@pytest.fixture
def convex(shards: dict[str, TensorDataset]) -> Callable[..., dict[str, Any]]:
    points = torch.cat([dataset.tensors[0] for dataset in shards.values()])
    labels = torch.cat([dataset.tensors[1] for dataset in shards.values()])

    def evaluate(model: nn.Module) -> float:
        return ((model(points)[:, 0] > 0) == labels).float().mean().item()

    def make(**replaced: Any) -> dict[str, Any]:
        given = {"build": build, "fit": fit, "evaluate": evaluate, "loss": loss, "parties": shards}
        return given | {"rounds": 4, "seed": 0} | replaced

    return make


@pytest.fixture
def oracle(shards: dict[str, TensorDataset]) -> Numpy:
    model = initial_model(build, shards["north"], 0)
    start = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).double().numpy()
    return Numpy(shards, start, seed=0)
