"""What was released, as immutable data: the events a ledger holds and an accountant reads."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from choral.errors import ConfigError
from choral.privacy.strategies import Strategy

UNIT = "record"
NEIGHBOURS = "add or remove one record"
CLIENT_UNIT = "client"
CLIENT_NEIGHBOURS = "zero out one client: its update is the zero vector in every round"
RELATIONS = {UNIT: NEIGHBOURS, CLIENT_UNIT: CLIENT_NEIGHBOURS}


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


class CorrelatedGaussian(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="correlated_gaussian"
):
    """One pass of `steps` releases of the matrix mechanism: the rows of C x + z that the pass adds.

    Every record is in the same one of the `steps` batches in every pass, or in none, and contributes a vector of L2
    norm at most C to its sum. `noise` is the standard deviation of z's coordinates over C; the pass is the one of
    this `number`, from 1, under its own z. Together, passes 1 to p cost one Gaussian mechanism
    (:mod:`choral.privacy.strategies`); this event is the part of pass p.
    """

    strategy: Strategy
    noise: float
    steps: int
    number: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise) and self.noise > 0.0):
            raise ConfigError(f"noise is {self.noise}, expected a finite number > 0")
        for name in ("steps", "number"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected >= 1")

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation over sensitivity of the one Gaussian mechanism that the pass adds, computed from C."""
        known = 1 << (self.number - 1).bit_length()  # few lengths, so that the costs of a strategy are computed once
        return self.noise / math.sqrt(float(self.strategy.costs(self.steps, known)[self.number - 1]))

    @property
    def sample_rate(self) -> float:
        """One: nothing is claimed for sampling."""
        return 1.0


RecordEvent = PoissonSampledGaussian | CorrelatedGaussian


class ClientRelease(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="client_release"):
    """`steps` sums of bounded client vectors with noise, of all clients (no amplification by sampling).

    Each client's vector has a squared L2 norm of at most `sensitivity_squared`; each coordinate of the sum has `shares`
    independent noises of variance parameter `share_variance` that the adversary does not know.

    mechanism: "gaussian" (real vectors), "discrete_gaussian" or "skellam" (integer vectors, `length` coordinates).
    settles: the sum that the event before this one paid for had this many shares, no fewer than it paid for; it counts
        in place of that one.
    """

    mechanism: Literal["gaussian", "discrete_gaussian", "skellam"]
    sensitivity_squared: int
    share_variance: float
    shares: int
    length: int
    steps: int = 1
    settles: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.share_variance) and self.share_variance > 0.0):
            raise ConfigError(f"share_variance is {self.share_variance}, expected a finite number > 0")
        for name in ("sensitivity_squared", "shares", "length", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected >= 1")

    @property
    def noise_multiplier(self) -> float:
        """The deviation of the unknown noise in one coordinate over the largest norm of a client's vector."""
        return math.sqrt(self.shares * self.share_variance / self.sensitivity_squared)
