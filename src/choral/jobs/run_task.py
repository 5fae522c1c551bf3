"""The task that a run folder was made of, for commands that need its model or its records again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from choral.errors import ConfigError
from choral.jobs.settings import Settings

if TYPE_CHECKING:
    from choral.trainers import Run, Task


def task_of(run: Run, folder: Path, *, task: Path | None, data_dir: Path | None, in_python: str) -> Task:
    """The run's task. A Python file is run only if the command line names it: a folder may come from anybody.

    in_python: what does the same for a run that was not made by the command line, for the hint.
    Raises: ConfigError for a run without settings, of another version's, or of a Python file that was not named.
    """
    from choral.jobs.standardising import as_trained
    from choral.jobs.training import load_task
    from choral.trainers.data import TASKS

    try:
        settings = msgspec.convert(run.info.config, Settings, dec_hook=lambda kind, value: kind(value))
    except msgspec.ValidationError as error:
        raise ConfigError(f"the settings in {folder} are not those of a job: {error}") from None
    if not run.info.config:
        raise ConfigError(
            f"{folder} holds no settings: it was not made by the command line", hint=f"in Python: {in_python}"
        )
    if task is None and settings.task not in TASKS:
        raise ConfigError(
            f"the run's task is a Python file, {settings.task!r}, and code is not run because a folder says so",
            hint="if you trust it, name it: --task FILE.py",
        )
    settings = dataclasses.replace(settings, task=settings.task if task is None else str(task), data_dir=data_dir)
    return as_trained(settings, load_task(settings, run.info.seed))
