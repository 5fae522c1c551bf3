"""A job on a table of one's own: parties by its key, a model for its columns, losses and metrics for its label."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from choral.errors import ConfigError, DataError
from choral.trainers.data.columns import Codebook, EncodedTable, Encoder
from choral.trainers.data.table_files import open_table
from choral.trainers.data.tables import DataTable, held_out, held_out_of, parties_of
from choral.trainers.local_steps.epochs import Criterion, Epochs
from choral.trainers.task.settings import DataSettings, LabelKind, ModelSettings, Split, Training
from choral.trainers.task.task import Built, Task

METRICS: dict[LabelKind, tuple[str, ...]] = {
    "class": ("accuracy",),
    "number": ("mean absolute error", "root mean squared error", "R2"),
    "count": ("mean absolute error", "mean Poisson deviance"),
}
_CRITERIA: dict[LabelKind, Criterion] = {"class": F.cross_entropy, "number": F.mse_loss, "count": F.poisson_nll_loss}
_READ = 2048  # records at once, for the evaluation


def own_task(data: DataSettings, model: ModelSettings, split: Split, training: Training, seed: int) -> Task:
    """The task of a table. ``seed`` decides which records are held out, the initial weights and the data order.

    Of a label with bounds the model predicts where it lies between them; metrics are in the label's own unit.
    Raises: ConfigError for settings that do not go together or that the table does not fit; DataError naming line and
        column.
    """
    _check(data, model, split, training)
    table = read_own_table(data, codes=model.kind == "table")
    labels = table.labels
    shift, unit = 0.0, 1.0
    if data.kind == "number" and data.label in data.bounds:
        low, high = data.bounds[data.label]
        shift, unit = (low + high) / 2, (high - low) / 2
        labels = ((labels - shift) / unit).clamp(-1, 1)
    if data.kind != "class":
        labels = labels[:, None]  # as the model's output, so that nothing is broadcast
    whole = DataTable(features=table.features, labels=labels, keys=table.owners)
    train, test = held_out(whole, split.test_fraction, seed)
    if data.keys:
        split = dataclasses.replace(split, kind="key")
    outputs = max(len(data.classes), int(labels.max()) + 1, 2) if data.kind == "class" else 1
    make = _maker(model, table, training.hidden, outputs)
    measure = _measure(data.kind, shift, unit)
    fit = Epochs(criterion=_CRITERIA[data.kind], epochs=training.local_epochs)
    records = test.at(torch.arange(len(test)))

    def build(dataset: Any) -> Built:
        network = make()
        optimizer = torch.optim.SGD(network.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
        return network, optimizer, DataLoader(dataset, min(training.batch_size, len(dataset)), shuffle=True)

    def evaluate(network: nn.Module, dataset: Any = records) -> dict[str, float]:
        device = next(network.parameters()).device
        batches = [(network(rows.to(device)).cpu(), truth) for rows, truth in DataLoader(dataset, batch_size=_READ)]
        return measure(torch.cat([guess for guess, _ in batches]), torch.cat([truth for _, truth in batches]))

    return Task(
        build=build,
        fit=fit,
        evaluate=lambda network: evaluate(network),
        parties=parties_of(train, split, seed),
        loss=fit.loss,
        min_classes=1 if data.keys else 2,
        held_out=held_out_of(train, test, split, seed) if data.kind == "class" or data.keys else None,
        evaluate_party=evaluate if data.kind == "class" or data.keys else None,
        references=lambda: _references(data.kind, train.labels, test.labels, measure),
        bounds=[(-1.0, 1.0) if each else None for each in table.bounded],
    )


def read_own_table(data: DataSettings, *, codes: bool = False) -> EncodedTable:
    """The file as tensors. codes: a category as one number. Raises: as :func:`own_task`."""
    if data.path is None:
        raise ConfigError("data.path is not set", hint='[data] path = "visits.csv"')
    header, rows = open_table(data.path, delimiter=data.delimiter)
    book = Codebook(classes=data.classes, categories=data.categories, bounds=data.bounds, missing=data.missing)
    encoder = Encoder.of(
        header,
        str(data.path),
        keys=data.keys,
        label=data.label,
        features=data.features,
        kind=data.kind,
        codebook=book,
        codes=codes,
    )
    return encoder.table(rows, str(data.path))


def _check(data: DataSettings, model: ModelSettings, split: Split, training: Training) -> None:
    if not data.label:
        raise ConfigError("data.label is not set", hint='the column to predict: [data] label = "died"')
    if data.keys and split.kind in ("shards", "iid"):
        raise ConfigError(
            f"data.key says whose each row is, and split.kind = {split.kind!r} deals rows out",
            hint="leave one of the two out; split.reshuffle = true deals out again, to each party as many as it has",
        )
    if not data.keys and (split.kind == "key" or (data.kind != "class" and split.kind != "iid")):
        why = "there is no data.key to split by" if split.kind == "key" else f"split.kind {split.kind!r} goes by class"
        raise ConfigError(
            f"{why}, and the label is a {data.kind}",
            hint='data.key = "hospital" (a column), or split.kind = "iid", which deals the rows out at random',
        )
    if model.kind == "table" and not data.categories:
        raise ConfigError(
            "model.kind is table, which learns a vector for each word, and data.categories names no column",
            hint='model.kind = "mlp", or name the columns of words',
        )
    if model.kind in ("mlp", "table") and not training.hidden:
        raise ConfigError(f"model.kind is {model.kind}, and training.hidden is 0", hint="e.g. training.hidden = 32")


class TableModel(nn.Module):
    """Numbers as they are, and a learnt vector for each category's word; then one hidden layer.

    Input: float32, shape (n, numbers + categories), the categories as numbers of their words.
    """

    def __init__(self, numbers: int, sizes: tuple[int, ...], *, hidden: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.words = nn.ModuleList(nn.Embedding(size, min(embedding, (size + 1) // 2)) for size in sizes)
        width = numbers + sum(min(embedding, (size + 1) // 2) for size in sizes)
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, outputs))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        numbers, codes = rows[:, : self.numbers], rows[:, self.numbers :].long()
        vectors = [embed(codes[:, at]) for at, embed in enumerate(self.words)]
        found: torch.Tensor = self.layers(torch.cat([numbers, *vectors], dim=1))
        return found


def _maker(model: ModelSettings, table: EncodedTable, hidden: int, outputs: int) -> Callable[[], nn.Module]:
    width = table.features.shape[1]
    if model.kind == "table":
        return lambda: TableModel(table.numbers, table.sizes, hidden=hidden, outputs=outputs, embedding=model.embedding)
    if model.kind == "linear" or not hidden:
        return lambda: nn.Linear(width, outputs)
    return lambda: nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def _measure(kind: LabelKind, shift: float, unit: float) -> Callable[[torch.Tensor, torch.Tensor], dict[str, float]]:
    """(outputs, labels) -> metrics, in the label's own unit."""

    def measure(outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        if kind == "class":
            return {"accuracy": float((outputs.argmax(dim=1) == labels).float().mean())}
        if kind == "count":
            return _of_counts(outputs.double().exp(), labels.double())
        errors = (outputs.double() - labels.double()) * unit
        spread = float(((labels.double() - labels.double().mean()) * unit).square().mean())
        squares = float(errors.square().mean())
        found = {"mean absolute error": float(errors.abs().mean()), "root mean squared error": squares**0.5}
        return found | ({"R2": 1 - squares / spread} if spread else {"R2": 0.0})

    del shift  # it cancels in differences
    return measure


def _of_counts(means: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
    """The deviance 2 (y log(y/m) - y + m), McCullagh and Nelder 1989, section 2.3."""
    deviance = 2 * (torch.special.xlogy(counts, counts / means.clamp(min=1e-12)) - counts + means)
    return {
        "mean absolute error": float((means - counts).abs().mean()),
        "mean Poisson deviance": float(deviance.mean()),
    }


def _references(
    kind: LabelKind,
    trained: torch.Tensor,
    labels: torch.Tensor,
    measure: Callable[[torch.Tensor, torch.Tensor], Mapping[str, float]],
) -> dict[str, dict[str, float]]:
    """What always the same answer gets: the most frequent class, or the mean."""
    if kind == "class":
        most = np.bincount(trained.numpy()).argmax()
        return {"accuracy": {"always the most frequent class": float((labels == int(most)).float().mean())}}
    mean = trained.double().mean()
    answer = mean.clamp(min=1e-12).log() if kind == "count" else mean
    found = measure(answer.expand_as(labels), labels)
    return {metric: {"always the mean": value} for metric, value in found.items() if metric != "R2"}


def check_public(data: DataSettings) -> None:
    """Raises: DataError where a promise for records would rest on what was read off the records."""
    if data.path is not None and data.bounds_from == "records":
        raise DataError(
            'data.bounds_from is "records": the bounds and words of the columns were read off the records, and no'
            " epsilon counts that",
            hint="put in their place what is known without the records (an age is 0 to 120), then set"
            ' bounds_from = "public"',
        )
