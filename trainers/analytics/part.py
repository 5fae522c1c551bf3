"""What a kind of statistic comes to: integers that add up over records and parties, and what their totals say.

A record contributes a vector of integers to each statistic. Divided by `unit`, coordinate by coordinate, that vector
has an L2 norm of at most sqrt(`norm_squared`), whatever the record: the sensitivity that noise is sized by.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.trainers.analytics.columns import Columns
from choral.trainers.analytics.estimates import Estimated
from choral.trainers.analytics.grid import Floats, Int64Array
from choral.trainers.task import arguments


class Part(ABC):
    """One statistic of a plan. unit: shape (length,), > 0. norm_squared: see the module. bound: of one record's
    coordinates in size. cells: whether its coordinates are cells that contributors are counted for one by one.
    """

    unit: Floats
    norm_squared: float
    bound: int
    cells: bool = False

    @property
    def length(self) -> int:
        """Coordinates."""
        return len(self.unit)

    @abstractmethod
    def sums(self, columns: Columns) -> Int64Array:
        """Return the sum of the records' contributions, shape (length,). Raises: DataError."""

    @abstractmethod
    def read(self, total: npt.NDArray[Any], noise: Floats) -> dict[str, Estimated]:
        """Return what a total says: int64, exact, or float64 with `noise`, the standard deviation of each coordinate.

        A coordinate whose noise is infinite was left out.
        """

    def below(self, total: npt.NDArray[Any], least: float) -> tuple[int, tuple[str, ...]] | None:
        """Return how many cells it shows one by one, and the estimates of those that count fewer than `least`; None
        where it shows none.
        """
        del total, least
        return None


@dataclass(frozen=True, kw_only=True)
class Statistic(ABC):
    """What a user asks for. column: by default the name that it is asked for under. weight: of the privacy budget, as
    against the other statistics': the noise of each is in proportion to 1 / sqrt(weight).
    """

    column: str | None = None
    weight: float = 1.0

    def check_weight(self) -> None:
        """Raises: ConfigError."""
        weight = arguments.number(self.weight, "weight", "the share of the budget, as against the other statistics")
        if not 1e-6 <= weight <= 1e6:
            raise ConfigError(f"weight is {weight:g}, expected 1e-6 to 1e6")
        if self.column is not None and (not isinstance(self.column, str) or not self.column):
            raise ConfigError(f"column is {arguments.shown(self.column)}, expected a name")

    def columns(self, name: str) -> tuple[str, ...]:
        """The columns that it reads, asked for under `name`."""
        return (self.column or name,)

    @abstractmethod
    def part(self, name: str, bits: int, *, noisy: bool) -> Part:
        """Return its part of a plan. bits: of a value's range, at most. noisy: whether its total will have noise."""


@dataclass(frozen=True)
class Packing:
    """All statistics as one vector. parts: by name, in order. weights: of the budget."""

    parts: Mapping[str, Part]
    weights: Mapping[str, float]

    @cached_property
    def places(self) -> dict[str, slice]:
        """Where each part is."""
        found, start = {}, 0
        for name, part in self.parts.items():
            found[name] = slice(start, start + part.length)
            start += part.length
        return found

    @property
    def length(self) -> int:
        """Of the vector."""
        return sum(part.length for part in self.parts.values())

    @property
    def bound(self) -> int:
        """Of one record's coordinates in size."""
        return max(part.bound for part in self.parts.values())

    @cached_property
    def unit(self) -> Floats:
        """What one record's vector is divided by to have a norm of at most 1: shape (length,).

        The squared norm is shared out among the parts by their weights; a part per 2^30 covers what floats round.
        """
        whole = sum(self.weights.values())
        pieces = []
        for name, part in self.parts.items():
            share = self.weights[name] / whole
            pieces.append(part.unit * np.sqrt(part.norm_squared / share) * (1.0 + 2.0**-30))
        return np.concatenate(pieces)

    def sums(self, columns: Columns) -> Int64Array:
        """Return one party's integers, shape (length,). Raises: DataError."""
        return np.concatenate([part.sums(columns) for part in self.parts.values()])

    def read(self, total: npt.NDArray[Any], noise: Floats) -> dict[str, dict[str, Estimated]]:
        """Return all estimates. total: in the parts' integers. noise: standard deviation of each coordinate."""
        return {
            name: part.read(total[at], noise[at])
            for (name, at), part in zip(self.places.items(), self.parts.values(), strict=True)
        }
