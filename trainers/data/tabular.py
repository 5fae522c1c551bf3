"""A CSV file with a column that says whose each row is, or any dataset with such keys, as a federation in one line."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from choral.errors import ConfigError, DataError
from choral.trainers.data.partition import key_split


def federation_from_csv(
    path: str | Path,
    key: str,
    label: str,
    *,
    features: Sequence[str] | None = None,
    delimiter: str = ",",
    min_records: int = 1,
) -> dict[str, TensorDataset]:
    """One party per value of ``key``: ``federate(task, federation_from_csv("visits.csv", "hospital", "died"), ...)``.

    path: CSV with a header, UTF-8. label: column of finite numbers; whole ones throughout become int64 classes, else
    float32 targets, shape (n,). features: columns of finite numbers, float32, shape (n, columns); by default all but
    key and label, in the file's order. Parties with fewer than ``min_records`` rows are left out.

    Raises: ConfigError for a column that is missing, named twice or used twice; DataError naming line and column for a
    file that cannot be read or has no rows, for rows with too few or too many fields, for empty keys, and for values
    that are empty, not numbers or not finite. No message holds a value of the file.
    """
    path = Path(path)
    rows = _rows(path, delimiter)
    header = next(rows, (0, []))[1]
    wanted = _columns(path, header, key, label, features)
    keys: list[str] = []
    values: list[list[float]] = []
    for line, row in rows:
        if not row:
            continue  # a blank line
        if len(row) != len(header):
            raise DataError(f"{path}, line {line}: {len(row)} fields, the header has {len(header)}")
        owner = row[header.index(key)].strip()
        if not owner:
            raise DataError(f"{path}, line {line}: the key column {key!r} is empty", hint="every row needs a party")
        keys.append(owner)
        values.append([_number(row[header.index(name)], f"{path}, line {line}, column {name!r}") for name in wanted])
    if not values:
        raise DataError(f"{path} has a header and no rows", hint="the first line names the columns")
    table = np.array(values)
    inputs = torch.from_numpy(table[:, :-1]).float()
    if not torch.isfinite(inputs).all():
        raise DataError(f"{path}: a feature is beyond the range of float32", hint="rescale it")
    targets = torch.from_numpy(table[:, -1])
    whole = bool((targets == targets.round()).all()) and bool((targets.abs() < 2**53).all())
    targets = targets.long() if whole else targets.float()
    return {
        name: TensorDataset(inputs[at], targets[at]) for name, at in key_split(keys, min_records=min_records).items()
    }


def federation_from_dataset(
    dataset: Dataset[Any], key: Sequence[str] | Callable[[Any], str], *, min_records: int = 1
) -> dict[str, Dataset[Any]]:
    """One party per key of a torch dataset: ``federation_from_dataset(visits, key=hospitals)``.

    dataset: map-style, with a length. key: whose each record is, in the dataset's order; or a function of a record,
    which is called once for each. Parties with fewer than ``min_records`` records are left out.

    Returns TensorDatasets of their own for a TensorDataset, else torch Subsets, in the order of the names.
    Raises: DataError for a dataset without length, another number of keys than records, or a key that is empty or no
    string; no message holds a key.
    """
    try:
        count = len(dataset)  # type: ignore[arg-type]
    except TypeError:
        raise DataError(
            f"a {type(dataset).__name__} has no length", hint="give a map-style dataset; a stream cannot be split"
        ) from None
    keys = [key(dataset[number]) for number in range(count)] if callable(key) else list(key)
    if len(keys) != count:
        raise DataError(f"{len(keys)} keys for {count} records", hint="give one key for each record, in their order")
    for number, owner in enumerate(keys):
        if not isinstance(owner, str) or not owner.strip():
            kind = "empty" if isinstance(owner, str) else f"a {type(owner).__name__}"
            raise DataError(f"the key of record {number} is {kind}", hint="every record needs a party's name")
    shares = key_split(keys, min_records=min_records)
    if isinstance(dataset, TensorDataset):
        return {name: TensorDataset(*(tensor[at] for tensor in dataset.tensors)) for name, at in shares.items()}
    return {name: Subset(dataset, at.tolist()) for name, at in shares.items()}


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each row. Raises: DataError if the file cannot be read as UTF-8 CSV."""
    if len(delimiter) != 1:
        raise ConfigError(f"expected one character as delimiter, got {len(delimiter)}", hint='e.g. "," or ";"')
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for row in reader:
                yield reader.line_num, row
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint="give a CSV file with a header") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not valid CSV in UTF-8: {type(error).__name__}") from None


def _columns(path: Path, header: list[str], key: str, label: str, features: Sequence[str] | None) -> list[str]:
    """The columns to read, the label last."""
    if not header:
        raise DataError(f"{path} is empty", hint="the first line names the columns")
    if len(set(header)) != len(header):
        raise ConfigError(f"{path} has two columns of one name", hint="give each column a name of its own")
    chosen = [name for name in header if name not in (key, label)] if features is None else list(features)
    for name in (key, label, *chosen):
        if name not in header:
            raise ConfigError(f"{path} has no column {name!r}", hint=f"its columns: {', '.join(header[:20])}")
    if key == label or len(set(chosen)) != len(chosen) or {key, label} & set(chosen):
        raise ConfigError("key, label and features must be different columns")
    if not chosen:
        raise ConfigError(f"{path} has no column besides key and label", hint="at least one feature is needed")
    return [*chosen, label]


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{where}: {'empty' if not text.strip() else 'not a number'}", hint="encode it first") from None
    if not math.isfinite(value):
        raise DataError(f"{where}: not finite", hint="fill in or leave out such rows")
    return value
