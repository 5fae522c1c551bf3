"""Counts of cells that are named in public: histograms, categories, contingency tables. A record is in one cell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.trainers.analytics.columns import Columns, numbers, places
from choral.trainers.analytics.estimates import UNKNOWN, Estimated
from choral.trainers.analytics.grid import Floats, Int64Array
from choral.trainers.analytics.part import Part, Statistic
from choral.trainers.task import arguments

MOST_CELLS = 1 << 20
OTHER = "other"


@dataclass(frozen=True)
class Histogram(Statistic):
    """How many records lie in each of the bins [e0, e1), [e1, e2), ..., [e(k-1), ek], and which share of all.

    edges: public, rising. What is beyond the outer edges counts in the outer bins.
    """

    edges: Sequence[float]

    def part(self, name: str, bits: int, *, noisy: bool) -> Part:
        """See :class:`Statistic`. Raises: ConfigError."""
        del bits, noisy
        edges = [arguments.number(edge, f"an edge of {name}", "public edges, rising") for edge in self.edges]
        if not 2 <= len(edges) <= MOST_CELLS or not all(a < b for a, b in itertools.pairwise(edges)):
            raise ConfigError(f"{name}: expected two edges or more, rising", hint="Histogram([0, 18, 65, 120])")
        if not all(math.isfinite(edge) for edge in edges):
            raise ConfigError(f"{name}: an edge is not finite", hint="what is beyond counts in the outer bins anyway")
        labels = [f"[{low:g}, {high:g})" for low, high in itertools.pairwise(edges)]
        labels[-1] = labels[-1][:-1] + "]"
        column, inner = self.columns(name)[0], np.array(edges[1:-1])

        def cell_of(columns: Columns) -> Int64Array:
            values = numbers(columns, column)
            found = np.searchsorted(inner, values, side="right").astype(np.int64)
            found[np.isnan(values)] = -1
            return found

        return _CellsPart(labels, cell_of)


@dataclass(frozen=True)
class Categories(Statistic):
    """How many records have each of these values, such as labels; all others are counted together as "other".

    values: public, words or numbers, all different.
    """

    values: Sequence[Any]

    def part(self, name: str, bits: int, *, noisy: bool) -> Part:
        """See :class:`Statistic`. Raises: ConfigError."""
        del bits, noisy
        column = self.columns(name)[0]
        values = _values(self.values, name)
        return _CellsPart([*map(str, values), OTHER], lambda columns: places(columns, column, values))


@dataclass(frozen=True)
class Table(Statistic):
    """A contingency table: how many records have each combination of the columns' values.

    values: column -> its values, public; all others are "other". A record without one of them is not counted. `column`
    is not used.
    """

    values: Mapping[str, Sequence[Any]]

    def columns(self, name: str) -> tuple[str, ...]:
        """See :class:`Statistic`. Raises: ConfigError."""
        if not isinstance(self.values, Mapping) or len(self.values) < 2 or self.column is not None:
            raise ConfigError(
                f"{name}: a table is of two columns or more", hint='Table({"sex": ("f", "m"), "smoker": (0, 1)})'
            )
        return tuple(self.values)

    def part(self, name: str, bits: int, *, noisy: bool) -> Part:
        """See :class:`Statistic`. Raises: ConfigError."""
        del bits, noisy
        known = {column: _values(self.values[column], f"{name}, {column}") for column in self.columns(name)}
        shape = tuple(len(values) + 1 for values in known.values())
        if math.prod(shape) > MOST_CELLS:
            raise ConfigError(f"{name} has {math.prod(shape)} cells, expected at most {MOST_CELLS}")
        labels = [", ".join(words) for words in itertools.product(*([*map(str, v), OTHER] for v in known.values()))]

        def cell_of(columns: Columns) -> Int64Array:
            found = [places(columns, column, values) for column, values in known.items()]
            missing = np.any([place < 0 for place in found], axis=0)
            cells = np.ravel_multi_index([np.maximum(place, 0) for place in found], shape).astype(np.int64)
            return np.where(missing, -1, cells)

        return _CellsPart(labels, cell_of)


def _values(given: Any, name: str) -> tuple[Any, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence) or not 1 <= len(given) < MOST_CELLS:
        raise ConfigError(f"{name}: expected a list of values, public", hint='such as ("yes", "no")')
    values = tuple(given)
    if not all(isinstance(value, str | int | float) for value in values) or len(set(map(str, values))) < len(values):
        raise ConfigError(f"{name}: expected words or numbers, all different")
    return values


class _CellsPart(Part):
    norm_squared, bound, cells = 1.0, 1, True

    def __init__(self, labels: Sequence[str], cell_of: Any) -> None:
        self.labels, self._cell_of, self.unit = tuple(labels), cell_of, np.ones(len(labels))

    def sums(self, columns: Columns) -> Int64Array:
        cell = self._cell_of(columns)
        return np.bincount(cell[cell >= 0], minlength=self.length).astype(np.int64)

    def below(self, total: npt.NDArray[Any], least: float) -> tuple[int, tuple[str, ...]]:
        few = [self.labels[at] for at in np.flatnonzero(total < least)]
        return self.length, tuple(f"{word} {label}" for label in few for word in ("count", "share"))

    def read(self, total: npt.NDArray[Any], noise: Floats) -> dict[str, Estimated]:
        known = ~np.isinf(noise)
        counts, deviations = total.astype(np.float64), np.where(known, noise, 0.0)
        whole = float(counts[known].sum())
        of_whole = float(np.sum(deviations**2))
        found = {
            f"count {label}": Estimated(float(counts[at]), float(noise[at])) if known[at] else UNKNOWN
            for at, label in enumerate(self.labels)
        }
        complete = bool(known.all()) and whole > max(0.0, 3.0 * math.sqrt(of_whole))
        for at, label in enumerate(self.labels):
            if not complete:
                found[f"share {label}"] = UNKNOWN
                continue
            share, squared = counts[at] / whole, deviations[at] ** 2
            by_noise = math.sqrt((1.0 - share) ** 2 * squared + share**2 * (of_whole - squared)) / whole
            inside = min(max(share, 0.0), 1.0)
            found[f"share {label}"] = Estimated(
                float(share), float(by_noise), math.sqrt(inside * (1.0 - inside) / whole)
            )
        return found
