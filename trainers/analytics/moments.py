"""Counts, means, variances, covariances and correlations, from sums of powers and products of whole numbers.

With u = z / reach in [-1, 1] for a value z of the grid, a record contributes

    Count        1                                               squared norm 1
    Mean         1, u, u^2 - 1/2, u^3 / 4, u^4 / 4               at most 1 + 1 + 1/4 + 1/16 + 1/16, where |u| = 1
    Covariance   1, u_i, u_i u_j (i <= j) of m columns           at most 1 + m + m (m + 1) / 2

(the second is convex in u^2, so that it is largest at an end, and 1.25 at the other). What is missing (NaN) contributes
zeros; a covariance counts records that have all of its columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.trainers.analytics.columns import Columns, numbers
from choral.trainers.analytics.estimates import UNKNOWN, Estimated
from choral.trainers.analytics.grid import Floats, Grid, Int64Array, bounds_of
from choral.trainers.analytics.part import Part, Statistic

_POWERS = 1 << 20  # steps of u^3 and u^4, which serve standard errors alone
_PRODUCT_BITS = 16  # of a covariance's columns: sums of products of 2^22 records are exact in float64
_LEAST_COUNT = 3.0  # deviations of its noise that a count has to have before anything is divided by it


@dataclass(frozen=True)
class Count(Statistic):
    """How many records have a value in the column."""

    def part(self, name: str, bits: int, *, noisy: bool) -> Part:
        """See :class:`Statistic`."""
        del bits, noisy
        return _CountPart(self.columns(name)[0])


@dataclass(frozen=True)
class Mean(Statistic):
    """Count, sum, mean, variance (of a sample) and deviation of a column.

    low, high: public bounds, never computed from the data; what is beyond them counts as the bound. They are the
    sensitivity: the wider, the more noise.
    """

    low: float
    high: float

    def part(self, name: str, bits: int, *, noisy: bool) -> Part:
        """See :class:`Statistic`. Raises: ConfigError."""
        del noisy
        return _MeanPart(self.columns(name)[0], Grid(self.low, self.high, bits))


@dataclass(frozen=True)
class Covariance(Statistic):
    """Means, covariances (of a sample) and correlations of several columns, of the records that have all of them.

    bounds: column -> (low, high), public. `column` is not used.
    """

    bounds: Mapping[str, tuple[float, float]]

    def columns(self, name: str) -> tuple[str, ...]:
        """See :class:`Statistic`. Raises: ConfigError for fewer than two columns."""
        if not isinstance(self.bounds, Mapping) or len(self.bounds) < 2 or self.column is not None:
            raise ConfigError(
                f"{name}: a covariance is of two columns or more",
                hint='Covariance({"age": (0, 120), "stay": (0, 60)})',
            )
        return tuple(self.bounds)

    def part(self, name: str, bits: int, *, noisy: bool) -> Part:
        """See :class:`Statistic`. Raises: ConfigError."""
        del noisy
        bits = min(bits, _PRODUCT_BITS)
        grids = {column: Grid(*bounds_of(self.bounds[column]), bits) for column in self.columns(name)}
        return _CovariancePart(grids)


class _CountPart(Part):
    norm_squared, bound = 1.0, 1

    def __init__(self, column: str) -> None:
        self.column, self.unit = column, np.ones(1)

    def sums(self, columns: Columns) -> Int64Array:
        array = columns[self.column]
        missing = np.isnan(array).sum() if array.dtype.kind == "f" else _empty(array)
        return np.array([len(array) - int(missing)], dtype=np.int64)

    def read(self, total: npt.NDArray[Any], noise: Floats) -> dict[str, Estimated]:
        if math.isinf(noise[0]):
            return {"count": UNKNOWN}
        return {"count": Estimated(float(total[0]), float(noise[0]))}


def _empty(array: npt.NDArray[Any]) -> int:
    if array.dtype.kind == "O":
        return sum(value is None or value != value or value == "" for value in array)
    return int((array == "").sum()) if array.dtype.kind in "US" else 0


class _MeanPart(Part):
    norm_squared = 2.25 + 2.0 / 16.0

    def __init__(self, column: str, grid: Grid) -> None:
        self.column, self.grid = column, grid
        reach = float(grid.reach)
        self.unit = np.array([1.0, reach, 2.0 * reach**2, 4.0 * _POWERS, 4.0 * _POWERS])
        self.bound = max(grid.reach**2, _POWERS)

    def sums(self, columns: Columns) -> Int64Array:
        values = numbers(columns, self.column)
        z = self.grid.whole(values[~np.isnan(values)])
        u = z / self.grid.reach
        powers = [int(np.rint(u**power * _POWERS).astype(np.int64).sum()) for power in (3, 4)]
        squares = int((2 * z * z - self.grid.reach**2).sum())
        return np.array([len(z), int(z.sum()), squares, *powers], dtype=np.int64)

    def read(self, total: npt.NDArray[Any], noise: Floats) -> dict[str, Estimated]:
        names = ("count", "sum", "mean", "variance", "deviation")
        if np.isinf(noise).any():
            return dict.fromkeys(names, UNKNOWN)
        grid, (n, s, q) = self.grid, (Fraction(value.item()) for value in total[:3])
        step, centre, reach = Fraction(grid.step), grid.centre, grid.reach
        found = {
            "count": Estimated(float(n), float(noise[0])),
            "sum": Estimated(float((s + n * centre) * step), math.hypot(noise[1], centre * noise[0]) * grid.step),
        }
        if float(n) < max(2.0, _LEAST_COUNT * noise[0]):
            return found | dict.fromkeys(names[2:], UNKNOWN)
        squares = (q + n * reach**2) / 2  # of z
        variance = max((squares - s * s / n) / (n - 1), Fraction(0)) * step**2
        errors = self._errors([float(value) for value in total], noise)
        unit = grid.step * reach
        deviation = math.sqrt(variance)
        half = 0.5 / deviation if deviation > 0.0 else None
        return found | {
            "mean": Estimated(float((s / n + centre) * step), errors[0] * unit, errors[1] * unit),
            "variance": Estimated(float(variance), errors[2] * unit**2, errors[3] * unit**2),
            "deviation": Estimated(deviation, errors[2] * unit**2 * half, errors[3] * unit**2 * half)
            if half
            else Estimated(0.0, None),
        }

    def _errors(self, total: list[float], noise: Floats) -> tuple[float, float, float, float]:
        """Of mean and variance, in u: by the noise, and by sampling; to first order in the noise."""
        reach = float(self.grid.reach)
        n, mean = total[0], total[1] / total[0] / reach
        second = (total[2] / reach**2 / total[0] + 1.0) / 2.0
        third, fourth = total[3] / n / _POWERS, total[4] / n / _POWERS
        variance = max(second - mean**2, 0.0)
        central = fourth - 4.0 * mean * third + 6.0 * mean**2 * second - 3.0 * mean**4
        by_n, by_s, by_q = noise[0], noise[1] / reach, noise[2] / reach**2
        of_mean = math.hypot(by_s, mean * by_n) / n
        # variance = (q / n + 1) / 2 - (s / n)^2
        parts = (0.5 * by_q, 2.0 * mean * by_s, (2.0 * mean**2 - second + 0.5) * by_n)
        sampled = math.sqrt(max(central - variance**2 * (n - 3.0) / (n - 1.0), 0.0) / n)
        return of_mean, math.sqrt(variance / n), math.hypot(*parts) / n, sampled


class _CovariancePart(Part):
    def __init__(self, grids: Mapping[str, Grid]) -> None:
        self.grids = dict(grids)
        reaches = np.array([float(grid.reach) for grid in grids.values()])
        self.rows, self.columns = np.triu_indices(len(grids))
        self.unit = np.concatenate([[1.0], reaches, reaches[self.rows] * reaches[self.columns]])
        self.norm_squared = float(len(self.unit))
        self.bound = max(grid.reach for grid in grids.values()) ** 2

    def sums(self, columns: Columns) -> Int64Array:
        table = np.stack([numbers(columns, name) for name in self.grids], axis=1)
        table = table[~np.isnan(table).any(axis=1)]
        whole = np.stack([grid.whole(table[:, at]) for at, grid in enumerate(self.grids.values())], axis=1)
        products = np.zeros((len(self.grids),) * 2, dtype=np.int64)
        for start in range(0, len(whole), 1 << 20):  # exact in float64: 2^20 records of products below 2^32
            piece = whole[start : start + (1 << 20)].astype(np.float64)
            products += (piece.T @ piece).astype(np.int64)
        return np.concatenate([[len(table)], whole.sum(axis=0), products[self.rows, self.columns]]).astype(np.int64)

    def read(self, total: npt.NDArray[Any], noise: Floats) -> dict[str, Estimated]:
        names = list(self.grids)
        count = Estimated(float(total[0]), float(noise[0]))
        if np.isinf(noise).any() or float(total[0]) < max(2.0, _LEAST_COUNT * noise[0]):
            return {"count": UNKNOWN if math.isinf(noise[0]) else count}
        m = len(names)
        steps = np.array([grid.step for grid in self.grids.values()])
        centres = [grid.centre for grid in self.grids.values()]
        n = Fraction(total[0].item())
        sums = [Fraction(value.item()) for value in total[1 : 1 + m]]
        found = {"count": count}
        matrix = np.zeros((m, m))
        for i, j, value in zip(self.rows, self.columns, total[1 + m :], strict=True):
            exact = (Fraction(value.item()) - sums[i] * sums[j] / n) / (n - 1)
            matrix[i, j] = matrix[j, i] = float(exact) * steps[i] * steps[j]
        errors = self._errors(total.astype(np.float64), noise, steps)
        for at, name in enumerate(names):
            value = float((sums[at] / n + centres[at]) * Fraction(float(steps[at])))
            sampling = math.sqrt(max(matrix[at, at], 0.0) / float(n))
            found[f"mean {name}"] = Estimated(value, float(errors[0][at]), sampling)
        for i, j in zip(self.rows, self.columns, strict=True):
            sampling = math.sqrt(max(matrix[i, i] * matrix[j, j] + matrix[i, j] ** 2, 0.0) / float(n))
            found[f"covariance {names[i]}, {names[j]}"] = Estimated(
                float(matrix[i, j]), float(errors[1][i, j]), sampling
            )
        for i, j in zip(self.rows, self.columns, strict=True):
            if i < j:
                found[f"correlation {names[i]}, {names[j]}"] = _correlation(matrix, errors[1], int(i), int(j), float(n))
        return found

    def _errors(self, total: Floats, noise: Floats, steps: Floats) -> tuple[Floats, Floats]:
        """The noise's part of the errors of means, shape (m,), and of covariances, shape (m, m); to first order."""
        m, n = len(self.grids), total[0]
        means = total[1 : 1 + m] / n
        of_means = np.hypot(noise[1 : 1 + m], means * noise[0]) / n
        squared = np.zeros((m, m))
        i, j = self.rows, self.columns
        products = total[1 + m :] / n
        by_n = (2.0 * means[i] * means[j] - products) * noise[0]
        by_sums = np.where(
            i == j,
            (2.0 * means[i] * noise[1 + i]) ** 2,
            (means[j] * noise[1 + i]) ** 2 + (means[i] * noise[1 + j]) ** 2,
        )
        squared[i, j] = squared[j, i] = (noise[1 + m :] ** 2 + by_sums + by_n**2) / n**2
        return of_means * steps, np.sqrt(squared) * np.outer(steps, steps)


def _correlation(matrix: Floats, errors: Floats, i: int, j: int, n: float) -> Estimated:
    if not (matrix[i, i] > 0.0 and matrix[j, j] > 0.0):
        return UNKNOWN
    scale = math.sqrt(matrix[i, i] * matrix[j, j])
    r = float(np.clip(matrix[i, j] / scale, -1.0, 1.0))
    by_variances = 0.5 * r * math.hypot(errors[i, i] / matrix[i, i], errors[j, j] / matrix[j, j])
    return Estimated(r, math.hypot(errors[i, j] / scale, by_variances), (1.0 - r * r) / math.sqrt(n))
