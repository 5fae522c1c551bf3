"""Tables as they are stored, in pieces of some thousand rows: CSV, Parquet, and data frames (by narwhals)."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from choral.errors import ConfigError, DataError
from choral.trainers.data.columns import Rows, Values

_PIECE = 20_000  # rows
_OTHERS = (".xlsx", ".xls", ".ods", ".json", ".jsonl", ".feather", ".sav", ".dta", ".sas7bdat", ".zip", ".gz", ".h5")
Opened = tuple[list[str], Iterator[Rows]]


def open_table(path: str | Path, *, delimiter: str = ",") -> Opened:
    """The columns' names, and the rows. A file that ends in .parquet is Parquet, every other one CSV.

    Raises: ConfigError for a delimiter of other than one character, and for Parquet without pyarrow or polars;
        DataError for a file that cannot be read, or that has no header.
    """
    path = Path(path)
    if path.suffix.lower() in (".parquet", ".pq"):
        return _open_parquet(path)
    if path.suffix.lower() in _OTHERS:
        raise DataError(
            f"{path} is neither CSV nor Parquet", hint="save it as CSV in UTF-8, with a header, or as Parquet"
        )
    if len(delimiter) != 1:
        raise ConfigError(f"expected one character as delimiter, got {len(delimiter)}", hint='e.g. "," or ";"')
    rows = _csv_rows(path, delimiter)
    header = next(rows, (0, []))[1]
    if not header:
        raise DataError(f"{path} is empty", hint="the first line names the columns")
    return header, _csv_pieces(path, header, rows)


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each row. Raises: DataError if the file cannot be read as UTF-8 CSV."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for row in reader:
                yield reader.line_num, row
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}",
            hint=f"expected a CSV or Parquet file; a path is looked for from {Path.cwd()}",
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not valid CSV in UTF-8: {type(error).__name__}", hint="save it as UTF-8") from None


def _csv_pieces(path: Path, header: list[str], rows: Iterator[tuple[int, list[str]]]) -> Iterator[Rows]:
    width = len(header)
    while piece := list(islice(rows, _PIECE)):
        lines, fields = [], []
        for line, row in piece:
            if not row:
                continue  # a blank line
            if len(row) != width:
                raise DataError(
                    f"{path}, line {line}: {len(row)} fields, the header has {width}",
                    hint="a text with the delimiter in it stands in quotation marks",
                )
            lines.append(line)
            fields.append(row)
        if fields:
            columns: dict[str, Values] = dict(zip(header, zip(*fields, strict=True), strict=True))
            yield Rows(columns, partial(_line, path, lines), len(fields))


def _line(path: Path, lines: list[int], number: int) -> str:
    return f"{path}, line {lines[number]}"


def _open_parquet(path: Path) -> Opened:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ConfigError(
            "Parquet files are read by pyarrow, which is not installed", hint='pip install "choral[frames]"'
        ) from None
    try:
        frame = parquet.read_table(path)
    except arrow.ArrowException:
        raise DataError(f"{path} is not a Parquet file", hint="write it again as Parquet, or save it as CSV") from None
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise DataError(f"cannot read {path}: {why}", hint=f"a path is looked for from {Path.cwd()}") from None
    return open_frame(frame, str(path))


def open_frame(frame: Any, source: str = "the data frame") -> Opened:
    """The columns and rows of a data frame of pandas, polars or pyarrow (whatever narwhals knows).

    Raises: ConfigError without narwhals, and for what is no data frame.
    """
    try:
        import narwhals.stable.v1 as nw
    except ImportError:
        raise ConfigError(
            "data frames are read by narwhals, which is not installed", hint='pip install "choral[frames]"'
        ) from None
    try:
        whole = nw.from_native(frame)
    except TypeError:
        raise ConfigError(
            f"expected a data frame, got {type(frame).__name__}", hint="one of pandas, polars or pyarrow"
        ) from None
    whole = whole.collect() if isinstance(whole, nw.LazyFrame) else whole
    if not isinstance(whole, nw.DataFrame):
        raise ConfigError(f"expected a data frame, got a {type(frame).__name__}", hint="one of its columns is not one")
    return list(map(str, whole.columns)), _frame_pieces(whole, source)


def _frame_pieces(frame: Any, source: str) -> Iterator[Rows]:
    for start in range(0, len(frame), _PIECE):
        piece = frame[start : start + _PIECE]
        columns: dict[str, Values] = {str(name): _column(piece[name]) for name in piece.columns}
        yield Rows(columns, _row(source, start), len(piece))


def _row(source: str, start: int) -> Callable[[int], str]:
    return lambda number: f"{source}, row {start + number + 1}"


def _column(series: Any) -> Values:
    """Numbers and truth values as float64 with NaN for null; all else as texts, empty for null."""
    import narwhals.stable.v1 as nw

    if series.dtype.is_numeric() or series.dtype == nw.Boolean:
        listed: Sequence[Any] = series.to_list()
        return np.array([np.nan if value is None else float(value) for value in listed])
    return ["" if value is None or value != value else str(value) for value in series.to_list()]
