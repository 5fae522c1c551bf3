"""Sealing a run when it is over: its manifest, signed by whoever is there."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from choral.privacy import Ledger
from choral.protocols.crypto.identity import Identity
from choral.trainers.run_folder.evidence.manifest import (
    FORMAT,
    NAME,
    VERSION,
    Owned,
    Sealing,
    claims_of,
    code,
    countersign,
    digest_of,
    write_manifest,
    write_signed,
)
from choral.trainers.run_folder.evidence.receipts import FOLDER, at, read
from choral.trainers.run_folder.evidence.rehearsal import Rehearsal
from choral.trainers.run_folder.folder import ledger_file
from choral.trainers.run_folder.run import Run

STATISTICS = "statistics"
"""The kind of a manifest, and of the algorithm in terms, where sites answered statistics and trained nothing."""


@dataclass(frozen=True, kw_only=True)
class Signatories:
    """Parties elsewhere, at the end of a run. run: its name in their receipts. coordinator: who writes the manifest.
    rehearsal: one operator has all their keys, and they say so as well.

    owned: what those who are there say of their receipts. sign: asks them. model, terms: as in `Sealing`;
    text: of the terms.
    """

    run: str
    coordinator: Identity
    owned: Mapping[str, Owned]
    sign: Callable[[bytes, Sequence[str]], Mapping[str, str]]
    model: str
    terms: str
    text: str
    rehearsal: bool = False


def seal(run: Run, rehearsal: Rehearsal | None = None, elsewhere: Signatories | None = None) -> None:
    """Write the manifest of a run that is over, into its folder; one that is there stays as it is.

    rehearsal: the parties of a process that played them all, who sign. elsewhere: those of a run with sites.
    Raises: EvidenceError, LedgerError.
    """
    folder = run.folder
    if folder is None or (folder / NAME).exists():
        return
    ledgers = {}
    for name in run.info.spent:
        if (path := ledger_file(folder / "ledger", name)).is_file():
            ledgers[name] = Ledger(path, holder=name)
    coordinator = elsewhere.coordinator if elsewhere else Identity(secrets.token_bytes(32))
    if elsewhere is not None:
        known = _Known(elsewhere.run, elsewhere.model, elsewhere.terms, dict(elsewhere.owned), elsewhere.sign)
        known = known._replace(claims=claims_of(elsewhere.text))
    else:
        known = _by_rehearsal(rehearsal) if rehearsal and rehearsal.receipts else _by_files(folder)
    sealing = Sealing(
        run=known.run or secrets.token_hex(16),
        info=run.info,
        last=run.history[-1],
        spent=run.info.spent,
        ledgers=ledgers,
        owned=known.owned,
        sign=known.sign,
        model=known.model,
        terms=known.terms,
        claims=known.claims,
    )
    write_manifest(folder, sealing, coordinator, rehearsal=elsewhere.rehearsal if elsewhere else not run.info.sites)


def seal_statistics(files: Sequence[Path], elsewhere: Signatories, everybody: Sequence[str]) -> None:
    """Write the manifest of statistics with sites, beside their files. everybody: the sites of the job.

    What the ledgers cost is with the sites, whose receipts have their heads. Raises: EvidenceError.
    """
    said = {
        "format": FORMAT,
        "version": VERSION,
        "rehearsal": elsewhere.rehearsal,
        "run": elsewhere.run,
        "kind": STATISTICS,
        "completed": 1,
        "ended": "",
        "files": {path.name: digest_of(path) for path in files},
        "transcript": None,
        "model": elsewhere.model,
        "terms": elsewhere.terms,
        "claims": claims_of(elsewhere.text),
        "metrics": {},
        "ledgers": {},
        "parties": {
            name: {"keys": list(own.keys), "receipts": own.receipts, "head": own.head}
            for name, own in elsewhere.owned.items()
        },
        "coordinator": elsewhere.coordinator.public.hex(),
        "gone": [],
        "code": code(),
    }
    folder, there = files[0].parent, elsewhere.owned
    write_signed(folder, said, elsewhere.coordinator, there=there, everybody=everybody, ask=elsewhere.sign)


class _Known(NamedTuple):
    """By the receipts. model: digest of the one that came of the latest round."""

    run: str
    model: str
    terms: str
    owned: dict[str, Owned]
    sign: Callable[[bytes, Sequence[str]], Mapping[str, str]] | None = None
    claims: Mapping[str, Any] = {}


def _by_rehearsal(rehearsal: Rehearsal) -> _Known:
    owned = {}
    for name, file in rehearsal.receipts.items():
        ledger = at(rehearsal.ledgers.get(name))
        owned[name] = Owned(keys=tuple(file.keys), receipts=file.count, head=file.head, ledger=ledger)
    _, model, terms = max(file.latest for file in rehearsal.receipts.values())

    def sign(body: bytes, names: Sequence[str]) -> dict[str, str]:
        return {name: countersign(body, name, owned[name], rehearsal.identities[name]) for name in names}

    return _Known(rehearsal.run, model, terms, owned, sign)


def _by_files(folder: Path) -> _Known:
    owned, latest, run = {}, (0, "", ""), ""
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        lines = list(read(path))
        keys = tuple(dict.fromkeys(content["key"] for content, _ in lines))
        owned[str(lines[0][0]["party"])] = Owned(keys=keys, receipts=len(lines), head=lines[-1][1])
        run = str(lines[0][0]["run"])
        for content, _ in lines:
            latest = max(latest, (content.get("round", 0), content.get("came") or "", content["terms"]))
    return _Known(run, latest[1], latest[2], owned)
