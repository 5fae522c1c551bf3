"""From runs that differ in their seeds to one row of the comparison. What cannot be compared is refused here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING

import msgspec

from choral.audits.comparison.shares_trust import shares_trust
from choral.audits.findings.claims import check_costs, claim_of, short_path
from choral.audits.findings.parameters import lattice_of
from choral.audits.findings.schema import ArmResult, BudgetCurve, BudgetPoint, Difference, Measure, Point
from choral.audits.findings.statistics import data_owners_of, difference_interval, mean_interval, spreads
from choral.audits.findings.text import is_percent
from choral.doors import worded
from choral.errors import ConfigError, DataError

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run


def check_runs(name: str, runs: Sequence[Run], metrics: Sequence[str]) -> tuple[Run, ...]:
    """The runs of one arm by rising seed, fit to be averaged.

    Raises: ConfigError for no runs, one seed twice, an interrupted run, a metric that was not evaluated, or runs with
        unlike settings; DataError for a metric that is not finite.
    """
    if not runs:
        raise ConfigError(f"arm {name!r} has no runs", hint="give each arm one run per seed")
    runs = sorted(runs, key=lambda run: run.info.seed)
    for run in runs:
        _check_run(name, run, metrics)
    for earlier, later in pairwise(runs):
        if earlier.info.seed == later.info.seed:
            raise ConfigError(
                f"arm {name!r} has two runs of seed {later.info.seed}", hint="runs of one arm differ in their seed"
            )
        for field in ("kind", "rounds", "parameters", "privacy"):
            if getattr(earlier.info, field) != getattr(later.info, field):
                raise ConfigError(
                    f"arm {name!r} mixes runs with different {field}: {getattr(earlier.info, field)} and"
                    f" {getattr(later.info, field)}",
                    hint="make them two arms; runs at several budgets belong in budgets=",
                )
        if _sum_name(earlier) != _sum_name(later):
            raise ConfigError(f"arm {name!r} mixes two secure sums", hint="make them two arms")
    return tuple(runs)


def _check_run(name: str, run: Run, metrics: Sequence[str]) -> None:
    what = f"arm {name!r}, seed {run.info.seed}"
    if not run.finished:
        done = run.history[-1].round if run.history else 0
        raise ConfigError(
            f"{what}: interrupted after round {done} of {run.info.rounds}",
            hint=worded(command="finish it with --resume", python="finish it with resume=True") + ", or leave it out",
        )
    if [entry.round for entry in run.history] != list(range(run.info.rounds + 1)):
        raise ConfigError(f"{what}: its history is not rounds 0 to {run.info.rounds}", hint="the run is incomplete")
    for entry, metric in product(run.history, metrics):
        if metric not in entry.metrics:
            known = ", ".join(sorted(entry.metrics)) or "none"
            raise ConfigError(
                f"{what}: no metric {metric!r}, it has {known}",
                hint="name a common one with " + worded(command="metrics = [...]", python="metric="),
            )
        if not math.isfinite(entry.metrics[metric]):
            raise DataError(
                f"{what}: {metric} is {entry.metrics[metric]} after round {entry.round}",
                hint="the training diverged; lower the learning rate and run it again",
            )
    check_costs(run.info, what)
    if run.info.privacy is not None and not run.info.spent:
        raise ConfigError(f"{what}: promises privacy but records no spending", hint="the run folder is incomplete")


def _sum_name(run: Run) -> str:
    return str((run.info.secure_sum or {}).get("name", ""))


def values(runs: Sequence[Run], metric: str) -> list[float]:
    return [run.history[-1].metrics[metric] for run in runs]


def arm_of(name: str, runs: Sequence[Run], metric: str, also: Sequence[str] = ()) -> ArmResult:
    """One row, without its difference to the baseline. ``runs`` passed :func:`check_runs` for each metric."""
    info = runs[0].info
    federated = info.kind == "federated"
    owners = data_owners_of(runs)
    return ArmResult(
        name=name,
        kind=info.kind,
        seeds=tuple(run.info.seed for run in runs),
        rounds=info.rounds,
        parties=max(run.info.party_count for run in runs),
        examples=max(run.info.total_examples for run in runs),
        parameters=info.parameters,
        metric=mean_interval(values(runs, metric), share=is_percent(metric)),
        claim=claim_of([run.info for run in runs]),
        holders=owners,
        shares=shares_trust(runs),
        spreads=spreads(owners),
        bytes_per_party=_bytes_per_party(runs),
        seconds=mean_interval([math.fsum(entry.seconds for entry in run.history) for run in runs]),
        survivors=_fewest_survivors(runs) if federated else None,
        secure_sum=msgspec.to_builtins(info.secure_sum),
        lattice=lattice_of(info.secure_sum),
        curve=_curve(runs, metric),
        more=tuple(
            Measure(
                metric=other,
                estimate=mean_interval(values(runs, other), share=is_percent(other)),
                curve=_curve(runs, other),
            )
            for other in also
        ),
        devices=tuple(sorted({run.info.device for run in runs})),
        folders=tuple(short_path(run.folder) for run in runs if run.folder is not None),
        config=msgspec.to_builtins(info.config),
    )


def _fewest_survivors(runs: Sequence[Run]) -> int | None:
    """Over all rounds of training; round 0 is the initial model and has none."""
    opened = (entry for run in runs for entry in run.history if entry.round and not entry.failed)
    return min((entry.survivors for entry in opened), default=None)


def _curve(runs: Sequence[Run], metric: str) -> tuple[Point, ...]:
    points, moved, seconds = [], 0.0, 0.0
    for entries in zip(*(run.history for run in runs), strict=True):
        scores = [entry.metrics[metric] for entry in entries]
        mean = math.fsum(scores) / len(scores)
        moved += math.fsum(entry.bytes_up + entry.bytes_down for entry in entries) / len(entries)
        seconds += math.fsum(entry.seconds for entry in entries) / len(entries)
        points.append(
            Point(round=entries[0].round, mean=mean, low=min(scores), high=max(scores), bytes=moved, seconds=seconds)
        )
    return tuple(points)


def _bytes_per_party(runs: Sequence[Run]) -> float | None:
    """Mean over seeds of the busiest party's traffic; for pooled training, of the largest party's raw data."""
    if runs[0].info.kind == "centralized":
        if not all(run.info.raw_bytes for run in runs):
            return None
        return math.fsum(max(run.info.raw_bytes.values()) for run in runs) / len(runs)
    return math.fsum(entry.bytes_up + entry.bytes_down for run in runs for entry in run.history) / len(runs)


def difference_of(runs: Sequence[Run], baseline: Sequence[Run], name: str, metric: str) -> Difference:
    """Seed by seed when both arms have the same seeds, Welch's interval of two independent means when not."""
    return paired_difference(runs, values(runs, metric), baseline, values(baseline, metric), name)


def paired_difference(
    runs: Sequence[Run], ours: Sequence[float], baseline: Sequence[Run], theirs: Sequence[float], name: str
) -> Difference:
    """The same for one number of each run: ``ours`` belong to ``runs``, ``theirs`` to ``baseline``."""
    paired = [run.info.seed for run in runs] == [run.info.seed for run in baseline]
    if paired:
        estimate = mean_interval([mine - other for mine, other in zip(ours, theirs, strict=True)])
    else:
        estimate = difference_interval(ours, theirs)
    return Difference(baseline=name, paired=paired, estimate=estimate)


def budget_curves(budgets: Mapping[str, Sequence[Run]], metric: str) -> tuple[BudgetCurve, ...]:
    """Each arm's runs, grouped by the epsilon that was asked for.

    Raises: ConfigError for runs without privacy, or whose epsilons are of unlike units: they share no axis.
    """
    curves: list[BudgetCurve] = []
    for arm, runs in budgets.items():
        groups: dict[float, list[Run]] = {}
        for run in runs:
            if run.info.privacy is None:
                raise ConfigError(f"budgets[{arm!r}] holds a run without privacy", hint="give private runs only")
            check_costs(run.info, f"budgets[{arm!r}], seed {run.info.seed}")
            groups.setdefault(float(run.info.privacy["epsilon"]), []).append(run)
        points = []
        for asked in sorted(groups):
            group = check_runs(f"{arm} at epsilon {asked:g}", groups[asked], [metric])
            spent = max((cost for run in group for cost in run.info.spent.values()), key=lambda cost: cost.epsilon)
            points.append(
                BudgetPoint(
                    asked=asked,
                    spent=spent.epsilon,
                    delta=spent.delta,
                    seeds=tuple(run.info.seed for run in group),
                    metric=mean_interval(values(group, metric), share=is_percent(metric)),
                )
            )
        if not points:
            raise ConfigError(f"budgets[{arm!r}] has no runs", hint="leave it out, or give its runs")
        unit = next(iter(runs[0].info.spent.values())).unit
        if curves and curves[0].unit != unit:
            raise ConfigError(
                f"budgets holds epsilons per {curves[0].unit} ({curves[0].arm}) and per {unit} ({arm})",
                hint="they are not on one scale; make two comparisons",
            )
        curves.append(BudgetCurve(arm=arm, unit=unit, points=tuple(points)))
    return tuple(curves)
