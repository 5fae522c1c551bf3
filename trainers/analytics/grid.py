"""Numbers as whole steps of a public grid, so that sums are exact, whoever adds them up in whatever order.

A value v, cut to the public bounds [low, high], becomes z = rint(v / step) - centre, |z| <= reach; step is a power of
two, at most (high - low) 2^(1 - bits). What lies on the grid, as whole numbers and dyadic fractions do, is not changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.trainers.task import arguments

Floats = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
    """low, high: public bounds of a column, never computed from it. bits: of the range. Raises: ConfigError."""

    low: float
    high: float
    bits: int

    def __post_init__(self) -> None:
        low, high = bounds_of((self.low, self.high))
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)
        if max(abs(low), abs(high)) / self.step >= 2.0**52:
            raise ConfigError(
                f"the bounds {low:g} and {high:g} are too close for numbers of their size",
                hint="subtract a public constant from the column first",
            )

    @cached_property
    def step(self) -> float:
        """A power of two."""
        return math.ldexp(1.0, math.ceil(math.log2(self.high - self.low)) - self.bits)

    @cached_property
    def _ends(self) -> tuple[int, int]:
        return round(self.low / self.step), round(self.high / self.step)

    @cached_property
    def centre(self) -> int:
        """In steps."""
        return sum(self._ends) // 2

    @cached_property
    def reach(self) -> int:
        """The largest |z|; at least 1."""
        return max(self._ends[1] - self.centre, self.centre - self._ends[0], 1)

    def whole(self, values: Floats) -> Int64Array:
        """Return the z of `values`, none of them NaN; what is beyond the bounds counts as the bound."""
        cut = np.clip(values, self.low, self.high)
        return np.asarray(np.rint(cut / self.step).astype(np.int64) - self.centre)


def bounds_of(given: Any) -> tuple[float, float]:
    """Return (low, high). Raises: ConfigError unless they are two finite numbers, the first below the second."""
    try:
        low, high = given
    except (TypeError, ValueError):
        raise ConfigError(f"bounds are {arguments.shown(given)}, expected two numbers", hint="(0, 120)") from None
    low = arguments.number(low, "low", "a public bound, never computed from the data")
    high = arguments.number(high, "high", "a public bound, never computed from the data")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(
            f"bounds are {low:g} and {high:g}, expected two finite numbers, the first below the second",
            hint="public bounds of the column; what is beyond counts as the bound",
        )
    return low, high
