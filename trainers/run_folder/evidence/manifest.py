"""A run's manifest: one file that names all the others by digest, signed in the end by the parties.

    DIR/manifest.json     {"manifest":{...},"signatures":{"":"...","NAME":"..."}}    (:mod:`.signed_lines`)

    run, rehearsal, kind, completed, ended    of the run, as receipts and run.json have it; "statistics" have one round
    files        SHA-256 of every file of the folder that is not a receipt, by path: run.json, history, weights, ledgers
    transcript   entries and head of its chain; null if none was recorded
    model, terms of receipts: the model that came of the last round, and the terms of training; empty without receipts
    claims       by those terms: algorithm, promise, and the names of the model's parameters in the order of its digest
    metrics      the last evaluation
    ledgers      by data owner: head, number of events, and what all of them cost
    parties      by name: the keys that signed its receipts, in their order; number and last digest of its receipts
    coordinator  the key of whoever wrote the manifest, whose signature has an empty name
    gone         parties that have not signed
    code         version of Choral, and a digest of its source

A party signs what it has compared with its own: number and head of its receipts, head and events of its ledger. Whoever
was not there in the end is named in `gone`. Of a run on pooled data, or of one with more parties than a rehearsal keeps
receipts of, the coordinator alone signs. Receipts and ledger of a site are with it: the manifest has their number and
head, and the head holds where the site's ledger stood.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from choral.privacy import Ledger, Spent
from choral.protocols.crypto.identity import Identity
from choral.trainers.run_folder.evidence.receipts import FOLDER as RECEIPTS
from choral.trainers.run_folder.evidence.receipts import LedgerAt, at
from choral.trainers.run_folder.evidence.signed_lines import EvidenceError, body_of, content_of, sign, signed_by
from choral.trainers.run_folder.folder import replace_file
from choral.trainers.run_folder.info import RoundRecord, RunInfo, versions

NAME = "manifest.json"
FORMAT, VERSION = "choral-manifest", 1
_ROOMS = ("audits", "network", "privacy", "protocols", "trainers")  # which may be links to elsewhere
_NOT_NAMED = {NAME, "cohorts.secret", ".lock", "report.json", "report.html", "verify.py", "transcript"}
"""Secrets, what is written afterwards, what has a head of its own, and the manifest itself."""


@dataclass(frozen=True, kw_only=True)
class Owned:
    """What a party knows of its own: the number of its receipts, the digest of the last, and where its ledger is."""

    keys: tuple[str, ...]
    receipts: int
    head: str
    ledger: LedgerAt | None = None


@dataclass(frozen=True, kw_only=True)
class Sealing:
    """What a manifest tells beside the files. owned: of the parties. sign: asks those who are named, each of whom
    compares it with what it owns; who is not in the answer is gone. None: all are.

    spent: what the ledgers cost. model: digest of the one that came of the last round. metrics: of the last round.
    """

    run: str
    info: RunInfo
    last: RoundRecord
    spent: Mapping[str, Spent]
    ledgers: Mapping[str, Ledger]
    owned: Mapping[str, Owned]
    sign: Callable[[bytes, Sequence[str]], Mapping[str, str]] | None = None
    model: str = ""
    terms: str = ""
    claims: Mapping[str, Any] = field(default_factory=dict)


def claims_of(text: str) -> dict[str, Any]:
    """What a manifest repeats of training terms, so that a folder without receipts can be held against it."""
    record = json.loads(text)
    layout, promise = [name for name, _ in record["shapes"]], record["privacy"]
    if promise and (shares := record.get("shares")):  # run.json says with it how few are ever summed
        promise = {**promise, "min_survivors": shares["terms"]["min_survivors"]}
    return {"algorithm": record["algorithm"]["kind"], "promise": promise, "layout": layout}


def rounds_of(text: str) -> int:
    """How many rounds these training terms agree on at most."""
    return int(json.loads(text)["rounds"])


def write_manifest(folder: Path, sealing: Sealing, coordinator: Identity, *, rehearsal: bool) -> None:
    """Raises: EvidenceError for a party that would not sign it."""
    info = sealing.info
    stands = {name: at(ledger) for name, ledger in sealing.ledgers.items()}
    said = {
        "format": FORMAT,
        "version": VERSION,
        "rehearsal": rehearsal,
        "run": sealing.run,
        "kind": info.kind,
        "completed": sealing.last.round,
        "ended": info.ended,
        "files": digests(folder),
        "transcript": None if info.transcript is None else [info.transcript.entries, info.transcript.head],
        "model": sealing.model,
        "terms": sealing.terms,
        "claims": dict(sealing.claims),
        "metrics": dict(sealing.last.metrics),
        "ledgers": {
            name: {
                "head": stand.head,
                "events": stand.events,
                "epsilon": sealing.spent[name].epsilon,
                "delta": sealing.spent[name].delta,
            }
            for name, stand in stands.items()
            if stand is not None and name in sealing.spent
        },
        "parties": {
            name: {"keys": list(own.keys), "receipts": own.receipts, "head": own.head}
            for name, own in sealing.owned.items()
        },
        "coordinator": coordinator.public.hex(),
        "gone": [],
        "code": code(),
    }
    write_signed(folder, said, coordinator, there=sealing.owned, everybody=sealing.info.sites, ask=sealing.sign)


def write_signed(
    folder: Path,
    said: dict[str, Any],
    coordinator: Identity,
    *,
    there: Iterable[str],
    everybody: Iterable[str],
    ask: Callable[[bytes, Sequence[str]], Mapping[str, str]] | None,
) -> None:
    """The words of a manifest, with the signatures that they have: who of everybody does not sign is named in them as
    gone, so the others are asked again. ask: as `Sealing.sign`.
    """
    there = list(there)
    everybody = dict.fromkeys((*there, *everybody))
    while True:
        body = body_of({**said, "gone": [name for name in everybody if name not in there]})
        found = ask(body, there) if there and ask else {}
        if all(name in found for name in there):
            break
        there = [name for name in there if name in found]
    signatures = {"": sign("manifest", body, coordinator), **{name: found[name] for name in there}}
    replace_file(folder / NAME, b'{"manifest":' + body + b',"signatures":' + body_of(signatures) + b"}\n")


def countersign(body: bytes, party: str, own: Owned, identity: Identity) -> str:
    """A party's signature, after it has compared what is said of it with what it knows.

    Raises: EvidenceError if that is not the same.
    """
    said = content_of(body)
    about = said.get("parties", {}).get(party)
    if about != {"keys": list(own.keys), "receipts": own.receipts, "head": own.head}:
        raise EvidenceError(f"the manifest says something else of the receipts of {party!r} than it has written")
    if not own.keys or own.keys[-1] != identity.public.hex():
        raise EvidenceError(f"the receipts of {party!r} were not signed by this identity last")
    ledger = said.get("ledgers", {}).get(party)
    stands = (own.ledger.head, own.ledger.events) if own.ledger is not None else (None, 0)
    if stands[1] and (ledger is None or (ledger.get("head"), ledger.get("events")) != stands):
        raise EvidenceError(f"the manifest says something else of the ledger of {party!r} than that holds")
    return sign("manifest", body, identity)


@dataclass(frozen=True)
class Manifest:
    """One that was read. sha256: of the file. said: its content. signed: who has signed it, "" the coordinator."""

    sha256: str
    said: dict[str, Any]
    signed: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """None if there is none; every signature that it has is checked. Raises: EvidenceError."""
        path = folder / NAME
        if not path.is_file():
            return None
        raw = path.read_bytes()
        body, mark, rest = raw.rstrip(b"\n").removeprefix(b'{"manifest":').rpartition(b',"signatures":')
        if not mark or not raw.startswith(b'{"manifest":') or not rest.endswith(b"}"):
            raise EvidenceError(f"{NAME} is no manifest", hint=_RESTORE)
        said, signatures = content_of(body), content_of(rest[:-1])
        if (said.get("format"), said.get("version")) != (FORMAT, VERSION):
            raise EvidenceError(f"{NAME} is of another format or version")
        keys = {name: each["keys"][-1] for name, each in said["parties"].items()} | {"": said["coordinator"]}
        for name, signature in signatures.items():
            if not signed_by("manifest", body, signature, keys.get(name)):
                raise EvidenceError(f"{NAME}: the signature of {name or 'the coordinator'} is not on these words")
        gone = {*said["gone"]} - {""}  # the coordinator, whose name is empty, never is
        if missing := [name for name in keys if name not in signatures and name not in gone]:
            raise EvidenceError(f"{NAME}: {missing[0] or 'the coordinator'} has not signed it", hint=_RESTORE)
        return cls(sha256(raw).hexdigest(), said, tuple(signatures))


_RESTORE = "it was damaged or edited: restore it from a copy"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 by path, of all that a manifest names."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and inside.parts[0] not in {RECEIPTS, *_NOT_NAMED} and not path.name.endswith(".tmp"):
            found[inside.as_posix()] = digest_of(path)
    return found


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    found = sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


@cache
def code() -> dict[str, str]:
    """Choral's version, and the SHA-256 of its source: the names and digests of all of its modules, in their order."""
    found, package = sha256(), Path(__file__).parents[3]
    own = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in _ROOMS]
    rooms = [path for room in _ROOMS for path in (package / room).rglob("*.py")]
    for path in sorted({*own, *rooms}):
        found.update(f"{path.relative_to(package).as_posix()} {sha256(path.read_bytes()).hexdigest()}\n".encode())
    return {"version": versions()["choral"], "digest": found.hexdigest()}
