"""Record-level privacy of a run: an engine and a ledger for each data owner, and how far their budgets reach."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from choral.errors import ConfigError
from choral.privacy import Ledger, LedgerError, Privacy, PrivacyEngine
from choral.privacy.ledgers.ledger import as_ledger
from choral.privacy.ledgers.memory_notice import notice_memory
from choral.privacy.ledgers.plans import passes_left
from choral.trainers.run_folder.folder import ledger_file
from choral.trainers.run_folder.recorder import Recorder


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
    check_own_ledger(privacy)
    check_delta(privacy, examples)
    if folder is None:
        notice_memory(Ledger(), "out=FOLDER")
    privacy_engines = {}
    for name in examples:
        ledger = Ledger(ledger_file(folder, name) if folder else None, holder=name)
        privacy_engines[name] = engine_for(privacy, name, ledger, rounds_left, clips.get(name))
    return privacy_engines


def engine_for(
    privacy: Privacy, holder: str, ledger: Ledger, rounds_left: int, clip: float | None = None
) -> PrivacyEngine:
    """One data owner's, for the rounds that are left, going on with its ledger's plan. Raises: LedgerError."""
    passes, planned = max(rounds_left, 1) * privacy.epochs, passes_left(ledger, privacy.epsilon)
    return PrivacyEngine(privacy, holder=holder, ledger=ledger, passes=min(passes, planned or passes), clip=clip)


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
        if recorder.fresh:
            continue
        left = passes_left(privacy_engine.ledger, privacy_engine.privacy.epsilon)
        # Without a plan: privacy engines use a budget to within 0.1 %; what is left below twice that pays for nothing.
        if left is None and spent.epsilon >= (1 - 2e-3) * privacy_engine.privacy.epsilon:
            left = 0
        if left is not None and (paid := recorder.completed + left // privacy_engine.privacy.epochs) < last:
            last, reason = paid, f"the budget of {name} is spent; ended after round {paid}"
    return last, reason


def check_delta(privacy: Privacy, examples: Mapping[str, int]) -> None:
    """Raises: ConfigError if delta is not below 1/n for some data owner: it would allow one record in the clear."""
    for name, count in examples.items():
        if privacy.delta >= 1 / count:
            raise ConfigError(
                f"delta = {privacy.delta:g} is not below 1/n = {1 / count:.3g} for party {name!r} with {count} records",
                hint="choose a delta well below 1 over the smallest party's record count",
            )


def check_own_ledger(privacy: Privacy) -> None:
    """Raises: ConfigError for a promise with one data owner's ledger, where every data owner has its own."""
    if (own := as_ledger(privacy.ledger)).path is not None or own.events:
        raise ConfigError(
            "Privacy(ledger=...) is one data owner's, but here every one has a ledger of its own",
            hint="leave it out; the ledgers are kept in the run's folder, so give out=FOLDER. A promise that was spent"
            " from without a file is one data owner's, too: make another one",
        )


def written(ledger: Ledger) -> int:
    """How much is written in a ledger, which only grows: of a file its bytes, which need not be read for that."""
    if ledger.path is None:
        return len(ledger.events)
    return ledger.path.stat().st_size if ledger.path.exists() else 0
