"""Whom a model serves worst: its worth at each party's held-out records, as one row of the comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from choral.audits.comparison.arms import paired_difference
from choral.audits.findings.schema import Fairness, PartyMeasure, PartyMeasureName
from choral.audits.findings.statistics import mean_interval
from choral.audits.findings.text import is_percent
from choral.errors import ConfigError, DataError
from choral.metrics import is_falling

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run
    from choral.trainers.task.per_party import PerParty


def fairness_metric(arms: Mapping[str, Sequence[Run]], metrics: Sequence[str]) -> str:
    """The first of the compared metrics that the numbers per party have, wherever there are such; of none, the first.

    Raises: ConfigError if there is none that all of them have.
    """
    found = [run.info.per_party for runs in arms.values() for run in runs if run.info.per_party is not None]
    common = set.intersection(*(set(each) for numbers in found for each in numbers.metrics.values())) if found else ()
    for metric in metrics:
        if not found or metric in common:
            return metric
    raise ConfigError(
        f"the numbers per party have no {' or '.join(map(repr, metrics))} everywhere, but {', '.join(sorted(common))}",
        hint="let evaluate_party return what evaluate does, or name a common one with metric= or also=",
    )


def fairness_of(
    name: str, runs: Sequence[Run], baseline: Sequence[Run] | None, base: str, metric: str
) -> Fairness | None:
    """The parties' numbers of one arm over its seeds; None if its runs have none. baseline: None for the arm itself.

    metric: as :func:`fairness_metric` has it.

    Raises: ConfigError if some runs have numbers per party and others have not; DataError for fewer than two parties,
        or numbers that are not finite.
    """
    found = _per_party(name, runs, metric)
    if found is None:
        return None
    reference = _per_party(base, baseline, metric) if baseline is not None else None
    ours = _spread_by_seed(found, metric)
    theirs = _spread_by_seed(reference, metric) if reference is not None else None
    measures = tuple(
        PartyMeasure(
            name=key,
            estimate=mean_interval(ours[key], share=is_percent(metric)),
            difference=paired_difference(runs, ours[key], baseline, theirs[key], base) if baseline and theirs else None,
        )
        for key in ours
    )
    return Fairness(
        metric=metric,
        note=found[0].note,
        least=found[0].least,
        parties=max(len(each.records) for each in found),
        listed=min(len(each.metrics) for each in found),
        records=min(each.records[party] for each in found for party in each.metrics),
        measures=measures,
        by_chance=_by_chance(found, metric) if is_percent(metric) else None,
    )


def _per_party(name: str, runs: Sequence[Run], metric: str) -> list[PerParty] | None:
    found = [run.info.per_party for run in runs if run.info.per_party is not None]
    if not found:
        return None
    if len(found) < len(runs):
        lacking = next(run.info.seed for run in runs if run.info.per_party is None)
        raise ConfigError(
            f"arm {name!r}: seed {lacking} has no numbers per party, other seeds have",
            hint="resume it with held_out= and evaluate_party= (evaluation.per_party), or leave it out",
        )
    for run, each in zip(runs, found, strict=True):
        what = f"arm {name!r}, seed {run.info.seed}"
        if len(each.metrics) < 2 or not each.metrics.keys() <= each.records.keys():
            raise DataError(f"{what}: numbers of {len(each.metrics)} parties, expected at least 2", hint="run it again")
        if any(each.records[party] < 2 for party in each.metrics):
            raise DataError(f"{what}: a party's numbers rest on fewer than 2 records", hint="the run was edited")
        for metrics in each.metrics.values():
            if not math.isfinite(metrics[metric]):
                raise DataError(f"{what}: {metric} is {metrics[metric]} at a party", hint="the run was edited")
    return found


def _spread_by_seed(found: Sequence[PerParty], metric: str) -> dict[PartyMeasureName, list[float]]:
    """Each measure of the parties' numbers, one value per seed. Every party counts the same, whatever its size.

    worst, tenth: the least and the tenth percentile, linearly interpolated; where less is better, the greatest and the
    ninetieth. deviation: the population's (parties are all there are).
    """
    spread: dict[PartyMeasureName, list[float]] = {
        name: [] for name in ("worst", "tenth", "mean", "deviation", "range")
    }
    better = -1.0 if is_falling(metric) else 1.0
    for each in found:
        values = [metrics[metric] for metrics in each.metrics.values()]
        upwards = [better * value for value in values]
        spread["worst"].append(better * min(upwards))
        spread["tenth"].append(better * statistics.quantiles(upwards, n=10, method="inclusive")[0])
        spread["mean"].append(statistics.fmean(values))
        spread["deviation"].append(statistics.pstdev(values))
        spread["range"].append(max(values) - min(values))
    return spread


def _by_chance(found: Sequence[PerParty], metric: str) -> float | None:
    """The standard deviation over parties that few records alone would give, root mean square over seeds.

    Of p right among n records, p (1 - p) / (n - 1) estimates the variance of p without bias; of the population
    variance of k such shares, the part of chance is (k - 1) / k times their mean. None for values that are no shares.
    """
    parts = []
    for each in found:
        shares = {party: metrics[metric] for party, metrics in each.metrics.items()}
        if not all(0 <= share <= 1 for share in shares.values()):
            return None
        variances = [share * (1 - share) / (each.records[party] - 1) for party, share in shares.items()]
        parts.append((len(shares) - 1) / len(shares) * statistics.fmean(variances))
    return math.sqrt(statistics.fmean(parts))
