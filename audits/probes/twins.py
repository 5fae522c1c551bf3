"""Train twice from one public state, so that whatever differs came from the operating system.

Noise and batches must come from randomness that nobody can replay. A second training in a copy of this very process
(fork) starts with the same seeds, counters and caches, and sees the same clock and process number: a trainer whose
randomness is made of any of these repeats itself, and the tests of reuse see it. Where a process cannot be copied, the
second training follows the first with the public random number generators put back.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch

from choral.audits.probes.records import ProbeLayout
from choral.audits.probes.seen import Seen
from choral.privacy import Spent

Shown = TypeVar("Shown")
_PATIENCE = 30.0  # seconds beside twice what the first training took


def twins(train: Callable[[], Seen]) -> list[Seen]:
    """Return what two trainings from one public state showed. Raises: what `train` raises."""
    with tempfile.TemporaryDirectory() as folder:
        public = _PublicState()
        moment, clone = time.time(), _forked()
        if clone == 0:
            _child(train, Path(folder), public, moment)
        began = time.monotonic()
        try:
            with _one_clock(moment):
                first = train()
        except BaseException:
            _end(clone)
            raise
        if clone is not None and _finished(clone, 2.0 * (time.monotonic() - began) + _PATIENCE):
            with contextlib.suppress(OSError, ValueError, KeyError, msgspec.MsgspecError):
                return [first, _read(Path(folder))]
    public.restore()
    with _one_clock(moment):
        return [first, train()]


def one_after_another(make: Callable[[], Shown]) -> list[Shown]:
    """The same for what leaves no trace in this process: made twice, with public randomness and clock put back."""
    public, moment, made = _PublicState(), time.time(), []
    for _ in range(2):
        public.restore()
        with _one_clock(moment):
            made.append(make())
    return made


class _PublicState:
    """The states of the random number generators that anybody may seed."""

    def __init__(self) -> None:
        self.states = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def restore(self) -> None:
        random.setstate(self.states[0])
        np.random.set_state(self.states[1])
        torch.set_rng_state(self.states[2])


def _forked() -> int | None:
    if not hasattr(os, "fork") or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which the copy needs
        return os.fork()


def _child(train: Callable[[], Seen], folder: Path, public: _PublicState, moment: float) -> None:
    """Train in the copy, write down what was seen, and end without returning to the caller's code."""
    code = 1
    try:
        torch.set_num_threads(1)  # threads of a pool do not survive a fork
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        public.restore()  # Python seeds `random` anew in a copy
        with _one_clock(moment):
            seen = train()
        arrays: dict[str, Any] = {
            "released": seen.released,
            "drawn": seen.drawn,
            "inside": seen.inside,
            "signs": seen.layout.signs,
            "step": np.array(seen.step),
        }
        np.savez(folder / "seen.npz", allow_pickle=False, **arrays)
        (folder / "spent.json").write_bytes(msgspec.json.encode(seen.spent))
        code = 0
    finally:
        os._exit(code)


def _read(folder: Path) -> Seen:
    with np.load(folder / "seen.npz", allow_pickle=False) as arrays:
        layout = ProbeLayout(len(arrays["signs"]), arrays["signs"])
        released, drawn, inside, step = arrays["released"], arrays["drawn"], arrays["inside"], float(arrays["step"])
    spent = msgspec.json.decode((folder / "spent.json").read_bytes(), type=Spent)
    return Seen(layout, released, drawn, inside, spent, step)


def _finished(clone: int, patience: float) -> bool:
    """Wait for the copy; True if it ended well. One that hangs is ended."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        ended, status = os.waitpid(clone, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        select.select([], [], [], 0.02)
    _end(clone)
    return False


def _end(clone: int | None) -> None:
    if clone is not None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(clone, 9)
            os.waitpid(clone, 0)


@contextlib.contextmanager
def _one_clock(moment: float) -> Iterator[None]:
    """Let both trainings see the same times and process number, whenever they run."""
    ticks, pid = count(), os.getpid()
    real = time.time, time.time_ns, os.getpid
    time.time = lambda: moment + 1e-4 * next(ticks)
    time.time_ns = lambda: int(1e9 * (moment + 1e-4 * next(ticks)))
    os.getpid = lambda: 1 if pid else 0
    try:
        yield
    finally:
        time.time, time.time_ns, os.getpid = real
