"""Means over seeds and their 95 % intervals, by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from choral.audits.findings.schema import DataOwner, Estimate, Spread

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run

LEVEL = 0.95


def mean_interval(values: Sequence[float], *, share: bool = False) -> Estimate:
    """The mean with its two-sided 95 % Student-t interval, ``mean ± t(.975, n-1) s / sqrt(n)``.

    The interval assumes values that are independent and near normal. One value has no interval: ``low`` and
    ``high`` are None, never 0 wide.

    share: the quantity lies in [0, 1], and so does its interval: what of it lies outside holds nothing.
    Raises: ValueError for no values or a value that is not finite.
    """
    mean, variance = _moments(values)
    if len(values) == 1:
        return Estimate(mean=mean, values=tuple(values))
    half = _quantile(len(values) - 1) * math.sqrt(variance / len(values))
    low, high = (max(mean - half, 0.0), min(mean + half, 1.0)) if share else (mean - half, mean + half)
    return Estimate(mean=mean, low=low, high=high, values=tuple(values))


def difference_interval(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The difference of two independent means, ours minus theirs, with Welch's 95 % interval.

    For arms that were run with different seeds. ``values`` is empty: no pair belongs together.
    Reference: Welch (1947), with the Welch-Satterthwaite degrees of freedom.

    Raises: ValueError for no values or a value that is not finite.
    """
    (mean_a, variance_a), (mean_b, variance_b) = _moments(ours), _moments(theirs)
    mean = mean_a - mean_b
    if len(ours) == 1 or len(theirs) == 1:
        return Estimate(mean=mean, values=())
    square_a, square_b = variance_a / len(ours), variance_b / len(theirs)
    if square_a + square_b == 0:
        return Estimate(mean=mean, low=mean, high=mean, values=())
    spread = square_a**2 / (len(ours) - 1) + square_b**2 / (len(theirs) - 1)
    half = _quantile((square_a + square_b) ** 2 / spread) * math.sqrt(square_a + square_b)
    return Estimate(mean=mean, low=mean - half, high=mean + half, values=())


def data_owners_of(runs: Sequence[Run]) -> tuple[DataOwner, ...]:
    """Every data owner with its worst run, the most expensive first."""
    worst: dict[str, DataOwner] = {}
    for run in runs:
        for name, spent in run.info.spent.items():
            if name not in worst or spent.epsilon > worst[name].epsilon:
                pooled = sum(run.info.parties.values()) if run.info.kind == "centralized" else None
                worst[name] = DataOwner(
                    name=name,
                    examples=run.info.parties.get(name, pooled),
                    epsilon=spent.epsilon,
                    steps=spent.steps,
                    noise_multiplier=spent.noise_multiplier,
                    sample_rate=spent.sample_rate,
                )
    return tuple(sorted(worst.values(), key=lambda owner: (-owner.epsilon, owner.name)))


def spreads(owners: Sequence[DataOwner]) -> tuple[Spread, ...]:
    """How unlike the data owners are in cost, noise, sample rate and size; empty for fewer than two.

    A quantity that some data owner has no number for is left out.
    """
    names: tuple[Literal["epsilon", "noise_multiplier", "sample_rate", "examples"], ...]
    names = ("epsilon", "noise_multiplier", "sample_rate", "examples")
    found = []
    for name in names:
        values = [float(value) for owner in owners if (value := getattr(owner, name)) is not None]
        if len(values) == len(owners) > 1:
            lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
            found.append(
                Spread(name=name, least=min(values), lower=lower, median=median, upper=upper, greatest=max(values))
            )
    return tuple(found)


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased variance (0 for one value)."""
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"Expected one or more finite values, got {list(values)}.")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _quantile(freedom: float) -> float:
    from scipy.special import stdtrit  # a third of a second to import

    return float(stdtrit(freedom, (1 + LEVEL) / 2))
