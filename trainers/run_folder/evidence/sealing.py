"""Sealing a run when it is over: its manifest, signed by whoever is there."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import NamedTuple

from choral.privacy import Ledger
from choral.protocols.crypto.identity import Identity
from choral.trainers.run_folder.evidence.manifest import NAME, Owned, Sealing, write_manifest
from choral.trainers.run_folder.evidence.receipts import FOLDER, at, read
from choral.trainers.run_folder.evidence.rehearsal import Rehearsal
from choral.trainers.run_folder.folder import ledger_file
from choral.trainers.run_folder.run import Run


def seal(run: Run, rehearsal: Rehearsal | None = None) -> None:
    """Write the manifest of a run that is over, into its folder; one that is there stays as it is.

    rehearsal: the parties of a process that played them all, who sign. Raises: EvidenceError, LedgerError.
    """
    folder = run.folder
    if folder is None or (folder / NAME).exists():
        return
    ledgers = {}
    for name in run.info.spent:
        if (path := ledger_file(folder / "ledger", name)).is_file():
            ledgers[name] = Ledger(path, holder=name)
    coordinator = Identity(secrets.token_bytes(32))
    known = _by_rehearsal(rehearsal) if rehearsal and rehearsal.receipts else _by_files(folder)
    sealing = Sealing(
        run=known.run or secrets.token_hex(16),
        info=run.info,
        last=run.history[-1],
        spent=run.info.spent,
        ledgers=ledgers,
        owned=known.owned,
        identities=rehearsal.identities if rehearsal else {},
        model=known.model,
        terms=known.terms,
    )
    write_manifest(folder, sealing, coordinator, rehearsal=not run.info.sites)


class _Known(NamedTuple):
    """By the receipts. model: digest of the one that came of the latest round."""

    run: str
    model: str
    terms: str
    owned: dict[str, Owned]


def _by_rehearsal(rehearsal: Rehearsal) -> _Known:
    owned = {}
    for name, file in rehearsal.receipts.items():
        ledger = at(rehearsal.ledgers.get(name))
        owned[name] = Owned(keys=tuple(file.keys), receipts=file.count, head=file.head, ledger=ledger)
    _, model, terms = max(file.latest for file in rehearsal.receipts.values())
    return _Known(rehearsal.run, model, terms, owned)


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
