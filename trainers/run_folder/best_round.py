"""The best round so far, by the evaluation's first metric; its weights are kept beside those of the last round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from choral.metrics import is_falling

if TYPE_CHECKING:
    from choral.trainers.run_folder.info import RoundRecord


def best_of(history: Sequence[RoundRecord]) -> int:
    """Return the round whose evaluation was best by the first metric, the earliest of equals; 0 before any evaluation.

    A choice by what ``evaluate`` says: where that reads records that a promise protects, the choice is a release of
    its own, as every metric is.
    """
    if not history:
        return 0
    metric = next(iter(history[0].metrics), "")
    known = [entry for entry in history if metric in entry.metrics]
    sign = -1.0 if is_falling(metric) else 1.0
    return max(known, key=lambda entry: (sign * entry.metrics[metric], -entry.round)).round if known else 0
