"""The receipts of a party in a process of its own, which it writes where it stands."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from choral.privacy import Ledger
from choral.privacy.ledgers.spending import spent_on
from choral.protocols.crypto.identity import Identity
from choral.protocols.driver import Agreed
from choral.trainers.run_folder.evidence.receipts import (
    Asked,
    Receipts,
    RoundEnd,
    RoundNotes,
    Signatory,
    Summed,
    at,
    model_digest,
)


@dataclass(frozen=True, kw_only=True)
class Receipted:
    """Where a party in a process of its own keeps its receipts, and as whom. run: the coordinator's name of the run."""

    path: Path
    identity: Identity
    run: str
    rehearsal: bool = False


class PartyReceipts:
    """The receipts of a party in a process of its own, one for each round that it was told of.

    file: where they go; None, nowhere. ledger: of the party's records, if it has one.
    """

    def __init__(self, file: Receipts | None, ledger: Ledger | None) -> None:
        self._file, self._ledger = file, ledger
        self._notes: RoundNotes | None = None
        self._asked: Asked | None = None
        self._sent: dict[str, None] = {}
        self._vector, self._failed = False, ""

    def hear(self, number: int, asked: Asked, weights: torch.Tensor) -> None:
        """What it was told of an exchange. With the first of a round comes the model of the round before."""
        if self._file is None:
            return
        if self._notes is None or self._notes.number != number:
            given = model_digest(weights)
            self.close(given, completed=number - 1)
            self._notes = RoundNotes(self._file.who.party, number, given, at(self._ledger))
        self._asked, self._vector = asked, False

    def send(self, answers: tuple[bytes, ...], *, vector: bool = False) -> tuple[bytes, ...]:
        """What leaves, as it is; the same bytes, asked for again, count once."""
        if self._file is None:
            return answers
        self._sent |= dict.fromkeys(hashlib.sha256(raw).hexdigest() for raw in answers)
        self._vector = self._vector or vector
        return answers

    def settle(self, agreed: Agreed | None, *, survived: bool | None) -> None:
        """The sum is over. survived: as the coordinator says; None, it said nothing."""
        if self._file is None or self._notes is None or self._asked is None:
            return
        party = self._file.who.party
        summed = Summed(survivors=None if survived is None else (party,) if survived else ())
        self._notes.add(self._asked, list(self._sent), agreed, vector=self._vector, summed=summed)
        self._asked, self._sent = None, {}

    def give_up(self, why: str) -> None:
        """The round failed, as the coordinator says."""
        self._failed = why

    def close(self, model: str, *, completed: int) -> None:
        """Write the receipt of the latest round. model: digest of the one that came of round ``completed``, if the
        party was told; of one that it was away in, that says nothing of the round that it was in last.
        """
        if self._file is None or self._notes is None:
            return
        ledger, came = self._ledger, model if model and completed == self._notes.number else None
        cost = spent_on(ledger, ledger.delta) if ledger is not None and ledger.delta else None
        end = RoundEnd(
            came=came,
            failed=self._failed,
            ledger=at(ledger),
            epsilon=cost.epsilon if cost else None,
            delta=cost.delta if cost else None,
        )
        self._file.write(self._notes, end)
        self._notes, self._failed = None, ""


def open_receipts(kept: Receipted, name: str, text: bytes, digest: bytes, ledger: Ledger | None) -> PartyReceipts:
    """A party's, under the training terms of that text and digest. Raises: EvidenceError for a file of another party or
    run, or one that is damaged.
    """
    who = Signatory(
        party=name,
        identity=kept.identity,
        run=kept.run,
        rehearsal=kept.rehearsal,
        terms=digest.hex(),
        text=text.decode(),
    )
    return PartyReceipts(Receipts(kept.path, who), ledger)
