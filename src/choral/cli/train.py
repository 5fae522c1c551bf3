"""The commands that train: ``choral compare`` and ``choral train``."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import tyro

from choral.cli.arguments import debug, parse_with_config
from choral.errors import ConfigError
from choral.failures import Failure
from choral.jobs.settings import Arm, Settings, read_job
from choral.progress import progress

if TYPE_CHECKING:
    from choral.trainers import Run


@dataclass(frozen=True, kw_only=True)
class CompareFlags:
    """Train every configuration of a comparison for several seeds, audit every run; write report.json and report.html.

    Exit code 0: nothing contradicts what the configurations claim. 1: a claim is violated or cannot be verified. 2:
    wrong usage, or a configuration could not be trained (the others are reported; --resume tries it again).

    Every key of CONFIG is a flag of the same name below; the flag wins.
    """

    config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")]
    """TOML file with the settings, e.g. examples/digits.toml."""
    out: Path
    """Folder for the runs and the report; must be new or empty, unless --resume."""
    resume: bool = False
    """Continue in a folder that an earlier, interrupted comparison left."""
    workers: int | None = None
    """Runs trained side by side, each in its own process; by default one per core."""
    json: bool = False
    """Print the report as JSON, in the place of the table."""
    quiet: bool = False
    """No progress and no table, only errors."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Train one configuration into a run folder: federated, or --centralized; private if privacy.epsilon is set.

    By several processes: torchrun --standalone --nproc-per-node 2 -m choral train CONFIG --out DIR. Parties, or with
    --centralized each batch, are divided among them.

    Every key of CONFIG is a flag of the same name below; the flag wins.
    """

    config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")]
    """TOML file with the settings, e.g. examples/digits.toml."""
    out: Path
    """Run folder; must be new or empty, unless --resume."""
    arm: str | None = None
    """Train this configuration of CONFIG, e.g. cloud."""
    centralized: bool = False
    """Pool the data: the cloud baseline."""
    resume: bool = False
    """Continue the run that the folder holds."""
    json: bool = False
    """Print what came of it as JSON, in the place of the summary."""
    quiet: bool = False
    """No progress and no summary, only errors."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)


def compare(words: list[str]) -> int:
    wanted = parse_with_config("compare", words, CompareFlags, read_job, "out")
    from choral.cli.report import print_json
    from choral.jobs import comparison as comparisons
    from choral.jobs.planned_runs import rounds_to_go

    settings = wanted.settings
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "compare under torchrun: it starts processes of its own, a run in each",
            hint="choose how many by --workers; torchrun is for choral train",
        )
    with progress(rounds_to_go(settings, wanted.out), settings.training.rounds, quiet=wanted.quiet) as tick:
        outcome = comparisons.run_comparison(
            settings, wanted.out, resume=wanted.resume, workers=wanted.workers, tick=tick
        )
    if wanted.json:
        print_json(outcome.comparison)
    elif not wanted.quiet:
        outcome.comparison.print()
        if not outcome.troubles:
            print(f"report: {wanted.out / 'report.html'}")
    for label, failure in _each_once(outcome.failed):
        print(failure.lines(debug=debug(), prefix=f"{label}: "), end="", file=sys.stderr)
    for failure in outcome.troubles:
        print(failure.lines(debug=debug(), prefix="the report is not complete: "), end="", file=sys.stderr)
    return outcome.exit_code


def _each_once(failed: Mapping[str, Failure]) -> Iterator[tuple[str, Failure]]:
    """The failures with unlike messages, each with the first of the runs that it stopped and how many more."""
    alike: dict[str, list[str]] = {}
    for label, failure in failed.items():
        alike.setdefault(failure.message, []).append(label)
    for labels in alike.values():
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        yield f"{labels[0]}{more} failed", failed[labels[0]]


def train(words: list[str]) -> int:
    wanted = parse_with_config("train", words, TrainFlags, read_job, "out")
    from choral.jobs import training as jobs

    settings = wanted.settings
    name, arm = _arm(wanted)
    jobs.forget_tasks()
    quiet = wanted.quiet or os.environ.get("RANK", "0") != "0"  # of several processes the first one speaks
    with progress(settings.training.rounds, settings.training.rounds, quiet=quiet) as tick:
        run = jobs.train(
            settings,
            arm,
            seed=settings.seed,
            epsilon=settings.privacy.epsilon,
            out=wanted.out,
            resume=wanted.resume,
            on_round=lambda entry: tick(name, entry),
        )
    if wanted.json and os.environ.get("RANK", "0") == "0":
        print(json.dumps(summary(run, name, wanted.out), indent=1))
    elif not quiet:
        metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in run.metrics.items())
        spent = run.spent
        promise = f"; {spent.in_words} (worst data owner)" if spent else ""
        print(f"{name}: {run.history[-1].round} rounds, {metrics}{promise}")
        if run.info.ended:
            print(f"note: {run.info.ended}")
        print(f"run folder: {wanted.out}   next: choral audit {shlex.quote(str(wanted.out))}")
    return 0


def summary(run: Run, name: str, folder: Path) -> dict[str, Any]:
    """What is printed of a run, as plain JSON data."""
    return {
        "configuration": name,
        "folder": str(folder),
        "rounds": run.history[-1].round,
        "metrics": run.metrics,
        "spent": {owner: msgspec.to_builtins(spent) for owner, spent in run.info.spent.items()},
        "ended": run.info.ended,
    }


def _arm(wanted: TrainFlags) -> tuple[str, Arm]:
    """The arm that the flags ask for. Raises: ConfigError for an unknown arm, or both ways of naming one."""
    if wanted.arm is None:
        private = wanted.settings.privacy.epsilon is not None
        return "cloud" if wanted.centralized else "federated", Arm(centralized=wanted.centralized, private=private)
    if wanted.centralized:
        raise ConfigError("--arm and --centralized exclude each other", hint="give one of the two")
    if wanted.arm not in wanted.settings.arms:
        known = ", ".join(wanted.settings.arms) or "none"
        raise ConfigError(f"no arm {wanted.arm!r}", hint=f"arms in {wanted.config}: {known}")
    return wanted.arm, wanted.settings.arms[wanted.arm]
