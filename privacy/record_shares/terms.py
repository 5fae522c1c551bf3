"""The public constants of a job with noise in shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from choral.errors import ConfigError
from choral.privacy.accounting.plain_numbers import as_float, as_integer
from choral.privacy.noise.record_noise_shares import MOST_ROWS

SECURE_SUM_FAILURE = 2.0**-40  # of one opening
CAP_FAILURE = 2.0**-60  # of one step


@dataclass(frozen=True, kw_only=True)
class SharesTerms:
    """The public constants of a job. No server may choose one of them, and every party knows them all.

    Args:
        records: N. batch_size: B, the number of records that a step draws in the mean, and by which sums are divided.
        steps: T, sums that are opened at most; one that is tried again counts again.
        parties: the most in a sum. min_survivors: the fewest in a sum that is opened. length: of a gradient.
        most_records: the most that one party has.
        declared: that `records` and `most_records` are constants which somebody declared, and no counts of the data.
        failure: the secure sum's statistical failure in one opening, added to delta.
    Raises: ConfigError for a value out of range.
    """

    records: int
    batch_size: int
    steps: int
    parties: int
    min_survivors: int
    length: int
    most_records: int
    declared: bool = False
    failure: float = SECURE_SUM_FAILURE

    def __post_init__(self) -> None:
        for name in ("records", "batch_size", "steps", "parties", "min_survivors", "length", "most_records"):
            object.__setattr__(self, name, as_integer(name, getattr(self, name)))
        object.__setattr__(self, "failure", as_float("failure", self.failure))
        if not isinstance(self.declared, bool):
            raise ConfigError(f"declared is {self.declared!r}, expected True or False")
        if self.batch_size > self.records:
            raise ConfigError(f"batch_size is {self.batch_size}, expected at most the {self.records} records")
        if self.min_survivors > self.parties:
            raise ConfigError(f"min_survivors is {self.min_survivors} of {self.parties} parties, expected at most all")
        if not 0.0 <= self.failure <= 1e-6:
            raise ConfigError(f"failure is {self.failure}, expected 0 to 1e-6 for one sum")
        if self.rows > MOST_ROWS:
            raise ConfigError(
                f"a party may draw {self.rows} records in a step, expected at most {MOST_ROWS}",
                hint="Take smaller batches, or divide large parties.",
            )

    @property
    def rate(self) -> Fraction:
        """q, exactly."""
        return Fraction(self.batch_size, self.records)

    @cached_property
    def rows(self) -> int:
        """The most records that a party uses in one step: more are drawn with probability CAP_FAILURE at most."""
        return rows_of(self.most_records, self.rate)


def rows_of(records: int, rate: Fraction) -> int:
    """Return the least K, up to `records`, with P(Bin(records, rate) >= K) <= CAP_FAILURE; where all may come, all."""
    if rate == 1:
        return records
    from scipy import stats  # here, since it takes long to load

    low, high = 0, records
    while high - low > 1:
        middle = (low + high) // 2
        enough = float(stats.binom.sf(middle - 1, records, float(rate))) <= CAP_FAILURE
        low, high = (low, middle) if enough else (middle, high)
    return high


def separation_of(terms: SharesTerms) -> int:
    """Batches of a pass where they are fixed: each record is in one of them."""
    return math.ceil(terms.records / terms.batch_size)
