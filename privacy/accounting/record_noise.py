"""The noise that fits a budget: found by secant steps on what releases cost. Imports no torch.

What was fixed in advance is priced by privacy loss distributions (:mod:`choral.privacy.accounting.record_level`); what
comes after something was released, by a filter (:mod:`choral.privacy.accounting.filters`).

>>> round(noise_multiplier(1.0, 1e-5, 0.1, 100), 4)
3.9417
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial

from choral.privacy.accounting.events import (
    NEIGHBOURS,
    PoissonSampledGaussian,
    RecordEvent,
    Search,
    as_gaussians,
    replaces,
)
from choral.privacy.accounting.filters import PrivacyFilter
from choral.privacy.accounting.merged_steps import LARGEST_NOISE, SMALLEST_NOISE, Merged, merge, without_search
from choral.privacy.accounting.other_accountants import check_others
from choral.privacy.accounting.record_level import GRIDS, check_target, checked_epsilon, discretised, settled_on_grid
from choral.privacy.accounting.record_level import (
    epsilon as _cost_of,  # the parameters below carry the function's name, and hide it
)
from choral.privacy.errors import AccountingError, BudgetExceededError
from choral.privacy.loss_distributions.sampled_renyi import gaussian_noise


def noise_multiplier(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    spent: Iterable[RecordEvent] = (),
    *,
    slack: float = 1e-5,
    neighbours: str = NEIGHBOURS,
    fixed: bool = False,
    others: bool = True,
) -> float:
    """Return the smallest noise multiplier with which `spent` and `steps` more releases cost at most `epsilon`.

    What comes after `spent` may have been chosen by what that showed, so that a filter counts all of it
    (:mod:`choral.privacy.accounting.filters`); of a plan that stopped early `spent` has to hold the whole. fixed: that
    everything, `spent` too, was fixed in advance; then it is privacy loss distributions that count, as where nothing
    was spent. others: have dp-accounting's PLD compute the result's cost, too, as is right for a training; it takes as
    long as loading torch.
    Guarantee: the cost of the result never exceeds `epsilon` and is at least (1 - slack) * epsilon; a larger
    `slack` (1e-3 is plenty for training) is answered faster.
    Raises: ConfigError (a number out of range), BudgetExceededError (`spent` leaves too little),
    AccountingError (the search found no answer).
    """
    check_target(epsilon, delta)
    merge((PoissonSampledGaussian(sample_rate=sample_rate, noise_multiplier=1.0, steps=steps),))
    before, replace = tuple(spent), replaces(neighbours)
    if before and not fixed:

        def event(noise: float) -> RecordEvent:
            return PoissonSampledGaussian(sample_rate=sample_rate, noise_multiplier=noise, steps=steps)

        return _by_filter(epsilon, delta, event, before, slack, neighbours)
    known, delta = as_gaussians(before, delta)
    if any(isinstance(event, Search) for event in known):
        return _calibrate_after_search(epsilon, delta, float(sample_rate), int(steps), known, slack, neighbours)
    found = _calibrate(epsilon, delta, float(sample_rate), int(steps), merge(without_search(known)), slack, replace)
    if others:
        _hold_against_others(
            _together(merge(without_search(known)), float(sample_rate), int(steps), found), delta, replace
        )
    return found


def search_noise(
    epsilon: float,
    delta: float,
    search: Callable[[float], Search],
    spent: Sequence[RecordEvent] = (),
    *,
    neighbours: str = NEIGHBOURS,
) -> float:
    """Return the smallest noise multiplier with which `spent` and the search `search(z)` cost at most `epsilon`.

    After something was spent a filter counts, as in :func:`noise_multiplier`.
    Raises: ConfigError (a number out of range), BudgetExceededError (`spent` leaves too little).
    """
    check_target(epsilon, delta)
    if spent:
        return _by_filter(epsilon, delta, search, tuple(spent), 1e-3, neighbours)
    return _search(lambda z: _cost_of([search(z)], delta, neighbours=neighbours), epsilon, 1.0, slack=1e-3)


def least_noise(cost: Callable[[float], float], target: float, *, slack: float) -> float:
    """Return a noise multiplier whose `cost`, which falls with it, is at most `target` and at least (1 - slack) of it.

    Raises: BudgetExceededError (no noise is enough).
    """
    return _search(lambda noise: min(cost(noise), 1e9), target, 1.0, slack=slack)


def _by_filter(
    epsilon: float,
    delta: float,
    event: Callable[[float], RecordEvent],
    before: tuple[RecordEvent, ...],
    slack: float,
    neighbours: str,
) -> float:
    rule = PrivacyFilter(epsilon, delta, neighbours)
    _refuse_spent(epsilon, delta, rule.cost(before), slack)
    return least_noise(lambda noise: rule.cost((*before, event(noise))), epsilon, slack=slack)


def _refuse_spent(target: float, delta: float, before: float, slack: float) -> None:
    if before >= (1.0 - 2.0 * slack) * target:
        raise BudgetExceededError(
            f"the budget epsilon={target:g} at delta={delta:g} is spent: {before:.6g} so far",
            hint="This data may not be used again under this promise; a larger epsilon is a weaker promise.",
        )


def _calibrate_after_search(
    target: float,
    delta: float,
    rate: float,
    steps: int,
    spent: tuple[RecordEvent, ...],
    slack: float,
    neighbours: str,
) -> float:
    _refuse_spent(target, delta, _cost_of(spent, delta, neighbours=neighbours), slack)

    def cost(noise: float) -> float:
        event = PoissonSampledGaussian(sample_rate=rate, noise_multiplier=noise, steps=steps)
        return _cost_of([*spent, event], delta, neighbours=neighbours)

    return _search(cost, target, _clt_guess(target, delta, rate, steps, (), replaces(neighbours)), slack=slack)


@lru_cache(maxsize=1024)
def _calibrate(
    target: float, delta: float, rate: float, steps: int, spent: Merged, slack: float, replace: bool
) -> float:
    # A remainder within the slack is what earlier calibrations left over, not budget to train on.
    if spent:
        _refuse_spent(target, delta, checked_epsilon(spent, delta, replace), slack)

    together = partial(_together, spent, rate, steps)
    noise = _clt_guess(target, delta, rate, steps, spent, replace)
    first = next((grid for grid in GRIDS if grid <= 1e-3 * target), GRIDS[-1])
    noise = _search(
        lambda z: discretised(together(z), delta, first, replace).upper, target, noise, slack=max(slack, 1e-3)
    )
    _, grid = settled_on_grid(together(noise), delta, replace)
    noise = _search(lambda z: discretised(together(z), delta, grid, replace).upper, target, noise, slack=slack)
    if checked_epsilon(together(noise), delta, replace) > target:  # it settled on a coarser grid there
        noise = _search(lambda z: checked_epsilon(together(z), delta, replace), target, noise, slack=slack)
    return noise


@lru_cache(maxsize=1024)
def _hold_against_others(merged: Merged, delta: float, replace: bool) -> None:
    """Once for parties that are alike. Raises: AccountingError."""
    check_others(merged, delta, replace)


def _together(spent: Merged, rate: float, steps: int, noise: float) -> Merged:
    parts = {(q, s): t for q, s, t in spent}
    parts[(rate, noise)] = parts.get((rate, noise), 0) + steps
    return tuple(sorted((q, s, t) for (q, s), t in parts.items()))


def _clt_guess(target: float, delta: float, rate: float, steps: int, spent: Merged, replace: bool) -> float:
    """Guess the noise by the central limit theorem of Gaussian DP (Bu et al. 2020): a start, never a guarantee."""
    distance = 2.0 if replace else 1.0
    mu_squared = gaussian_noise(target, delta) ** -2
    left = mu_squared - sum(t * q * q * math.expm1(min((distance / s) ** 2, 50.0)) for q, s, t in spent)
    guess = distance / math.sqrt(math.log1p(max(left, 1e-3 * mu_squared) / (steps * rate * rate)))
    return min(max(guess, SMALLEST_NOISE), LARGEST_NOISE / 2)


def _search(cost: Callable[[float], float], target: float, start: float, *, slack: float) -> float:
    """Return a noise whose cost lies in [(1 - slack) * target, target], by secant steps kept inside a bracket.

    Cost falls with noise, nearly as a power, so secants of log cost over log noise converge in a few steps.
    """
    too_little, enough = 0.0, math.inf
    noise, slope = start, -1.0
    previous: tuple[float, float] | None = None
    aim = math.log(target * (1.0 - slack / 2.0))
    for _ in range(200):
        value = cost(noise)
        if (1.0 - slack) * target <= value <= target:
            return noise
        too_little, enough = (noise, enough) if value > target else (too_little, noise)
        if enough - too_little <= 1e-9 * too_little:  # the cost jumps over the aim
            return enough
        if enough <= SMALLEST_NOISE:
            return SMALLEST_NOISE
        if too_little > LARGEST_NOISE:
            raise BudgetExceededError(
                f"what is left of epsilon={target:g} is too little for any noise multiplier up to {LARGEST_NOISE:g}",
                hint="Plan fewer steps, or accept that this data's budget is spent.",
            )
        here = (math.log(noise), math.log(max(value, 1e-300)))
        if previous is not None and here[0] != previous[0]:
            slope = min((here[1] - previous[1]) / (here[0] - previous[0]), -1e-3)
        previous = here
        noise = math.exp(here[0] + max(-2.0, min(2.0, (aim - here[1]) / slope)))
        if not too_little < noise < enough:
            noise = _between(too_little, enough)
    raise AccountingError("the calibration of the noise did not converge", hint="Please report the four numbers.")


def _between(low: float, high: float) -> float:
    if low == 0.0:
        return high / 2.0
    return 2.0 * low if high == math.inf else math.sqrt(low * high)
