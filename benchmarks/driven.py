"""Processes that do a round when they are told to, so that frameworks of other environments can be interleaved."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass
class Spent:
    """Of one round. cpu: seconds of processor time of each process that took part; wall: on the clock."""

    wall: float
    cpu: list[float] = field(default_factory=list)


def timed(work: Callable[[], Any]) -> Spent:
    """Of work in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - wall, [time.process_time() - cpu])


class Driven:
    """A process, and those that it starts, which call ``bare.turn`` after each round. Ended with the block.

    Raises: RuntimeError with the end of its error output if it ends by itself.
    """

    def __init__(self, command: list[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed on leaving
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )

    def first(self) -> dict[str, Any]:
        """Wait for the first round, which is a warm-up; what the process says of itself."""
        return self._said()

    def once(self) -> Spent:
        before, started = seconds_of_tree(self._process.pid), time.perf_counter()
        if self._process.stdin is not None:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        self._said()
        wall, after = time.perf_counter() - started, seconds_of_tree(self._process.pid)
        return Spent(wall, [seconds - before.get(number, 0.0) for number, seconds in after.items()])

    def _said(self) -> dict[str, Any]:
        for line in self._process.stdout or ():
            if line.startswith("turn "):
                said: dict[str, Any] = json.loads(line.removeprefix("turn "))
                return said
        self._process.wait()
        self._errors.seek(0)
        raise RuntimeError(f"{self._process.args!r} ended:\n{self._errors.read()[-3000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        ours = list(seconds_of_tree(self._process.pid))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)  # its own group, made for it
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        for number in ours:  # and those of its children that made groups of their own, such as Ray's
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()


def seconds_of_tree(root: int) -> dict[int, float]:
    """Processor time of a process and of all its descendants, by process, from /proc (Linux)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, grown = {root}, True
    while grown:
        more = {number for number, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return {number: _seconds(number) for number in sorted(found)}


def _seconds(number: int) -> float:
    total = 0
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{number}/task").iterdir():
            with contextlib.suppress(OSError, ValueError):
                total += int((thread / "schedstat").read_text().split()[0])  # nanoseconds on a processor
    return total / 1e9
