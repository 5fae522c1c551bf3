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

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from choral.privacy import ClientPrivacy, Privacy
from choral.protocols.interface import SecureSum
from choral.protocols.masking.policy import Policy
from choral.trainers.algorithms import algorithm_named
from choral.trainers.algorithms.interface import Algorithm, LocalTrainer
from choral.trainers.federated.checks import participation_of
from choral.trainers.federated.codec import Encoding
from choral.trainers.federated.one_round import one_round
from choral.trainers.federated.participation import Participation
from choral.trainers.federated.plan import Plan
from choral.trainers.federated.session import Session
from choral.trainers.local_steps.resident_model import Resident
from choral.trainers.run_folder.keep import Keep, OnRound
from choral.trainers.run_folder.run import Run
from choral.trainers.run_folder.transcript import Detail
from choral.trainers.task.arithmetic import Compute, Precision
from choral.trainers.task.initial_weights import Start
from choral.trainers.task.learning_rate import Schedule
from choral.trainers.task.task import Build, Evaluate, EvaluateParty, Fit, Loss, Task

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
    algorithm = algorithm_named(algorithm)
    plan = Plan.of(
        Task(
            build=build,
            fit=fit,
            evaluate=evaluate,
            loss=loss,
            start=start,
            schedule=schedule,
            min_classes=min_classes,
            held_out=held_out,
            evaluate_party=evaluate_party,
        ),
        parties,
        rounds=rounds,
        algorithm=algorithm,
        privacy=privacy,
        secure_sum=secure_sum,
        participation=participation_of(algorithm, participation, cohort, dropout_rate),
        encoding=Encoding(value_bound=value_bound, value_bits=value_bits, policy=policy),
        compute=Compute(seed=seed, device=device, precision=precision, compile=compile, engine=engine),
        keep=Keep(out=out, resume=resume, config=config, tuning=tuning, transcript=transcript, on_round=on_round),
    )
    with Session.open(plan) as session:
        for number in session.rounds_left():
            session.keep(one_round(session, number))
    return session.run
