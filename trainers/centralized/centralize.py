"""The baseline in the cloud: the same task on the pooled data of all parties."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
from torch.utils.data import ConcatDataset, TensorDataset

from choral.errors import ConfigError, DataError
from choral.privacy import Privacy, PrivacyEngine
from choral.trainers.centralized.data_parallel import Workers, own_device, workers_of
from choral.trainers.local_steps.resident_model import initial_model
from choral.trainers.run_folder.algorithm_state import AlgorithmState
from choral.trainers.run_folder.describe import NOTHING, check_tuned, describe
from choral.trainers.run_folder.energy import EnergyMeter, Stopwatch
from choral.trainers.run_folder.evidence.sealing import seal
from choral.trainers.run_folder.info import RoundRecord, RoundTimes, RunInfo
from choral.trainers.run_folder.keep import Keep, OnRound
from choral.trainers.run_folder.owner_privacy import clips_of, open_privacy_engines, rounds_paid_for
from choral.trainers.run_folder.recorder import Recorder
from choral.trainers.run_folder.run import Run
from choral.trainers.task import arguments
from choral.trainers.task.arithmetic import Arithmetic, Compute, check_arithmetic, resolve_device
from choral.trainers.task.device_batches import OnDevice
from choral.trainers.task.evaluation import evaluated
from choral.trainers.task.flat_vector import Layout, all_finite
from choral.trainers.task.initial_weights import Weights
from choral.trainers.task.learning_rate import Schedule
from choral.trainers.task.per_party import check_held_out, per_party_of
from choral.trainers.task.seeding import forget_workers, generators_of, reseed, seeded
from choral.trainers.task.task import (
    DivergedError,
    Task,
    call,
    check_parties,
    checked_build,
    parties_of,
    takes_round,
)
from choral.trainers.task.user_state import Attributes, Groups, Watched

POOLED = "pooled"
_PLACE = "the pooled data"  # in messages, where a party would be named


def centralize(
    task: Task,
    parties: Mapping[str, Any] | None = None,
    *,
    rounds: int,
    privacy: Privacy | None = None,
    data_parallel: bool = False,
    compute: Compute | None = None,
    keep: Keep | None = None,
) -> Run:
    """Train the same task as :func:`federate` on the pooled data of all parties: what it is compared with.

    A round is one call of ``fit`` on the pooled data, so equal rounds mean equally many passes over each record. The
    initial weights are those of ``federate`` for the same seed. The optimizer lives through all rounds.
    privacy: record-level DP-SGD on the pooled data, with one ledger; the data itself is seen by the cloud.
    data_parallel: divide every batch among the processes that torchrun started; the run folder is the first one's, and
        every process returns the run. Not with ``privacy``, and not to be resumed. See docs/training.md.
    The other arguments and errors are those of :func:`federate`. The engine and ``min_classes`` are of parties, and not
    used here.
    """
    compute, keep = Compute() if compute is None else compute, Keep() if keep is None else keep
    for value, name, kind in ((task, "task", Task), (compute, "compute", Compute), (keep, "keep", Keep)):
        arguments.instance(value, name, kind, f"{kind.__name__}(...)")
    if privacy is not None:
        hint = "ClientPrivacy protects the parties of a federation; pooled data has none"
        arguments.instance(privacy, "privacy", Privacy, hint)
    parties = parties_of(task, parties)
    rounds = arguments.whole_number(rounds, "rounds", 1, "20 is a start")
    changing = task.schedule or Schedule()
    examples = check_parties(parties, least=1, min_classes=1)
    check_held_out(task.held_out, task.evaluate_party, parties, private=privacy is not None)
    _check_parallel(data_parallel, privacy, keep)
    check_arithmetic(compute.precision, compute.compile, private=privacy is not None, reads_records=False)
    on = own_device(resolve_device(compute.device)) if data_parallel else resolve_device(compute.device)
    initial = Weights.read(task.initial_weights) if task.initial_weights is not None else None
    whole, arithmetic = pool(list(parties.values())), Arithmetic(on, compute.precision, compile=compute.compile)
    job = _Job(replace(task, parties=parties), whole, privacy, changing, initial, arithmetic)
    info = describe("centralized", parties, examples, rounds, compute.seed, arithmetic, privacy, keep, initial)
    stated = None if task.standardised is None else dict(task.standardised)
    info = msgspec.structs.replace(info, schedule=changing.record(), standardised=stated)
    with (
        workers_of(data_parallel, on) as workers,
        Recorder.open(keep.out if workers.first else None, info, resume=keep.resume, ledgers=keep.ledgers) as recorder,
    ):
        with keep.telling(rounds, "cloud") as tell:
            run = _train(job, info, recorder, workers, tell if workers.first else None)
        seal(run)
        return run


@dataclass(frozen=True)
class _Job:
    """What is trained, and how. whole: the pooled data. initial: None where the seed makes the weights."""

    task: Task
    whole: Any
    privacy: Privacy | None
    schedule: Schedule
    initial: Weights | None
    arithmetic: Arithmetic


def _train(job: _Job, info: RunInfo, recorder: Recorder, workers: Workers, on_round: OnRound | None) -> Run:
    """All rounds that are left and paid for, each recorded."""
    task, seed, held = job.task, info.seed, (job.task.held_out, job.task.evaluate_party)
    left, clips = info.rounds - recorder.completed, recorder.clips(job.privacy)
    engines = open_privacy_engines(job.privacy, {POOLED: len(job.whole)}, recorder.ledger_folder, left, clips)
    recorder.keep({name: engine.ledger for name, engine in engines.items()})
    last_round, reason = rounds_paid_for(engines, recorder, info.rounds)
    if reason and last_round <= recorder.completed:
        return recorder.end(reason, {name: engine.spent() for name, engine in engines.items()})
    pooled = _Pooled(job, seed)
    model, meter = pooled.model, EnergyMeter(job.arithmetic.device)
    parameters = pooled.layout.length
    recorder.begin(msgspec.structs.replace(info, parameters=parameters, meters=meter.meters, processes=workers.size))
    recorder.restore(model, pooled.layout, pooled.optimizer)
    if recorder.fresh:
        recorder.add(RoundRecord(round=0, metrics=evaluated(task.evaluate, model, seed), **NOTHING), model)
    pooled.divide(workers)
    for number in range(recorder.completed + 1, last_round + 1):
        started, _ = time.perf_counter(), meter.take()
        with (training := Stopwatch()):
            pooled.train(number, job.schedule.factor(number, info.rounds), engines.get(POOLED))
        seconds, joules = time.perf_counter() - started, meter.take()
        spent = {name: engine.spent() for name, engine in engines.items()}
        with (evaluating := Stopwatch()):
            metrics = evaluated(task.evaluate, model, seed)
        entry = RoundRecord(
            round=number,
            metrics=metrics,
            epsilon=spent[POOLED].epsilon if spent else None,
            **{**NOTHING, "seconds": seconds, "survivors": len(task.parties), "joules": joules},
            times=_times(training, evaluating) if workers.size == 1 else None,
        )
        recorder.add(entry, model, spent, pooled.optimizer, AlgorithmState(clips=clips_of(engines)))
        if on_round:
            on_round(entry)
    if recorder.completed < info.rounds:
        return recorder.end(reason, {name: engine.spent() for name, engine in engines.items()})
    return recorder.finish(per_party_of(*held, model, task.parties))


def _times(training: Stopwatch, evaluation: Stopwatch) -> RoundTimes:
    return RoundTimes(
        training=training.seconds,
        server=0.0,
        evaluation=evaluation.seconds,
        processor=training.processor,
        training_processor=training.processor,
    )


class _Pooled:
    """The model on the pooled data, with what lives through all rounds: optimizer, loader, and what watches them."""

    def __init__(self, job: _Job, seed: int) -> None:
        self._job, self._seed, build = job, seed, job.task.build
        first = initial_model(build, next(iter(job.task.parties.values())), seed, job.initial)
        with seeded(seed, 0, POOLED):
            reseed(generators_of(build), seed, 0, POOLED)
            self.model, self.optimizer, self._loader = checked_build(build, job.whole)
        self._groups, self._attributes = Groups(self.optimizer), Attributes(self.model)
        self._watched, self._told = Watched(job.whole, self._loader), False
        self.model.to(job.arithmetic.device)
        self.layout = Layout(self.model)
        self.layout.check(first, _PLACE)
        self.model.load_state_dict(first.state_dict())

    def divide(self, workers: Workers) -> None:
        """Give each process its share of the batches; to be called once, before the first round."""
        fit, whole = self._job.task.fit, self._job.whole
        self._generators = generators_of(fit, self.model, self._loader, whole)
        self._trained, self._loader, self._workers = self.model, workers.split(self._loader), workers

    def train(self, number: int, factor: float, engine: PrivacyEngine | None) -> None:
        """One round: one call of ``fit``. factor: of the learning rates.

        Raises: DivergedError if the weights are not finite; TaskError for what ``fit`` must not change.
        """
        fit, arithmetic = self._job.task.fit, self._job.arithmetic
        self.model.train()
        self._groups.begin(self.optimizer, factor)
        seed = self._seed if engine is None else None  # whose batches are sampled in secret
        reseed(self._generators, seed, number, POOLED)
        forget_workers(self._loader)
        with seeded(seed, number, POOLED), self._workers.averaging(self.layout.parameters):
            arguments = (self._trained, self.optimizer, self._loader)
            if engine is not None:
                arguments = engine.wrap(*arguments)
                self._trained = arguments[0]
            with arithmetic.over(self._trained, POOLED, private=engine is not None):
                call(fit, arguments[0], arguments[1], OnDevice.wrap(arguments[2], arithmetic.device), number)
        self._workers.agree(self.model)
        self._groups.check(self.optimizer, _PLACE)
        self._attributes.settle(_PLACE, takes_round=takes_round(fit))
        self._told = self._told or self._watched.tell(_PLACE)
        if not all_finite(self.layout.read()):
            raise DivergedError(
                f"training on {_PLACE} diverged in round {number}: the weights are not finite",
                hint="lower the learning rate; the last good round is kept",
            )


def _check_parallel(data_parallel: bool, privacy: Privacy | None, keep: Keep) -> None:
    check_tuned(keep.tuning, private=privacy is not None)
    arguments.flag(data_parallel, "data_parallel")
    if keep.transcript is not None:
        raise ConfigError("a transcript is of a secure sum, and pooled data has none", hint="leave transcript out")
    if data_parallel and privacy is not None:
        raise ConfigError(
            "data_parallel with privacy: each process would clip, add noise and keep a ledger by itself, and the sum of"
            " their steps is not what the accounting covers",
            hint="train privately in one process",
        )
    if data_parallel and keep.resume:
        raise ConfigError("a data_parallel run cannot be resumed", hint="resume it in one process, without torchrun")


def pool(datasets: Sequence[Any]) -> Any:
    """One dataset of all records, in the order of the parties.

    Raises: DataError if tensors of different shapes meet.
    """
    if all(type(dataset) is TensorDataset for dataset in datasets):
        columns = zip(*(dataset.tensors for dataset in datasets), strict=True)
        try:
            return TensorDataset(*(torch.cat(column) for column in columns))
        except (RuntimeError, ValueError):
            shapes = sorted({str([tuple(t.shape[1:]) for t in dataset.tensors]) for dataset in datasets})
            raise DataError(f"the parties' records differ in shape: {', '.join(shapes)}") from None
    return ConcatDataset(datasets)
