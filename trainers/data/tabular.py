"""A table with a column that says whose each row is, or any dataset with such keys, as a federation in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset, TensorDataset

from choral.errors import ConfigError, DataError
from choral.trainers.data.columns import Codebook, Encoder
from choral.trainers.data.partition import key_split
from choral.trainers.data.table_files import Opened, open_frame, open_table
from choral.trainers.task.settings import LabelKind


def federation_from_csv(
    path: str | Path,
    key: str | Sequence[str],
    label: str,
    *,
    kind: LabelKind = "class",
    features: Sequence[str] | None = None,
    codebook: Codebook | None = None,
    delimiter: str = ",",
    min_records: int = 1,
) -> dict[str, TensorDataset]:
    """One party per value of ``key``: ``federate(task, federation_from_csv("visits.csv", "hospital", "died"), ...)``.

    path: CSV with a header, UTF-8; or Parquet, if it ends in .parquet. key: a column, or several. label: a column that
    is a class (int64), or a number or a count (float32), shape (n,). features: by default all columns but key and
    label; float32, shape (n, width), the numbers in the table's order, then what the codebook's categories become.
    Parties with fewer than ``min_records`` rows are left out.

    Raises: ConfigError for a column that is missing, named twice or used twice; DataError naming line and column for a
    file that cannot be read or has no rows, for rows with too few or too many fields, for empty keys, and for values
    that are empty, not numbers or not finite. No message holds a value of the file.
    """
    opened = open_table(path, delimiter=delimiter)
    return _federation(opened, str(path), key, label, kind, features, codebook, min_records)


def federation_from_frame(
    frame: Any,
    key: str | Sequence[str],
    label: str,
    *,
    kind: LabelKind = "class",
    features: Sequence[str] | None = None,
    codebook: Codebook | None = None,
    min_records: int = 1,
) -> dict[str, TensorDataset]:
    """:func:`federation_from_csv` of a data frame of pandas, polars or pyarrow; null and NaN are missing values.

    Raises: as that does; ConfigError without narwhals (``pip install "choral[frames]"``).
    """
    return _federation(open_frame(frame), "the data frame", key, label, kind, features, codebook, min_records)


def _federation(
    opened: Opened,
    source: str,
    key: str | Sequence[str],
    label: str,
    kind: LabelKind,
    features: Sequence[str] | None,
    codebook: Codebook | None,
    min_records: int,
) -> dict[str, TensorDataset]:
    header, rows = opened
    keys = (key,) if isinstance(key, str) else tuple(key)
    if not keys:
        raise ConfigError("key names no column", hint="the column that says whose each row is")
    if features is not None and not features:
        raise ConfigError(f"{source}: features is empty", hint="at least one feature is needed; None takes all")
    encoder = Encoder.of(header, source, keys=keys, label=label, features=features, kind=kind, codebook=codebook)
    table = encoder.table(rows, source)
    shares = key_split(table.owners if table.owners is not None else (), min_records=min_records)
    return {name: TensorDataset(table.features[at], table.labels[at]) for name, at in shares.items()}


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
