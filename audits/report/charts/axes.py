"""The vertical axis of a metric: linear and from 0, or, for how far a value is from its least, logarithmic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from choral.audits.findings.text import is_gap, is_percent, power
from choral.audits.report.charts.svg import log_ticks, ticks

FLOOR = 1e-12  # a gap below it, or rounded below 0, is drawn here


@dataclass(frozen=True, kw_only=True)
class Axis:
    """metric: its name. marks: where lines are drawn across, in the chart's unit, which :meth:`at` gives."""

    metric: str
    marks: tuple[float, ...]

    @classmethod
    def over(cls, metric: str, values: Iterable[float], *, from_zero: bool = True) -> Self:
        """An axis that covers ``values``; from_zero: and 0, if it is linear."""
        found = list(values)
        if not is_gap(metric):
            return cls(metric=metric, marks=tuple(ticks(min(found + [0.0] * from_zero), max(found), 5)))
        logs = [math.log10(max(value, FLOOR)) for value in found]
        low, high = math.floor(min(logs)), math.ceil(max(logs))
        return cls(metric=metric, marks=tuple(log_ticks(low, max(high, low + 1))))

    @property
    def span(self) -> tuple[float, float]:
        return self.marks[0], self.marks[-1]

    @property
    def title(self) -> str:
        return f"{self.metric} (log scale)" if is_gap(self.metric) else self.metric

    def at(self, value: float) -> float:
        return math.log10(max(value, FLOOR)) if is_gap(self.metric) else value

    def show(self, mark: float) -> str:
        if is_gap(self.metric):
            return power(float(f"{10**mark:.1g}"))
        return f"{100 * mark:.3g} %" if is_percent(self.metric) else f"{mark:.3g}"
