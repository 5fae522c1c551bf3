"""What the user's functions draw over records that were sampled in secret: dropout masks go by rows, and who is drawn
moves the rows of others. So no seed may tell them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Masked, Privacy, centralize, federate
from choral.privacy.dpsgd import poisson_loader, private_optimizer
from choral.privacy.noise import shares as noise_shares
from choral.privacy.record_shares import party as party_module
from choral.trainers import FedSGD, Task

PARTIES = {name: TensorDataset(torch.ones(12, 30), torch.arange(12) % 2) for name in ("north", "south", "east", "west")}
LOCAL, SHARES = Privacy(4.0, 1e-3), Privacy(4.0, 1e-3, noise="distributed")


def task(dropout: float, numpy_too: bool = False) -> Task:
    def build(dataset: Any) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
        model = nn.Sequential(nn.Dropout(dropout), nn.Linear(30, 2))
        return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=6)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        for points, labels in loader:
            optimizer.zero_grad()
            loss(model, (points, labels)).mean().backward()
            optimizer.step()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        points = batch[0]
        if numpy_too:
            points = points * torch.from_numpy(np.random.random((len(points), 1))).float()
        return nn.functional.cross_entropy(model(points), batch[1], reduction="none")

    return Task(build=build, fit=fit, evaluate=lambda model: 0.0, parties=PARTIES, loss=loss)


def pooled(task: Task) -> Any:
    return centralize(task, rounds=2, privacy=LOCAL)


def local(task: Task) -> Any:
    return federate(task, rounds=2, privacy=LOCAL)


def shares(task: Task) -> Any:
    algorithm = FedSGD(batch_size=24, steps_per_round=2, learning_rate=0.3)
    return federate(
        task, rounds=2, algorithm=algorithm, privacy=SHARES, secure_sum=Masked(corrupt=1, dropouts=0, min_survivors=4)
    )


@pytest.fixture(autouse=True)
def nothing_else_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise; every step draws every other record."""
    every_other = lambda size, rate, source: np.arange(0, size, 2)  # noqa: E731
    monkeypatch.setattr(noise_shares, "gaussian", lambda count, source: np.zeros(count))
    monkeypatch.setattr(private_optimizer, "grid_gaussian", lambda count, *_: np.zeros(count))
    monkeypatch.setattr(party_module, "poisson_sample", every_other)
    monkeypatch.setattr(poisson_loader, "poisson_sample", every_other)


def ends(run: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


@pytest.mark.parametrize("train", [pooled, local, shares])
def test_no_seed_tells_what_a_private_training_draws(train: Callable[[Task], Any]) -> None:
    assert torch.equal(ends(train(task(0.0))), ends(train(task(0.0))))  # all else is the same
    assert not torch.equal(ends(train(task(0.5))), ends(train(task(0.5))))
    assert not torch.equal(ends(train(task(0.0, numpy_too=True))), ends(train(task(0.0, numpy_too=True))))


def test_without_a_promise_the_seed_decides() -> None:
    assert torch.equal(ends(federate(task(0.5), rounds=2)), ends(federate(task(0.5), rounds=2)))
