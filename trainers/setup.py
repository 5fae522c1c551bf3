"""What both kinds of training do before their rounds: describe the run, open the privacy engines of the data owners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import torch
from torch import nn

from choral.errors import ConfigError
from choral.privacy import ClientPrivacy, CorrelatedPrivacy, Ledger, LedgerError, Privacy, PrivacyEngine
from choral.privacy.accounting.events import NEIGHBOURS
from choral.privacy.dpsgd.clipping import settings_of as clipping_settings
from choral.privacy.ledgers.ledger import as_ledger
from choral.privacy.ledgers.memory_notice import notice_memory
from choral.privacy.ledgers.plans import passes_left
from choral.trainers.local_steps.resident_model import initial_model
from choral.trainers.run_folder.info import Population, RoundRecord, RunInfo, versions
from choral.trainers.run_folder.recorder import Recorder
from choral.trainers.task.arithmetic import Arithmetic
from choral.trainers.task.initial_weights import Weights
from choral.trainers.task.seeding import seeded
from choral.trainers.task.task import Build, Evaluate, TaskError, metrics_of, raw_bytes

OnRound = Callable[[RoundRecord], None]


def describe(
    kind: Literal["centralized", "federated"],
    parties: Mapping[str, Any],
    examples: Mapping[str, int],
    rounds: int,
    seed: int,
    arithmetic: Arithmetic,
    privacy: Privacy | ClientPrivacy | None,
    config: Mapping[str, Any] | None,
    start: Weights | None,
    tuning: Mapping[str, Any] | None,
    population: Population | None = None,
) -> RunInfo:
    """What is known of a run before its model is built. population: in the place of the parties' own numbers.

    Raises: ConfigError for a private run that was tuned.
    """
    if tuning is not None and privacy is not None:
        raise ConfigError(
            "tuning with privacy: its tries read the records without noise, which no budget covers",
            hint="take settings from public data, or choral.privacy.private_search",
        )
    return RunInfo(
        kind=kind,
        rounds=rounds,
        seed=seed,
        device=arithmetic.device.type,
        parties={} if population else dict(examples),
        population=population,
        precision=arithmetic.precision,
        compile=arithmetic.compile,
        parameters=0,
        privacy=_settings_of(privacy, len(parties)),
        raw_bytes={} if population else {name: raw_bytes(dataset) for name, dataset in parties.items()},
        config=dict(config or {}),
        start=start.record() if start else None,
        tuning=dict(tuning) if tuning is not None else None,
        versions=versions(),
    )


NOTHING: dict[str, Any] = {"seconds": 0.0, "survivors": 0, "bytes_up": 0, "bytes_down": 0}


def check_settings(rounds: int, seed: int, dropout_rate: float) -> None:
    if rounds < 1:
        raise ConfigError(f"expected rounds >= 1, got {rounds}", hint="20 is a start")
    if seed < 0:
        raise ConfigError(f"expected seed >= 0, got {seed}", hint="any whole number from 0")
    if not 0 <= dropout_rate < 1:
        raise ConfigError(f"expected 0 <= dropout_rate < 1, got {dropout_rate}", hint="0 loses nobody")


def _settings_of(privacy: Privacy | ClientPrivacy | None, clients: int) -> dict[str, float | int | str] | None:
    if privacy is None:
        return None
    if isinstance(privacy, ClientPrivacy):
        return privacy.settings(clients)
    settings: dict[str, float | int | str] = {
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        **clipping_settings(privacy.max_grad_norm),
        "epochs": privacy.epochs,
    }
    if privacy.neighbours != NEIGHBOURS:  # runs that do not say are of this one
        settings |= {"neighbours": privacy.neighbours}
    if privacy.records_per_person is not None:
        settings |= {"records_per_person": privacy.records_per_person}
    if isinstance(privacy, CorrelatedPrivacy):
        settings |= {"mechanism": privacy.mechanism, "bands": privacy.bands or 0}
    return settings


def evaluated(evaluate: Evaluate, model: nn.Module, seed: int) -> dict[str, float]:
    """What `metrics_of` returns, of an evaluation that draws the same random numbers after each round.

    Raises: as that does; TaskError if the evaluation changed the model, which is what would be recorded.
    """
    frozen = {name: (p, p._version) for name, p in model.named_parameters() if not p.requires_grad}
    others = {name: t.detach().clone() for name, t in model.state_dict().items() if name not in frozen}
    with seeded(seed, 0, "evaluation"):
        metrics = metrics_of(evaluate, model)
    now = model.state_dict()
    changed = [name for name, kept in others.items() if name not in now or not torch.equal(now[name], kept)]
    changed += [name for name, (parameter, version) in frozen.items() if parameter._version != version]
    if changed:
        raise TaskError(
            f"evaluate changed {changed[0]!r} of the model that is being trained", hint="evaluate a copy of it instead"
        )
    return metrics


def clips_of(privacy_engines: Mapping[str, PrivacyEngine]) -> dict[str, float]:
    """Where each data owner's adaptive clipping norm is; empty where it does not move."""
    return {name: engine.clip for name, engine in privacy_engines.items() if engine.adaptive}


def open_privacy_engines(
    privacy: Privacy | None,
    examples: Mapping[str, int],
    folder: Path | None,
    rounds_left: int,
    clips: Mapping[str, float],
) -> dict[str, PrivacyEngine]:
    """One privacy engine and one ledger per data owner; empty without privacy. clips: of adaptive clipping, resumed.

    Raises: what check_delta does; LedgerError.
    """
    if privacy is None:
        return {}
    if not isinstance(privacy, Privacy):
        raise ConfigError(
            f"privacy is a {type(privacy).__name__}, expected Privacy",
            hint="ClientPrivacy protects the parties of a federation; pooled data has none",
        )
    if (own := as_ledger(privacy.ledger)).path is not None or own.events:
        raise ConfigError(
            "Privacy(ledger=...) is one data owner's, but here every one has a ledger of its own",
            hint="leave it out; the ledgers are kept in the run's folder, so give out=FOLDER. A promise that was spent"
            " from without a file is one data owner's, too: make another one",
        )
    check_delta(privacy, examples)
    if folder is None:
        notice_memory(Ledger(), "out=FOLDER")
    privacy_engines = {}
    for name in examples:
        ledger = Ledger(folder / f"{quote(name, safe='')}.jsonl" if folder else None, holder=name)
        passes, planned = max(rounds_left, 1) * privacy.epochs, passes_left(ledger, privacy.epsilon)
        privacy_engines[name] = PrivacyEngine(
            privacy, holder=name, ledger=ledger, passes=min(passes, planned or passes), clip=clips.get(name)
        )
    return privacy_engines


def rounds_paid_for(privacy_engines: Mapping[str, PrivacyEngine], recorder: Recorder, rounds: int) -> tuple[int, str]:
    """How far a run can go, `rounds` or less, and why no further.

    A resumed run goes on with the plans on its ledgers. The pass of a round that was cut short is paid for and gone, so
    that repeating that round leaves one too few at the end.
    Raises: LedgerError if a ledger holds less than the run has recorded.
    """
    last, reason = rounds, ""
    for name, privacy_engine in privacy_engines.items():
        spent, before = privacy_engine.spent(), recorder.spent.get(name)
        if before and spent.steps < before.steps:
            raise LedgerError(
                f"the ledger of {name!r} holds {spent.steps} noisy steps, but the run has recorded {before.steps}",
                hint="put back the ledger file that belongs to this run",
            )
        if not recorder.completed:
            continue
        left = passes_left(privacy_engine.ledger, privacy_engine.privacy.epsilon)
        # Without a plan: privacy engines use a budget to within 0.1 %; what is left below twice that pays for nothing.
        if left is None and spent.epsilon >= (1 - 2e-3) * privacy_engine.privacy.epsilon:
            left = 0
        if left is not None and (paid := recorder.completed + left // privacy_engine.privacy.epochs) < last:
            last, reason = paid, f"the budget of {name} is spent; ended after round {paid}"
    return last, reason


def recorded_model(recorder: Recorder, build: Build, parties: Mapping[str, Any]) -> nn.Module:
    """The model with the weights that were recorded last, on the CPU."""
    model = initial_model(build, next(iter(parties.values())), 0)
    model.load_state_dict(recorder.run().state)
    return model


def check_delta(privacy: Privacy, examples: Mapping[str, int]) -> None:
    """Raises: ConfigError if delta is not below 1/n for some holder: it would allow one record in the clear."""
    for name, count in examples.items():
        if privacy.delta >= 1 / count:
            raise ConfigError(
                f"delta = {privacy.delta:g} is not below 1/n = {1 / count:.3g} for party {name!r} with {count} records",
                hint="choose a delta well below 1 over the smallest party's record count",
            )
