"""One number of a result, and how far it may be off: by the noise that was added, and as a sample of a population."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimated:
    """value: None where too few records are left to say one.

    noise: standard error by the privacy noise alone, of the same number computed from all records; 0.0 without noise.
    sampling: standard error of that number as an estimate of the population that the records are a random sample of;
        None for what is only about these records (counts, sums).
    """

    value: float | None
    noise: float | None = 0.0
    sampling: float | None = None

    @property
    def standard_error(self) -> float | None:
        """Of both together."""
        return None if self.noise is None else math.hypot(self.noise, self.sampling or 0.0)

    def interval(self, deviations: float = 1.96) -> tuple[float, float] | None:
        """Return the normal interval around the value; by default of 95 %."""
        if self.value is None or (error := self.standard_error) is None:
            return None
        return self.value - deviations * error, self.value + deviations * error


UNKNOWN = Estimated(None, None, None)


def false_publication(threshold: float, most: float, deviation: float) -> float:
    """P(m + N(0, s^2) >= t): how often a cell of one contributor alone, who counts m at most, passes a threshold t.

    deviation: s, of the noise of the cell's count. The noise is a sum of rounded or discrete Gaussians, whose tails
    differ from this by less than rounding by half a step moves t.
    """
    return 0.5 * math.erfc((threshold - most) / (deviation * math.sqrt(2.0)))
