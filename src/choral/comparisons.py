"""The comparison behind the command line: every arm, seed and budget trained, some side by side, and compared."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from choral.attacks import attacked, attempt, attempt_file, evidence_of
from choral.errors import ChoralError, ConfigError
from choral.jobs import (
    algorithm_of,
    check_per_party,
    check_tuning,
    load_task,
    participation_given,
    privacy_of,
    train,
    unit_of,
    with_overrides,
)
from choral.settings import Arm, Settings, to_json

if TYPE_CHECKING:
    from choral.audits import Comparison
    from choral.privacy import ClientPrivacy, Privacy
    from choral.trainers import Round, Task

# Called with a label for what runs and the round that it completed.
Tick = Callable[[str, "Round"], None]

_MAY_CHANGE = {
    "audit",
    "evaluation",
    "metrics",
    "seeds",
    "title",
    "device",
    "prices",
    "price",
    "transcript",
}  # when a comparison is resumed


class Cell(NamedTuple):
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
        return out / "arms" / quote(self.arm, safe="") / f"seed-{self.seed}{budget}"


def cells(settings: Settings) -> Iterator[Cell]:
    """Every run of the comparison: each arm and seed, private arms at each budget."""
    for seed in _seeds(settings):
        for name, arm in settings.arms.items():
            if not arm.private:
                yield Cell(name, seed, None)
            elif settings.privacy.epsilon is not None:
                more = settings.epsilons if _on_curve(settings, arm) else ()
                for epsilon in sorted({settings.privacy.epsilon, *more}):
                    yield Cell(name, seed, epsilon)


def attacks(settings: Settings) -> list[Cell]:
    return [
        Cell(name, settings.seed, settings.privacy.epsilon if arm.private else None, attack=True)
        for name, arm in settings.arms.items()
        if attacked(settings, arm)
    ]


def _on_curve(settings: Settings, arm: Arm) -> bool:
    """Whether the budget-against-accuracy curve, whose axis has one unit, shows this private arm."""
    return len(settings.epsilons) > 0 and unit_of(settings, arm) == settings.privacy.unit


def rounds_to_go(settings: Settings, out: Path) -> int:
    """Rounds that the comparison has still to train, for the progress bar; round 0 is the initial model."""
    done = 0
    for cell in cells(settings):
        history = cell.folder(out) / "history.jsonl"
        done += max(history.read_bytes().count(b"\n") - 1, 0) if history.is_file() else 0
    runs = sum(1 for _ in cells(settings)) + sum(
        not attempt_file(settings, cell.arm, out).is_file() for cell in attacks(settings)
    )
    return max(runs * settings.training.rounds - done, 0)


def run_comparison(
    settings: Settings, out: Path, *, resume: bool, workers: int | None = None, tick: Tick
) -> Comparison:
    """Train every arm for every seed into ``out/arms``, compare them, and write ``out/report.json`` and ``.html``.

    Every run is audited; attacks that the settings ask for are kept in ``out/evidence``.

    workers: processes that train runs side by side; by default one per core.

    Raises: ConfigError for settings that leave nothing to compare; RunFolderError if ``out`` holds another run.
    """
    from choral.audits import compare, read_prices
    from choral.trainers import Run

    _check(settings)
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise ConfigError(f"expected workers >= 1, got {workers}", hint="leave it out for one per core")
    _open(settings, out, resume)
    todo = list(cells(settings))
    _train_all(settings, todo + attacks(settings), out, resume, workers, tick)
    runs = {cell: Run.load(cell.folder(out)) for cell in todo}
    headline = (None, settings.privacy.epsilon)
    comparison = compare(
        {
            name: [run for cell, run in runs.items() if cell.arm == name and cell.epsilon in headline]
            for name in settings.arms
        },
        budgets={
            name: [run for cell, run in runs.items() if cell.arm == name]
            for name, arm in settings.arms.items()
            if arm.private and _on_curve(settings, arm)
        },
        metric=settings.metrics[0],
        also=settings.metrics[1:],
        references=_references(settings),
        title=settings.title,
        prices=read_prices(settings.prices, settings.price),
        **evidence_of(settings, out),
    )
    comparison.save(out / "report.json")
    comparison.save(out / "report.html")
    return comparison


def _references(settings: Settings) -> dict[str, dict[str, float]]:
    """The task's levels, each its mean over the seeds that are compared; of the metrics that are shown."""
    found: dict[str, dict[str, list[float]]] = {}
    for seed in _seeds(settings):
        task = load_task(settings, seed)
        for metric, levels in (task.references() if task.references else {}).items():
            for name, level in levels.items():
                found.setdefault(metric, {}).setdefault(name, []).append(level)
    return {
        metric: {name: math.fsum(each) / len(each) for name, each in levels.items()} for metric, levels in found.items()
    }


def _seeds(settings: Settings) -> range:
    return range(settings.seed, settings.seed + settings.seeds)


def _train_all(settings: Settings, todo: list[Cell], out: Path, resume: bool, workers: int, tick: Tick) -> None:
    """Train the runs, ``workers`` at a time. The first error ends the job; completed rounds stay on disk."""
    if workers == 1:
        for cell in todo:
            _train_cell(settings, cell, out, resume, tick)
        return
    context = multiprocessing.get_context("spawn")
    ticks: queue.Queue[tuple[str, Round]] = context.Queue()  # type: ignore[assignment]
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, context, _start_worker, (ticks, threads)) as pool:
        running = {pool.submit(_train_in_worker, settings, cell, out, resume) for cell in todo}
        try:
            while running:
                done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                while not ticks.empty():
                    tick(*ticks.get())
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise ChoralError(
                "a worker process died", hint="out of memory? use fewer --workers; --resume goes on from what is done"
            ) from None
        finally:
            if running:  # on an error or Ctrl-C; a run's folder is consistent at any moment
                for worker in multiprocessing.active_children():
                    worker.terminate()


def _train_cell(settings: Settings, cell: Cell, out: Path, resume: bool, tick: Tick) -> None:
    from choral.privacy import LedgerError
    from choral.trainers import Run

    def on_round(entry: Round) -> None:
        for metric in settings.metrics:
            if metric not in entry.metrics:
                raise ConfigError(
                    f"the task is evaluated by {', '.join(entry.metrics)}, and not by {metric!r}",
                    hint=f"set metrics = {json.dumps(list(entry.metrics))}, or some of them, and --resume",
                )
        tick(cell.label, entry)

    if cell.attack:
        attempt(settings, cell.arm, out, cell.folder(out), lambda entry: tick(cell.label, entry))
        return
    try:
        train(
            settings,
            settings.arms[cell.arm],
            seed=cell.seed,
            epsilon=cell.epsilon,
            out=cell.folder(out),
            resume=resume,
            on_round=on_round,
        )
    except LedgerError:
        # Of a finished run there is nothing to train, and the report says what is wrong with its ledger.
        if not (resume and Run.load(cell.folder(out)).finished):
            raise


_ticks: queue.Queue[tuple[str, Round]]  # set once in each worker process


def _start_worker(ticks: queue.Queue[tuple[str, Round]], threads: int) -> None:
    import torch

    global _ticks
    _ticks = ticks
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once; its folder is always consistent
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker must not outlive a killed command: it would hold its run's folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train_in_worker(settings: Settings, cell: Cell, out: Path, resume: bool) -> None:
    try:
        _train_cell(settings, cell, out, resume, lambda label, entry: _ticks.put((label, entry)))
    except ChoralError as error:
        # Errors that take more than a message do not survive the way between processes; their text does.
        raise ChoralError(f"{cell.label}: {error}", hint=error.hint) from None


def _check(settings: Settings) -> None:
    """Everything that can be refused before a folder is touched or a model is trained."""
    from choral.audits import read_prices
    from choral.trainers.task import check_parties

    if not settings.arms:
        raise ConfigError(
            "there is nothing to compare: no [arms.NAME] in the settings", hint="see examples/digits.toml"
        )
    read_prices(settings.prices, settings.price)
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
    first = load_task(settings, settings.seed)
    for name, arm in settings.arms.items():
        with_overrides(settings, arm)
        _check_arithmetic(settings, name, arm)
        if not arm.centralized:
            _check_algorithm(settings, name, arm, first)
    if not settings.metrics or len(set(settings.metrics)) < len(settings.metrics):
        raise ConfigError(f"expected metrics, each once, got {list(settings.metrics)}", hint='e.g. ["accuracy"]')
    for seed in _seeds(settings):
        task = load_task(settings, seed)
        examples = check_parties(task.parties, least=2, min_classes=settings.split.min_classes)
        check_per_party(settings, task, private=bool(private))
        for arm in private.values():
            _check_promise(privacy_of(settings, arm, settings.privacy.epsilon), arm, examples)


def _check_algorithm(settings: Settings, name: str, arm: Arm, task: Task) -> None:
    from choral.trainers.rounds import check_fits, check_participation, check_patience, participation_of

    privacy = privacy_of(settings, arm, settings.privacy.epsilon) if arm.private else None
    try:
        algorithm = algorithm_of(settings, arm)
        check_fits(algorithm, privacy, task.loss)
        participation = participation_of(algorithm, participation_given(settings), None, settings.dropout_rate)
        check_participation(algorithm, participation, len(task.parties))
        check_patience(algorithm, participation, privacy, arm.secure_sum or settings.secure_sum.kind)
    except ChoralError as error:
        raise ConfigError(f"arm {name!r}: {error}", hint=error.hint) from None


def _check_arithmetic(settings: Settings, name: str, arm: Arm) -> None:
    from choral.trainers.arithmetic import check_arithmetic

    try:
        check_arithmetic(
            settings.training.precision,
            settings.training.compile,
            private=arm.private and unit_of(settings, arm) == "record",
            reads_records=not arm.centralized and algorithm_of(settings, arm).needs_loss,
        )
    except ConfigError as error:
        raise ConfigError(f"arm {name!r}: {error}", hint=error.hint) from None


def _check_promise(privacy: Privacy | ClientPrivacy, arm: Arm, examples: Mapping[str, int]) -> None:
    from choral.privacy import Privacy
    from choral.privacy.client import check_client_delta
    from choral.trainers.beginning import check_delta

    if isinstance(privacy, Privacy):
        check_delta(privacy, examples)
    elif arm.centralized:
        raise ConfigError("a centralized arm has no clients", hint='leave out unit = "client"')
    else:
        check_client_delta(privacy.delta, len(examples))
        privacy.survivors_of(len(examples))


def _open(settings: Settings, out: Path, resume: bool) -> None:
    """Claim the folder: a fresh one, or on resume one that was made with the same settings (more seeds are welcome)."""
    from choral.trainers.run import check_empty, replace_file

    record = out / "settings.json"
    wanted = to_json(settings)
    if resume and record.is_file():
        old = json.loads(record.read_text(encoding="utf-8"))
        for key in sorted(old.keys() | wanted.keys()):
            if key not in _MAY_CHANGE and old.get(key) != wanted.get(key):
                raise ConfigError(
                    f"cannot resume {out}: {key} was {old.get(key)}, now it is {wanted.get(key)}",
                    hint="use the same settings, or another --out",
                )
    else:
        check_empty(out)
        out.mkdir(parents=True, exist_ok=True)
    replace_file(record, json.dumps(wanted, indent=1).encode())
