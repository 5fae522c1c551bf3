"""The baseline in the cloud: the same task on the pooled data of all parties."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.utils.data import ConcatDataset, TensorDataset

from choral.errors import ConfigError, DataError
from choral.privacy import Privacy
from choral.trainers.centralized.data_parallel import own_device, workers_of
from choral.trainers.local_steps.resident_model import initial_model, resolve_device
from choral.trainers.run_folder.algorithm_state import AlgorithmState
from choral.trainers.run_folder.energy import EnergyMeter
from choral.trainers.run_folder.info import RoundRecord
from choral.trainers.run_folder.recorder import Recorder
from choral.trainers.run_folder.run import Run
from choral.trainers.setup import (
    NOTHING,
    OnRound,
    check_settings,
    clips_of,
    describe,
    evaluated,
    open_privacy_engines,
    recorded_model,
    rounds_paid_for,
)
from choral.trainers.task.arithmetic import Arithmetic, Precision, check_arithmetic
from choral.trainers.task.device_batches import OnDevice
from choral.trainers.task.flat_vector import Layout
from choral.trainers.task.initial_weights import Start, Weights
from choral.trainers.task.learning_rate import Schedule
from choral.trainers.task.per_party import check_held_out, per_party_of
from choral.trainers.task.seeding import forget_workers, generators_of, reseed, seeded
from choral.trainers.task.task import (
    Build,
    DivergedError,
    Evaluate,
    EvaluateParty,
    Fit,
    Loss,
    call,
    check_parties,
    checked_build,
    takes_round,
)
from choral.trainers.task.user_state import Attributes, Groups, Watched

POOLED = "pooled"


def centralize(
    *,
    build: Build,
    fit: Fit,
    evaluate: Evaluate,
    parties: Mapping[str, Any],
    rounds: int,
    seed: int = 0,
    loss: Loss | None = None,
    start: Start | None = None,
    schedule: Schedule | None = None,
    held_out: Mapping[str, Any] | None = None,
    evaluate_party: EvaluateParty | None = None,
    privacy: Privacy | None = None,
    data_parallel: bool = False,
    device: str = "cpu",
    precision: Precision = "float32",
    compile: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    tuning: Mapping[str, Any] | None = None,
    on_round: OnRound | None = None,
) -> Run:
    """Train the same task as :func:`federate` on the pooled data of all parties: what it is compared with.

    A round is one call of ``fit`` on the pooled data, so equal rounds mean equally many passes over each record. The
    starting weights are those of ``federate`` for the same seed. The optimizer lives through all rounds.
    loss: taken so that one job's functions suit both, and not called.
    privacy: record-level DP-SGD on the pooled data, with one ledger; the data itself is seen by the cloud.
    data_parallel: divide every batch among the processes that torchrun started; the run folder is the first one's, and
        every process returns the run. Not with ``privacy``, and not to be resumed. See docs/training.md.
    The other arguments and errors are those of :func:`federate`.
    """
    del loss
    changing = schedule or Schedule()
    check_settings(rounds, seed, 0.0)
    examples = check_parties(parties, least=1, min_classes=1)
    check_held_out(held_out, evaluate_party, parties, private=privacy is not None)
    _check_parallel(data_parallel, privacy, resume)
    check_arithmetic(precision, compile, private=privacy is not None, reads_records=False)
    on = own_device(resolve_device(device)) if data_parallel else resolve_device(device)
    initial = Weights.read(start) if start is not None else None
    whole = pool(list(parties.values()))
    arithmetic = Arithmetic(on, precision, compile=compile)
    info = describe("centralized", parties, examples, rounds, seed, arithmetic, privacy, config, initial, tuning)
    info = msgspec.structs.replace(info, schedule=changing.record())
    with (
        workers_of(data_parallel, on) as workers,
        Recorder.open(out if workers.first else None, info, resume=resume) as recorder,
    ):
        privacy_engines = open_privacy_engines(
            privacy, {POOLED: len(whole)}, recorder.ledger_folder, rounds - recorder.completed, recorder.clips(privacy)
        )
        recorder.keep({name: engine.ledger for name, engine in privacy_engines.items()})
        last_round, reason = rounds_paid_for(privacy_engines, recorder, rounds)
        if reason and last_round <= recorder.completed:
            if recorder.awaits(evaluate_party):
                final = recorded_model(recorder, build, parties)
                recorder.finish(per_party_of(held_out, evaluate_party, final, parties))
            return recorder.end(reason, {name: engine.spent() for name, engine in privacy_engines.items()})
        first = initial_model(build, next(iter(parties.values())), seed, initial)
        with seeded(seed, 0, POOLED):
            reseed(generators_of(build), seed, 0, POOLED)
            model, optimizer, loader = checked_build(build, whole)
        groups, attributes, watched, told = Groups(optimizer), Attributes(model), Watched(whole, loader), False
        model.to(on)
        layout = Layout(model)
        layout.check(first, "the pooled data")
        model.load_state_dict(first.state_dict())
        meter = EnergyMeter(on)
        recorder.begin(
            msgspec.structs.replace(info, parameters=layout.length, meters=meter.meters, processes=workers.size)
        )
        recorder.restore(model, layout, optimizer)
        if recorder.fresh:
            recorder.add(RoundRecord(round=0, metrics=evaluated(evaluate, model, seed), **NOTHING), model)
        own_generators = generators_of(fit, model, loader, whole)
        trained, loader = model, workers.split(loader)
        for number in range(recorder.completed + 1, last_round + 1):
            started, _ = time.perf_counter(), meter.take()
            model.train()
            groups.begin(optimizer, changing.factor(number, rounds))
            reseed(own_generators, seed, number, POOLED)
            forget_workers(loader)
            with seeded(seed, number, POOLED), workers.averaging(layout.parameters):
                arguments = (trained, optimizer, loader)
                if privacy_engines:
                    arguments = privacy_engines[POOLED].wrap(trained, optimizer, loader)
                    trained = arguments[0]
                with arithmetic.over(trained, POOLED, private=bool(privacy_engines)):
                    call(fit, arguments[0], arguments[1], OnDevice.wrap(arguments[2], on), number)
            workers.agree(model)
            groups.check(optimizer, "the pooled data")
            attributes.settle("the pooled data", takes_round=takes_round(fit))
            told = told or watched.tell("the pooled data")
            if not torch.isfinite(layout.read()).all():
                raise DivergedError(
                    f"training on the pooled data diverged in round {number}: the weights are not finite",
                    hint="lower the learning rate; the last good round is kept",
                )
            seconds, joules = time.perf_counter() - started, meter.take()
            spent = {name: engine.spent() for name, engine in privacy_engines.items()}
            entry = RoundRecord(
                round=number,
                metrics=evaluated(evaluate, model, seed),
                epsilon=spent[POOLED].epsilon if spent else None,
                **{**NOTHING, "seconds": seconds, "survivors": len(parties), "joules": joules},
            )
            recorder.add(entry, model, spent, optimizer, AlgorithmState(clips=clips_of(privacy_engines)))
            if on_round and workers.first:
                on_round(entry)
        if recorder.completed < rounds:
            return recorder.end(reason, {name: engine.spent() for name, engine in privacy_engines.items()})
        return recorder.finish(per_party_of(held_out, evaluate_party, model, parties))


def _check_parallel(data_parallel: bool, privacy: Privacy | None, resume: bool) -> None:
    if data_parallel and privacy is not None:
        raise ConfigError(
            "data_parallel with privacy: each process would clip, add noise and keep a ledger by itself, and the sum of"
            " their steps is not what the accounting covers",
            hint="train privately in one process",
        )
    if data_parallel and resume:
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
