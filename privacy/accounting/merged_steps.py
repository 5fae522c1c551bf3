"""Steps of one kind counted together, in the form that all accountants take: sample rate, noise multiplier, number.

What is out of the range that is accounted for is refused here, before anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from choral.errors import ConfigError
from choral.privacy.accounting.events import BaseEvent, CorrelatedGaussian, Priced, Search

SMALLEST_RATE, SMALLEST_NOISE, LARGEST_NOISE, MOST_STEPS = 1e-9, 1e-2, 1e6, 2**24  # what is accounted for

_MOST_PARTS = 256  # unlike steps that are told apart
_LEAST_WHOLE, _MOST_WHOLE = 1e-6, 1e9  # noise multipliers of one Gaussian whose exact epsilon double precision holds

Merged = tuple[tuple[float, float, int], ...]


def without_search(events: Iterable[Priced]) -> tuple[BaseEvent, ...]:
    """The events as they are. Raises: ConfigError if one is a private search, which has a Renyi bound alone."""
    known = tuple(events)
    plain = tuple(event for event in known if not isinstance(event, Search))
    if len(plain) != len(known):
        raise ConfigError(
            "a private search has a bound by Renyi DP alone", hint="Use epsilon() or epsilon_rdp() for this ledger."
        )
    return plain


def merge(events: Iterable[BaseEvent]) -> Merged:
    """Return how many steps of each sample rate and noise multiplier there are. Raises: ConfigError (out of range)."""
    totals: dict[tuple[float, float], int] = {}
    correlated = 0.0
    for event in events:
        if isinstance(event, CorrelatedGaussian):
            correlated += event.noise_multiplier**-2  # Gaussian mechanisms compose to one: precisions add
            continue
        key = (event.sample_rate, event.noise_multiplier)
        totals[key] = totals.get(key, 0) + event.steps
    if correlated:
        key = (1.0, correlated**-0.5)
        totals[key] = totals.get(key, 0) + 1
    _check_range(totals)
    return _told_apart(totals)


def _check_range(totals: Mapping[tuple[float, float], int]) -> None:
    """Raise ConfigError for what is not accounted for: before anything is computed."""
    for rate, noise in totals:
        if rate < SMALLEST_RATE:
            raise ConfigError(
                f"sample_rate is {rate:g}, expected {SMALLEST_RATE:g} <= sample_rate <= 1 for the accountant",
                hint="Take larger batches.",
            )
        if not SMALLEST_NOISE <= noise <= LARGEST_NOISE and rate < 1.0:
            raise ConfigError(
                f"noise_multiplier is {noise:g}, expected {SMALLEST_NOISE:g} to {LARGEST_NOISE:g} for the accountant",
                hint="Below that nothing is hidden; above it nothing is learned.",
            )
    steps = sum(count for (rate, _), count in totals.items() if rate < 1.0)
    if steps > MOST_STEPS:
        raise ConfigError(
            f"there are {steps} sampled steps, expected at most {MOST_STEPS} for the accountant",
            hint="Train fewer steps of larger batches.",
        )
    whole = {noise: count for (rate, noise), count in totals.items() if rate == 1.0}
    least = min((noise / math.sqrt(count) for noise, count in whole.items()), default=_LEAST_WHOLE)
    if not (least >= _LEAST_WHOLE and max(whole, default=0.0) <= _MOST_WHOLE):
        raise ConfigError(
            f"steps of full batches have noise multipliers {min(whole):g} to {max(whole):g}, expected that of each"
            f" kind over the root of its number to be {_LEAST_WHOLE:g} to {_MOST_WHOLE:g} for the accountant"
        )


def _told_apart(totals: Mapping[tuple[float, float], int]) -> Merged:
    """The steps in order; where too many are unlike, nearly alike ones are counted as the worst of them.

    Less noise costs more, since noise may be added to what is released, and so does a larger rate q: the pair of q' < q
    is a mixture of q's and of one that tells nothing.
    """
    step = 1e-3
    parts = totals
    while len(parts) > _MOST_PARTS:
        grown: dict[tuple[float, float], int] = {}
        worst: dict[tuple[int, int], tuple[float, float]] = {}
        for rate, noise in totals:
            cell = (math.floor(math.log(rate) / step), math.floor(math.log(noise) / step))
            most, least = worst.get(cell, (rate, noise))
            worst[cell] = (max(most, rate), min(least, noise))
        for (rate, noise), count in totals.items():
            key = worst[math.floor(math.log(rate) / step), math.floor(math.log(noise) / step)]
            grown[key] = grown.get(key, 0) + count
        parts, step = grown, 2.0 * step
    return tuple(sorted((rate, noise, steps) for (rate, noise), steps in parts.items()))


def gaussians_as_one(merged: Merged) -> Merged:
    """Return the same with T steps that take every record as what they are: one Gaussian of noise / sqrt(T)."""
    return tuple((q, s / math.sqrt(t), 1) if q == 1.0 else (q, s, t) for q, s, t in merged)
