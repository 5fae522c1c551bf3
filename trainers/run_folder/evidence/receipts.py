"""A party's receipts: what it was asked, what it sent, who was summed, what came of it and what it cost its ledger.

    DIR/receipts/NAME.jsonl     {"receipt":{...},"signature":"..."} in each line (:mod:`.signed_lines`)

The first line tells the terms of training in full, whose digest the parties sign with every sum; it comes again where
they change. Every other line is of one round. All carry the SHA-256 of the line before, and the party's signature:

    kind       "terms" or "round"
    run        the coordinator's name of the run; rehearsal: whether one operator played all parties
    party, key its name and public key
    round      its number; given: digest of the model that it was given; came: of the one that came of the round, null
               where the party was not told; failed: why the coordinator gave the round up, empty if it did not
    terms      digest of the terms; algorithm, promise: what they claim, so that a line can be read by itself
    sums       of each exchange: what was told (the digest that Begin holds), the digests of the messages that the party
               sent since the last, whether its vector was among them, whether the coordinator says that it is in the
               sum (null: it said nothing), and what all signed: digests of setup and session, the Begin, the roster,
               who of it is not in the sum (null: not known here), and the keys and signatures of other survivors on
               just that set and Begin; none where the sum is not one that parties sign
    ledger     head before and after, number of events, epsilon and delta after; null where no ledger is the party's

**What a receipt proves**: that whoever holds the key signed it, and (signatures of a sum) that the named survivors
signed the same set of survivors, model, exchange and terms in the same session. That is consistency. It does not prove
that others added noise, nor that data were what they seem. In a rehearsal one operator made all the keys: then the
signatures only prove that the files belong together.

A receipt is written when its round is over: with the next round's model, or when the party leaves. A party that is
killed before that has no receipt of its last round; its ledger has what the round cost.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from choral.privacy import Ledger
from choral.protocols.crypto.identity import Identity
from choral.protocols.driver import Agreed
from choral.trainers.run_folder.evidence.signed_lines import (
    START,
    EvidenceError,
    body_of,
    digest,
    line_of,
    parsed,
    signed_by,
)

FOLDER = "receipts"
FORMAT, VERSION = "choral-receipt", 1


@dataclass(frozen=True, kw_only=True)
class Signatory:
    """Who writes receipts. run: the coordinator's name of the run. rehearsal: the process made the identity itself.

    terms: the digest of the training terms; text: their record as JSON, as it was hashed.
    """

    party: str
    identity: Identity
    run: str
    rehearsal: bool
    terms: str
    text: str

    @cached_property
    def head(self) -> dict[str, Any]:
        """What every line begins with."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "rehearsal": self.rehearsal,
            "run": self.run,
            "party": self.party,
            "key": self.identity.public.hex(),
        }

    @cached_property
    def claims(self) -> dict[str, Any]:
        """What each receipt says of the terms, so that it can be read by itself."""
        record = json.loads(self.text)
        return {"algorithm": record["algorithm"]["kind"], "promise": record["privacy"]}


@dataclass(frozen=True)
class LedgerAt:
    """A ledger at a moment. events: on it, plans not counted."""

    head: str
    events: int


@dataclass
class RoundNotes:
    """What a party notes of a round as it goes. given: digest of the model. ledger: before the round."""

    party: str
    number: int
    given: str
    ledger: LedgerAt | None = None
    sums: list[dict[str, Any]] = field(default_factory=list)

    def add(self, asked: Asked, sent: Sequence[str], agreed: Agreed | None, *, vector: bool, summed: Summed) -> None:
        """One sum that is over."""
        fits = agreed is not None and asked.begins(agreed.begin)
        seen = agreed if agreed is not None and fits else Agreed(begin=b"")
        told_all = summed.survivors if summed.roster else None
        alive = seen.survivors if seen.survivors is not None else told_all
        roster = seen.roster or summed.roster
        self.sums.append(
            {
                "exchange": asked.exchange,
                "channel": asked.channel,
                "told": asked.digest.hex(),
                "sent": list(sent),
                "vector": vector,
                "in_sum": None if summed.survivors is None else self.party in summed.survivors,
                "setup": seen.setup.hex(),
                "session": seen.session.hex(),
                "begin": seen.begin.hex(),
                "roster": list(roster),
                "dropped": None if alive is None else [name for name in roster if name not in set(alive)],
                "keys": {name: key.hex() for name, key in seen.keys.items()},
                "signatures": {name: signature.hex() for name, signature in seen.signatures.items()},
            }
        )


@dataclass(frozen=True)
class Asked:
    """Of an exchange: which sum of the round, from 0; its channel; the digest that the sum's Begin holds."""

    exchange: int
    channel: str
    digest: bytes

    def begins(self, begin: bytes) -> bool:
        """Whether that Begin is of this exchange."""
        return begin[-66:-34] == self.digest


@dataclass(frozen=True)
class Summed:
    """What the coordinator says of a sum, whether or not parties sign it. survivors: None where it says nothing."""

    roster: tuple[str, ...] = ()
    survivors: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class RoundEnd:
    """How a round ended. came: digest of the model. ledger: after it, with what all of it costs."""

    came: str | None = None
    failed: str = ""
    ledger: LedgerAt | None = None
    epsilon: float | None = None
    delta: float | None = None


class Receipts:
    """A party's file of receipts; the first line makes it. fsync: whether each line is on disk when `write` returns.

    Raises: EvidenceError for a file that is not whole, or is of another party or run.
    """

    def __init__(self, path: Path, who: Signatory, *, fsync: bool = True) -> None:
        self.path, self.who, self._fsync = path, who, fsync
        self.count, self.head, terms = 0, START, ""
        self.keys: dict[str, None] = {}  # that signed, in their order
        self.latest = (0, "", "")  # round, the model that came of it, terms
        if path.is_file():
            with path.open("r+b") as file:
                file.truncate(_whole(path.read_bytes()))  # a line that a killed process left half written
        for content, head in read(path) if path.is_file() else ():
            if (content["party"], content["run"]) != (who.party, who.run):
                raise EvidenceError(f"{path} holds receipts of another party or run", hint="keep one folder for each")
            self.count, self.head, terms = self.count + 1, head, content["terms"] + content["key"]
            self._remember(content)
        path.parent.mkdir(exist_ok=True)
        if terms != who.terms + who.identity.public.hex():
            self._append({"kind": "terms", "terms": who.terms, "text": who.text})

    def write(self, notes: RoundNotes, end: RoundEnd) -> None:
        """The receipt of a round that is over."""
        before, after = notes.ledger, end.ledger
        ledger = None
        if before is not None and after is not None:
            ledger = {
                "before": before.head,
                "after": after.head,
                "events": [before.events, after.events],
                "epsilon": end.epsilon,
                "delta": end.delta,
            }
        said = {"kind": "round", "round": notes.number, "given": notes.given, "came": end.came, "failed": end.failed}
        self._append({**said, "terms": self.who.terms, **self.who.claims, "sums": notes.sums, "ledger": ledger})

    def _append(self, said: Mapping[str, Any]) -> None:
        line = line_of(body_of({**self.who.head, **said, "previous": self.head}), self.who.identity)
        with self.path.open("ab") as file:
            file.write(line + b"\n")
            if self._fsync:
                file.flush()
                os.fsync(file.fileno())
        self.count, self.head = self.count + 1, digest(line)
        self._remember({**self.who.head, **said})

    def _remember(self, content: Mapping[str, Any]) -> None:
        self.keys[content["key"]] = None
        self.latest = max(self.latest, (content.get("round", 0), content.get("came") or "", content["terms"]))


def receipts_path(folder: Path, party: str) -> Path:
    return folder / FOLDER / f"{quote(party, safe='')}.jsonl"


def read(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each line's content, and its digest; the signature and the chain are checked, a torn tail is left out.

    Raises: EvidenceError.
    """
    content = path.read_bytes()
    head, first = START, None
    for number, line in enumerate(content[: _whole(content)].split(b"\n")[:-1], 1):
        where = f"{path.name}, line {number}"
        try:
            said, body, signature = parsed(line)
        except EvidenceError as error:
            raise EvidenceError(f"{where}: {error}", hint=_RESTORE) from None
        if not signed_by("receipt", body, signature, said.get("key")):
            raise EvidenceError(f"{where}: the signature is not of these words", hint=_RESTORE)
        if said.get("previous") != head:
            raise EvidenceError(f"{where} does not follow from the line before", hint=_RESTORE)
        if (said.get("format"), said.get("version")) != (FORMAT, VERSION):
            raise EvidenceError(f"{where} is of another format or version")
        whose = said.get("party"), said.get("run")
        if first not in (None, whose):
            raise EvidenceError(f"{where} is of another party or run than the lines before", hint=_RESTORE)
        first, head = whose, digest(line)
        yield said, head


def at(ledger: Ledger | None) -> LedgerAt | None:
    """Where a ledger stands."""
    if ledger is None:
        return None
    head = ledger.head  # reads what is new
    return LedgerAt(head, sum(len(events) for _, events in ledger.segments))


def model_digest(weights: torch.Tensor) -> str:
    """SHA-256 of the flat weights, float32, little-endian, after a word of what they are."""
    values = weights.detach().cpu().contiguous().float().numpy().astype("<f4", copy=False)
    found = hashlib.sha256(b"choral model 1\n")
    found.update(values.data.cast("B"))
    return found.hexdigest()


_RESTORE = "it was damaged, edited or mixed up: restore it from the party's own copy"


def _whole(content: bytes) -> int:
    return content.rfind(b"\n") + 1
