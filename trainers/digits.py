"""The embedded task: scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels, 10 classes)."""

from __future__ import annotations

from typing import Any

import torch
from numpy.random import default_rng
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.trainers.partition import dirichlet_split
from choral.trainers.settings import Split, Training
from choral.trainers.task import Built, Task


def load(split: Split, training: Training, seed: int) -> Task:
    """Digits among ``split.parties`` parties, Dirichlet by label; a two-layer network trained with SGD.

    ``seed`` decides the held-out records, the split, the initial weights and the data order.
    """
    images, labels = _digits()
    order = torch.from_numpy(default_rng(seed).permutation(len(labels)))
    held_out = round(split.test_fraction * len(labels))
    test, rest = order[:held_out], order[held_out:]
    shares = dirichlet_split(
        labels[rest], parties=split.parties, alpha=split.alpha, seed=seed, min_records=split.min_records
    )
    width = len(str(split.parties))
    parties = {
        f"party-{number:0{width}d}": TensorDataset(images[rest[share]], labels[rest[share]])
        for number, share in enumerate(shares, start=1)
    }

    def build(dataset: TensorDataset) -> Built:
        if training.hidden:
            model: nn.Module = nn.Sequential(nn.Linear(64, training.hidden), nn.Tanh(), nn.Linear(training.hidden, 10))
        else:
            model = nn.Linear(64, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=training.learning_rate)
        loader = DataLoader(dataset, batch_size=min(training.batch_size, len(dataset)), shuffle=True)
        return model, optimizer, loader

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        for _ in range(training.local_epochs):
            for batch, target in loader:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(batch), target)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    def evaluate(model: nn.Module) -> float:
        device = next(model.parameters()).device
        predicted = model(images[test].to(device)).argmax(dim=1).cpu()
        return float((predicted == labels[test]).float().mean())

    return Task(build=build, fit=fit, evaluate=evaluate, parties=parties)


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels).long()
