"""How far a training is: a bar on a terminal and in a notebook, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

_BETWEEN_LINES = 30.0  # seconds


class Completed(Protocol):
    """A completed round, as `RoundRecord` has it."""

    @property
    def round(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def dropped(self) -> Mapping[str, str]: ...


Tick = Callable[[str, Completed], None]


@contextmanager
def progress(total: int, rounds: int, *, quiet: bool = False) -> Iterator[Tick]:
    """Yield what is to be called with a label and each completed round. Everything goes to standard error.

    total: rounds of all trainings together. rounds: of one, after which a log gets its line; one that takes long gets a
    line each half a minute.
    """
    if quiet:
        yield lambda label, entry: None  # noqa: ARG005
        return
    from rich.console import Console

    notebook = Console().is_jupyter and find_spec("ipywidgets") is not None  # without which rich only warns
    if notebook or sys.stderr.isatty():
        with _bar(total, Console() if notebook else Console(file=sys.stderr)) as tick:
            yield tick
        return
    yield _lines(rounds)


def _lines(rounds: int) -> Tick:
    printed = time.monotonic()

    def tick(label: str, entry: Completed) -> None:
        nonlocal printed
        if entry.round == rounds or (entry.round and time.monotonic() - printed >= _BETWEEN_LINES):
            printed = time.monotonic()
            print(f"{label}: round {entry.round} of {rounds}, {_said(entry)}", file=sys.stderr, flush=True)

    return tick


@contextmanager
def _bar(total: int, console: Any) -> Iterator[Tick]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("rounds"),
        TimeElapsedColumn(),
        TextColumn("left"),
        Remaining(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=total)

        def tick(label: str, entry: Completed) -> None:
            bar.update(task, advance=1 if entry.round else 0, description=f"{label}: {_said(entry)}")

        yield tick


def _said(entry: Completed) -> str:
    name, value = next(iter(entry.metrics.items()))
    gone = f", without {', '.join(entry.dropped)}" if entry.dropped else ""
    return f"{name} {value:.4g}{gone}"
