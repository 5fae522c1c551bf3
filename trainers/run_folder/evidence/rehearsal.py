"""Receipts of a rehearsal: of all the parties that one process plays, under identities that it made itself.

The identities live as long as the process, and no seed of theirs is ever written: a resumed run has others, and who
edits the folder afterwards cannot sign in their names, only in others. What they prove is that the files belong
together.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from choral.privacy import Ledger, Spent
from choral.protocols.crypto.identity import Identity
from choral.protocols.interface import SumSession
from choral.protocols.tap import Watcher, Way
from choral.trainers.run_folder.evidence.receipts import (
    FOLDER,
    Asked,
    Receipts,
    RoundEnd,
    RoundNotes,
    Signatory,
    Summed,
    at,
    model_digest,
    read,
    receipts_path,
)

MOST_PARTIES = 64
"""Each receipt names all who were summed: beyond so many parties a rehearsal, whose receipts prove little, has none."""


class SentMessages:
    """The digests of what each party sent, since they were taken last. next_one: who hears every message, too.

    heard: whether anything is to be heard; only `next_one` is told otherwise.
    """

    def __init__(self, next_one: Watcher | None, *, heard: bool) -> None:
        self._next, self._heard, self._sent = next_one, heard, defaultdict[str, list[str]](list)

    @property
    def watcher(self) -> Watcher | None:
        """For :func:`choral.protocols.tap.watched_by`."""
        return self._saw if self._heard else self._next

    def _saw(self, way: Way, party: str, raw: bytes) -> None:
        if way == "up":
            self._sent[party].append(hashlib.sha256(raw).hexdigest())
        if self._next is not None:
            self._next(way, party, raw)

    def take(self, party: str) -> list[str]:
        return self._sent.pop(party, [])


class Rehearsal:
    """See the module. sent: what the parties sent. terms, text: of the training, as :class:`.receipts.Signatory` has
    it. ledgers: by party, of those that have their own.

    Raises: EvidenceError for receipts in the folder that are not whole, or are of other parties.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        sent: SentMessages,
        *,
        terms: str,
        text: str,
        ledgers: Mapping[str, Ledger],
    ) -> None:
        self._sent, self.ledgers = sent, ledgers
        self.run = run_of(folder) or secrets.token_hex(16)
        self.identities = {name: Identity(secrets.token_bytes(32)) for name in names}
        self.receipts = {
            name: Receipts(
                receipts_path(folder, name),
                Signatory(party=name, identity=identity, run=self.run, rehearsal=True, terms=terms, text=text),
                fsync=False,
            )
            for name, identity in self.identities.items()
        }
        self._notes: dict[str, RoundNotes] = {}

    def begin(self, number: int, selected: Sequence[str], weights: torch.Tensor) -> None:
        """A round begins, with the model that its parties are given."""
        given = model_digest(weights)
        self._notes = {name: RoundNotes(name, number, given, at(self.ledgers.get(name))) for name in selected}
        for name in selected:
            self._sent.take(name)

    def add(self, asked: Asked, session: SumSession, summed: Summed, vectors: Sequence[str]) -> None:
        """A sum is over. vectors: who sent one."""
        for name, notes in self._notes.items():
            notes.add(asked, self._sent.take(name), session.agreed(name), vector=name in vectors, summed=summed)

    def end(self, weights: torch.Tensor, failed: str, spent: Mapping[str, Spent]) -> None:
        """The round is recorded: every party that was selected has its receipt. weights: that came of it."""
        came = model_digest(weights)
        for name, notes in self._notes.items():
            cost = spent.get(name)
            end = RoundEnd(
                came=came,
                failed=failed,
                ledger=at(self.ledgers.get(name)),
                epsilon=cost.epsilon if cost else None,
                delta=cost.delta if cost else None,
            )
            self.receipts[name].write(notes, end)
        self._notes = {}


def run_of(folder: Path) -> str:
    """The name of the run whose receipts are in a folder; empty if there are none. Raises: EvidenceError."""
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        for content, _ in read(path):
            return str(content["run"])
    return ""
