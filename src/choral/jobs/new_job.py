"""What `choral init` writes: settings for a table of one's own, commented, and a task file to go on from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from choral.errors import ConfigError, DataError
from choral.privacy.accounting.record_level import check_target
from choral.trainers.task.settings import LabelKind

if TYPE_CHECKING:
    from choral.trainers.data.columns import Values

MOST_WORDS, MOST_CLASSES = 50, 20
_DATE = re.compile(r"(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4})([T ][\d:.+Z-]*)?$")
_LACKING = {"", "na", "n/a", "nan", "null", "none", "?"}


@dataclass
class Column:
    """What was seen of one column. words: its texts, no more than are of use. number: all but missing are numbers."""

    number: bool = True
    whole: bool = True
    least: float = math.inf
    greatest: float = -math.inf
    words: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)

    def see(self, values: Values) -> None:
        """Take in some rows."""
        if isinstance(values, np.ndarray):
            known = values[np.isfinite(values)]
            if len(known) < len(values):
                self.missing.add("")
            self._range(known)
            texts: Iterable[str] = (f"{value:g}" for value in known[: 10 * MOST_WORDS])
        else:
            texts = {text.strip() for text in values}
            self.missing |= {text for text in texts if text.lower() in _LACKING}
            texts = {text for text in texts if text.lower() not in _LACKING}
            self._texts(texts)
        for text in texts:
            if len(self.words) <= MOST_WORDS:
                self.words.add(text)

    def _texts(self, texts: Iterable[str]) -> None:
        try:
            self._range(np.array([float(text) for text in texts]))
        except ValueError:
            self.number = self.whole = False

    def _range(self, values: np.ndarray) -> None:
        if len(values):
            self.least, self.greatest = min(self.least, float(values.min())), max(self.greatest, float(values.max()))
            self.whole = self.whole and bool((values == values.round()).all())

    @property
    def useless(self) -> str:
        """Why the column is left out of the features, if it is."""
        if not self.number and self.words and all(_DATE.match(word) for word in self.words):
            return "dates: put a number in their place, such as days since a visit"
        if not self.number and len(self.words) > MOST_WORDS:
            return f"more than {MOST_WORDS} different words"
        if self.number and not math.isfinite(self.least):
            return "no value at all"
        return ""

    def bounds(self) -> tuple[float, float]:
        """Least and greatest, rounded outwards."""
        step = 10.0 ** math.floor(math.log10(max(self.greatest - self.least, abs(self.greatest) * 1e-3, 1e-6)))
        low, high = math.floor(self.least / step) * step, math.ceil(self.greatest / step) * step
        return _short(low), _short(high if high > low else low + step)


@dataclass(frozen=True)
class Survey:
    """What the file holds. rows: how many. smallest: rows of the smallest party; parties: how many there are."""

    columns: dict[str, Column]
    rows: int
    parties: dict[str, int]


def survey(path: Path, keys: Sequence[str], label: str, delimiter: str = ",") -> Survey:
    """Read the file once. Raises: ConfigError for a column that it lacks; DataError as the reader does."""
    from choral.trainers.data.columns import Encoder
    from choral.trainers.data.table_files import open_table

    header, pieces = open_table(path, delimiter=delimiter)
    encoder = Encoder.of(header, str(path), keys=tuple(keys), label=label, features=None)
    columns = {name: Column() for name in header}
    rows, parties = 0, dict[str, int]()
    for piece in pieces:
        rows += piece.count
        for name, column in columns.items():
            column.see(piece.columns[name])
        for owner in encoder.owners(piece).tolist() if keys else ():
            parties[owner] = parties.get(owner, 0) + 1
    if not rows:
        raise DataError(f"{path} has a header and no rows", hint="the first line names the columns")
    return Survey(columns, rows, parties)


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What is to be written. public: that what the file shows of its columns is public knowledge."""

    data: Path
    keys: tuple[str, ...]
    label: str
    kind: LabelKind
    found: Survey
    delimiter: str = ","
    epsilon: float = 3.0
    public: bool = False

    @classmethod
    def of(
        cls,
        data: Path,
        keys: Sequence[str],
        label: str,
        *,
        kind: LabelKind | None,
        delimiter: str,
        epsilon: float,
        public: bool,
    ) -> NewJob:
        """Raises: as :func:`survey`; ConfigError for a label that is not of its kind."""
        check_target(epsilon, 1e-5)
        found = survey(data, keys, label, delimiter)
        if keys and len(found.parties) < 2:
            raise DataError(
                f"{data}: all rows are of one party by {' and '.join(keys)}",
                hint="a federation has two or more: take another column, or --key - to deal rows out at random",
            )
        column = found.columns[label]
        few = len(column.words) <= MOST_CLASSES and (column.whole or not column.number)
        chosen: LabelKind = kind or ("class" if few or not column.number else "number")
        if column.missing:
            raise DataError(
                f"{data}: some rows have no {label!r}", hint="leave them out of the file: they say nothing of the label"
            )
        if len(column.words) < 2:
            raise DataError(
                f"{data}: the label {label!r} is the same in every row", hint="there is nothing to learn: take another"
            )
        if chosen == "class" and not few:
            raise ConfigError(
                f"the label {label!r} has more than {MOST_CLASSES} values, or some that are not whole numbers",
                hint="--kind number or --kind count" if column.number else "classes are few: take another label",
            )
        if chosen != "class" and not column.number:
            raise ConfigError(f"the label {label!r} has words, and is no {chosen}", hint="--kind class")
        return cls(
            data=data,
            keys=tuple(keys),
            label=label,
            kind=chosen,
            found=found,
            delimiter=delimiter,
            epsilon=epsilon,
            public=public,
        )

    @property
    def features(self) -> list[str]:
        return [
            name
            for name, column in self.found.columns.items()
            if name not in (*self.keys, self.label) and not column.useless
        ]

    @property
    def left_out(self) -> dict[str, str]:
        apart = (*self.keys, self.label)
        return {n: c.useless for n, c in self.found.columns.items() if n not in apart and c.useless}

    @property
    def classes(self) -> list[str]:
        """The classes in order; none where they are 0, 1, 2, ... already."""
        if self.kind != "class":
            return []
        words = self.found.columns[self.label].words
        ordered = sorted(words, key=float) if self.found.columns[self.label].number else sorted(words)
        return [] if ordered == [str(number) for number in range(len(ordered))] else ordered

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        names = [*self.features, *([self.label] if self.kind == "number" else [])]
        return {name: self.found.columns[name].bounds() for name in names if self.found.columns[name].number}

    @property
    def categories(self) -> dict[str, list[str]]:
        columns = self.found.columns
        return {
            name: [*sorted(columns[name].words), *sorted(columns[name].missing)]
            for name in self.features
            if not columns[name].number
        }

    @property
    def missing(self) -> dict[str, list[str]]:
        columns = self.found.columns
        return {
            name: sorted(columns[name].missing)
            for name in self.features
            if columns[name].number and columns[name].missing
        }

    @property
    def delta(self) -> float:
        """A tenth, or less, of one over the records of the largest data owner: a power of ten."""
        most = max(self.found.parties.values(), default=self.found.rows)
        return float(min(1e-5, 10.0 ** -(math.ceil(math.log10(max(most, 2))) + 1)))

    def settings(self, *, task: str | None = None) -> str:
        """The TOML file. task: the name of a task file, in the place of [data]."""
        metrics, rate = {
            "class": (["accuracy"], 0.5),
            "number": (["mean absolute error", "root mean squared error", "R2"], 0.1),
            "count": (["mean absolute error", "mean Poisson deviance"], 0.05),
        }[self.kind]
        head = [
            "# Written by `choral init`. `choral compare --help-all` lists every key; each is a flag of the same name.",
            f"title = {json.dumps(f'{self.label}: what privacy and distribution cost', ensure_ascii=False)}",
            *([f"task = {json.dumps(task)}"] if task else []),
            f"metrics = {json.dumps(['accuracy'] if task else metrics)}",
            "seeds = 3                        # trainings of each configuration, for an interval",
        ]
        return "\n".join([*head, "", *([] if task else self._data()), *self._rest(rate)])

    def _data(self) -> list[str]:
        """[data] and [model]."""
        key = json.dumps(self.keys[0] if len(self.keys) == 1 else list(self.keys), ensure_ascii=False)
        lines = [
            "[data]",
            f"path = {json.dumps(str(self.data), ensure_ascii=False)}",
            f"key = {key}    # each value is a party" if self.keys else '# key = "COLUMN"  # each value is a party',
            f"label = {json.dumps(self.label, ensure_ascii=False)}",
            f'kind = "{self.kind}"',
        ]
        if self.delimiter != ",":
            lines.append(f"delimiter = {json.dumps(self.delimiter)}")
        if self.classes:
            lines.append(f"classes = {json.dumps(self.classes, ensure_ascii=False)}")
        lines.append(f"features = {json.dumps(self.features, ensure_ascii=False)}")
        lines += [f"# left out: {name} ({why})" for name, why in self.left_out.items()]
        if self.public:
            lines.append('bounds_from = "public"           # bounds and words are known without the records')
        else:
            lines += [
                "# The bounds and words below were read off the records, and no epsilon counts that. Put what is known",
                '# without them (an age is 0 to 120), then write "public": differential privacy is refused before.',
                'bounds_from = "records"',
            ]
        for part, table in (("bounds", self.bounds), ("categories", self.categories), ("missing", self.missing)):
            if table:
                lines += ["", f"[data.{part}]", *(f"{_key(name)} = {_array(words)}" for name, words in table.items())]
        kinds = "linear or mlp (one hidden layer)" + (", or table (a vector for each word)" if self.categories else "")
        return [*lines, "", "[model]", f'kind = "linear"                  # {kinds}', ""]

    def _rest(self, rate: float) -> list[str]:
        split = (
            []
            if self.keys
            else ["[split]", 'kind = "iid"                     # rows dealt out at random', "parties = 10", ""]
        )
        return [
            *split,
            "[training]",
            "rounds = 20",
            "batch_size = 32",
            f"learning_rate = {rate}",
            "",
            "[privacy]                        # of each record, at each party, for the whole run",
            f"epsilon = {self.epsilon:g}",
            f"delta = {self.delta:g}",
            "",
            "# Configurations that are compared, each trained for every seed.",
            "[arms.cloud]                     # all records in one place, without privacy",
            "centralized = true",
            "[arms.federated]                 # the server sees sums of updates, never one party's",
            'secure_sum = "masked"',
            "[arms.federated-dp]              # and noise in each party's training, as [privacy] promises",
            "private = true",
            'secure_sum = "masked"',
            "",
        ]

    def task_file(self) -> str:
        """A Python file with build, fit and evaluate to be replaced."""
        book = {
            part: found for part in ("classes", "categories", "bounds", "missing") if (found := getattr(self, part))
        }
        said = ", ".join(f"{part}={found!r}" for part, found in book.items())
        keys = repr(self.keys[0] if len(self.keys) == 1 else list(self.keys))
        network = (
            "nn.Linear(width, classes)" if self.kind == "class" else "nn.Sequential(nn.Linear(width, 1), nn.Flatten(0))"
        )
        loss = {"class": "cross_entropy", "number": "mse_loss", "count": "poisson_nll_loss"}[self.kind]
        score = (
            "(model(x).argmax(1) == y).float().mean().item()"
            if self.kind == "class"
            else '{"mean absolute error": (model(x)%s - y).abs().mean().item()}'
            % (".exp()" if self.kind == "count" else "")
        )
        count = max(len(self.classes), len(self.found.columns[self.label].words)) if self.kind == "class" else 1
        more = f"    features={self.features!r},\n" if self.left_out else ""
        more += f"    delimiter={self.delimiter!r},\n" if self.delimiter != "," else ""
        return _TASK.format(
            data=str(self.data), keys=keys, label=self.label, kind=self.kind, book=said, network=network, loss=loss,
            score=score, count=count, more=more,
        )  # fmt: skip


_TASK = '''\
"""What is trained: change build, fit and evaluate to your own. Written by `choral init --task`."""

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, random_split

from choral import Task
from choral.trainers.data import Codebook, federation_from_csv

PARTIES = federation_from_csv(
    {data!r},
    key={keys},
    label={label!r},
    kind={kind!r},
{more}    codebook=Codebook({book}),
)


def load(split, training, seed):  # the tables [split] and [training] of the settings
    parts = [random_split(each, [0.8, 0.2], torch.Generator().manual_seed(seed)) for each in PARTIES.values()]
    parties = dict(zip(PARTIES, (train for train, _ in parts), strict=True))
    x, y = next(iter(DataLoader(ConcatDataset([held for _, held in parts]), batch_size=100_000)))
    width, classes = x.shape[1], {count}

    def build(dataset):
        model = {network}
        optimizer = torch.optim.SGD(model.parameters(), lr=training.learning_rate)
        return model, optimizer, DataLoader(dataset, batch_size=training.batch_size, shuffle=True)

    def fit(model, optimizer, loader):
        for batch, target in loader:
            optimizer.zero_grad()
            nn.functional.{loss}(model(batch), target).backward()
            optimizer.step()

    def evaluate(model):
        return {score}

    return Task(build=build, fit=fit, evaluate=evaluate, parties=parties, min_classes=1)
'''


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _key(name: str) -> str:
    return (
        name
        if name.isascii() and name.replace("_", "").replace("-", "").isalnum()
        else json.dumps(name, ensure_ascii=False)
    )


def _array(values: Sequence[object]) -> str:
    return json.dumps(
        [int(v) if isinstance(v, float) and v == int(v) and abs(v) < 1e15 else v for v in values], ensure_ascii=False
    )
