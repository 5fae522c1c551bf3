"""What the server's stages have in common: one message of one kind from each party, checked before it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from choral.protocols import messages as wire
from choral.protocols import transcript
from choral.protocols.errors import FaultyPartyError, LateVectorError, StateUsedError, TooFewSurvivorsError
from choral.protocols.seam import IntVector

Outbox = dict[str, bytes]
"""What to send to whom, by party name."""


@dataclass(frozen=True)
class Terms:
    """What the server knows of an open session; all of it is public. graph: each party's neighbours."""

    setup: wire.Setup
    directory: Mapping[str, bytes]
    signatures: transcript.Signatures
    session: bytes
    graph: Sequence[tuple[int, ...]]

    def name(self, party: int) -> str:
        return self.setup.roster[party]

    def signed(self, party: int, message: bytes, signature: bytes) -> bool:
        return self.signatures.valid(self.directory[self.name(party)], message, signature)


@dataclass(frozen=True)
class Outcome:
    """A finished round.

    total: int64, shape (length,), the exact sum over ``survivors`` (names, in roster order).
    following: keys for a later round, of the parties that sent them along.
    """

    total: IntVector
    survivors: tuple[str, ...]
    following: Mapping[int, wire.Following] = field(default_factory=dict)


class Stage:
    """Messages of one kind, at most one from each expected party, in any order."""

    kind: type[wire.Message]

    def __init__(self, roster: Sequence[str], session: bytes, number: int, expected: Sequence[int], limit: int) -> None:
        self._roster = roster
        self._places = {name: place for place, name in enumerate(roster)}
        self._session = session
        self._number = number
        self._expected = frozenset(expected)
        self._limit = limit
        self._heard: dict[int, Any] = {}
        self._seen: dict[int, bytes] = {}
        self._closed = False

    @property
    def waiting(self) -> tuple[str, ...]:
        """Who has not been heard."""
        return tuple(self._roster[party] for party in sorted(self._expected - self._heard.keys()))

    def receive(self, sender: str, raw: bytes) -> None:
        """Take one message. Raises: MessageError, FaultyPartyError, LateVectorError; then nothing has changed."""
        if sender not in self._places:
            raise FaultyPartyError(sender, "is not in the roster")
        party = self._places[sender]
        message: Any = wire.to_server(raw, sender=sender, limit=self._limit)
        kind = type(message).__name__
        if message.session != self._session:
            raise FaultyPartyError(sender, f"its {kind} is of another session")
        number = getattr(message, "round", 0)
        if isinstance(message, wire.Upload) and self._too_late(party, number):
            raise LateVectorError(sender)
        if not isinstance(message, self.kind):
            raise FaultyPartyError(sender, f"expected its {self.kind.__name__}, got its {kind}: out of order")
        if number != self._number:
            raise FaultyPartyError(sender, f"its {kind} is of round {number}, not {self._number}")
        if self._closed or party not in self._expected:
            raise FaultyPartyError(sender, f"its {kind} came after the round went on without it")
        if party in self._heard:
            differs = self._seen[party] != self._fingerprint(message)
            raise FaultyPartyError(sender, f"sent a second {kind}{', and not the same' if differs else ''}")
        self._heard[party] = self._accept(party, message)
        self._seen[party] = self._fingerprint(message)

    def _fingerprint(self, message: wire.Message) -> bytes:
        """To tell a repetition from two different answers; vectors are too long to be kept or hashed for that."""
        return b"" if isinstance(message, wire.Upload) else transcript.digest("seen", wire.encode(message))

    def _too_late(self, party: int, number: int) -> bool:
        """Whether an Upload of this round number belongs to a party that was declared dropped."""
        return number < self._number or (number == self._number and self._closed and party not in self._heard)

    def _accept(self, party: int, message: Any) -> Any:
        """Check a message and give the part to keep. Raises FaultyPartyError."""
        raise FaultyPartyError(self._roster[party], f"nothing is expected now, got {type(message).__name__}")

    def _close(self, needed: int, what: str) -> list[int]:
        """End the stage: who was heard, ascending. Raises StateUsedError; TooFewSurvivorsError below ``needed``."""
        if self._closed:
            raise StateUsedError(f"the stage {type(self).__name__} is closed")
        self._closed = True
        if len(self._heard) < needed:
            raise TooFewSurvivorsError(what, survivors=len(self._heard), needed=needed, missing=self.waiting)
        return sorted(self._heard)
