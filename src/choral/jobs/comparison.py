"""The comparison behind the command line: every arm, seed and budget trained, some side by side, and compared.

One failure costs no more than what failed: an arm that cannot be trained is a row with its reason, an attack or audit
that cannot be made leaves its arm unverified, and a file that cannot be written is said after the table.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from choral.audits.findings.context import Context
from choral.differences import differences, in_short
from choral.errors import ChoralError, ConfigError
from choral.failures import Failure, failure_of
from choral.jobs.attacks import evidence_files, evidence_of
from choral.jobs.planned_runs import PlannedRun, Tick, arm_folder, attacks, on_curve, planned_runs, seeds_of
from choral.jobs.settings import Arm, Settings, to_json
from choral.jobs.side_by_side import on_device, train_all
from choral.jobs.standardising import check_standardise
from choral.jobs.training import (
    check_per_party,
    check_tuning,
    compute_of,
    federation_of,
    forget_tasks,
    load_task,
    privacy_of,
    task_of,
    with_overrides,
)

if TYPE_CHECKING:
    from choral.audits import Comparison
    from choral.audits.findings.schema import FailedRuns
    from choral.trainers import Run, Task

T = TypeVar("T")

_MAY_CHANGE = {
    "audit",
    "report",
    "evaluation",
    "metrics",
    "seeds",
    "title",
    "device",
    "prices",
    "price",
    "transcript",
}  # when a comparison is resumed


@dataclass(frozen=True)
class ComparisonOutcome:
    """What came of a comparison. failed: runs, by their labels. troubles: what could not be said or written after."""

    comparison: Comparison
    failed: Mapping[str, Failure]
    troubles: Sequence[Failure]

    @property
    def exit_code(self) -> int:
        return 2 if self.troubles and self.comparison.exit_code == 0 else self.comparison.exit_code


def run_comparison(
    settings: Settings, out: Path, *, resume: bool, workers: int | None = None, tick: Tick
) -> ComparisonOutcome:
    """Train every arm for every seed into ``out/arms``, compare them, and write ``out/report.json`` and ``.html``.

    Every run is audited; attacks that the settings ask for are kept in ``out/evidence``.

    workers: processes that train runs side by side; by default one per core.

    Raises: ConfigError for settings that leave nothing to compare; RunFolderError if ``out`` holds another run;
        ChoralError if no arm at all could be trained.
    """
    from choral.audits import compare, read_prices
    from choral.audits.report.storage import put_verifier

    forget_tasks()
    _check(settings)
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise ConfigError(f"expected workers >= 1, got {workers}", hint="leave it out for one per core")
    _open(settings, out, resume)
    todo = list(planned_runs(settings))
    failed = train_all(settings, todo + attacks(settings), out, resume, workers, tick)
    runs = _read([planned for planned in todo if planned not in failed], out, failed)
    headline = (None, settings.privacy.epsilon)
    arms = _averaged(settings, {planned: run for planned, run in runs.items() if planned.epsilon in headline}, failed)
    if not arms:
        first = next(iter(failed.values()))
        raise _NothingTrainedError(first, len(settings.arms))
    troubles: list[Failure] = []
    levels: dict[str, dict[str, float]] = {}
    comparison = compare(
        arms,
        budgets={name: found for name in arms if (found := _curve(settings, name, runs))},
        metric=settings.metrics[0],
        also=settings.metrics[1:],
        references=_tried(lambda: _references(settings), levels, troubles),
        title=settings.title,
        prices=read_prices(settings.prices, settings.price, settings.report.job),
        target=settings.target,
        evidence=replace(evidence_of(settings, list(arms), out), not_trained=_failed_runs(settings, failed, arms, out)),
    )
    measured = _tried(lambda: on_device(settings, out), None, troubles)
    if measured is not None and comparison.costs is not None:
        costs = msgspec.structs.replace(comparison.costs, on_device=measured)
        comparison = msgspec.structs.replace(comparison, costs=costs)
    stated = settings.report
    comparison = comparison.stated(stated.context if stated.context != Context() else None, stated.tolerance)
    for name in ("report.json", "report.html"):
        _tried(lambda name=name: comparison.save(out / name), None, troubles)  # type: ignore[misc]
    _tried(lambda: put_verifier(out), None, troubles)
    return ComparisonOutcome(comparison, {planned.label: failure for planned, failure in failed.items()}, troubles)


class _NothingTrainedError(ChoralError):
    """Every arm failed; the first reason stands for all."""

    def __init__(self, first: Failure, arms: int) -> None:
        of = "the only arm" if arms == 1 else f"none of {arms} arms"
        super().__init__(f"{of} could be trained: {first.message}", hint=first.hint)
        self.trace = first.trace


def _tried(make: Callable[[], T], otherwise: T, troubles: list[Failure]) -> T:
    """What `make` returns; if it fails, `otherwise`, and the failure is kept for the end."""
    try:
        return make()
    except Exception as error:  # of the user's code, of the disk, or of a drawing: the runs are there all the same
        troubles.append(failure_of(error))
        return otherwise


def _read(todo: Sequence[PlannedRun], out: Path, failed: dict[PlannedRun, Failure]) -> dict[PlannedRun, Run]:
    """The runs from their folders; one that is damaged has failed."""
    from choral.trainers import Run

    runs: dict[PlannedRun, Run] = {}
    for planned in todo:
        try:
            runs[planned] = Run.load(planned.folder(out))
        except (ChoralError, OSError) as error:
            failed[planned] = failure_of(error)
    return runs


def _averaged(
    settings: Settings, runs: Mapping[PlannedRun, Run], failed: dict[PlannedRun, Failure]
) -> dict[str, list[Run]]:
    """The runs of each arm that has any, fit to be averaged; an arm whose runs are not has failed."""
    from choral.audits.comparison.arms import check_runs

    arms: dict[str, list[Run]] = {}
    for name in settings.arms:
        mine = {planned: run for planned, run in runs.items() if planned.arm == name}
        try:
            if mine:
                arms[name] = list(check_runs(name, list(mine.values()), settings.metrics))
        except ChoralError as error:
            failed |= dict.fromkeys(mine, failure_of(error))
    return arms


def _curve(settings: Settings, name: str, runs: Mapping[PlannedRun, Run]) -> list[Run]:
    """The runs of a private arm at all budgets, if the curve shows it."""
    arm = settings.arms[name]
    shown = arm.private and on_curve(settings, arm)
    return [run for planned, run in runs.items() if planned.arm == name] if shown else []


def _failed_runs(
    settings: Settings, failed: Mapping[PlannedRun, Failure], arms: Mapping[str, Sequence[Run]], out: Path
) -> list[FailedRuns]:
    """For the report: the arms of which runs failed, each with the first reason."""
    from choral.audits.findings.schema import FailedRuns

    rows = []
    for name in settings.arms:
        mine = {planned: failure for planned, failure in failed.items() if planned.arm == name and not planned.attack}
        if mine:
            rows.append(
                FailedRuns(
                    arm=name,
                    reason=next(iter(mine.values())).reason.replace(str(out), out.name),
                    runs=tuple(planned.label.removeprefix(f"{name}, ") for planned in mine),
                    left=len(arms.get(name, ())),
                )
            )
    return rows


def _references(settings: Settings) -> dict[str, dict[str, float]]:
    """The task's levels, each its mean over the seeds that are compared; of the metrics that are shown."""
    found: dict[str, dict[str, list[float]]] = {}
    for seed in seeds_of(settings):
        task = load_task(settings, seed)
        for metric, levels in (task.references() if task.references else {}).items():
            for name, level in levels.items():
                found.setdefault(metric, {}).setdefault(name, []).append(level)
    return {
        metric: {name: math.fsum(each) / len(each) for name, each in levels.items()} for metric, levels in found.items()
    }


def _check(settings: Settings) -> None:
    """Everything that can be refused before a folder is touched or a model is trained."""
    from choral.audits import read_prices
    from choral.trainers.task.task import check_parties

    if not settings.arms:
        raise ConfigError(
            "there is nothing to compare: no [arms.NAME] in the settings", hint="see examples/digits.toml"
        )
    read_prices(settings.prices, settings.price)
    if settings.ledgers is not None:
        raise ConfigError(
            "ledgers are for the life of the data, and a comparison trains the same records many times",
            hint="leave ledgers out: each run then has its own, and the report says what all of them cost together;"
            " train the configuration that you choose with `choral train --ledgers FOLDER`",
        )
    if settings.target is not None and not math.isfinite(settings.target):
        raise ConfigError(f"target is {settings.target}, expected a finite number", hint="a level of the first metric")
    if settings.seeds < 1:
        raise ConfigError(f"expected seeds >= 1, got {settings.seeds}", hint="3 to 5 give an interval")
    for epsilon in settings.epsilons:
        if not epsilon > 0:
            raise ConfigError(f"expected epsilons > 0, got {epsilon:g}", hint="e.g. epsilons = [1, 2, 4, 8]")
    for arm in settings.arms.values():
        check_tuning(arm)
    private = {name: arm for name, arm in settings.arms.items() if arm.private}
    if private and settings.privacy.epsilon is None:
        raise ConfigError(
            f"arm {next(iter(private))!r} is private, but privacy.epsilon is not set", hint="e.g. epsilon = 8"
        )
    if not settings.metrics or len(set(settings.metrics)) < len(settings.metrics):
        raise ConfigError(f"expected metrics, each once, got {list(settings.metrics)}", hint='e.g. ["accuracy"]')
    for seed in seeds_of(settings):
        task = load_task(settings, seed)
        check_parties(task.parties, least=2, min_classes=task_of(settings, task).min_classes)
        check_per_party(settings, task)
        for name, arm in settings.arms.items():
            try:
                _check_arm(with_overrides(settings, arm), arm, task, seed)
            except ChoralError as error:
                raise ConfigError(f"arm {name!r}: {error}", hint=error.hint) from None


def _check_arm(settings: Settings, arm: Arm, task: Task, seed: int) -> None:
    """What an arm's training would refuse before its first round."""
    from choral.privacy import Privacy
    from choral.trainers.federated.plan import Plan
    from choral.trainers.run_folder.owner_privacy import check_delta
    from choral.trainers.task.arithmetic import check_arithmetic
    from choral.trainers.task.per_party import check_held_out

    privacy = privacy_of(settings, arm, settings.privacy.epsilon) if arm.private else None
    check_standardise(settings, task, privacy)
    if not arm.centralized:
        Plan.of(**federation_of(settings, arm, task, privacy), compute=compute_of(settings, seed))
        return
    chosen = task_of(settings, task)
    check_held_out(chosen.held_out, chosen.evaluate_party, task.parties, private=arm.private)
    check_arithmetic(settings.training.precision, settings.training.compile, private=arm.private, reads_records=False)
    if isinstance(privacy, Privacy):
        check_delta(privacy, {name: len(records) for name, records in task.parties.items()})


def _open(settings: Settings, out: Path, resume: bool) -> None:
    """Claim the folder: a fresh one, or on resume one that was made with the same settings.

    More seeds are welcome, and other arms: an arm that is left out keeps its folder, one that is set otherwise is
    trained anew, and its old runs are set aside.
    """
    from choral.trainers.run_folder.folder import check_empty, replace_file

    record = out / "settings.json"
    wanted = to_json(settings)
    known: dict[str, Any] = {}
    if resume and record.is_file():
        old = to_json(Settings()) | _read_record(record)  # made before some key was there, it had what is the default
        known = old.get("arms") or {}
        fixed = (old.keys() | wanted.keys()) - _MAY_CHANGE - {"arms"}
        changed = [each for key in sorted(fixed) for each in differences(old.get(key), wanted.get(key), key)]
        if changed:
            raise ConfigError(
                f"cannot resume {out}: {in_short(changed)}", hint="use the same settings, or another --out"
            )
        for name, arm in wanted["arms"].items():
            if name in known and known[name] != arm:
                _set_aside(name, out)
    else:
        check_empty(out)
        out.mkdir(parents=True, exist_ok=True)
    replace_file(record, json.dumps({**wanted, "arms": known | wanted["arms"]}, indent=1).encode())


def _read_record(record: Path) -> dict[str, Any]:
    try:
        old = json.loads(record.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{record} is damaged: {error}", hint="restore it, or use another --out") from None
    if not isinstance(old, dict):
        raise ConfigError(f"{record} is damaged: expected an object", hint="restore it, or use another --out")
    return old


def _set_aside(name: str, out: Path) -> None:
    """Keep what there is of an arm that is trained anew, ledgers included, beside where the new will be."""
    for kept in (arm_folder(out, name), *evidence_files(name, out)):
        if kept.exists():
            number = 1
            while (aside := kept.with_name(f"{kept.name}~{number}")).exists():
                number += 1
            kept.rename(aside)
