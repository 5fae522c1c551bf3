"""What the server's stages have in common: one message of one kind from each party, checked before it counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from choral.protocols.argument_checks import MAX_NAME
from choral.protocols.errors import FaultyPartyError, LateVectorError, StateUsedError, TooFewSurvivorsError
from choral.protocols.interface import IntVector
from choral.protocols.masking import messages, signing
from choral.protocols.wire_format import read

Outbox = dict[str, bytes]
"""What to send to whom, by party name."""

Seen = dict[tuple[str, int], bytes]
"""Fingerprints of the messages taken, by kind and party."""


@dataclass(frozen=True)
class SessionTerms:
    """What the server knows of an open session; all of it is public.

    graph: each party's neighbours. taken: by round, whose vectors are in a sum, as bits (of party i: 1 << i). begun:
    the digest of each round's Begin.
    """

    setup: messages.SumSetup
    directory: Mapping[str, bytes]
    signatures: signing.Signatures
    session: bytes
    graph: Sequence[tuple[int, ...]]
    taken: dict[int, int] = field(default_factory=dict)
    begun: dict[int, bytes] = field(default_factory=dict)

    def name(self, party: int) -> str:
        return self.setup.roster[party]

    def signed(self, party: int, message: bytes, signature: bytes) -> bool:
        return self.signatures.valid(self.directory[self.name(party)], message, signature)


@dataclass(frozen=True)
class Outcome:
    """A finished round.

    total: int64, shape (length,), the exact sum over ``survivors`` (names, in roster order).
    following: keys for a later round, of the parties that sent them along.
    disputes: by name of a party, who said that the shares it dealt them do not open. One of the two lies, and with more
        accusers than parties that may be corrupt it is the dealer: leave them out of the next session.
    """

    total: IntVector
    survivors: tuple[str, ...]
    following: Mapping[int, messages.Following] = field(default_factory=dict)
    disputes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Stage(ABC):
    """Messages of one kind, at most one from each expected party, in any order.

    seen: fingerprints of what was taken, by kind and party, handed from each stage of a round to the next.
    """

    known: Any = messages.ToServer  # whatever a party may send in this protocol, so that what is out of order is named
    kind: type[messages.Message]

    def __init__(
        self,
        roster: Sequence[str],
        session: bytes,
        number: int,
        expected: Sequence[int],
        limit: int,
        seen: Seen,
    ) -> None:
        self._roster = roster
        self._places = {name: place for place, name in enumerate(roster)}
        self._session = session
        self._number = number
        self._expected = frozenset(expected)
        self._limit = limit
        self._heard: dict[int, Any] = {}
        self._seen = seen
        self._closed = False
        self._taken: Mapping[int, int] = {}

    @property
    def waiting(self) -> tuple[str, ...]:
        """Who has not been heard."""
        return tuple(self._roster[party] for party in sorted(self._expected - self._heard.keys()))

    @property
    def heard(self) -> int:
        """How many have been."""
        return len(self._heard)

    def receive(self, sender: str, raw: bytes) -> None:
        """Take one message; ignore it when it repeats one that this round took before.

        Raises: MessageError, FaultyPartyError, LateVectorError; then nothing has changed.
        """
        if not isinstance(sender, str) or sender not in self._places:
            raise FaultyPartyError(str(sender)[:MAX_NAME], "is not in the roster")
        party = self._places[sender]
        message: Any = read(self.known, raw, sender=sender, limit=self._limit)
        kind = type(message).__name__
        if message.session != self._session:
            raise FaultyPartyError(sender, f"its {kind} is of another session")
        number = getattr(message, "round", 0)
        before, fingerprint = self._seen.get((kind, party)), fingerprint_of(raw)
        if number == self._number and before == fingerprint:
            return
        if isinstance(message, messages.Upload) and self._too_late(party, number):
            raise LateVectorError(sender)
        if not isinstance(message, self.kind):
            raise FaultyPartyError(sender, f"expected its {self.kind.__name__}, got its {kind}: out of order")
        if number != self._number:
            raise FaultyPartyError(sender, f"its {kind} is of round {number}, not {self._number}")
        if before is not None:
            raise FaultyPartyError(sender, f"sent a second {kind}, and not the same")
        if self._closed or party not in self._expected:
            raise FaultyPartyError(sender, f"its {kind} came after the round went on without it")
        self._heard[party] = self._accept(party, message)
        self._seen[kind, party] = fingerprint

    def is_of_round(self, sender: str, raw: bytes) -> bool:
        """Whether a message is of this stage's session and round. Raises: MessageError."""
        message: Any = read(self.known, raw, sender=sender, limit=self._limit)
        return (message.session, getattr(message, "round", 0)) == (self._session, self._number)

    @property
    def _uploads_are_over(self) -> bool:
        return False

    def _too_late(self, party: int, number: int) -> bool:
        """An Upload of a party that was declared dropped. Where its vector had been taken it is a replay instead."""
        over = number < self._number or (number == self._number and self._uploads_are_over)
        return over and not self._taken.get(number, 0) >> party & 1

    @abstractmethod
    def _accept(self, party: int, message: Any) -> Any:
        """Check a message and give the part to keep. Raises FaultyPartyError."""

    def _close(self, needed: int, what: str) -> list[int]:
        """End the stage: who was heard, ascending. Raises StateUsedError; TooFewSurvivorsError below ``needed``."""
        if self._closed:
            raise StateUsedError(f"the stage {type(self).__name__} is closed")
        self._closed = True
        if len(self._heard) < needed:
            raise TooFewSurvivorsError(what, survivors=len(self._heard), needed=needed, missing=self.waiting)
        return sorted(self._heard)


_HEAD = 1 << 16


def fingerprint_of(raw: bytes) -> bytes:
    """To tell a repetition from a second answer, by length and first 64 KiB: vectors are too long to hash whole.

    Two masked vectors that are not the same differ there at once. Whoever makes two that do not gains nothing: the
    first is the one that counts.
    """
    return signing.digest("seen", len(raw), raw[:_HEAD])
