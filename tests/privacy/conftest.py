"""A small problem, its loop, and engines with little ceremony."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.audits.lower_bounds.trials import Counts, clopper_pearson
from choral.privacy import Ledger, Privacy, PrivacyEngine

torch.set_num_threads(1)


class Problem:
    """Three-class toy data, shape (n, 6), and what a training loop needs for it."""

    def __init__(self, n: int = 200, batch_size: int = 20) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 6, generator=generator)
        self.y = (self.x[:, 0] > 0).long() + (self.x[:, 1] > 0.5).long()
        self.dataset = TensorDataset(self.x, self.y)
        self.batch_size = batch_size

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def loader(self, **settings: Any) -> DataLoader[Any]:
        return DataLoader(self.dataset, **{"batch_size": self.batch_size, "shuffle": True, **settings})

    def wrapped(
        self,
        privacy: Privacy | None = None,
        model: nn.Module | None = None,
        *,
        passes: int = 1,
        lr: float = 0.1,
        **loader: Any,
    ) -> tuple[Any, Any, Any]:
        privacy = privacy or Privacy(epsilon=5.0, delta=1e-3)
        model = model or self.model()
        engine = PrivacyEngine(privacy, holder="a", ledger=Ledger(), passes=passes)
        return engine.wrap(model, torch.optim.SGD(model.parameters(), lr=lr), self.loader(**loader))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], epochs: int = 1) -> int:
    """The user's own loop; returns the number of batches seen."""
    seen = 0
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            seen += 1
    return seen


@pytest.fixture
def problem() -> Problem:
    return Problem()


@pytest.fixture
def make_problem() -> type[Problem]:
    return Problem


@pytest.fixture
def loop() -> Callable[..., int]:
    return train


def proved(with_it: np.ndarray, without: np.ndarray, cuts: Sequence[float], *, delta: float, alarm: float) -> float:
    """The largest epsilon at `delta` that tests "statistic > cut" prove, at fixed `cuts`, from independent trials.

    Clopper-Pearson, in both directions; above the true epsilon with probability at most `alarm` in all.
    """
    best = 0.0
    for cut in cuts:
        hits, alarms = int((with_it > cut).sum()), int((without > cut).sum())
        counts = Counts(
            true_positives=hits,
            false_negatives=len(with_it) - hits,
            false_positives=alarms,
            true_negatives=len(without) - alarms,
        )
        best = max(best, clopper_pearson(counts, delta=delta, beta=alarm / len(cuts)))
    return best


@pytest.fixture
def proved_epsilon() -> Callable[..., float]:
    return proved
