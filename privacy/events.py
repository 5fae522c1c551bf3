"""What was released, as immutable data: the events a ledger holds and an accountant reads."""

from __future__ import annotations

import math

import msgspec

from choral.errors import ConfigError

UNIT = "record"
NEIGHBOURS = "add or remove one record"


class PoissonSampledGaussian(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="poisson_gaussian"
):
    """`steps` releases of the Poisson-sampled Gaussian mechanism.

    Each step takes every record independently with probability `sample_rate` (0 < q <= 1), sums contributions
    of L2 norm at most C and adds N(0, (noise_multiplier * C)^2) to every coordinate.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0.0 < self.sample_rate <= 1.0:
            raise ConfigError(f"sample_rate is {self.sample_rate}, expected 0 < sample_rate <= 1")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0.0):
            raise ConfigError(f"noise_multiplier is {self.noise_multiplier}, expected a finite number > 0")
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}, expected >= 1")
