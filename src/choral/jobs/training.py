"""One job behind the command line: train one arm, as the settings say."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from choral.errors import ConfigError
from choral.jobs.settings import Arm, Settings, SitesSettings, Unit, to_json
from choral.jobs.standardising import standardised
from choral.trainers.task.settings import ModelSettings

if TYPE_CHECKING:
    from choral.privacy import ClientPrivacy, Privacy
    from choral.protocols.interface import SecureSum
    from choral.trainers import Algorithm, Compute, Keep, RoundRecord, Run, Task


def load_task(settings: Settings, seed: int) -> Task:
    """The task named by ``settings.task``, for one seed.

    Of a Python file ``load`` is called once in a process for one seed, split and training; arms share what it returned.

    Raises: ConfigError if it is neither embedded nor a Python file with a function ``load`` that returns a Task; what
        that file raises.
    """
    from choral.trainers import Task
    from choral.trainers.data import TASKS

    if settings.data.path is not None:
        return _own_task(settings, seed)
    if settings.model != ModelSettings():
        raise ConfigError(
            f"[model] is for a table of your own, and the task is {settings.task!r}",
            hint="[data] path names the table; training.hidden is the width of other tasks' hidden layer",
        )
    if settings.task in TASKS:
        return TASKS[settings.task](settings.split, settings.training, seed, settings.data_dir)
    path = Path(settings.task)
    key = json.dumps([str(path.resolve()), *map(to_json, (settings.split, settings.training)), seed])
    if key not in _tasks:
        task = _load_function(path)(settings.split, settings.training, seed)
        if not isinstance(task, Task):
            raise ConfigError(f"load in {settings.task} returned {type(task).__name__}; expected choral.trainers.Task")
        _tasks[key] = task
    return _tasks[key]


def _own_task(settings: Settings, seed: int) -> Task:
    """The task of a table, which is read once in a process for one seed, split and training."""
    from choral.trainers.data.own_table import own_task

    if settings.task != Settings.task:
        raise ConfigError(f"data.path names a table, and task names {settings.task!r}", hint="leave out one of the two")
    key = json.dumps([*map(to_json, (settings.data, settings.model, settings.split, settings.training)), seed])
    if key not in _tasks:
        _tasks[key] = own_task(settings.data, settings.model, settings.split, settings.training, seed)
    return _tasks[key]


# A task file is run, and `load` called with the same arguments, once in a process: both may take minutes.
_tasks: dict[str, Task] = {}
_loads: dict[Path, Callable[..., object]] = {}


def forget_tasks() -> None:
    """Run task files anew from here on: one command after another in one process may find them changed."""
    _tasks.clear()
    _loads.clear()


def load_module(path: Path, expected: str) -> ModuleType:
    """Run a user's own Python file. expected: what it should be, for the error. Raises: ConfigError."""
    if not path.is_file():
        raise ConfigError(f"no file {str(path)!r}", hint=f"expected {expected}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file", hint=f"expected {expected}")
    module = importlib.util.module_from_spec(spec)
    there = sys.modules.setdefault(spec.name, module)  # where dataclasses look names of annotations up
    try:
        spec.loader.exec_module(module)
    finally:
        if there is module:  # it is nobody's to import by that name
            sys.modules.pop(spec.name, None)
    return module


def _refuse_no_task(path: Path, known: list[str]) -> None:
    """Raise ConfigError for a name that is nearly a task's, a table of data, or a folder."""
    if path.suffix.lower() in (".csv", ".tsv", ".parquet", ".json", ".xlsx"):
        raise ConfigError(
            f"task is {str(path)!r}, a file of data",
            hint="`choral init --data FILE --key COLUMN --label COLUMN` writes settings for it, with [data] path, key"
            " and label in the place of task",
        )
    if path.is_dir():
        raise ConfigError(f"task is {str(path)!r}, a folder", hint="name a Python file in it")
    near = difflib.get_close_matches(str(path), known, n=1)
    if near and not path.exists():
        raise ConfigError(
            f"no task {str(path)!r}, and no file of that name",
            hint=f"did you mean {near[0]!r}? Tasks are {', '.join(known)}, or a Python file",
        )


def _load_function(path: Path) -> Callable[..., object]:
    from choral.trainers.data import TASKS

    if path in _loads:
        return _loads[path]
    _refuse_no_task(path, list(TASKS))
    module = load_module(path, f"a task ({', '.join(TASKS)}), or a Python file with load(split, training, seed)")
    if not callable(load := getattr(module, "load", None)):
        raise ConfigError(f"{path} has no function load(split, training, seed)")
    _loads[path] = load
    return load  # type: ignore[no-any-return]


def train(
    settings: Settings,
    arm: Arm,
    *,
    seed: int,
    epsilon: float | None,
    out: Path,
    resume: bool,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> Run:
    """Train one arm into the folder ``out``, with settings of its own tuning if it has a grid. epsilon: the budget of a
    private arm.
    """
    settings, record = tuned(with_overrides(settings, arm), arm, seed, out, resume)
    run, task = trainer_of(settings, arm, seed, epsilon), load_task(settings, seed)
    check_per_party(settings, task)
    return run(task, tuning=record, out=out, resume=resume, on_round=on_round)


def check_per_party(settings: Settings, task: Task) -> None:
    """Raises: ConfigError for an evaluation at each party of a task that holds out no records by party."""
    if settings.evaluation.per_party and (task.held_out is None or task.evaluate_party is None):
        raise ConfigError(
            "evaluation.per_party is set, and the task holds out no records by party",
            hint="return Task(..., held_out={party: dataset}, evaluate_party=f) with f(model, dataset) from load",
        )


def trainer_of(settings: Settings, arm: Arm, seed: int, epsilon: float | None) -> Callable[..., Run]:
    """``federate`` or ``centralize`` with all that the settings say, to be called with the task."""
    from choral.privacy import ClientPrivacy
    from choral.trainers import centralize, federate

    privacy: Any = privacy_of(settings, arm, epsilon) if arm.private else None
    by_record = privacy is not None and not isinstance(privacy, ClientPrivacy)
    in_torch = by_record or settings.training.precision != "float32" or settings.training.compile

    def train(task: Task, keep: Keep) -> Run:
        if arm.centralized:
            parallel = int(os.environ.get("WORLD_SIZE", "1")) > 1  # as torchrun sets it
            return centralize(
                task_of(settings, task),
                rounds=settings.training.rounds,
                privacy=privacy,
                data_parallel=parallel,
                compute=compute_of(settings, seed),
                keep=keep,
            )
        engine = None if in_torch else task.engine  # which knows no noise per record, and computes as it likes
        return federate(
            **federation_of(settings, arm, task, privacy), compute=compute_of(settings, seed, engine), keep=keep
        )

    def run(task: Task, **options: Any) -> Run:
        def federation() -> dict[str, Any]:
            return federation_of(settings, arm, task, privacy)

        with standardised(settings, arm, task, privacy, federation, options) as (prepared, ledgers):
            keep = keep_of(settings, arm, **options)
            return train(prepared, keep if ledgers is None else dataclasses.replace(keep, ledgers=ledgers))

    return run


def federation_of(settings: Settings, arm: Arm, task: Task, privacy: Privacy | ClientPrivacy | None) -> dict[str, Any]:
    """What ``federate``, and its plan, are to be given, but for how it is computed and kept."""
    from choral.trainers import Encoding

    chosen = settings.secure_sum
    return {
        "task": task_of(settings, task),
        "rounds": settings.training.rounds,
        "algorithm": algorithm_of(settings, arm),
        "privacy": privacy,
        "secure_sum": secure_sum_of(settings, arm),
        "participation": settings.participation,
        "encoding": Encoding(value_bound=chosen.value_bound, value_bits=chosen.value_bits, weights=chosen.weights),
    }


def task_of(settings: Settings, task: Task) -> Task:
    """The task with what the settings say of it."""
    per_party = settings.evaluation.per_party
    return dataclasses.replace(
        task,
        initial_weights=settings.training.start,
        schedule=settings.training.schedule,
        min_classes=min(task.min_classes, settings.split.min_classes),
        held_out=task.held_out if per_party else None,
        evaluate_party=task.evaluate_party if per_party else None,
    )


def compute_of(settings: Settings, seed: int, engine: Callable[[Any], Any] | None = None) -> Compute:
    from choral.trainers import Compute

    training = settings.training
    return Compute(
        seed=seed, device=settings.device, precision=training.precision, compile=training.compile, engine=engine
    )


def keep_of(settings: Settings, arm: Arm, *, out: Path | None = None, **options: Any) -> Keep:
    """Where and what is kept of an arm. options: further fields of `Keep`."""
    from choral.trainers import Keep

    # Where and how long a coordinator waits may be another when a run goes on; what sites agreed to may not.
    apart = {"prices", "price", "serve", *(() if settings.sites != SitesSettings() else ("sites",))}
    config = {key: value for key, value in to_json(settings).items() if key not in apart}
    seen = None if settings.transcript == "none" or out is None or arm.centralized else settings.transcript
    ledgers = settings.ledgers if arm.private else None
    return Keep(out=out, config=config, transcript=seen, ledgers=ledgers, **options)


def tuned(settings: Settings, arm: Arm, seed: int, out: Path, resume: bool) -> tuple[Settings, dict[str, Any] | None]:
    """The settings with what the arm's grid, if it has one, chose for the run in ``out``; and the record of that."""
    record = _tuning(settings, arm, seed, out, resume)
    chosen = record["chosen"] if record else {}
    return dataclasses.replace(settings, training=dataclasses.replace(settings.training, **chosen)), record


def _tuning(settings: Settings, arm: Arm, seed: int, out: Path, resume: bool) -> dict[str, Any] | None:
    """What :func:`choral.trainers.centralized.tuning` records for the arm's grid; of a run that is resumed, what it had
    recorded.

    Raises: ConfigError for a private arm; what tune does.
    """
    from choral.trainers import tune
    from choral.trainers.run_folder.folder import check_empty, read_info

    if not arm.tune.grid:
        return None
    check_tuning(arm)
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

    few = dataclasses.replace(settings, split=dataclasses.replace(settings.split, min_classes=1))
    trainer = trainer_of(few, arm, seed, None)
    found = tune(
        make,
        arm.tune.grid,
        trainer,
        seed=seed,
        validation_fraction=arm.tune.validation_fraction,
    )
    return dict(found.record)


def check_tuning(arm: Arm) -> None:
    from choral.trainers.centralized.tuning import check_grid
    from choral.trainers.run_folder.describe import check_tuned

    if arm.tune.grid:
        check_tuned(arm.tune.grid, private=arm.private)
        check_grid(arm.tune.grid, arm.tune.validation_fraction)


def with_overrides(settings: Settings, arm: Arm) -> Settings:
    """The settings with what the arm sets of training and split. Raises: ConfigError if a value is out of range."""
    own = {name: value for name in ("batch_size", "learning_rate") if (value := getattr(arm, name)) is not None}
    split = settings.split if arm.reshuffle is None else dataclasses.replace(settings.split, reshuffle=arm.reshuffle)
    return dataclasses.replace(settings, split=split, training=dataclasses.replace(settings.training, **own))


def privacy_of(settings: Settings, arm: Arm, epsilon: float | None) -> Privacy | ClientPrivacy:
    """The promise of a private arm. Raises: ConfigError for a setting out of range."""
    from choral.privacy import AdaptiveClip, ClientPrivacy
    from choral.privacy.accounting.events import NEIGHBOURS
    from choral.trainers.data.own_table import check_public

    if epsilon is None:
        raise ConfigError("a private arm needs a budget", hint="set privacy.epsilon")
    if arm.centralized and unit_of(settings, arm) == "client":
        raise ConfigError("a centralized arm has no clients", hint='leave out unit = "client"')
    check_public(settings.data)
    chosen = settings.privacy
    if unit_of(settings, arm) == "record":
        if chosen.noise_multiplier is not None:
            raise ConfigError(
                "privacy.noise_multiplier is for clients, and this arm's unit is the record",
                hint="leave it out: every data owner has the noise made for what is left on its own ledger",
            )
        in_shares = chosen.noise == "distributed" and not arm.centralized and algorithm_of(settings, arm).in_shares
        given: dict[str, Any] = {
            "epsilon": epsilon,
            "delta": chosen.delta,
            "max_grad_norm": chosen.max_grad_norm,
            "epochs": settings.training.local_epochs,
            "neighbours": chosen.neighbours,
            "records_per_person": chosen.records_per_person,
            "noise": "distributed" if in_shares else "local",
            "colluders": chosen.colluders,
        }
        return chosen.for_records(given)
    if chosen.neighbours != NEIGHBOURS:
        raise ConfigError(
            f"privacy.neighbours = {chosen.neighbours!r} is for records, and this arm's unit is the client",
            hint="leave it out: of clients, one is zeroed out",
        )
    return ClientPrivacy(
        epsilon=epsilon,
        delta=chosen.delta,
        clip=chosen.clip if chosen.quantile is None else AdaptiveClip(start=chosen.clip, quantile=chosen.quantile),
        noise=chosen.noise,
        mechanism=chosen.client_mechanism,
        bits=chosen.bits,
        min_survivors=None
        if chosen.sample_rate is not None
        else chosen.min_survivors or settings.secure_sum.min_survivors,
        colluders=chosen.colluders,
        sample_rate=chosen.sample_rate,
        noise_multiplier=chosen.noise_multiplier,
    )


def algorithm_of(settings: Settings, arm: Arm) -> Algorithm:
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
    if "ridge" in known and settings.training.weight_decay:
        chosen.setdefault("ridge", settings.training.weight_decay)
    return kind(**chosen)


def secure_sum_of(settings: Settings, arm: Arm) -> SecureSum:
    from choral.protocols import Grouped, Plain

    chosen = settings.secure_sum
    made = Plain() if (arm.secure_sum or chosen.kind) == "plain" else _hiding_sum_of(settings, arm)
    if chosen.robust is None:
        return made
    return Grouped(sums=made, robust=chosen.robust, group=chosen.group, attackers=chosen.attackers)


def _hiding_sum_of(settings: Settings, arm: Arm) -> SecureSum:
    from choral.protocols import Homomorphic, Masked

    chosen = settings.secure_sum
    terms: dict[str, Any] = {name: getattr(chosen, name) for name in ("min_survivors", "corrupt", "dropouts", "cohort")}
    if (arm.secure_sum or chosen.kind) == "homomorphic":
        if chosen.trips not in (None, 4):
            raise ConfigError(f"secure_sum.trips = {chosen.trips} is for masked sums", hint="leave it out")
        return Homomorphic(key=chosen.key, server=chosen.server, **terms)
    own = {name: getattr(chosen, name) for name in ("contributors", "block")}
    return Masked(server=chosen.server or "malicious", trips=chosen.trips or 4, **own, **terms)


def unit_of(settings: Settings, arm: Arm) -> Unit:
    return arm.unit or ("record" if arm.centralized else settings.privacy.unit)
