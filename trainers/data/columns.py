"""Columns of a table as numbers: what is known of each beforehand, and the rows turned into tensors by that alone."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from choral.doors import worded
from choral.errors import ConfigError, DataError
from choral.trainers.task.settings import LabelKind

Array = np.ndarray[Any, Any]
Values = Sequence[str] | Array
OTHER = "*"
_APART = " / "  # between the values of a key of several columns


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """What is known of a table's columns without looking at its records.

    classes: of a label of kind "class", as the table writes them; by default the label is 0, 1, 2, ... categories:
        columns of words, each with all its words; a last word "*" stands for any other. bounds: least and greatest
        value of columns of numbers, which are scaled to [-1, 1] and clipped. missing: columns of numbers that may lack
        a value, each with the words for it; one more feature, 0 or 1, says that it lacks, and the value is then the
        middle of its bounds. In a data frame, null and NaN lack, too.
    Raises: ConfigError for bounds that are not two rising finite numbers, and for words that are there twice.
    """

    classes: Sequence[str] = ()
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    missing: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (low, high) in self.bounds.items():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ConfigError(
                    f"bounds of {name!r} are {low:g} and {high:g}; expected the least and the greatest, which differ",
                    hint="e.g. age = [0, 120]",
                )
        for name, words in {"the label": self.classes, **self.categories}.items():
            if len(set(words)) < len(words):
                raise ConfigError(f"the words of {name} hold one twice", hint="list each once")
            if OTHER in words[:-1]:
                raise ConfigError(f'"{OTHER}" in the words of {name} is not the last', hint="it stands for any other")
        for name in self.categories:
            if name in self.bounds or name in self.missing:
                raise ConfigError(
                    f"{name!r} is a column of categories, and bounds or missing are for numbers",
                    hint="a category for values that lack is a word like the others, such as the empty one",
                )


@dataclass(frozen=True)
class Rows:
    """Some rows of a table. columns: texts, or floats with NaN where a value lacks. places: how to name each row."""

    columns: Mapping[str, Values]
    places: Callable[[int], str]
    count: int


@dataclass(frozen=True, kw_only=True)
class EncodedTable:
    """features: float32, shape (n, width); the first `numbers` are numbers, then come the categories.

    labels: int64 or float32, shape (n,). owners: the key of each row, or None. sizes: how many words a category has.
    bounded: of each feature, whether it is a number that was scaled to -1 ... 1 by its bounds.
    """

    features: torch.Tensor
    labels: torch.Tensor
    owners: Array | None
    numbers: int
    sizes: tuple[int, ...]
    bounded: tuple[bool, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """How rows become tensors. keys, label, features: columns.

    codes: a category as one number, in the place of a 0 or 1 for each word.
    """

    keys: tuple[str, ...]
    label: str
    features: tuple[str, ...]
    kind: LabelKind = "class"
    codebook: Codebook = field(default_factory=Codebook)
    codes: bool = False

    @classmethod
    def of(
        cls,
        header: Sequence[str],
        source: str,
        *,
        keys: tuple[str, ...],
        label: str,
        features: Sequence[str] | None,
        kind: LabelKind = "class",
        codebook: Codebook | None = None,
        codes: bool = False,
    ) -> Encoder:
        """Raises: ConfigError for columns that `source` lacks, has twice, or that are given two parts to play."""
        book = codebook or Codebook()
        if len(set(header)) != len(header):
            twice = next(name for number, name in enumerate(header) if name in header[:number])
            raise ConfigError(f"{source} has two columns named {twice!r}", hint="give each column a name of its own")
        if kind not in ("class", "number", "count"):
            raise ConfigError(f"kind is {kind!r}, expected class, number or count", hint="of the label")
        if book.classes and kind != "class":
            raise ConfigError(f"classes are given for a label of kind {kind}", hint="leave one of the two out")
        apart = (*keys, label)
        chosen = [name for name in header if name not in apart] if not features else list(features)
        for name in (*apart, *chosen):
            if name not in header:
                near = difflib.get_close_matches(name, header, n=1)
                meant = f"did you mean {near[0]!r}? " if near else ""
                hint = f"{meant}its columns: {', '.join(header[:20])}"
                if len(header) == 1 and (mark := next((each for each in ";\t|" if each in header[0]), "")):
                    hint = f"its one column is {header[0]!r:.80}: the delimiter seems to be {mark!r}, " + worded(
                        command=f"--delimiter {mark!r}", python=f"delimiter={mark!r}"
                    )
                raise ConfigError(f"{source} has no column {name!r}", hint=hint)
        if len(set(apart)) < len(apart) or len(set(chosen)) != len(chosen) or set(apart) & set(chosen):
            named = [*apart, *chosen]
            twice = next(name for number, name in enumerate(named) if name in named[:number])
            raise ConfigError(
                f"{twice!r} is named twice: key, label and features must be different columns",
                hint="a column plays one part; leave the label and the key out of the features",
            )
        if not chosen:
            raise ConfigError(f"{source} has no column besides key and label", hint="at least one feature is needed")
        allowed = (*chosen, label)
        for part in ("categories", "bounds", "missing"):
            for name in getattr(book, part):
                if name not in (allowed if part == "bounds" and kind == "number" else chosen):
                    raise ConfigError(
                        f"{part} names {name!r}, which is no feature", hint=f"features: {', '.join(chosen[:20])}"
                    )
        return cls(keys=keys, label=label, features=tuple(chosen), kind=kind, codebook=book, codes=codes)

    @property
    def _numbers(self) -> list[str]:
        return [name for name in self.features if name not in self.codebook.categories]

    @property
    def _words(self) -> dict[str, Sequence[str]]:
        return {name: self.codebook.categories[name] for name in self.features if name in self.codebook.categories}

    def table(self, chunks: Iterable[Rows], source: str) -> EncodedTable:
        """All rows. Raises: DataError naming row and column, never a value."""
        parts = [(self._features(rows), self._labels(rows), self.owners(rows)) for rows in chunks if rows.count]
        if not parts:
            raise DataError(f"{source} has a header and no rows", hint="the first line names the columns")
        features, labels, owners = zip(*parts, strict=True)
        return EncodedTable(
            features=torch.from_numpy(np.concatenate(features)),
            labels=torch.from_numpy(np.concatenate(labels)),
            owners=np.concatenate(owners) if self.keys else None,
            numbers=len(self._numbers) + len(self.codebook.missing),
            sizes=tuple(len(words) for words in self._words.values()),
            bounded=tuple(
                place < len(self._numbers) and self._numbers[place] in self.codebook.bounds
                for place in range(features[0].shape[1])
            ),
        )

    def _features(self, rows: Rows) -> Array:
        names, book = self._numbers, self.codebook
        values = np.empty((rows.count, len(names)))
        for at, name in enumerate(names):
            values[:, at] = _floats(rows, name, book.missing.get(name))
        bounds = [book.bounds.get(name, (-1.0, 1.0)) for name in names]
        low, high = np.array(bounds, dtype=float).reshape(-1, 2).T
        lacks = np.isnan(values)
        middle = np.where([name in book.bounds for name in names], (low + high) / 2, 0.0)
        scaled = (np.where(lacks, middle, values) - (low + high) / 2) / ((high - low) / 2)
        bounded = np.array([name in book.bounds for name in names], dtype=bool)
        scaled[:, bounded] = scaled[:, bounded].clip(-1, 1)
        _check_range(scaled, rows, names)
        flags = [lacks[:, names.index(name)] for name in names if name in book.missing]
        words = [_codes(rows, name, words, "category") for name, words in self._words.items()]
        if not self.codes:
            words = [
                column
                for codes, known in zip(words, self._words.values(), strict=True)
                for column in np.eye(len(known))[codes].T
            ]
        return np.column_stack([scaled, *flags, *words]).astype(np.float32)

    def _labels(self, rows: Rows) -> Array:
        if self.codebook.classes:
            return _codes(rows, self.label, self.codebook.classes, "class")
        values = _floats(rows, self.label, None)
        if self.kind == "number":
            _check_range(values[:, None], rows, [self.label])
            return values.astype(np.float32)
        wrong = np.flatnonzero((values != values.round()) | (values < 0) | (values >= 2**24))
        if len(wrong):
            expected = "a class" if self.kind == "class" else "a count"
            raise DataError(
                f"{rows.places(int(wrong[0]))}, column {self.label!r}: {expected} is a whole number from 0",
                hint='a label of any numbers has kind = "number"; classes of other names are listed in classes = [...]',
            )
        return values.astype(np.int64 if self.kind == "class" else np.float32)

    def owners(self, rows: Rows) -> Array:
        """The party of each row. Raises: DataError for one without."""
        columns = [_texts(rows.columns[name]) for name in self.keys]
        owners = []
        for number, parts in enumerate(zip(*columns, strict=True)):
            stripped = [part.strip() for part in parts]
            for name, part in zip(self.keys, stripped, strict=True):
                if not part:
                    raise DataError(
                        f"{rows.places(number)}: the key column {name!r} is empty", hint="every row needs a party"
                    )
                if len(parts) > 1 and _APART in part:
                    raise DataError(
                        f"{rows.places(number)}, column {name!r}: a key of several columns is joined by {_APART!r},"
                        " which this one holds",
                        hint="write it otherwise",
                    )
            owners.append(_APART.join(stripped))
        return np.array(owners)


def _floats(rows: Rows, name: str, missing: Sequence[str] | None) -> Array:
    """The column as float64, NaN where a value lacks. Raises: DataError for one that may not lack, or is no number."""
    column = rows.columns[name]
    if isinstance(column, np.ndarray):
        values = column.astype(np.float64)
        bad = ~np.isfinite(values) if missing is None else np.isinf(values)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            said = "not finite" if np.isinf(values[at]) else "empty"
            raise DataError(f"{rows.places(at)}, column {name!r}: {said}", hint=_hint(name))
        return values
    if missing is not None:
        known = {word.strip() for word in missing}
        column = ["nan" if text.strip() in known else _strict(text) for text in column]
    try:
        values = np.fromiter(map(float, column), dtype=np.float64, count=rows.count)
    except ValueError:
        at = next(number for number, text in enumerate(column) if not _is_number(text))
        empty = not column[at].strip()
        raise DataError(
            f"{rows.places(at)}, column {name!r}: {'empty' if empty else 'not a number'}",
            hint=_hint(name)
            if empty
            else f"name its words: categories = {{ {name} = [...] }}, or leave the column out",
        ) from None
    bad = np.isinf(values) if missing is not None else ~np.isfinite(values)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise DataError(f"{rows.places(at)}, column {name!r}: not finite", hint=_hint(name))
    return values


def _strict(text: str) -> str:
    """A written nan is a missing value only where it is named as one."""
    return "inf" if text.strip().lower().lstrip("+-") == "nan" else text


def _hint(name: str) -> str:
    return f'fill it in, leave the row out, or say which words mean that it lacks: missing = {{ {name} = ["", "NA"] }}'


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_range(values: Array, rows: Rows, names: list[str]) -> None:
    beyond = np.argwhere(np.abs(values) > np.finfo(np.float32).max)
    if len(beyond):
        row, column = map(int, beyond[0])
        raise DataError(f"{rows.places(row)}, column {names[column]!r}: beyond the range of float32", hint="rescale it")


def _texts(column: Values) -> Iterator[str]:
    if not isinstance(column, np.ndarray):
        yield from column
        return
    for value in column:
        yield "" if value != value else f"{value:.0f}" if value == int(value) else repr(float(value))


def _codes(rows: Rows, name: str, words: Sequence[str], what: str) -> Array:
    """The place of each row's word among `words`. Raises: DataError for another word."""
    place = {word.strip(): number for number, word in enumerate(words)}
    other = place.get(OTHER, -1) if words and words[-1] == OTHER else -1
    found = np.fromiter(
        (place.get(text.strip(), other) for text in _texts(rows.columns[name])), dtype=np.int64, count=rows.count
    )
    wrong = np.flatnonzero(found < 0)
    if len(wrong):
        raise DataError(
            f"{rows.places(int(wrong[0]))}, column {name!r}: not a {what} that is listed for it",
            hint=f'list it, or end the list with "{OTHER}" for any other',
        )
    return found
