"""A party's records as columns by name: a mapping of arrays, a data frame, or a dataset of features and labels."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from choral.errors import DataError
from choral.trainers.analytics.grid import Floats

Columns = Mapping[str, npt.NDArray[Any]]


def columns_of(data: Any, party: str, wanted: frozenset[str]) -> dict[str, npt.NDArray[Any]]:
    """Return the wanted columns as one-dimensional arrays of one length.

    data: a mapping (or data frame) from names to arrays, lists or tensors; or a dataset with `tensors` (features of
    shape (n, d), labels), whose columns are "0" to "d-1" and "label". Raises: DataError naming party and column, and
    no value.
    """
    named = _of_tensors(data) if hasattr(data, "tensors") else data
    if not hasattr(named, "__getitem__") or not hasattr(named, "keys"):
        raise DataError(
            f"{party}: a {type(data).__name__} has no columns by name",
            hint="give a mapping of columns, a data frame, or a TensorDataset of features and labels",
        )
    known = [str(name) for name in named.keys()]  # noqa: SIM118 (a data frame iterates otherwise)
    found: dict[str, npt.NDArray[Any]] = {}
    for name in sorted(wanted):
        if name not in known:
            raise DataError(f"{party} has no column {name!r:.80}", hint=f"its columns: {', '.join(known[:20])}")
        column = named[name]
        array = np.asarray(column.detach().cpu().numpy() if hasattr(column, "detach") else column)
        if array.ndim != 1:
            raise DataError(f"{party}: column {name!r:.80} has {array.ndim} dimensions, expected one")
        found[name] = array
    if len({len(array) for array in found.values()}) != 1:
        raise DataError(f"{party}: its columns have different lengths", hint="one value, or NaN, for each record")
    return found


def _of_tensors(data: Any) -> dict[str, Any]:
    features, *rest = data.tensors
    named = {str(place): features[:, place] for place in range(features.shape[1])} if features.ndim == 2 else {}
    return named | ({"label": rest[0]} if rest else {})


def numbers(columns: Columns, name: str) -> Floats:
    """Return a column as float64; NaN is a value that is missing. Raises: DataError for a column that is no number."""
    array = columns[name]
    if array.dtype.kind not in "fiub":
        raise DataError(
            f"column {name!r:.80} holds {array.dtype.name} values, expected numbers",
            hint="Categories(...) and Table(...) count words",
        )
    return array.astype(np.float64)


def places(columns: Columns, name: str, values: tuple[Any, ...]) -> npt.NDArray[np.int64]:
    """Return the place of each record's value among `values`; len(values) for any other one, -1 for a missing one."""
    array = columns[name]
    if array.dtype.kind == "f":
        missing = np.isnan(array)
    elif array.dtype.kind == "O":
        missing = np.array([value is None or value != value or value == "" for value in array], dtype=bool)
    else:
        missing = (array == "") if array.dtype.kind in "US" else np.zeros(len(array), dtype=bool)
    known = {value: place for place, value in enumerate(values)}
    plain = array.tolist()
    found = np.fromiter((known.get(value, len(values)) for value in plain), np.int64, len(plain))
    found[missing] = -1
    return found


def read_columns(path: Path, delimiter: str = ",") -> dict[str, list[Any]]:
    """Return the columns of a CSV file by name: numbers where every field that is not empty is one, else words.

    An empty field is missing. Raises: DataError naming the file and the line, and no value.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file, delimiter=delimiter, strict=True)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint="give a CSV file with a header") from None
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8 with a header: {type(error).__name__}") from None
    rows = [row for row in rows if row]
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise DataError(f"{path}, record {number - 1}: {len(row)} fields, the header has {len(header)}")
    return {name: _column([row[at].strip() for row in rows]) for at, name in enumerate(header)}


def _column(fields: list[str]) -> list[Any]:
    try:
        return [float(text) if text else float("nan") for text in fields]
    except ValueError:
        return fields
