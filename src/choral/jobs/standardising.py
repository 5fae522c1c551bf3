"""Private standardisation of a job: computed and paid for before its training, and in front of its model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from choral.errors import ConfigError
from choral.jobs.settings import Arm, Settings

if TYPE_CHECKING:
    from choral.privacy import ClientPrivacy, Privacy
    from choral.trainers import Task
    from choral.trainers.data.standardised import Standardisation


def wanted(settings: Settings) -> bool:
    return settings.data.standardise == "private"


def kept(settings: Settings, out: Path | None) -> Standardisation | None:
    """What was computed for the run in this folder before; None where it is still to be, or is not wanted.

    Raises: RunFolderError for a damaged file.
    """
    from choral.trainers.data.standardised import Standardisation
    from choral.trainers.run_folder.folder import STANDARDISE
    from choral.trainers.run_folder.info import RunFolderError

    if not wanted(settings) or out is None or not (out / STANDARDISE).is_file():
        return None
    try:
        return msgspec.json.decode((out / STANDARDISE).read_bytes(), type=Standardisation, strict=True)
    except (msgspec.DecodeError, ConfigError) as error:
        raise RunFolderError(
            f"{out / STANDARDISE} is damaged: {error}", hint="what it says was paid for: put back a copy of it"
        ) from None


def keep(by: Standardisation, out: Path) -> None:
    """In the run's folder, where :func:`kept` finds it."""
    from choral.trainers.run_folder.folder import STANDARDISE, replace_file

    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / STANDARDISE, msgspec.json.encode(by))


def check_standardise(settings: Settings, task: Task, privacy: Any) -> None:
    """Raises: ConfigError for what it does not go together with."""
    if wanted(settings):
        from choral.trainers.analytics.standardise import refuse_clients
        from choral.trainers.data.standardised import bounds_of_features

        refuse_clients(privacy)
        bounds_of_features(task)


def as_trained(settings: Settings, task: Task) -> Task:
    """The task whose model has the places of a standardisation, for weights of a run to be read into."""
    if not wanted(settings):
        return task
    from choral.trainers.data.standardised import Standardisation, bounds_of_features, standardised_task

    return standardised_task(task, Standardisation.none(len(bounds_of_features(task))))


@contextmanager
def standardised(
    settings: Settings,
    arm: Arm,
    task: Task,
    privacy: Privacy | ClientPrivacy | None,
    federation: Callable[[], Mapping[str, Any]],
    options: Mapping[str, Any],
) -> Iterator[tuple[Task, Path | None]]:
    """Yield the task as it is trained, and the folder of ledgers where the training is to find its plan, if it is one
    that only lasts as long. federation: what its plan is made of. options: of :class:`~choral.trainers.Keep`.

    In a run's folder it is kept as standardise.json, which a run that is resumed reads: nothing is paid for twice.
    Raises: ConfigError, DataError; BudgetExceededError, LedgerError; RunFolderError.
    """
    if not wanted(settings):
        yield task, None
        return
    from choral.trainers.data.standardised import standardised_task
    from choral.trainers.run_folder.folder import STANDARDISE, check_empty

    check_standardise(settings, task, privacy)
    out, resume = options.get("out"), bool(options.get("resume"))
    if out is not None and not resume:
        if (out / STANDARDISE).exists():
            raise ConfigError(f"{out} holds a run that had begun", hint="choose another --out, or --resume")
        check_empty(out)
    if resume and (by := kept(settings, out)) is not None:
        yield standardised_task(task, by), None
        return
    with tempfile.TemporaryDirectory() as passing:
        lasting = settings.ledgers if arm.private else None
        ledgers = lasting or (Path(passing) if out is None else out / "ledger")
        ledgers.mkdir(parents=True, exist_ok=True)
        by = _computed(settings, arm, task, privacy, federation, ledgers)
        if out is not None:
            keep(by, out)
            if not any(ledgers.iterdir()):
                ledgers.rmdir()
        yield standardised_task(task, by), ledgers if out is None and privacy is not None else None


def _computed(
    settings: Settings,
    arm: Arm,
    task: Task,
    privacy: Privacy | ClientPrivacy | None,
    federation: Callable[[], Mapping[str, Any]],
    ledgers: Path,
) -> Standardisation:
    from choral.privacy import ClientPrivacy
    from choral.trainers.analytics.standardise import pooled_standardisation, standardisation
    from choral.trainers.federated.plan import Plan

    share = settings.data.standardise_share
    if arm.centralized:
        if isinstance(privacy, ClientPrivacy):
            raise ConfigError("a centralized arm has no clients")
        rounds = settings.training.rounds
        return pooled_standardisation(task, privacy=privacy, share=share, rounds=rounds, ledgers=ledgers)
    return standardisation(Plan.of(**federation()), share=share, ledgers=ledgers)
