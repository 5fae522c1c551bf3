"""Who wins: specialised hardware or massive distribution, over parties and the size of a record against the model's.

Each cell sets pooled training on accelerators against the federation by :mod:`choral.audits.costs.crossover`, at equal
accuracy (each side is charged the rounds that it took to the target) and equal privacy (both without, or both at one
epsilon for each record). A cell flips if the winner changes when any one price is doubled or halved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from choral.audits.costs.bills import mean
from choral.audits.costs.crossover import (
    Workload,
    cloud_seconds,
    cloud_usd,
    federation_seconds,
    federation_usd,
    workload,
)
from choral.audits.costs.prices import KEYS, POSITIVE_COUNTS, Prices
from choral.audits.costs.target import Target, rounds_to

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run

PARTIES = tuple(2 * 10 ** (i / 4) for i in range(24))  # 2 to about a million
RATIOS = tuple(10 ** (i / 3) for i in range(-15, 10))  # 1e-5 to 1e3
DAILY = 1.0
KINDS: tuple[Literal["usd", "seconds"], ...] = ("usd", "seconds")
Cells = NDArray[np.bool_]


class TaskSize(NamedTuple):
    """parties, record_bytes, parameters: of the task by that name, with its own split and model."""

    name: str
    parties: int
    record_bytes: float
    parameters: int

    @property
    def ratio(self) -> float:
        """Bytes of a record over those of the model."""
        return self.record_bytes / (4.0 * self.parameters)


TASK_SIZES = (
    TaskSize("digits", 10, 264.0, 2_410),
    TaskSize("adult", 10, 208.0, 1_698),
    TaskSize("comments", 505, 100.0, 834),
    TaskSize("shakespeare", 243, 648.0, 8_041),
    TaskSize("fashion", 10, 3_144.0, 63_786),
)


class WinnerMap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One picture. distribution: whether it wins, by ratio (rows, ascending) and number of parties; firm: likewise,
    whether it would with each price doubled and halved, too. flips: by price, how many cells change their winner.

    epsilon: of both sides, None without privacy. daily: one round a day. rounds, cloud_rounds: to the target, in the
    mean over seeds; None where that side never reached it, and so wins nowhere.
    """

    kind: Literal["usd", "seconds"]
    cloud: str
    federated: str
    epsilon: float | None
    daily: bool
    rounds: float | None
    cloud_rounds: float | None
    parties: tuple[float, ...]
    ratios: tuple[float, ...]
    distribution: tuple[tuple[bool, ...], ...]
    firm: tuple[tuple[bool, ...], ...]
    flips: dict[str, int]

    @property
    def share(self) -> float:
        """Of the cells, that distribution wins."""
        return mean([float(cell) for row in self.distribution for cell in row])


def winner_maps(arms: Mapping[str, Sequence[Run]], target: Target | None, prices: Prices) -> tuple[WinnerMap, ...]:
    """For each pair of configurations at equal privacy: money and time with rounds that follow on one another, and time
    with one a day, which changes no bill. Empty where there is no such pair, or nobody reached the target.
    """
    if target is None:
        return ()
    made = []
    for cloud, federated, epsilon in equal_pairs(arms):
        work = workload(federated, arms[federated], cloud, arms[cloud], prices)
        rounds, cloud_rounds = rounds_to(target, federated), rounds_to(target, cloud)
        if work is None or not work.model_bytes or (rounds is None and cloud_rounds is None):
            continue
        nightly, pace = _changed(prices, "rounds_per_day", DAILY), (epsilon, rounds, cloud_rounds)
        made += [_map(kind, work, prices, pace, daily=False) for kind in KINDS]
        made += [_map("seconds", work, nightly, pace, daily=True)]
    return tuple(made)


def equal_pairs(arms: Mapping[str, Sequence[Run]]) -> list[tuple[str, str, float | None]]:
    """Pooled and federated configurations at equal privacy, one pair without it and one with."""
    pairs: list[tuple[str, str, float | None]] = []
    for private in (False, True):
        pooled = [name for name in arms if _kind(arms, name, "centralized", private)]
        apart = sorted((name for name in arms if _kind(arms, name, "federated", private)), key=lambda n: _rank(arms, n))
        found = next(
            ((one, other) for one in pooled for other in apart if _promise(arms, one) == _promise(arms, other)), None
        )
        if found:
            promise = arms[found[0]][0].info.privacy
            pairs.append((*found, None if promise is None else float(promise["epsilon"])))
    return pairs


def _kind(arms: Mapping[str, Sequence[Run]], name: str, kind: str, private: bool) -> bool:
    info = arms[name][0].info
    return info.kind == kind and (info.privacy is not None) == private


def _rank(arms: Mapping[str, Sequence[Run]], name: str) -> tuple[bool, bool]:
    """Sums that hide come first, and of promises those of noise in shares."""
    info = arms[name][0].info
    return (info.privacy or {}).get("noise") != "distributed", (info.secure_sum or {}).get("name") == "plain"


def _promise(arms: Mapping[str, Sequence[Run]], name: str) -> tuple[object, ...]:
    promise = arms[name][0].info.privacy or {}
    return promise.get("epsilon"), promise.get("delta"), promise.get("unit", "record")


def _map(
    kind: Literal["usd", "seconds"],
    work: Workload,
    prices: Prices,
    pace: tuple[float | None, float | None, float | None],
    *,
    daily: bool,
) -> WinnerMap:
    epsilon, rounds, cloud_rounds = pace

    def winners(table: Prices) -> Cells:
        if rounds is None or cloud_rounds is None:
            return np.full((len(RATIOS), len(PARTIES)), cloud_rounds is None)
        at = msgspec.structs.replace(work, rounds=math.ceil(rounds), cloud_rounds=math.ceil(cloud_rounds))
        if work.accelerator_basis == "modelled":  # the speed-up is in it
            seconds = work.accelerator_seconds * prices["accelerator_speedup"] / table["accelerator_speedup"]
            at = msgspec.structs.replace(at, accelerator_seconds=seconds)
        return distribution_wins(kind, at, table, np.array(PARTIES), np.array(RATIOS)[:, None] * work.model_bytes)

    cells = winners(prices)
    others = {key: [winners(_changed(prices, key, value)) for value in _twice_and_half(prices, key)] for key in KEYS}
    changed = {key: np.logical_or.reduce([other != cells for other in found]) for key, found in others.items()}
    flips = {key: int(found.sum()) for key, found in changed.items() if found.any()}
    return WinnerMap(
        kind=kind,
        cloud=work.cloud,
        federated=work.federated,
        epsilon=epsilon,
        daily=daily,
        rounds=rounds,
        cloud_rounds=cloud_rounds,
        parties=PARTIES,
        ratios=RATIOS,
        distribution=tuple(map(tuple, cells.tolist())),
        firm=tuple(map(tuple, (~np.logical_or.reduce(list(changed.values()))).tolist())),
        flips=dict(sorted(flips.items(), key=lambda item: -item[1])),
    )


def distribution_wins(kind: str, work: Workload, prices: Prices, parties: Any, record_bytes: Any) -> Cells:
    """At the comparison's examples per party. parties, record_bytes: numbers, or arrays that broadcast."""
    m = work.examples
    if kind == "usd":
        ours, theirs = federation_usd(work, prices, parties, m), cloud_usd(work, prices, parties, m, record_bytes)
    else:
        ours, theirs = federation_seconds(work, prices, m), cloud_seconds(work, prices, parties, m, record_bytes)
    return np.asarray(ours < theirs)


def _twice_and_half(prices: Prices, key: str) -> tuple[float, ...]:
    """Within what the entry may be: no half accelerator, no efficiency above 1."""
    value = prices[key]
    wanted = (2 * value, value / 2)
    if key == "accelerator_efficiency":
        return tuple(min(each, 1.0) for each in wanted)
    return tuple(max(each, 1.0) for each in wanted) if key in POSITIVE_COUNTS else wanted


def _changed(prices: Prices, key: str, value: float) -> Prices:
    entry = msgspec.structs.replace(prices.entries[key], value=value)
    return dataclasses.replace(prices, entries={**prices.entries, key: entry})
