"""Federated training in one process: the way of a round, from local training to the next global model.

    server:  ask                   weights -> exchange      float32, shape (d,)      Algorithm.round
    party:   local training        exchange -> result       float32, shape (d,)      LocalTrainer.do
    party:   answer                result  -> vector        float32, shape (l,)      Algorithm.answer
    party:   encode                vector  -> integers      int64, shape (D,)        codec.Codec.encode
    parties: secure sum            integers -> their sum    int64, shape (D,)        protocols.SecureSum
    server:  decode, step          sum -> mean, weights     float64, shape (l,)      Algorithm.round

Some algorithms have several exchanges in a round. D = l + 1: the extra coordinate carries the weights of the mean, so
the server needs no party's example count in the clear. With client-level privacy every party weighs the same, and D is
what the noise's encoding pads to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from choral.errors import ConfigError
from choral.privacy import ClientPrivacy, Privacy, PrivacyEngine, Spent
from choral.protocols import Plain
from choral.protocols.interface import SecureSum, SumSession
from choral.protocols.masking.policy import Policy, check_policy
from choral.protocols.tap import watched_by
from choral.trainers.algorithms import algorithm_named
from choral.trainers.algorithms.interface import Algorithm, FederationInfo, LocalTrainer
from choral.trainers.engines.fastest import Fastest
from choral.trainers.engines.sharded import RankGroup, RankSetup, Sharded, led
from choral.trainers.federated.checks import check_fits, check_participation, check_patience, participation_of
from choral.trainers.federated.codec import Codec, WeightedCodec, cap_of, open_clients
from choral.trainers.federated.failures import with_reasons
from choral.trainers.federated.participation import Clock, Participation
from choral.trainers.federated.rounds import Federation, check_promises, open_sessions
from choral.trainers.federated.virtual_parties import census_of
from choral.trainers.local_steps.resident_model import Resident, recorded_model, resolve_device
from choral.trainers.run_folder.describe import NOTHING, OnRound, check_settings, describe
from choral.trainers.run_folder.energy import EnergyMeter
from choral.trainers.run_folder.info import RoundRecord, RunInfo
from choral.trainers.run_folder.owner_privacy import clips_of, open_privacy_engines, rounds_paid_for
from choral.trainers.run_folder.recorder import Recorder
from choral.trainers.run_folder.run import Run
from choral.trainers.run_folder.transcript import Detail, Transcript
from choral.trainers.task.arithmetic import Arithmetic, Precision, check_arithmetic
from choral.trainers.task.evaluation import evaluated
from choral.trainers.task.initial_weights import Start, Weights
from choral.trainers.task.learning_rate import Schedule
from choral.trainers.task.per_party import check_held_out, per_party_of
from choral.trainers.task.task import Build, Evaluate, EvaluateParty, Fit, Loss

Engine = Callable[[Resident], LocalTrainer]


def federate(
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
    algorithm: Algorithm | str | None = None,
    engine: Engine | None = None,
    privacy: Privacy | ClientPrivacy | None = None,
    secure_sum: SecureSum | None = None,
    policy: Policy | None = None,
    value_bound: float = 16.0,
    value_bits: int = 28,
    dropout_rate: float = 0.0,
    cohort: int | None = None,
    participation: Participation | None = None,
    min_classes: int = 2,
    device: str = "cpu",
    precision: Precision = "float32",
    compile: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    tuning: Mapping[str, Any] | None = None,
    transcript: Detail | None = None,
    on_round: OnRound | None = None,
) -> Run:
    """Train one model over parties that keep their data.

    build, fit, evaluate: the user's own functions: ``build(dataset) -> (model, optimizer, loader)``,
        ``fit(model, optimizer, loader)`` trains in place, ``evaluate(model) -> float`` or a dict of floats. A ``fit``
        with a parameter ``round`` is given the number of the round, from 1.
    schedule: of the optimizer's learning rates from round to round, as :class:`Schedule` says.
    parties: name -> map-style dataset; at least two, none empty. A party whose labels can be read cheaply must have
        ``min_classes`` classes. With a cohort also `VirtualParties`, made on demand: a round then costs what its cohort
        costs, however many there are.
    loss: ``loss(model, batch) -> losses``, one per record, shape (n,), for algorithms that need gradients.
    start: a state dict, or the path of a .safetensors file, to start from in the place of the weights that ``build``
        and ``seed`` make. Only trainable parameters are trained, sent and summed; see docs/training.md. What the
        weights tell of the data that they were trained on is not in this run's budget.
    held_out, evaluate_party: name -> records that the party held back, and ``evaluate_party(model, dataset)``, which
        returns what ``evaluate`` does. Given both, the model after the last round is evaluated at each party with at
        least five such records, and run.json names them (``per_party``). These numbers come from held-out records **in
        the clear: no privacy and no secure sum covers them**. Records that were trained on are refused.
    algorithm: ``FedAvg()`` (default), another of ``choral.trainers.algorithms``, or its name as in TOML; see
        docs/algorithms.md.
    engine: who computes at the parties, as a function of the resident trainer: ``Direct``, ``Cohort``, or the default
        ``Fastest`` of ``choral.trainers.engines``. They differ from the resident trainer only where fit is an `Epochs`.
    privacy: ``Privacy(...)``: record-level differential privacy inside each party, each with its own ledger, sample
        rate and noise. ``ClientPrivacy(...)``: client-level, for each party as a whole: updates are clipped, the mean
        is noisy, all parties weigh the same, and one ledger counts for all. None trains without.
    secure_sum: ``Plain()`` (default: the server sees each update), ``Masked(...)`` or ``Homomorphic(...)``.
    policy: what the parties of this rehearsal accept, whatever ``secure_sum`` proposes: ``Policy(corrupt=..., ...)``,
        as a site has it, so that what would be refused there is refused here. Its directory is filled in, and its
        encoding too where it has none. By default the parties hold what is proposed against ``secure_sum``'s settings.
    value_bound, value_bits: the fixed-point range and resolution of an update's coordinates. A party whose
        update is beyond the range drops out; it is never clipped or wrapped. With ``Plain`` and no transcript there is
        no bound: what is beyond is sent as it is. Not used with ``ClientPrivacy``.
    cohort: how many parties each round selects, drawn by the operating system (`Participation.draw`); by default all.
        The server sees who they are, so every round is charged as if all took part. A secure sum is opened over the
        cohort alone, and must withstand all its colluders there: see ``Masked.cohort``.
    dropout_rate: chance, per party and round, to drop out after the key exchange (to rehearse failures).
    participation: all that, and hours of the day, slow devices, losses at each step, rounds that fail and are
        retried, in simulated time: `Participation`. ``cohort`` and ``dropout_rate`` are short for two parts of it.
    seed: decides initial weights, data order and rehearsed dropouts: torch's, numpy's and Python's generators, and
        those that loader, dataset and functions have of their own, are seeded anew for each round and party. It never
        reaches noise, sampling for privacy, keys or masks.
    device: "cpu", "cuda", "mps" or "auto"; the model and the batches that ``fit`` sees are on it.
    precision: "bf16" computes the model's calls in ``fit`` under torch.autocast; weights and updates stay float32.
    compile: compile the model (torch.compile), where the parties take turns. Neither with an algorithm that reads
        gradients of records; not both with record-level privacy. See docs/engines.md.
    out, resume: keep the run in a folder as it goes, and continue it there. config: settings to record in it.
    tuning: the ``record`` of :func:`choral.trainers.centralized.tuning`, if that chose the settings.
    transcript: record what the server sees in ``out``, for the audit: "digests" of the messages, the "messages", or a
        "rehearsal", which also writes down **every party's update in the clear** and is for harmless data only.
    on_round: called after each completed round.
    A party whose training fails (its ``fit`` raises, its weights are not finite, its update is beyond the bound) drops
    out of that round: named in the history, and with its reason on the log "choral.trainers". With ``ClientPrivacy`` it
    sends a change of nothing instead. The run ends where all fail, or too few are left.

    Raises: ConfigError, DataError, TaskError, InitialWeightsError, DivergedError, RunFolderError; of privacy, protocol
        BudgetExceededError, UnsupportedModelError, EncodingError, ProtocolError. Completed rounds stay in ``out``.
    """
    secure_sum = secure_sum if secure_sum is not None else Plain()
    check_settings(rounds, seed, dropout_rate)
    if policy is not None:
        check_policy(policy)
    algorithm = algorithm_named(algorithm)
    check_fits(algorithm, privacy, loss)
    participation = participation_of(algorithm, participation, cohort, dropout_rate)
    census = census_of(parties, participation=participation, privacy=privacy, min_classes=min_classes)
    examples, names = census.examples, census.names
    check_held_out(held_out, evaluate_party, parties, private=privacy is not None)
    on = resolve_device(device)
    initial = Weights.read(start) if start is not None else None
    check_arithmetic(precision, compile, private=isinstance(privacy, Privacy), reads_records=algorithm.needs_loss)
    check_participation(algorithm, participation, len(parties))
    check_patience(algorithm, participation, privacy, secure_sum.name)
    if schedule is not None and not schedule.constant and algorithm.needs_loss:
        raise ConfigError(
            f"the schedule is of the learning rate of fit, which {algorithm.kind} does not call",
            hint="leave the schedule out, or use FedAvg, FedProx, SCAFFOLD, FedAdam, FedYogi or FedNova",
        )
    arithmetic = Arithmetic(on, precision, compile=compile)
    info = describe(
        "federated", parties, examples, rounds, seed, arithmetic, privacy, config, initial, tuning, census.population
    )
    info = msgspec.structs.replace(
        info,
        algorithm=algorithm.record(),
        participation=participation.record(),
        schedule=schedule.record() if schedule else None,
        releases=tuple(asdict(release) for release in algorithm.releases),
    )

    def trainer_of(privacy_engines: Mapping[str, PrivacyEngine]) -> tuple[Resident, LocalTrainer]:
        resident = Resident(
            build=build,
            fit=fit,
            datasets=census.datasets,
            privacy_engines=privacy_engines,
            seed=seed,
            device=on,
            loss=loss,
            start=initial,
            first=names[0],
            seats=census.seats,
            arithmetic=arithmetic,
            schedule=schedule,
            rounds=rounds,
        )
        return resident, engine(resident) if engine else Fastest(resident)

    ranks = RankGroup.join()
    records = None if isinstance(privacy, ClientPrivacy) else privacy
    if ranks is not None:
        _check_shared(ranks, records, out, len(parties))
        if ranks.rank:
            return ranks.follow(lambda told: trainer_of(_privacy_engines_here(ranks, told, records, examples))[1])
    with (
        led(ranks) as share,
        Recorder.open(out, info, resume=resume) as recorder,
        Transcript(Path(out) if out else None, transcript, recorder.sealed) as seen,
        watched_by(seen.watcher),
    ):
        clients = open_clients(privacy, recorder) if isinstance(privacy, ClientPrivacy) else None
        rounds_left, clips = rounds - recorder.completed, recorder.clips(privacy)
        privacy_engines = open_privacy_engines(records, examples, recorder.ledger_folder, rounds_left, clips)
        recorder.keep({name: engine.ledger for name, engine in privacy_engines.items()})
        last_round, reason = (
            clients.rounds_paid_for(rounds, 1) if clients else rounds_paid_for(privacy_engines, recorder, rounds)
        )
        if reason and last_round <= recorder.completed:
            if recorder.awaits(evaluate_party):
                final = recorded_model(recorder, build, parties)
                recorder.finish(per_party_of(held_out, evaluate_party, final, parties))
            return share(recorder.end(reason, clients.spent() if clients else _spent(privacy_engines)))
        resident, trainer = trainer_of(privacy_engines)
        resident.check_batches()
        if ranks is not None:
            folder = recorder.ledger_folder
            ranks.begin(RankSetup(rounds_left=rounds_left, folder=str(folder) if folder else None, clips=clips))
            trainer = Sharded(ranks, trainer, examples, sticky=bool(privacy_engines))
        federation = FederationInfo(
            parties=len(parties),
            length=resident.layout.length,
            examples=census.total,
            largest=cap_of(census.largest),
            value_bound=value_bound,
        )
        channels = algorithm.channels(federation)
        first = tuple(names[: participation.fewest(len(names))])  # stands for every cohort: no sum is over fewer
        roster = first if census.population else tuple(names)
        if clients:
            sums = sum(not channel.once for channel in channels.values())
            last_round, reason = clients.rounds_paid_for(rounds, sums)
            codecs: dict[str, Codec] = dict.fromkeys(
                channels,
                clients.codec(roster, federation.parties, federation.length, rounds, sums, most=participation.cohort),
            )
        else:
            codecs = {
                name: WeightedCodec(
                    examples,
                    channel,
                    bound=value_bound,
                    value_bits=value_bits,
                    privacy_engines=privacy_engines,
                    cap=federation.largest,
                    roster=roster,
                    in_clear=secure_sum.name == "plain" and transcript is None,
                )
                for name, channel in channels.items()
            }
        last = list(codecs)[-1]
        if transcript is not None and len(channels) > 1:
            raise ConfigError(
                f"{algorithm.kind} has several sums in a round, and a transcript is of one",
                hint="record one of FedAvg; the messages of each sum are alike",
            )
        opened = partial(open_sessions, secure_sum, codecs, seen, parties=len(names), policy=policy)
        rooms = opened(roster=None if participation.everybody else first)
        if not participation.everybody and len(first) < (most := participation.expected(len(names))):
            full = opened(roster=tuple(names[:most]))
            check_promises(rooms, len(first), full, most)
        meter = EnergyMeter(on)
        recorder.begin(_complete(info, resident, secure_sum, rooms[last], codecs[last], meter))
        seen.flush()
        weights = recorder.restore(resident.model, resident.layout)
        running = Federation(
            algorithm=algorithm,
            trainer=trainer,
            federation=federation,
            names=names,
            examples=examples,
            codecs=codecs,
            sessions=rooms,
            memory=recorder.algorithm_state(),
            participation=participation,
            secure_sum=secure_sum,
            seed=seed,
            seen=seen,
            draws=seed if participation.draw == "seed" or participation.everybody else recorder.draws(),
            policy=policy,
            shapes=resident.layout.shapes,
            succeeded=sum(not entry.failed for entry in recorder.history[1:]),
        )
        if recorder.fresh:
            untrained = RoundRecord(round=0, metrics=evaluated(evaluate, resident.model, seed), **NOTHING)
            recorder.add(untrained, resident.model, sealed=seen.sealed)
        for number in range(recorder.completed + 1, last_round + 1):
            started, _ = time.perf_counter(), meter.take()
            simulated = _next_start(participation.clock, recorder.history)
            weights, traffic = running.round(weights, number, simulated)
            if traffic.failed and _failed_in_a_row(recorder.history) >= participation.patience:
                raise with_reasons(traffic.failed, traffic.errors)
            seen.flush()
            resident.layout.write(weights)
            seconds, joules = time.perf_counter() - started, meter.take()
            spent = codecs[last].spent()
            entry = RoundRecord(
                round=number,
                metrics=evaluated(evaluate, resident.model, seed),
                seconds=seconds,
                survivors=traffic.survivors,
                bytes_up=traffic.bytes_up,
                bytes_down=traffic.bytes_down,
                epsilon=max((cost.epsilon for cost in spent.values()), default=None),
                clip=codecs[last].clip,
                joules=joules,
                selected=traffic.asked,
                failed=str(traffic.failed or ""),
                dropped=traffic.dropped,
                largest=codecs[last].largest if not traffic.failed else None,
                simulated_start=simulated if participation.timed else None,
                simulated_seconds=traffic.seconds if participation.timed else None,
            )
            running.memory.clips = {} if ranks is not None else clips_of(privacy_engines)  # other ranks keep theirs
            recorder.add(entry, resident.model, spent, algorithm_state=running.memory, sealed=seen.sealed)
            if on_round:
                on_round(entry)
        if recorder.completed < rounds:
            return share(recorder.end(reason, codecs[last].spent()))
        return share(recorder.finish(per_party_of(held_out, evaluate_party, resident.model, parties)))


def _next_start(clock: Clock, history: Sequence[RoundRecord]) -> float:
    """When the round after these begins, in simulated seconds."""
    last = history[-1]
    if last.simulated_start is None or last.simulated_seconds is None:
        return clock.first
    return clock.next(last.simulated_start, last.simulated_seconds)


def _failed_in_a_row(history: Sequence[RoundRecord]) -> int:
    return next(count for count, entry in enumerate(reversed(history)) if not entry.failed)


def _check_shared(ranks: RankGroup, privacy: Privacy | None, out: str | Path | None, parties: int) -> None:
    """Raises: ConfigError if ledgers would have to be known to several processes and are not in files, or if a process
    would keep none.
    """
    if privacy is None:
        return
    if out is None:
        raise ConfigError(
            "several processes keep the ledgers of one run, which must be files then", hint="give out=FOLDER"
        )
    if parties < ranks.size:
        raise ConfigError(
            f"{ranks.size} processes for {parties} private parties, each of which stays at one process",
            hint=f"start at most {parties}",
        )


def _privacy_engines_here(
    ranks: RankGroup, told: RankSetup, privacy: Privacy | None, examples: Mapping[str, int]
) -> dict[str, PrivacyEngine]:
    """The privacy engines of the parties that stay at this rank."""
    if privacy is None:
        return {}
    here = {party: examples[party] for party in ranks.parties_of(ranks.rank, examples)}
    return open_privacy_engines(privacy, here, Path(told.folder) if told.folder else None, told.rounds_left, told.clips)


def _complete(
    info: RunInfo, resident: Resident, secure_sum: SecureSum, session: SumSession, codec: Codec, meter: EnergyMeter
) -> RunInfo:
    return msgspec.structs.replace(
        info,
        parameters=resident.layout.length,
        secure_sum={"name": secure_sum.name, **session.statement},
        fixed_point=codec.fixed_point,
        meters=meter.meters,
    )


def _spent(privacy_engines: Mapping[str, PrivacyEngine]) -> dict[str, Spent]:
    return {name: engine.spent() for name, engine in privacy_engines.items()}
