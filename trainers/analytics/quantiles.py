"""Quantiles from a histogram on public bounds: of one level without noise, of two with it.

With noise, f groups of f bins each are counted as well as the f^2 bins, so that a rank is the sum of at most 2 (f - 1)
noisy counts, not of f^2. Every record is in one bin and one group: squared norm 2. Each count has noise of variance v.
The groups' counts and the sums of their bins are two views of the same numbers; least squares reconciles them (Hay et
al. 2010, "Boosting the accuracy of differentially private histograms through consistency"; y a group's count, S the sum
of its bins' counts):

    group  (f y + S) / (f + 1),  variance v f / (f + 1)                                                             (1)
    bin    its count + (f / (f + 1)) (y - S) / f                                                                    (2)

so that the first m bins of a group have the variance v (m - m^2 / (f + 1)), and the covariance v m / (f + 1) with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.trainers.analytics.columns import Columns, numbers
from choral.trainers.analytics.estimates import UNKNOWN, Estimated
from choral.trainers.analytics.grid import Floats, Int64Array, bounds_of
from choral.trainers.analytics.part import Part, Statistic
from choral.trainers.task import arguments

_MOST_FANOUT = 256


@dataclass(frozen=True)
class Quantiles(Statistic):
    """The values below which these shares of the records lie, to the width of a bin, (high - low) / bins.

    shares: between 0 and 1; the least and the largest value are no quantiles, since they are one record's. low, high:
    public bounds; what is beyond counts as the bound. bins: a square, such as 1,024.
    """

    shares: Sequence[float]
    low: float
    high: float
    bins: int = 1024
    weight: float = field(default=4.0, kw_only=True)

    def part(self, name: str, bits: int, *, noisy: bool) -> Part:
        """See :class:`Statistic`. Raises: ConfigError."""
        del bits
        low, high = bounds_of((self.low, self.high))
        bins = arguments.whole_number(self.bins, "bins", 4, "a square, such as 1024")
        fanout = math.isqrt(bins)
        if fanout**2 != bins or fanout > _MOST_FANOUT:
            raise ConfigError(f"{name}: bins is {bins}, expected a square up to {_MOST_FANOUT**2}", hint="bins=1024")
        if isinstance(self.shares, str) or not isinstance(self.shares, Sequence) or not self.shares:
            raise ConfigError(f"{name}: expected a list of shares", hint="(0.25, 0.5, 0.75)")
        shares = [arguments.number(share, "a share", "between 0 and 1") for share in self.shares]
        if not all(0.0 < share < 1.0 for share in shares):
            raise ConfigError(
                f"{name}: shares are {shares}, expected numbers between 0 and 1, without the two",
                hint="the least and the largest value are one record's: they are never published",
            )
        return _QuantilesPart(self.columns(name)[0], shares, low, high, fanout, noisy=noisy)


class _QuantilesPart(Part):
    bound, cells = 1, True

    def __init__(
        self, column: str, shares: Sequence[float], low: float, high: float, fanout: int, *, noisy: bool
    ) -> None:
        self.column, self.shares, self.low, self.high, self.fanout = column, tuple(shares), low, high, fanout
        self.noisy = noisy
        self.unit = np.ones(fanout**2 + (fanout if noisy else 0))
        self.norm_squared = 2.0 if noisy else 1.0

    def sums(self, columns: Columns) -> Int64Array:
        values = numbers(columns, self.column)
        bins = self.fanout**2
        cut = np.clip(values[~np.isnan(values)], self.low, self.high)
        place = np.minimum((cut - self.low) / (self.high - self.low) * bins, bins - 1).astype(np.int64)
        counts = np.bincount(place, minlength=bins).astype(np.int64)
        return np.concatenate([counts, counts.reshape(self.fanout, -1).sum(axis=1)]) if self.noisy else counts

    def read(self, total: npt.NDArray[Any], noise: Floats) -> dict[str, Estimated]:
        names = [f"quantile {share:g}" for share in self.shares]
        if np.isinf(noise).any():
            return dict.fromkeys(["count", *names], UNKNOWN)
        f, variance = self.fanout, float(noise[0]) ** 2
        bins = total[: f * f].astype(np.float64).reshape(f, f)
        if self.noisy:
            off = total[f * f :].astype(np.float64) - bins.sum(axis=1)
            bins = bins + off[:, None] / (f + 1.0)  # (2)
        count = float(bins.sum())
        of_count = math.sqrt(f * self._group(variance))
        found = {"count": Estimated(count, of_count)}
        if count < max(1.0, 3.0 * of_count):
            return found | dict.fromkeys(names, UNKNOWN)
        # The ranks at the edges of the bins. What noise has made fall is evened out: between the least bound from
        # above and the largest from below that monotone ranks could have.
        ranks = np.concatenate([[0.0], np.cumsum(bins.ravel())]) / count
        ranks = (np.maximum.accumulate(ranks) + np.minimum.accumulate(ranks[::-1])[::-1]) / 2.0
        for share, name in zip(self.shares, names, strict=True):
            by_noise = self._of_rank(ranks, share, variance, count)
            sampled = math.sqrt(share * (1.0 - share) / count)
            found[name] = Estimated(
                self._at(ranks, share), self._spread(ranks, share, by_noise), self._spread(ranks, share, sampled)
            )
        return found

    def _group(self, variance: float) -> float:
        """The variance of a reconciled group, (1); of the sum of its bins where no groups were counted."""
        return variance * self.fanout / (self.fanout + 1.0) if self.noisy else variance * self.fanout

    def _of_rank(self, ranks: Floats, share: float, variance: float, count: float) -> float:
        """The deviation by noise of the rank of the edge near the quantile: of (prefix - share * whole) / count."""
        groups, m = divmod(int(np.searchsorted(ranks, share)), self.fanout)
        f, one = self.fanout, self._group(variance)
        inner, with_group = (m - m * m / (f + 1.0), m / (f + 1.0)) if self.noisy else (float(m), float(m))
        prefix = groups * one + inner * variance
        both = groups * one + with_group * variance
        return math.sqrt(max(prefix - 2.0 * share * both + share**2 * f * one, 0.0)) / count

    def _at(self, ranks: Floats, rank: float) -> float:
        """The value of a rank, by straight lines between the edges; the middle of where it is constant."""
        edges = np.linspace(self.low, self.high, len(ranks))
        first = int(np.searchsorted(ranks, rank, side="left"))
        last = int(np.searchsorted(ranks, rank, side="right"))
        if first >= len(ranks):
            return self.high
        if last > first:  # the rank of edges themselves
            return float(edges[first] + edges[last - 1]) / 2.0
        if first == 0:
            return self.low
        below, above = ranks[first - 1], ranks[first]
        return float(edges[first - 1] + (edges[first] - edges[first - 1]) * (rank - below) / (above - below))

    def _spread(self, ranks: Floats, share: float, deviation: float) -> float:
        """Half of the way between the values one deviation of the rank below and above: its error as the value's."""
        return (self._at(ranks, min(share + deviation, 1.0)) - self._at(ranks, max(share - deviation, 0.0))) / 2.0
