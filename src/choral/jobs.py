"""The jobs behind the command line: train one arm, or all arms of a comparison."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from choral.errors import ChoralError, ConfigError
from choral.settings import Arm, Settings, Unit, to_json

if TYPE_CHECKING:
    from choral.audits import Comparison
    from choral.privacy import ClientPrivacy, Privacy
    from choral.protocols.seam import SecureSum
    from choral.trainers import Algorithm, Round, Run, Task

# Called with a label for what runs and the round that it completed.
Tick = Callable[[str, "Round"], None]


_MAY_CHANGE = {"seeds", "title", "device", "prices", "price", "transcript"}  # when a comparison is resumed


class Cell(NamedTuple):
    """One run of a comparison."""

    arm: str
    seed: int
    epsilon: float | None

    @property
    def label(self) -> str:
        budget = "" if self.epsilon is None else f", epsilon {self.epsilon:g}"
        return f"{self.arm}{budget}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        budget = "" if self.epsilon is None else f"-epsilon-{self.epsilon:g}"
        return out / "arms" / quote(self.arm, safe="") / f"seed-{self.seed}{budget}"


def load_task(settings: Settings, seed: int) -> Task:
    """The task named by ``settings.task``, for one seed.

    Raises: ConfigError if it is neither embedded nor a Python file with a function ``load`` that returns a Task.
    """
    from choral.trainers import Task
    from choral.trainers.data import TASKS

    if settings.task in TASKS:
        return TASKS[settings.task](settings.split, settings.training, seed, settings.data_dir)
    task = _load_function(Path(settings.task))(settings.split, settings.training, seed)
    if not isinstance(task, Task):
        raise ConfigError(f"load in {settings.task} returned {type(task).__name__}; expected choral.trainers.Task")
    return task


def load_module(path: Path, expected: str) -> ModuleType:
    """Run a user's own Python file. expected: what it should be, for the error. Raises: ConfigError."""
    if not path.is_file():
        raise ConfigError(f"no file {str(path)!r}", hint=f"expected {expected}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file", hint=f"expected {expected}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_function(path: Path) -> Callable[..., object]:
    from choral.trainers.data import TASKS

    module = load_module(path, f"a task ({', '.join(TASKS)}), or a Python file with load(split, training, seed)")
    if not callable(load := getattr(module, "load", None)):
        raise ConfigError(f"{path} has no function load(split, training, seed)")
    return load  # type: ignore[no-any-return]


def train(
    settings: Settings,
    arm: Arm,
    *,
    seed: int,
    epsilon: float | None,
    out: Path,
    resume: bool,
    on_round: Callable[[Round], None] | None = None,
) -> Run:
    """Train one arm into the folder ``out``, with settings of its own tuning if it has a grid. epsilon: the budget of a
    private arm.
    """
    settings = _with_overrides(settings, arm)
    record = _tuning(settings, arm, seed, out, resume)
    chosen = record["chosen"] if record else {}
    settings = dataclasses.replace(settings, training=dataclasses.replace(settings.training, **chosen))
    run = _trainer(settings, arm, seed, epsilon)
    return run(load_task(settings, seed), tuning=record, out=out, resume=resume, on_round=on_round)


def _trainer(settings: Settings, arm: Arm, seed: int, epsilon: float | None) -> Callable[..., Run]:
    """``federate`` or ``centralize`` with all that the settings say, to be called with the task."""
    from choral.privacy import ClientPrivacy
    from choral.trainers import centralize, federate

    privacy = _privacy(settings, arm, epsilon) if arm.private else None
    if arm.centralized and isinstance(privacy, ClientPrivacy):
        raise ConfigError("a centralized arm has no clients", hint='leave out unit = "client"')
    shared: dict[str, Any] = {
        "rounds": settings.training.rounds,
        "seed": seed,
        "start": settings.training.start,
        "privacy": privacy,
        "device": settings.device,
        "config": {key: value for key, value in to_json(settings).items() if key not in ("prices", "price")},
    }
    federated: dict[str, Any] = {
        "algorithm": _algorithm(settings, arm),
        "secure_sum": _secure_sum(settings, arm),
        "value_bound": settings.secure_sum.value_bound,
        "value_bits": settings.secure_sum.value_bits,
        "dropout_rate": settings.dropout_rate,
        "min_classes": settings.split.min_classes,
    }
    transcript = None if settings.transcript == "none" else settings.transcript

    def run(task: Task, *, out: Path | None = None, **options: Any) -> Run:
        job = {name: getattr(task, name) for name in ("build", "fit", "evaluate", "parties", "loss")}
        if arm.centralized:
            return centralize(**job, **shared, out=out, **options)
        seen = transcript if out is not None else None
        return federate(**job, **(shared | federated | options), out=out, transcript=seen)

    return run


def _tuning(settings: Settings, arm: Arm, seed: int, out: Path, resume: bool) -> dict[str, Any] | None:
    """What :func:`choral.trainers.tune` records for the arm's grid; of a run that is resumed, what it had recorded.

    Raises: ConfigError for a private arm; what tune does.
    """
    from choral.trainers import tune
    from choral.trainers.run import check_empty, read_info

    if not arm.tune.grid:
        return None
    _check_tuning(arm)
    if resume and (out / "run.json").is_file():
        old = read_info(out).tuning
        if old and old["grid"] == {name: list(values) for name, values in arm.tune.grid.items()}:
            return old
    if not resume:
        check_empty(out)

    def make(**tried: float | int) -> Task:
        return load_task(
            dataclasses.replace(settings, training=dataclasses.replace(settings.training, **tried)),  # type: ignore[arg-type]
            seed,
        )

    options = {} if arm.centralized else {"min_classes": 1}
    trainer = _trainer(settings, arm, seed, None)
    found = tune(
        make,
        arm.tune.grid,
        lambda task: trainer(task, **options),
        seed=seed,
        validation_fraction=arm.tune.validation_fraction,
    )
    return dict(found.record)


def _check_tuning(arm: Arm) -> None:
    from choral.trainers.tune import check_grid

    if not arm.tune.grid:
        return
    if arm.private:
        raise ConfigError(
            "tuning with privacy: its tries read the records without noise, which no budget covers",
            hint="leave out tune for private arms; choral.privacy.private_search is charged for",
        )
    check_grid(arm.tune.grid, arm.tune.validation_fraction)


def _with_overrides(settings: Settings, arm: Arm) -> Settings:
    """The settings with the arm's own batch size and learning rate. Raises: ConfigError if one is out of range."""
    own = {name: value for name in ("batch_size", "learning_rate") if (value := getattr(arm, name)) is not None}
    return dataclasses.replace(settings, training=dataclasses.replace(settings.training, **own))


def _privacy(settings: Settings, arm: Arm, epsilon: float | None) -> Privacy | ClientPrivacy:
    """The promise of a private arm. Raises: ConfigError for a setting out of range."""
    from choral.privacy import AdaptiveClip, ClientPrivacy, Privacy

    if epsilon is None:
        raise ConfigError("a private arm needs a budget", hint="set privacy.epsilon")
    chosen = settings.privacy
    if _unit(settings, arm) == "record":
        return Privacy(
            epsilon=epsilon,
            delta=chosen.delta,
            max_grad_norm=chosen.max_grad_norm,
            epochs=settings.training.local_epochs,
        )
    return ClientPrivacy(
        epsilon=epsilon,
        delta=chosen.delta,
        clip=chosen.clip if chosen.quantile is None else AdaptiveClip(start=chosen.clip, quantile=chosen.quantile),
        noise=chosen.noise,
        mechanism=chosen.mechanism,
        bits=chosen.bits,
        min_survivors=chosen.min_survivors or settings.secure_sum.min_survivors,
        colluders=chosen.colluders,
    )


def _algorithm(settings: Settings, arm: Arm) -> Algorithm:
    """The arm's algorithm if it names one, else the file's with what the arm sets.

    Raises: ConfigError for a hyper-parameter that the algorithm does not have, or one out of range.
    """
    from choral.trainers.algorithms import KINDS

    said, own = ({k: v for k, v in vars(part).items() if v is not None} for part in (settings.algorithm, arm.algorithm))
    chosen = own if "kind" in own else said | own
    kind = KINDS[chosen.pop("kind", "fedavg")]
    known = [field.name for field in dataclasses.fields(kind)]
    for name in chosen:
        if name not in known:
            raise ConfigError(
                f"algorithm.{name} is set, which {kind.kind} does not have",
                hint=f"it has {', '.join(known)}" if known else "it has no settings of its own",
            )
    return kind(**chosen)


def _secure_sum(settings: Settings, arm: Arm) -> SecureSum:
    from choral.protocols import Homomorphic, Masked, Plain

    chosen = settings.secure_sum
    kind = arm.secure_sum or chosen.kind
    if kind == "plain":
        return Plain()
    terms = {"min_survivors": chosen.min_survivors, "corrupt": chosen.corrupt, "dropouts": chosen.dropouts}
    if kind == "homomorphic":
        return Homomorphic(key=chosen.key, server=chosen.server, **terms)
    return Masked(server=chosen.server or "malicious", **terms)


def cells(settings: Settings) -> Iterator[Cell]:
    """Every run of the comparison: each arm and seed, private arms at each budget."""
    for seed in range(settings.seed, settings.seed + settings.seeds):
        for name, arm in settings.arms.items():
            if not arm.private:
                yield Cell(name, seed, None)
            elif settings.privacy.epsilon is not None:
                more = settings.epsilons if _on_curve(settings, arm) else ()
                for epsilon in sorted({settings.privacy.epsilon, *more}):
                    yield Cell(name, seed, epsilon)


def _on_curve(settings: Settings, arm: Arm) -> bool:
    """Whether the budget-against-accuracy curve, whose axis has one unit, shows this private arm."""
    return len(settings.epsilons) > 0 and _unit(settings, arm) == settings.privacy.unit


def _unit(settings: Settings, arm: Arm) -> Unit:
    return arm.unit or ("record" if arm.centralized else settings.privacy.unit)


def rounds_to_go(settings: Settings, out: Path) -> int:
    """Rounds that the comparison has still to train, for the progress bar; round 0 is the initial model."""
    done = 0
    for cell in cells(settings):
        history = cell.folder(out) / "history.jsonl"
        done += max(history.read_bytes().count(b"\n") - 1, 0) if history.is_file() else 0
    return max(sum(1 for _ in cells(settings)) * settings.training.rounds - done, 0)


def run_comparison(
    settings: Settings, out: Path, *, resume: bool, workers: int | None = None, tick: Tick
) -> Comparison:
    """Train every arm for every seed into ``out/arms``, compare them, and write ``out/report.json`` and ``.html``.

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
    _train_all(settings, todo, out, resume, workers, tick)
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
        title=settings.title,
        prices=read_prices(settings.prices, settings.price),
    )
    comparison.save(out / "report.json")
    comparison.save(out / "report.html")
    return comparison


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
    train(
        settings,
        settings.arms[cell.arm],
        seed=cell.seed,
        epsilon=cell.epsilon,
        out=cell.folder(out),
        resume=resume,
        on_round=lambda entry: tick(cell.label, entry),
    )


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
        _check_tuning(arm)
    private = {name: arm for name, arm in settings.arms.items() if arm.private}
    if private and settings.privacy.epsilon is None:
        raise ConfigError(
            f"arm {next(iter(private))!r} is private, but privacy.epsilon is not set", hint="e.g. epsilon = 8"
        )
    for name, arm in settings.arms.items():
        _with_overrides(settings, arm)
        if not arm.centralized:
            _check_algorithm(settings, name, arm)
    for seed in range(settings.seed, settings.seed + settings.seeds):
        examples = check_parties(load_task(settings, seed).parties, least=2, min_classes=settings.split.min_classes)
        for arm in private.values():
            _check_promise(_privacy(settings, arm, settings.privacy.epsilon), arm, examples)


def _check_algorithm(settings: Settings, name: str, arm: Arm) -> None:
    from choral.trainers.rounds import check_fits

    privacy = _privacy(settings, arm, settings.privacy.epsilon) if arm.private else None
    try:
        check_fits(_algorithm(settings, arm), privacy, load_task(settings, settings.seed).loss)
    except ChoralError as error:
        raise ConfigError(f"arm {name!r}: {error}", hint=error.hint) from None


def _check_promise(privacy: Privacy | ClientPrivacy, arm: Arm, examples: Mapping[str, int]) -> None:
    from choral.privacy import Privacy
    from choral.privacy.client import check_client_delta
    from choral.trainers.federate import check_delta

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
            if key not in {"seeds", "title", "device", "prices", "price", "transcript"} and old.get(key) != wanted.get(
                key
            ):
                raise ConfigError(
                    f"cannot resume {out}: {key} was {old.get(key)}, now it is {wanted.get(key)}",
                    hint="use the same settings, or another --out",
                )
    else:
        check_empty(out)
        out.mkdir(parents=True, exist_ok=True)
    replace_file(record, json.dumps(wanted, indent=1).encode())
