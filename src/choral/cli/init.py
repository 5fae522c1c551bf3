"""``choral init``: settings for data of one's own, by flags or by questions."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from choral.cli.arguments import parse
from choral.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NewJobFlags:
    """Write settings for a table of your own: a CSV file with a header, or Parquet. What is not given is asked for.

    The file is read once, for its columns' words and bounds; nothing leaves this machine.
    """

    data: Path | None = None
    """The CSV or Parquet file."""
    key: tuple[str, ...] | None = None
    """Column, or columns, that say whose a row is: each value is a party. None deals rows out at random."""
    label: str | None = None
    """Column that is to be predicted."""
    kind: Literal["class", "number", "count"] | None = None
    """What the label is; by default class if it has few values, else number."""
    epsilon: float = 3.0
    """Budget of the private configuration."""
    public: bool = False
    """What the file shows of its columns (words, bounds) is public knowledge. Differential privacy needs this."""
    delimiter: str = ","
    """Between the fields of a CSV file."""
    task: bool = False
    """Also write a Python file with build, fit and evaluate, for a model of your own."""
    out: Path = Path("job.toml")
    """The settings file; a task file is written beside it."""


def init(words: list[str]) -> int:
    """Write the files, and say what to do next."""
    wanted = parse("init", words, NewJobFlags)
    asking = sys.stdin.isatty() and sys.stdout.isatty()
    data = wanted.data or Path(_asked("data", "CSV or Parquet file", asking))
    task = wanted.out.with_name("task.py")
    for file in (wanted.out, *([task] if wanted.task else [])):
        if file.exists():
            raise ConfigError(f"{file} is there already", hint="--out FILE writes to another, or move it away")
    from choral.jobs.new_job import NewJob
    from choral.trainers.data.table_files import open_table

    if asking and (wanted.key is None or wanted.label is None):
        print(f"columns: {', '.join(open_table(data, delimiter=wanted.delimiter)[0])}")
    key = wanted.key
    if key is None:
        key = tuple(_asked("key", "column that says whose a row is (several: a b; none: -)", asking).split())
    key = () if key == ("-",) else key
    label = wanted.label or _asked("label", "column to predict", asking)
    job = NewJob.of(
        data,
        key,
        label,
        kind=wanted.kind,
        delimiter=wanted.delimiter,
        epsilon=wanted.epsilon,
        public=wanted.public or wanted.task,
    )
    if wanted.task:
        if not key:
            raise ConfigError("a task file needs a key: the column whose values are the parties", hint="--key COLUMN")
        _write(task, job.task_file())
    _write(wanted.out, job.settings(task=str(task) if wanted.task else None))
    parties = f"{len(job.found.parties)} parties by {' and '.join(key)}" if key else "rows dealt out to 10 parties"
    files = f"{wanted.out} and {task}" if wanted.task else str(wanted.out)
    print(f"wrote {files}: {job.found.rows} rows, {parties}, {label} as a {job.kind}")
    if job.left_out:
        print(f"left out: {', '.join(f'{name} ({why})' for name, why in job.left_out.items())}")
    if not wanted.public:
        what = "Codebook(...) in the task file" if wanted.task else "[data.bounds] and the words"
        then = "" if wanted.task else ', and set bounds_from = "public"'
        print(f"next: look at {what}: they were read off the records. Put what is known publicly{then}.")
    print(f"then: choral compare {shlex.quote(str(wanted.out))} --out runs/first")
    return 0


def _asked(flag: str, what: str, asking: bool) -> str:
    """The answer. Raises: ConfigError where nobody can be asked, or says nothing."""
    if asking and (said := input(f"{what}: ").strip()):
        return said
    more = "; --key - for none" if flag == "key" else ""
    raise ConfigError(
        f"--{flag} is not given: the {what.partition(' (')[0]}",
        hint=f"--{flag} {'FILE' if flag == 'data' else 'COLUMN'}{more}",
    )


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", hint="--out FILE") from None
