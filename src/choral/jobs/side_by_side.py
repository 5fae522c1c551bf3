"""Runs trained side by side in worker processes. One that fails, or takes its process along, costs no other.

Also the figures of one core for a report, which are measured in a process of their own.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from choral.doors import enter_by_command_line
from choral.errors import ConfigError
from choral.failures import Failure
from choral.jobs.planned_runs import PlannedRun, Tick, train_planned
from choral.jobs.settings import Settings

if TYPE_CHECKING:
    from choral.audits.costs.on_device import OneCore
    from choral.trainers import RoundRecord

ON_DEVICE = {"pt2": (".pt2",), "onnx": (".onnx", ".pt2")}
ON_DEVICE_FILE = "on-device.json"
_DIED = Failure(
    "a worker process died", "out of memory? use fewer --workers; --resume tries it again", "its process died", ""
)


def train_all(
    settings: Settings, todo: Sequence[PlannedRun], out: Path, resume: bool, workers: int, tick: Tick
) -> dict[PlannedRun, Failure]:
    """Train the runs, ``workers`` at a time; returns those that failed. Completed rounds stay on disk."""
    failed: dict[PlannedRun, Failure] = {}
    if workers == 1:
        for planned in todo:
            if (failure := train_planned(settings, planned, out, resume, tick)) is not None:
                failed[planned] = failure
        return failed
    left = _pool(settings, todo, out, resume, workers, tick, failed)
    while left:  # a process died, and took the others' with it: one by one shows which it was
        again = _pool(settings, left[:1], out, True, 1, tick, failed)
        if again:
            failed[again[0]] = _DIED
        left = left[1:]
    return failed


def _pool(
    settings: Settings,
    todo: Sequence[PlannedRun],
    out: Path,
    resume: bool,
    workers: int,
    tick: Tick,
    failed: dict[PlannedRun, Failure],
) -> list[PlannedRun]:
    """Train in fresh processes and note what failed; returns the runs that are left where one process died."""
    context = multiprocessing.get_context("spawn")
    ticks: queue.Queue[tuple[str, RoundRecord]] = context.Queue()  # type: ignore[assignment]
    threads = max(1, (os.cpu_count() or 1) // workers)
    left = dict.fromkeys(todo)
    with ProcessPoolExecutor(workers, context, _start_worker, (ticks, threads)) as pool:
        running: dict[Future[Failure | None], PlannedRun] = {}
        try:
            running = {pool.submit(_train_in_worker, settings, planned, out, resume): planned for planned in todo}
            while running:
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                while not ticks.empty():
                    tick(*ticks.get())
                for future in done:
                    failure = future.result()
                    planned = running.pop(future)
                    del left[planned]
                    if failure is not None:
                        failed[planned] = failure
        except BrokenProcessPool:
            return list(left)
        finally:
            if running:  # on Ctrl-C, or if one died; a run's folder is consistent at any moment
                for worker in multiprocessing.active_children():
                    worker.terminate()
    return []


_ticks: queue.Queue[tuple[str, RoundRecord]]  # set once in each worker process


def _start_worker(ticks: queue.Queue[tuple[str, RoundRecord]], threads: int) -> None:
    import torch

    global _ticks
    _ticks = ticks
    enter_by_command_line()
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once; its folder is always consistent
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker must not outlive a killed command: it would hold its run's folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train_in_worker(settings: Settings, planned: PlannedRun, out: Path, resume: bool) -> Failure | None:
    return train_planned(settings, planned, out, resume, lambda label, entry: _ticks.put((label, entry)))


def on_device(settings: Settings, out: Path) -> OneCore | None:
    """What ``report.on_device`` asks for, from ``out`` where it was measured before; None where nothing is asked.

    Raises: ConfigError for a damaged file; what training and export raise.
    """
    from choral.audits.costs.on_device import OneCore
    from choral.trainers.run_folder.folder import replace_file

    wanted, file = settings.report.on_device, out / ON_DEVICE_FILE
    if wanted == "no":
        return None
    if file.is_file():
        try:
            found = msgspec.json.decode(file.read_bytes(), type=OneCore, strict=True)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{file} is damaged: {error}", hint="delete it: it is measured anew") from None
        if {each.kind for each in found.exported} >= set(ON_DEVICE[wanted]):
            return found
    plain = dataclasses.replace(settings, device="cpu")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_measured, plain).result()
    replace_file(file, msgspec.json.encode(found))
    return found


def _measured(settings: Settings) -> OneCore:
    from choral.audits.costs.on_device import capped, measure
    from choral.jobs.training import load_task

    capped()
    return measure(load_task(settings, settings.seed), ON_DEVICE[settings.report.on_device])
