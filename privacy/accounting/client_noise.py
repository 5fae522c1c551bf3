"""The noise with which further sums of clients' vectors fit into a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from choral.errors import ConfigError
from choral.privacy.accounting.client_level import epsilon
from choral.privacy.accounting.events import ClientRelease
from choral.privacy.accounting.filters import PrivacyFilter
from choral.privacy.errors import BudgetExceededError

SLACK = 1e-3  # calibrations use at least 1 - SLACK of the budget, and never more than all of it


def calibrate(
    target: float,
    delta: float,
    release: Callable[[float], ClientRelease],
    steps: int,
    spent: Sequence[ClientRelease] = (),
) -> float:
    """Return the smallest noise ratio z with which `spent` and `steps` times `release(z)` cost at most `target`.

    release: from the ratio of noise to clipping norm, which is what is wanted of the sum, to the event it amounts to
        after rounding; its cost falls with z. It may raise ConfigError for too little noise. Accurate to SLACK of the
        budget, unless `release` refuses so little noise.
    spent: what came before, and may have been looked at: a filter counts it then
    (:mod:`choral.privacy.accounting.filters`).
    Raises: ConfigError (target, delta, or what `release` raises for any noise), BudgetExceededError (what is
        left is too little for any noise).
    """
    rule = PrivacyFilter(target, delta)
    before = rule.cost(spent)
    if before >= (1.0 - 2.0 * SLACK) * target:
        raise BudgetExceededError(
            f"the budget epsilon={target:g} at delta={delta:g} is spent: {before:.6g} so far",
            hint="These clients may not be selected again under this promise; a larger epsilon is a weaker promise.",
        )

    refused: list[ConfigError] = []

    def together(event: ClientRelease) -> float:
        return rule.cost((*spent, event)) if spent else epsilon([event], delta)

    def costs(ratio: float) -> float:
        try:
            event = release(ratio)
        except ConfigError as error:  # so little noise that its integers would be too small
            refused.append(error)
            return math.inf
        return together(msgspec.structs.replace(event, steps=steps))

    low, high = 1e-3, 1.0
    while costs(high) > target:
        low, high = high, 4.0 * high
        if high > 1e6:
            if refused:
                raise refused[-1]
            raise BudgetExceededError(
                f"no amount of noise makes {steps} more rounds fit into epsilon={target:g} at delta={delta:g}",
                hint="Use more bits, fewer rounds or more clients: at few bits, rounding alone costs too much.",
            )
    while (high / low > 1.0 + 1e-7) and costs(high) < (1.0 - SLACK) * target:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if costs(middle) > target else (low, middle)
    return high
