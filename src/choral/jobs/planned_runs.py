"""What a comparison consists of: its runs and attacks, each with a folder of its own, and the training of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from choral.errors import ConfigError
from choral.failures import Failure, failure_of
from choral.jobs.attacks import attacked, attempt, attempt_file
from choral.jobs.settings import Arm, Settings
from choral.jobs.training import train, unit_of

if TYPE_CHECKING:
    from choral.trainers import RoundRecord

# Called with a label for what runs and the round that it completed.
Tick = Callable[[str, "RoundRecord"], None]


class PlannedRun(NamedTuple):
    """One run of a comparison, or the attack on an arm."""

    arm: str
    seed: int
    epsilon: float | None
    attack: bool = False

    @property
    def label(self) -> str:
        if self.attack:
            return f"{self.arm}, with canaries"
        budget = "" if self.epsilon is None else f", epsilon {self.epsilon:g}"
        return f"{self.arm}{budget}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        budget = "" if self.epsilon is None else f"-epsilon-{self.epsilon:g}"
        return arm_folder(out, self.arm) / f"seed-{self.seed}{budget}"


def arm_folder(out: Path, name: str) -> Path:
    return out / "arms" / quote(name, safe="")


def planned_runs(settings: Settings) -> Iterator[PlannedRun]:
    """Every run of the comparison: each arm and seed, private arms at each budget."""
    for seed in seeds_of(settings):
        for name, arm in settings.arms.items():
            if not arm.private:
                yield PlannedRun(name, seed, None)
            elif settings.privacy.epsilon is not None:
                more = settings.epsilons if on_curve(settings, arm) else ()
                for epsilon in sorted({settings.privacy.epsilon, *more}):
                    yield PlannedRun(name, seed, epsilon)


def attacks(settings: Settings) -> list[PlannedRun]:
    return [
        PlannedRun(name, settings.seed, settings.privacy.epsilon if arm.private else None, attack=True)
        for name, arm in settings.arms.items()
        if attacked(settings, arm)
    ]


def on_curve(settings: Settings, arm: Arm) -> bool:
    """Whether the budget-against-accuracy curve, whose axis has one unit, shows this private arm."""
    return len(settings.epsilons) > 0 and unit_of(settings, arm) == settings.privacy.unit


def seeds_of(settings: Settings) -> range:
    return range(settings.seed, settings.seed + settings.seeds)


def rounds_to_go(settings: Settings, out: Path) -> int:
    """Rounds that the comparison has still to train, for the progress bar; round 0 is the initial model."""
    done = 0
    for planned in planned_runs(settings):
        history = planned.folder(out) / "history.jsonl"
        done += max(history.read_bytes().count(b"\n") - 1, 0) if history.is_file() else 0
    runs = sum(1 for _ in planned_runs(settings)) + sum(
        not attempt_file(settings, planned.arm, out).is_file() for planned in attacks(settings)
    )
    return max(runs * settings.training.rounds - done, 0)


def train_planned(settings: Settings, planned: PlannedRun, out: Path, resume: bool, tick: Tick) -> Failure | None:
    """Train one run, or make one attack. Whatever stops it is returned: the other runs do not depend on it."""
    try:
        _train_planned(settings, planned, out, resume, tick)
    except (Exception, SystemExit) as error:  # of the user's code, too, which may end its process
        return failure_of(error)
    return None


def _train_planned(settings: Settings, planned: PlannedRun, out: Path, resume: bool, tick: Tick) -> None:
    from choral.privacy import LedgerError
    from choral.trainers import Run
    from choral.trainers.run_folder.info import RunFolderError

    def on_round(entry: RoundRecord) -> None:
        for metric in settings.metrics:
            if metric not in entry.metrics:
                raise ConfigError(
                    f"the task is evaluated by {', '.join(entry.metrics)}, and not by {metric!r}",
                    hint=f"set metrics = {json.dumps(list(entry.metrics))}, or some of them, and --resume",
                )
        tick(planned.label, entry)

    if planned.attack:
        attempt(settings, planned.arm, out, planned.folder(out), lambda entry: tick(planned.label, entry))
        return
    try:
        train(
            settings,
            settings.arms[planned.arm],
            seed=planned.seed,
            epsilon=planned.epsilon,
            out=planned.folder(out),
            resume=resume,
            on_round=on_round,
        )
    except (LedgerError, RunFolderError):
        # Of a finished run there is nothing to train, and the report says what is wrong with its ledger or transcript.
        if not (resume and Run.load(planned.folder(out)).finished):
            raise
