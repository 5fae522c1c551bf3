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

from collections.abc import Mapping
from typing import Any

from choral.privacy import ClientPrivacy, Privacy
from choral.protocols.interface import SecureSum
from choral.trainers.algorithms.interface import Algorithm
from choral.trainers.federated.codec import Encoding
from choral.trainers.federated.one_round import one_round
from choral.trainers.federated.participation import Participation
from choral.trainers.federated.plan import Plan
from choral.trainers.federated.session import Session
from choral.trainers.run_folder.keep import Keep
from choral.trainers.run_folder.run import Run
from choral.trainers.task.arithmetic import Compute
from choral.trainers.task.task import Task


def federate(
    task: Task,
    parties: Mapping[str, Any] | None = None,
    *,
    rounds: int,
    algorithm: Algorithm | str | None = None,
    privacy: Privacy | ClientPrivacy | None = None,
    secure_sum: SecureSum | str | None = None,
    participation: Participation | None = None,
    encoding: Encoding | None = None,
    compute: Compute | None = None,
    keep: Keep | None = None,
) -> Run:
    """Train one model over parties that keep their data.

    task: the user's own functions, ``Task(build=..., fit=..., evaluate=...)``: what is trained, and how it is judged.
    parties: name -> map-style dataset; at least two, none empty; by default the task's. With a cohort also
        `VirtualParties`, made on demand.
    algorithm: ``FedAvg()`` (default), another of ``choral.trainers.algorithms``, or its name as in TOML; see
        docs/algorithms.md.
    privacy: ``Privacy(...)``: record-level differential privacy inside each party, each with its own ledger, sample
        rate and noise. ``ClientPrivacy(...)``: client-level, for each party as a whole: updates are clipped, the mean
        is noisy, all parties weigh the same, and one ledger counts for all. None trains without.
    secure_sum: ``Plain()`` (default: the server sees each update), ``Masked(...)``, ``Homomorphic(...)``, or a name as
        in TOML: "plain", "masked", "homomorphic".
    participation: who takes part in a round, and who drops out: `Participation`. By default everybody, always.
    encoding: how updates become whole numbers, what a party may count for, and what parties accept: `Encoding`.
    compute: seed, device, arithmetic, and who computes at the parties: `Compute`.
    keep: the run's folder, resuming, the transcript, and what is called after each round: `Keep`.

    A party whose training fails (its ``fit`` raises, its weights are not finite, its update is beyond the bound) drops
    out of that round: named in the history, and with its reason on the log "choral.trainers". With ``ClientPrivacy`` it
    sends a change of nothing instead. The run ends where all fail, or too few are left.

    Raises: ConfigError, DataError, TaskError, InitialWeightsError, DivergedError, RunFolderError (this package), and
        what privacy and the protocol raise: BudgetExceededError, UnsupportedModelError, EncodingError, ProtocolError.
        Rounds already completed stay in the run's folder.
    """
    plan = Plan.of(
        task,
        parties,
        rounds=rounds,
        algorithm=algorithm,
        privacy=privacy,
        secure_sum=secure_sum,
        participation=participation,
        encoding=encoding,
        compute=compute,
        keep=keep,
    )
    with Session.open(plan) as session:
        for number in session.rounds_left():
            session.keep(one_round(session, number))
    return session.run
