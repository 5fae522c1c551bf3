"""Where the columns of a training lie and how widely they spread, for its standardisation: two sums a column.

With u = z / reach in [-1, 1] for a value z of the grid, a record contributes u and u^2 - 1/2 of each of m columns:
squared norm at most m (u^4 + 1/4) <= 5 m / 4. How many records there are is public, so it is not counted again.

With noise of deviation s (of a mean, in u) the spread of a single column may be lost in it. So each variance is drawn
towards the mean over all columns, by as much as the noise has of what they differ by (James and Stein 1961); that is
post-processing, and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.trainers.analytics.columns import Columns, numbers
from choral.trainers.analytics.estimates import Estimated
from choral.trainers.analytics.grid import Floats, Grid, Int64Array, bounds_of
from choral.trainers.analytics.part import Part, Statistic

_NARROWEST = 16.0  # times below the mean variance that a noisy one is taken for


@dataclass(frozen=True)
class Scales(Statistic):
    """Mean and deviation of each column, to standardise it by. bounds: column -> (low, high), public. records: of all
    parties together, public. `column` is not used.
    """

    bounds: Mapping[str, tuple[float, float]]
    records: int

    def columns(self, name: str) -> tuple[str, ...]:
        """See :class:`Statistic`. Raises: ConfigError for none."""
        if not isinstance(self.bounds, Mapping) or not self.bounds or self.column is not None:
            raise ConfigError(f"{name}: expected bounds of one column or more", hint='Scales({"age": (0, 120)}, 500)')
        return tuple(self.bounds)

    def part(self, name: str, bits: int, *, noisy: bool) -> Part:
        """See :class:`Statistic`. Raises: ConfigError."""
        del noisy
        grids = {column: Grid(*bounds_of(self.bounds[column]), bits) for column in self.columns(name)}
        return _ScalesPart(grids, self.records)


class _ScalesPart(Part):
    def __init__(self, grids: Mapping[str, Grid], records: int) -> None:
        self.grids, self.records = dict(grids), records
        reach = np.array([float(grid.reach) for grid in grids.values()])
        self.unit = np.concatenate([reach, 2.0 * reach**2])
        self.norm_squared = 1.25 * len(self.grids)
        self.bound = max(grid.reach for grid in grids.values()) ** 2

    def sums(self, columns: Columns) -> Int64Array:
        whole = [grid.whole(_present(numbers(columns, name))) for name, grid in self.grids.items()]
        squares = [2 * z * z - grid.reach**2 for z, grid in zip(whole, self.grids.values(), strict=True)]
        return np.array([each.sum() for each in (*whole, *squares)], dtype=np.int64)

    def read(self, total: npt.NDArray[Any], noise: Floats) -> dict[str, Estimated]:
        m, n = len(self.grids), float(self.records)
        scaled, deviations = total / self.unit / n, noise / self.unit / n
        of_mean, of_square = deviations[:m], deviations[m:]
        mean = np.clip(scaled[:m], -1.0, 1.0)
        variance = scaled[m:] + 0.5 - scaled[:m] ** 2 + of_mean**2
        of_variance = np.hypot(of_square, 2.0 * mean * of_mean)
        shrunk = shrink(variance, of_variance)
        found = {}
        for at, (name, grid) in enumerate(self.grids.items()):
            half = grid.step * grid.reach
            value = (grid.centre + mean[at] * grid.reach) * grid.step
            sampling = math.sqrt(shrunk[at] / n) * half
            found[f"mean {name}"] = Estimated(float(value), float(of_mean[at]) * half, sampling)
            deviation = math.sqrt(shrunk[at])
            error = of_variance[at] / (2.0 * deviation) * half if deviation > 0.0 else None
            found[f"deviation {name}"] = Estimated(deviation * half, None if error is None else float(error))
        return found


def _present(values: Floats) -> Floats:
    return values[~np.isnan(values)]


def shrink(variance: Floats, noise: Floats) -> Floats:
    """Return variances drawn towards their mean. noise: the deviation of each; both of shape (m,), in u squared.

    Without noise they stay as they are.
    """
    if not noise.any():
        return np.clip(variance, 0.0, 1.0)
    middle = max(float(variance.mean()), float(noise.mean()) / math.sqrt(len(variance)))
    apart = max(0.0, float(variance.var()) - float((noise**2).mean()))
    kept = apart / (apart + noise**2)
    return np.clip(middle + kept * (variance - middle), middle / _NARROWEST, 1.0)
