"""Checks of a comparison: same start, same data, budgets kept, and a masked sum that changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from choral.audits.findings.schema import ArmResult, Check, WeightsMatch
from choral.audits.findings.text import cost, power
from choral.audits.run.arm_audit import Rows

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run

Runs = Mapping[str, Sequence["Run"]]


def comparison_checks(
    arms: Runs, budgets: Runs, rows: Sequence[ArmResult], metric: str, ledger_rows: Rows
) -> tuple[Check, ...]:
    """The sanity checks that make the arms comparable at all, and whether budgets were kept."""
    kept = [
        budget_kept(f"{name} stays within its budget", runs, ledger_rows)
        for name, runs in arms.items()
        if runs[0].info.privacy is not None
    ]
    kept += [
        budget_kept(f"{name} stays within each budget of its curve", runs, ledger_rows)
        for name, runs in budgets.items()
    ]
    return (_same_start(arms, metric), _same_data(rows), *kept)


def _same_start(arms: Runs, metric: str) -> Check:
    """Identical initial weights show as an identical evaluation of round 0."""
    name = "Every configuration starts from the same weights"
    starts: dict[int, dict[str, float]] = {}
    for arm, runs in arms.items():
        for run in runs:
            starts.setdefault(run.info.seed, {})[arm] = run.history[0].metrics[metric]
    shared = {seed: scores for seed, scores in starts.items() if len(scores) > 1}
    if not shared:
        return Check(name=name, verdict="unverified", finding="No two configurations share a seed.")
    for seed, scores in sorted(shared.items()):
        if len(set(scores.values())) > 1:
            said = ", ".join(f"{arm} {score:.6g}" for arm, score in scores.items())
            return Check(
                name=name, verdict="violated", finding=f"The {metric} before training differs at seed {seed}: {said}."
            )
    seeds = ", ".join(map(str, sorted(shared)))
    return Check(
        name=name,
        verdict="holds",
        finding=f"The {metric} before training is equal in all configurations (seeds {seeds}).",
    )


def _same_data(rows: Sequence[ArmResult]) -> Check:
    name = "Every configuration trains on the same number of examples"
    counts = {row.examples for row in rows}
    if len(counts) == 1:
        finding = f"{rows[0].examples:,} examples in each configuration."
        return Check(name=name, verdict="holds", finding=finding, refutable=len(rows) > 1)
    said = ", ".join(f"{row.name} {row.examples:,}" for row in rows)
    return Check(name=name, verdict="violated", finding=f"They differ: {said}.")


def budget_kept(name: str, runs: Sequence[Run], ledger_rows: Rows) -> Check:
    """Every data owner of every run, recomputed from its ledger where the run has a folder."""
    rows = [(run.info.seed, row) for run in runs for row in ledger_rows(run)]
    for verdict in ("violated", "unverified"):
        faults = [f"Seed {seed}, {row.holder}: {row.finding}" for seed, row in rows if row.verdict == verdict]
        if faults:
            more = f"; and {len(faults) - 1} more like it" if len(faults) > 1 else ""
            return Check(name=name, verdict=verdict, finding=f"{faults[0]}{more}.")
    closest = max((row for _, row in rows), key=lambda row: (row.recomputed or 0.0) / row.promised)
    return Check(
        name=name,
        verdict="holds",
        finding=f"{len(rows)} ledgers of {len(runs)} runs recomputed; the closest to its promise is {closest.holder}"
        f" with ε\u00a0=\u00a0{cost(closest.recomputed or 0.0)} of {closest.promised:g}.",
    )


def weights_match(arms: Runs) -> tuple[tuple[WeightsMatch, ...], Check | None]:
    """Largest difference of any final weight between non-private federated arms that differ in their secure sum alone.

    All sums take the same integers, so the expectation is exactly 0; the printed bound is what fixed-point encoding
    may do to one coordinate of the weighted mean in one round. None when there are no two such arms.
    """
    groups: dict[str, dict[str, Sequence[Run]]] = {}
    for name, runs in arms.items():
        if runs[0].info.kind == "federated" and runs[0].info.privacy is None:
            groups.setdefault(_method(runs[0]), {})[name] = runs
    rows: list[WeightsMatch] = []
    obstacles: list[str] = []
    pairs: list[tuple[str, list[str]]] = []
    for candidates in groups.values():
        kinds = {
            name: str((runs[0].info.secure_sum or {}).get("name", "")).lower() for name, runs in candidates.items()
        }
        reference = next((name for name, kind in kinds.items() if kind == "plain"), next(iter(kinds)))
        others = [name for name in kinds if kinds[name] != kinds[reference]]
        if others:
            pairs.append((reference, others))
        twins = {run.info.seed: run for run in candidates[reference]}
        for other in others:
            for run in candidates[other]:
                obstacle = _obstacle(run, twins.get(run.info.seed))
                if obstacle:
                    obstacles.append(f"{other}, seed {run.info.seed}: {obstacle}")
                else:
                    rows.append(_match(other, run, reference, twins[run.info.seed]))
    return tuple(rows), _verdict(pairs, rows, obstacles) if pairs else None


def _method(run: Run) -> str:
    """What two runs must share to end at the same weights: algorithm, training and split, where these are known."""
    config = run.info.config
    return repr((run.info.algorithm, config.get("training"), config.get("split")))


def _obstacle(run: Run, twin: Run | None) -> str:
    """Why two runs cannot be held against each other, or nothing."""
    if twin is None:
        return "no run of the same seed"
    mine, theirs = run.info, twin.info
    if (mine.rounds, mine.parties, mine.population) != (theirs.rounds, theirs.parties, theirs.population):
        return "other rounds or parties"
    if any(mine.survivors != other.survivors for mine, other in zip(run.history, twin.history, strict=True)):
        return "other parties survived"
    if run.info.fixed_point is None or run.info.fixed_point != twin.info.fixed_point:
        return "no common fixed-point encoding"
    return ""


def _match(arm: str, run: Run, reference: str, twin: Run) -> WeightsMatch:
    bound = float((run.info.fixed_point or {})["error_bound"])
    return WeightsMatch(
        arm=arm, reference=reference, seed=run.info.seed, difference=_distance(run, twin), error_bound=bound
    )


def _distance(run: Run, twin: Run) -> float | None:
    """max |difference| over all weights; None where they have other shapes or are not finite."""
    if run.state.keys() != twin.state.keys():
        return None
    largest = 0.0
    for name, mine in run.state.items():
        other = twin.state[name]
        if mine.shape != other.shape:
            return None
        if mine.numel() == 0:
            continue
        gap = float((mine.double().cpu() - other.double().cpu()).abs().max())
        if not math.isfinite(gap):
            return None
        largest = max(largest, gap)
    return largest


def _verdict(
    pairs: Sequence[tuple[str, Sequence[str]]], rows: Sequence[WeightsMatch], obstacles: Sequence[str]
) -> Check:
    name = "; ".join(
        f"{' and '.join(others)} {'equals' if len(others) == 1 else 'equal'} {reference}" for reference, others in pairs
    )
    for row in rows:
        where = f"{row.arm}, seed {row.seed}"
        if row.difference is None:
            return Check(name=name, verdict="violated", finding=f"The weights do not even compare ({where}).")
        if not row.difference <= row.error_bound:
            finding = f"Some weight differs by {power(row.difference)} ({where}); the fixed-point bound is"
            return Check(name=name, verdict="violated", finding=f"{finding} {power(row.error_bound)}.")
    if obstacles or not rows:
        return Check(name=name, verdict="unverified", finding="Not compared: " + "; ".join(obstacles) + ".")
    largest, bound = max(row.difference or 0.0 for row in rows), min(row.error_bound for row in rows)
    if largest == 0:
        finding = (
            f"Every final weight is identical, to the last bit, at each of {len({row.seed for row in rows})} seeds"
        )
    else:
        finding = f"The largest difference of any final weight is {power(largest)}"
    return Check(
        name=name,
        verdict="holds",
        finding=f"{finding} (the fixed-point bound is {power(bound)} per coordinate and round).",
    )
