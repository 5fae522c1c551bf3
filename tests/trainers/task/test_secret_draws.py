"""What the user's functions draw over records that were sampled in secret: dropout masks go by rows, and who is drawn
moves the rows of others. So no seed may tell them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Masked, Privacy, centralize, federate
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.accounting.record_level import epsilon
from choral.privacy.dpsgd import poisson_loader, private_optimizer
from choral.privacy.noise import record_noise_shares as noise_shares
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


def test_masks_that_are_known_would_cost() -> None:
    """Why they are secret. A record that is drawn with rate q adds 1 in one direction; where its being drawn also moves
    what the others add, by so many clipping norms in another, the pair's exact loss is composed on a grid.
    """
    rate, sigma, steps, delta = 0.05, 2.0, 200, 1e-5
    claimed = epsilon([PoissonSampledGaussian(sample_rate=rate, noise_multiplier=sigma, steps=steps)], delta)
    assert claimed == pytest.approx(1.56, abs=0.01)
    assert composed(rate, sigma, 0.0, steps, delta) == pytest.approx(claimed, abs=0.01)  # an honest pair
    assert composed(rate, sigma, 1.0, steps, delta) == pytest.approx(1.82, abs=0.01)
    assert composed(rate, sigma, 2.0, steps, delta) == pytest.approx(2.73, abs=0.01)


def composed(rate: float, sigma: float, moved: float, steps: int, delta: float) -> float:
    """The larger epsilon of the pair's two directions."""
    width = 0.06 * sigma
    at = np.arange(-7.5 * sigma, 7.5 * sigma + 1.0, width)

    def density(mean: float) -> Any:
        return np.exp(-((at - mean) ** 2) / (2 * sigma**2)) * (width / sigma / np.sqrt(2 * np.pi))

    undrawn = (1 - rate) * np.outer(density(moved), density(0.0))
    there, not_there = (undrawn + rate * np.outer(density(0.0), density(own)) for own in (1.0, 0.0))
    return max(_epsilon_of(there, not_there, steps, delta), _epsilon_of(not_there, there, steps, delta))


def _epsilon_of(first: Any, second: Any, steps: int, delta: float) -> float:
    step, half = 2e-4, 1 << 18
    places = np.clip(np.rint(np.log(first / second) / step).astype(int), 1 - half, half - 1)
    law = np.bincount(places.ravel() % (2 * half), weights=(first / first.sum()).ravel(), minlength=2 * half)
    law = np.maximum(np.fft.irfft(np.fft.rfft(law) ** steps, 2 * half), 0.0)
    losses = np.fft.fftfreq(2 * half, 1 / (2 * half)) * step

    def excess(bound: float) -> float:
        beyond = losses > bound
        return float(np.sum(law[beyond] * -np.expm1(bound - losses[beyond]))) - delta

    return float(brentq(excess, 0.0, 20.0))
