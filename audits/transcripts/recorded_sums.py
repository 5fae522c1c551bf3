"""A recorded transcript as its sessions and sums, with each message decoded by its protocol where that can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from choral.protocols.masking import messages
    from choral.protocols.tap import Way
    from choral.trainers.run_folder.transcript import ObservedMessage, Opened, Recorded, SumBegun, Vector


class SeenMessage(NamedTuple):
    """A message, and the sum that it is of. sum: its place among all sums of the transcript, 0 while a session opens.

    begun: None while a session opens, and in old transcripts, which have one sum in a round.
    """

    message: ObservedMessage
    sum: int
    begun: SumBegun | None

    @property
    def round(self) -> int:
        return self.message.round

    @property
    def way(self) -> Way:
        return self.message.way

    @property
    def party(self) -> str:
        return self.message.party

    @property
    def size(self) -> int:
        return self.message.size

    @property
    def where(self) -> str:
        return where(self.message.round, self.begun)


class KnownVector(NamedTuple):
    """A party's own vector of a rehearsal, and the sum that it went into, as for `SeenMessage`."""

    vector: Vector
    sum: int
    begun: SumBegun | None


def where(number: int, begun: SumBegun | None) -> str:
    """In words: the round, and which of its sums where there are several."""
    return f"round {number}" if begun is None or begun.exchange == 1 else f"round {number}, {begun.channel}"


@dataclass
class RecordedSession:
    """One opening of the secure sum, with its messages in order, decoded where they can be."""

    opened: Opened
    seen: list[SeenMessage] = field(default_factory=list)
    vectors: list[KnownVector] = field(default_factory=list)
    decoded: list[tuple[SeenMessage, Any]] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    unread: int = 0
    old: int | None = None  # the protocol version of messages of another one

    @property
    def setup(self) -> messages.SumSetup | None:
        from choral.protocols.masking.messages import SumSetup

        return next((message for _, message in self.decoded if isinstance(message, SumSetup)), None)

    def of(self, kind: type[Any] | tuple[type[Any], ...]) -> Iterator[tuple[SeenMessage, Any]]:
        return ((seen, message) for seen, message in self.decoded if isinstance(message, kind))


def recorded_sessions(recorded: Recorded) -> list[RecordedSession]:
    from choral.trainers.run_folder.info import RunFolderError
    from choral.trainers.run_folder.transcript import ObservedMessage, Opened, SumBegun

    sessions: list[RecordedSession] = []
    begun: SumBegun | None = None
    sums, rounds, current = 0, 0, -1  # rounds: the latest one of an old transcript, each of which is a sum
    for entry in recorded.entries:
        if isinstance(entry, Opened):
            sessions.append(RecordedSession(entry))
            begun, rounds, current = None, 0, len(sessions) - 1
        elif isinstance(entry, SumBegun):
            if not 0 <= entry.session < len(sessions):
                raise RunFolderError(
                    f"the transcript tells of a sum in session {entry.session}, of {len(sessions)} opened",
                    hint="it was damaged or edited: restore it from a copy",
                )
            begun, sums, current = entry, sums + 1, entry.session
        else:
            if sessions[current].opened.version < 3 and entry.round not in (0, rounds):
                rounds, sums = entry.round, sums + 1
            place = sums if begun is not None or rounds else 0
            if isinstance(entry, ObservedMessage):
                sessions[current].seen.append(SeenMessage(entry, place, begun))
            else:
                sessions[current].vectors.append(KnownVector(entry, place, begun))
    return sessions


def decode(session: RecordedSession, recorded: Recorded, *, ahead: bool = False) -> None:
    """Every message by its protocol's strict decoder; what does not decode is strange. ahead: of a masked sum in two or
    three trips, which has messages more.
    """
    from choral.protocols.crypto.modular_integers import unpack
    from choral.protocols.errors import SERVER, ProtocolError
    from choral.protocols.homomorphic.messages import Ciphertext, read_ciphertext
    from choral.protocols.masking import messages
    from choral.protocols.wire_format import claims_to_be, read

    opened, masked_sum = session.opened, session.opened.secure_sum
    to_server, to_party = _declared_of(ahead)
    roster = set(opened.parties)
    for seen in session.seen:
        raw = recorded.raw(seen.message)
        said = f"{seen.where}, {seen.way}, {seen.party}"
        if seen.party not in roster:
            session.strange.append(f"{said}: not a party of this session")
            continue
        if raw is None:
            session.unread += 1
            continue
        if masked_sum != "plain" and raw and 0 < raw[0] < messages.VERSION:
            session.old, session.unread = raw[0], session.unread + 1
            continue
        try:
            if masked_sum == "plain":
                unpack(raw, opened.length, opened.modulus_bits)
                continue
            if masked_sum == "homomorphic" and seen.way == "up" and claims_to_be(Ciphertext, raw):
                parts: list[tuple[bytes, Any]] = [(raw, read_ciphertext(raw, sender=seen.party, body=len(raw)))]
            elif seen.way == "up":
                parts = [(raw, read(to_server, raw, sender=seen.party, limit=len(raw)))]
            else:
                bundle = read(to_party, raw, sender=SERVER, limit=len(raw))
                each = bundle.parts if isinstance(bundle, messages.Bundle) else (raw,)
                parts = [(part, read(to_party, part, sender=SERVER, limit=len(part))) for part in each]
        except ProtocolError as error:
            session.strange.append(f"{said}: {error}")
            continue
        for part, message in parts:
            session.decoded.append((seen, message))
            most = _most(session.setup, message)
            if most is not None and len(part) > most:
                session.strange.append(f"{said}: {len(part)} bytes, at most {most} belong to it")


def _declared_of(ahead: bool) -> tuple[Any, Any]:
    """Whatever a party, and the server, may send."""
    from choral.protocols.masking import messages
    from choral.protocols.masking.ahead import messages as dealt_ahead

    declared = dealt_ahead if ahead else messages
    return declared.ToServer, declared.ToParty


def _most(setup: messages.SumSetup | None, message: Any) -> int | None:
    """The largest size of a message under these terms, by the formulas of :mod:`choral.protocols.masking.messages`, and
    of those that come ahead.
    """
    from choral.protocols.crypto.modular_integers import packed_bytes
    from choral.protocols.masking import messages
    from choral.protocols.masking.ahead import messages as dealt_ahead

    if setup is None:
        return None
    n, k = len(setup.roster), setup.neighbours
    of_ahead: dict[type[Any], int] = {
        dealt_ahead.AheadSetup: messages.limit(messages.SumSetup, n) + 16,
        dealt_ahead.SignedRoster: dealt_ahead.roster_limit(k),
        dealt_ahead.SignedSurvivors: dealt_ahead.survivors_limit(n),
    }
    if (most := of_ahead.get(type(message))) is not None:
        return most
    entries: dict[type[Any], int] = {
        **dict.fromkeys((messages.SumSetup, messages.Hellos, messages.Reveals), n),
        **dict.fromkeys((messages.Roster, messages.DealtShares, messages.Deliveries, messages.Confirm), k),
        **dict.fromkeys((messages.Hello, messages.Reveal, messages.Begin, messages.Advertise), 0),
        messages.Upload: packed_bytes(setup.length, setup.modulus_bits),
        messages.Survivors: -(-n // 8),
        messages.Confirmations: setup.threshold,
        messages.Unmask: k + 1,
    }
    kind = type(message)
    return messages.limit(kind, entries[kind]) if kind in entries else None
