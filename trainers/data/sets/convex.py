"""Logistic regression whose optimum is known: the task that methods of federated optimization are compared on.

The experiment of Konecny, McMahan, Ramage, Richtarik 2016 (arXiv 1610.02527, section 4), on public and on made-up
posts. Measured after each round: how far the objective is from its least value, and the error on other posts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import nn
from torch.utils.data import DataLoader

from choral.errors import ConfigError
from choral.trainers.centralized.optimum import Objective
from choral.trainers.data.generators import sparse_posts
from choral.trainers.data.partition import reshuffled
from choral.trainers.data.sets.comments import read_comments
from choral.trainers.data.sparse_rows import SparseDataset
from choral.trainers.data.tables import DataTable, shares_of
from choral.trainers.task.settings import Split, Training
from choral.trainers.task.task import Built, Task

GAP, ERROR = "objective gap", "test error"
Array = np.ndarray[Any, Any]
Parties = Mapping[str, SparseDataset]


class Problem:
    """f over the records of all parties, and the records to test on by party, of whom some may be new.

    ridge: lambda of f, as in :class:`choral.trainers.centralized.optimum.Objective`.
    """

    def __init__(self, train: Parties, tests: Parties, ridge: float) -> None:
        self.train, self.tests = train, tests
        labels = torch.cat([data.targets for data in train.values()])
        if not ridge > 0:
            raise ConfigError(
                "the objective has no least value that is surely reached: training.weight_decay is 0",
                hint=f"1/n is usual, here training.weight_decay = {1 / len(labels):.3g}",
            )
        rows = sparse.csr_array(sparse.vstack([data.rows for data in train.values()]))
        self.objective = Objective(rows, labels.double().numpy(), ridge)
        self._rows = sparse.csr_array(sparse.vstack([data.rows for data in tests.values()]))
        self._labels = torch.cat([data.targets for data in tests.values()]).numpy() > 0

    @cached_property
    def optimum(self) -> tuple[Array, float]:
        """(w*, f(w*))."""
        return self.objective.least()

    def measured(self, weights: Array) -> dict[str, float]:
        """f - f* over the training records, and the share of wrong answers on the test records."""
        gap = self.objective.value(weights) - self.optimum[1]
        return {GAP: gap, ERROR: self._error(self._rows @ weights > 0)}

    def at(self, weights: Array, party: SparseDataset) -> dict[str, float]:
        """The share of wrong answers on the test records of one party."""
        return {ERROR: float(((party.rows @ weights > 0) != (party.targets.numpy() > 0)).mean())}

    def references(self) -> dict[str, dict[str, float]]:
        """Test errors of the optimum, of the training records' more frequent answer, and of each party's own, where
        it has records to train on.
        """
        most = bool(self.objective.labels.mean() > 0.5)
        own = [
            np.full(len(data), bool(self.train[name].targets.double().mean() > 0.5) if name in self.train else most)
            for name, data in self.tests.items()
        ]
        return {
            ERROR: {
                "optimum": self._error(self._rows @ self.optimum[0] > 0),
                "majority": self._error(np.full(len(self._labels), most)),
                "each party's majority": self._error(np.concatenate(own)),
            }
        }

    def _error(self, answers: Array) -> float:
        return float((answers != self._labels).mean())


def convex_task(problem: Problem, parties: Parties, training: Training, *, by_party: bool = True) -> Task:
    """From w = 0, measured by ``problem``, which is of the same records, however they are dealt out.

    by_party: whether a party's test records are of its own kind; not where records were dealt again.

    A linear model without a bias: the data have a column of ones. The parties' work is done by formula
    (:class:`choral.trainers.local_steps.logistic_regression.ClosedForm`), equal to what ``fit`` would do up to
    rounding.
    """
    from choral.trainers.local_steps.logistic_regression import ClosedForm  # which reads the data sets of this package

    width = problem.objective.rows.shape[1]
    rate, decay = training.learning_rate, training.weight_decay

    def build(dataset: Any) -> Built:
        model = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=decay)
        return model, optimizer, DataLoader(dataset, batch_size=min(training.batch_size, len(dataset)), shuffle=True)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        margins, labels = model(batch[0])[:, 0], batch[1].float()
        return nn.functional.binary_cross_entropy_with_logits(margins, labels, reduction="none")

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        for _ in range(training.local_epochs):
            for batch in loader:
                optimizer.zero_grad()
                loss(model, batch).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    def evaluate(model: nn.Module) -> dict[str, float]:
        return problem.measured(_weights(model))

    engine = ClosedForm.of(rate=rate, batch_size=training.batch_size, epochs=training.local_epochs, decay=decay)
    return Task(
        build=build,
        fit=fit,
        evaluate=evaluate,
        parties=parties,
        loss=loss,
        engine=engine,
        references=problem.references,
        held_out={name: problem.tests[name] for name in parties if name in problem.tests} if by_party else None,
        evaluate_party=(lambda model, party: problem.at(_weights(model), party)) if by_party else None,
    )


def _weights(model: nn.Module) -> Array:
    weights: Array = next(model.parameters()).detach()[0].double().cpu().numpy()
    return weights


def comments(split: Split, training: Training, seed: int, data_dir: str | Path | None = None) -> Task:
    """Facebook posts by page, with the page's columns and a column of ones: 134 features.

    The test posts are given, most of them of other pages. Raises: ConfigError unless hidden = 0 and weight_decay > 0.
    """
    _linear(training)
    train, test = (_with_ones(table) for table in read_comments(data_dir, page_columns=True))
    own = _datasets(train, shares_of(train, dataclasses.replace(split, reshuffle=False), seed))
    tests = _datasets(test, shares_of(test, Split(kind="key", min_records=1), seed))
    return _task(own, tests, split, training, seed)


def posts(split: Split, training: Training, seed: int, data_dir: str | Path | None = None) -> Task:
    """``split.parties`` authors of made-up posts with the paper's statistics (:func:`sparse_posts`); a file-less task.

    ``seed`` makes the posts, too. Raises: ConfigError for another split than by key, which an author is.
    """
    del data_dir
    _linear(training)
    if split.kind != "key":
        raise ConfigError(f'posts are split by author, not "{split.kind}"', hint='set split.kind = "key"')
    made = sparse_posts(parties=split.parties, seed=seed)
    return _task(made.parties, made.tests, split, training, seed)


def _task(own: Parties, tests: Parties, split: Split, training: Training, seed: int) -> Task:
    problem = Problem(own, tests, training.weight_decay)  # of the parties as they were: sums equal to the last bit
    parties = dealt_again(own, seed) if split.reshuffle else own
    return convex_task(problem, parties, training, by_party=split.kind == "key" and not split.reshuffle)


def dealt_again(parties: Parties, seed: int) -> dict[str, SparseDataset]:
    """The same records, each party as many as it had, at random (:func:`choral.trainers.data.partition.reshuffled`)."""
    rows = sparse.csr_array(sparse.vstack([data.rows for data in parties.values()]))
    targets = torch.cat([data.targets for data in parties.values()])
    ends = torch.tensor([len(data) for data in parties.values()]).cumsum(0)[:-1]
    shares = torch.arange(len(targets)).tensor_split(ends)
    return {
        name: SparseDataset(rows[share.numpy()], targets[share])
        for name, share in zip(parties, reshuffled(shares, seed=seed), strict=True)
    }


def _linear(training: Training) -> None:
    if training.hidden:
        raise ConfigError("a convex task has a linear model", hint="set training.hidden = 0")


def _with_ones(table: DataTable) -> DataTable:
    ones = torch.ones(len(table), 1)
    return DataTable(features=torch.cat([table.features, ones], dim=1), labels=table.labels, keys=table.keys)


def _datasets(table: DataTable, shares: Mapping[str, torch.Tensor]) -> dict[str, SparseDataset]:
    features = table.features.numpy()
    return {name: SparseDataset(features[share.numpy()], table.labels[share]) for name, share in shares.items()}
