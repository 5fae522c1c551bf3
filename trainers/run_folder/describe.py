"""What is known of a run before its rounds: its settings, checked, as run.json holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from choral.errors import ConfigError
from choral.privacy import ClientPrivacy, CorrelatedPrivacy, Privacy
from choral.privacy.accounting.events import NEIGHBOURS
from choral.privacy.dpsgd.clip_settings import settings_of as clipping_settings
from choral.trainers.run_folder.info import Population, RunInfo, versions
from choral.trainers.run_folder.keep import Keep
from choral.trainers.task.arithmetic import Arithmetic
from choral.trainers.task.initial_weights import Weights
from choral.trainers.task.task import raw_bytes

NOTHING: dict[str, Any] = {"seconds": 0.0, "survivors": 0, "bytes_up": 0, "bytes_down": 0}


def describe(
    kind: Literal["centralized", "federated"],
    parties: Mapping[str, Any],
    examples: Mapping[str, int],
    rounds: int,
    seed: int,
    arithmetic: Arithmetic,
    privacy: Privacy | ClientPrivacy | None,
    keep: Keep,
    initial: Weights | None,
    population: Population | None = None,
) -> RunInfo:
    """What is known of a run before its model is built. population: in the place of the parties' own numbers."""
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
        privacy=settings_of(privacy, len(parties)),
        raw_bytes={} if population else {name: raw_bytes(dataset) for name, dataset in parties.items()},
        config=dict(keep.config or {}),
        start=initial.record() if initial else None,
        tuning=dict(keep.tuning) if keep.tuning is not None else None,
        versions=versions(),
        ledgers="run" if keep.ledgers is None else "data",
    )


def check_tuned(tuning: object, *, private: bool) -> None:
    """Raises: ConfigError for a private run that was tuned."""
    if tuning is not None and private:
        raise ConfigError(
            "tuning with privacy: its tries read the records without noise, which no budget covers",
            hint="take settings from public data, or choral.privacy.private_search",
        )


def settings_of(privacy: Privacy | ClientPrivacy | None, clients: int) -> dict[str, float | int | str] | None:
    """The promise as plain data; None without."""
    if privacy is None:
        return None
    if isinstance(privacy, ClientPrivacy):
        return privacy.settings(clients)
    settings: dict[str, float | int | str] = {
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        **clipping_settings(privacy.max_grad_norm),
    }
    if privacy.noise == "distributed":
        settings |= {"noise": privacy.noise, "colluders": privacy.colluders}
    else:
        settings |= {"epochs": privacy.epochs}
    if privacy.neighbours != NEIGHBOURS:  # runs that do not say are of this one
        settings |= {"neighbours": privacy.neighbours}
    if privacy.records_per_person is not None:
        settings |= {"records_per_person": privacy.records_per_person}
    if isinstance(privacy, CorrelatedPrivacy):
        settings |= {"mechanism": privacy.mechanism, "bands": privacy.bands or 0}
    return settings
