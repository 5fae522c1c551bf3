"""Records as one table with, possibly, the key of whoever they belong to; a table becomes parties, and a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from choral.errors import ConfigError
from choral.trainers.data.partition import dirichlet_split, iid_split, key_split, reshuffled, shard_split, split_alike
from choral.trainers.task.settings import Split, Training
from choral.trainers.task.task import Built, Task


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """features: shape (n, ...); labels: integers, (n,), or numbers, (n, 1); keys: strings, (n,), or None."""

    features: torch.Tensor
    labels: torch.Tensor
    keys: np.ndarray[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, indices: torch.Tensor) -> TensorDataset:
        return TensorDataset(self.features[indices], self.labels[indices])


def held_out(table: DataTable, fraction: float, seed: int) -> tuple[DataTable, DataTable]:
    """(the rest, a random share of ``fraction``), for data sets that come without a test set."""
    order = np.random.default_rng(seed).permutation(len(table))
    cut = round(fraction * len(table))
    parts = [
        DataTable(
            features=table.features[torch.from_numpy(part)],
            labels=table.labels[torch.from_numpy(part)],
            keys=None if table.keys is None else table.keys[part],
        )
        for part in (order[cut:], order[:cut])
    ]
    return parts[0], parts[1]


def parties_of(table: DataTable, split: Split, seed: int) -> dict[str, TensorDataset]:
    """One dataset per party, as :func:`shares_of` says."""
    return {name: table.at(share) for name, share in shares_of(table, split, seed).items()}


def held_out_of(train: DataTable, test: DataTable, split: Split, seed: int) -> dict[str, TensorDataset]:
    """Each party's part of the test records: those of its key, else dealt out by label as its own records are.

    No party's part holds another's record; with a key, records of owners who are no party are nobody's.
    """
    shares = shares_of(train, split, seed)
    if split.kind == "key" and not split.reshuffle and test.keys is not None:
        return {name: test.at(torch.from_numpy(np.flatnonzero(test.keys == name))) for name in shares}
    dealt = split_alike(test.labels, train.labels, list(shares.values()), seed=seed)
    return {name: test.at(part) for name, part in zip(shares, dealt, strict=True)}


def shares_of(table: DataTable, split: Split, seed: int) -> dict[str, torch.Tensor]:
    """Indices per party, as ``split`` says. Raises: ConfigError for a key that the data lacks; DataError."""
    shares = _dealt(table, split, seed)
    if not split.reshuffle:
        return shares
    return dict(zip(shares, reshuffled(list(shares.values()), seed=seed), strict=True))


def _dealt(table: DataTable, split: Split, seed: int) -> dict[str, torch.Tensor]:
    if split.kind == "key":
        if table.keys is None:
            raise ConfigError("this data has no key to split by", hint='use split.kind "dirichlet", "shards" or "iid"')
        return key_split(table.keys, min_records=split.min_records)
    if split.kind == "dirichlet":
        shares = dirichlet_split(
            table.labels, parties=split.parties, alpha=split.alpha, seed=seed, min_records=split.min_records
        )
    elif split.kind == "shards":
        shares = shard_split(table.labels, parties=split.parties, seed=seed)
    else:
        shares = iid_split(len(table), parties=split.parties, seed=seed)
    width = len(str(split.parties))
    return {f"party-{number:0{width}d}": share for number, share in enumerate(shares, start=1)}


def table_task(train: DataTable, test: DataTable, *, classes: int, split: Split, training: Training, seed: int) -> Task:
    """Classification of flat features: a linear model, or one hidden layer; SGD, cross entropy, accuracy.

    ``seed`` decides the split, the initial weights and the data order.
    """
    width = train.features[0].numel()

    def make() -> nn.Module:
        if not training.hidden:
            return nn.Linear(width, classes)
        return nn.Sequential(nn.Linear(width, training.hidden), nn.Tanh(), nn.Linear(training.hidden, classes))

    return table_classification(make, train, test, split=split, training=training, seed=seed)


def table_classification(
    make: Callable[[], nn.Module], train: DataTable, test: DataTable, *, split: Split, training: Training, seed: int
) -> Task:
    """:func:`classification` of a table's parties, with what each holds out of the test table."""
    return classification(
        make,
        parties_of(train, split, seed),
        test.at(torch.arange(len(test))),
        training,
        held_out=held_out_of(train, test, split, seed),
    )


def classification(
    make: Callable[[], nn.Module],
    parties: dict[str, Any],
    test: Dataset[Any],
    training: Training,
    *,
    held_out: dict[str, Any] | None = None,
) -> Task:
    """A task of SGD on the cross entropy of ``make()``'s logits, shape (n, classes), and accuracy on ``test``."""

    def build(dataset: Any) -> Built:
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
        loader = DataLoader(dataset, batch_size=min(training.batch_size, len(dataset)), shuffle=True)
        return model, optimizer, loader

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        for _ in range(training.local_epochs):
            for batch, target in loader:
                optimizer.zero_grad()
                loss(model, (batch, target)).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    return Task(
        build=build,
        fit=fit,
        evaluate=lambda model: _accuracy(model, test),
        parties=parties,
        loss=loss,
        held_out=held_out,
        evaluate_party=_accuracy,
    )


def _accuracy(model: nn.Module, dataset: Any) -> float:
    device = next(model.parameters()).device
    right = total = 0
    for batch, target in DataLoader(dataset, batch_size=2048):
        predicted = model(batch.to(device)).argmax(dim=1).cpu()
        right, total = right + int((predicted == target).sum()), total + len(target)
    return right / total
