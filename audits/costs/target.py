"""What it costs to reach a level: rounds, bytes, time, energy and money until a run's metric was there, or never.

Two configurations that end at different levels, or after different rounds, are compared fairly only so: a method that
needs twice the rounds at half the bytes costs the same, and one that never gets there has no cost that could be named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from choral.audits.costs.bills import bill, mean
from choral.audits.costs.prices import Prices
from choral.errors import ConfigError
from choral.metrics import is_falling

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run

SHARE = 0.95
"""Of the baseline's gain over the untrained model: the level where none was stated."""


class Reached(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run. round: the first whose metric is there; None, as all else, if none is: the run never reached it.

    bytes: sent and received by the busiest party until then; a pooled run's raw data. seconds, usd, joules: of the bill
    of those rounds alone; None without a bill. epsilon: the worst data owner's until then, None without privacy.
    """

    seed: int
    round: int | None = None
    bytes: float | None = None
    seconds: float | None = None
    usd: float | None = None
    joules: float | None = None
    epsilon: float | None = None


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """level: of the metric. stated: whether the reader named it. arms: by configuration, its runs by seed."""

    metric: str
    level: float
    stated: bool
    arms: dict[str, tuple[Reached, ...]]


def costs_to_target(
    arms: Mapping[str, Sequence[Run]], metric: str, baseline: str, prices: Prices, level: float | None = None
) -> Target | None:
    """Every run's cost until ``metric`` reached ``level``: at least, or at most where less is better.

    level: by default 95 % of what the baseline gained over its untrained model, in the mean over seeds; None is
        returned where it gained nothing. Raises: ConfigError for a level that is no finite number.
    """
    falling = is_falling(metric)
    if level is None:
        first, last = (mean([run.history[place].metrics[metric] for run in arms[baseline]]) for place in (0, -1))
        if (last >= first) if falling else (last <= first):
            return None
        chosen = first + SHARE * (last - first)
    else:
        chosen = level
        if not -float("inf") < level < float("inf"):
            raise ConfigError(f"target is {level}, expected a finite number", hint=f"a level of {metric}")
    reached = {name: tuple(_reached(name, run, metric, chosen, falling, prices) for run in arms[name]) for name in arms}
    return Target(metric=metric, level=chosen, stated=level is not None, arms=reached)


def rounds_to(target: Target, name: str) -> float | None:
    """Of a configuration, in the mean over its seeds; None where one of them never reached the level."""
    found = [each.round for each in target.arms[name]]
    return None if any(place is None for place in found) else max(mean([float(place or 0) for place in found]), 1.0)


def _reached(name: str, run: Run, metric: str, level: float, falling: bool, prices: Prices) -> Reached:
    there = (
        entry
        for entry in run.history
        if (entry.metrics[metric] <= level if falling else entry.metrics[metric] >= level)
    )
    if (entry := next(there, None)) is None:
        return Reached(seed=run.info.seed)
    until = dataclasses.replace(run, history=tuple(each for each in run.history if each.round <= entry.round))
    found = Reached(seed=run.info.seed, round=entry.round, epsilon=entry.epsilon)
    if (made := bill(name, [until], prices)) is None:
        return found
    moved = made.bytes_up + made.bytes_down
    return msgspec.structs.replace(found, bytes=moved, seconds=made.seconds, usd=made.usd, joules=made.joules)
