"""The server of the masked sum: a state per stage, which collects messages and closes once.

    stage        collects     close() sends out            and goes to
    Opening      Hello        Hellos                       Gathering
    Gathering    Reveal       Reveals                      Session           (once per session)
    Advertising  Advertise    Roster                       Sharing
    Sharing      Shares       Deliveries                   Uploading
    Uploading    Upload       Survivors                    Confirming
    Confirming   Confirm      Confirmations                Unmasking
    Unmasking    Unmask       -                            Outcome

``receive(sender, raw)`` refuses a message without changing anything; ``sender`` is whom the transport authenticated.
``close()`` may be called at any time, when everyone answered or patience ends: who has not been heard has dropped out
(except while a session opens, which needs everybody). It raises TooFewSurvivorsError when the round cannot go on.

Threat model here is the other way round: parties may send anything. A sum that comes out is the exact sum of what the
named survivors masked, or close() names who prevented it. The parties do not rely on any check made here.

Trips (message up and answer down): 2 to open a session, then 5 per round, 4 when the keys rode on the round before.
Memory: one vector, whatever the number of parties, for vectors are added as they come; and 200 bytes per edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from choral.protocols import messages as wire
from choral.protocols import transcript, unmasking
from choral.protocols.errors import (
    FaultyPartyError,
    LateVectorError,
    SpecError,
    StateUsedError,
    TooFewSurvivorsError,
)
from choral.protocols.graph import neighbours
from choral.protocols.integers import PackingError, accumulator_dtype, packed_bytes, unpack
from choral.protocols.policy import check_setup
from choral.protocols.seam import IntVector

M = TypeVar("M", bound=wire.Message)
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
            raise FaultyPartyError(sender, f"sent a second {kind}")
        self._heard[party] = self._accept(party, message)

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


class Opening(Stage):
    """The session's parties are invited with ``encode(setup)``; every one of them must answer."""

    kind = wire.Hello

    def __init__(self, setup: wire.Setup, directory: Mapping[str, bytes], signatures: transcript.Signatures) -> None:
        """Raises: PolicyError for an inconsistent setup; SpecError for a party that the directory does not have."""
        check_setup(setup)
        unknown = [name for name in setup.roster if name not in directory]
        if unknown:
            raise SpecError(f"the directory has no key for {unknown[0]!r}")
        everyone = range(len(setup.roster))
        super().__init__(setup.roster, setup.session, 0, everyone, wire.ENVELOPE + 134)
        self._setup = setup
        self._directory = directory
        self._signatures = signatures
        self.invitation = wire.encode(setup)
        self._digest = transcript.setup_digest(self.invitation)

    def _accept(self, party: int, message: wire.Hello) -> wire.Hello:
        signed = transcript.hello(self._digest, party, message.transport, message.commitment)
        name = self._roster[party]
        if not self._signatures.valid(self._directory[name], signed, message.signature):
            raise FaultyPartyError(name, "its Hello is not signed by its pinned identity for this setup")
        return message

    def close(self) -> tuple[Gathering, Outbox]:
        """Raises TooFewSurvivorsError unless all answered: open again without those it names."""
        self._close(len(self._roster), "a session opens with all its parties or not at all")
        entries = tuple(
            wire.HelloEntry(hello.transport, hello.commitment, hello.signature)
            for _, hello in sorted(self._heard.items())
        )
        raw = wire.encode(wire.Hellos(self._setup.session, entries))
        stage = Gathering(self._setup, self._digest, self._directory, self._signatures, entries)
        return stage, dict.fromkeys(self._roster, raw)


class Gathering(Stage):
    """Waits for the nonces that everyone has committed to."""

    kind = wire.Reveal

    def __init__(
        self,
        setup: wire.Setup,
        digest: bytes,
        directory: Mapping[str, bytes],
        signatures: transcript.Signatures,
        hellos: Sequence[wire.HelloEntry],
    ) -> None:
        super().__init__(setup.roster, setup.session, 0, range(len(setup.roster)), wire.ENVELOPE + 134)
        self._setup = setup
        self._digest = digest
        self._directory = directory
        self._signatures = signatures
        self._hellos = hellos

    def _accept(self, party: int, message: wire.Reveal) -> bytes:
        if transcript.commitment(self._digest, party, message.nonce) != self._hellos[party].commitment:
            raise FaultyPartyError(self._roster[party], "revealed another nonce than it had committed to")
        return message.nonce

    def close(self) -> tuple[Session, Outbox]:
        """Raises TooFewSurvivorsError unless all revealed; one that will not could otherwise steer the graph."""
        everyone = self._close(len(self._roster), "a session opens with all its parties or not at all")
        nonces = tuple(self._heard[party] for party in everyone)
        session = transcript.session_digest(
            self._digest,
            [hello.transport for hello in self._hellos],
            [hello.commitment for hello in self._hellos],
            nonces,
        )
        graph = neighbours(len(self._roster), self._setup.neighbours, transcript.graph_seed(session))
        terms = Terms(self._setup, self._directory, self._signatures, session, graph)
        return Session(terms), dict.fromkeys(self._roster, wire.encode(wire.Reveals(self._setup.session, nonces)))


class Session:
    """An open session, between rounds."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self._last = 0

    def begin(self, number: int, following: Mapping[int, wire.Following] | None = None) -> Advertising:
        """Start round ``number``; ``following`` are the keys that rode on an earlier round.

        Raises: SpecError unless the number is greater than the last.
        """
        if number <= self._last:
            raise SpecError(f"expected a round after {self._last}, got {number}: parties refuse to run one twice")
        self._last = number
        return Advertising(self.terms, number, following or {})


class RoundStage(Stage):
    """A stage of a round."""

    def __init__(self, terms: Terms, number: int, expected: Sequence[int]) -> None:
        setup = terms.setup
        size = max(packed_bytes(setup.length, setup.modulus_bits), 158 * setup.neighbours + 109)
        session = terms.session[: transcript.SESSION_BYTES]
        super().__init__(setup.roster, session, number, expected, wire.ENVELOPE + size)
        self._terms = terms

    @property
    def _enough(self) -> int:
        """Fewest parties with whom a round can still end well."""
        return max(self._terms.setup.min_survivors, self._terms.setup.threshold)

    def _fault(self, party: int, what: str) -> FaultyPartyError:
        return FaultyPartyError(self._terms.name(party), what)


class Advertising(RoundStage):
    """Waits for mask keys; those that came with an earlier round are there already."""

    kind = wire.Advertise

    def __init__(self, terms: Terms, number: int, following: Mapping[int, wire.Following]) -> None:
        super().__init__(terms, number, range(len(terms.setup.roster)))
        for party, early in following.items():
            if early.round == number:
                self._heard[party] = wire.RosterEntry(party, early.mask, early.signature)

    def _accept(self, party: int, message: wire.Advertise) -> wire.RosterEntry:
        signed = transcript.advertise(self._terms.session, self._number, party, message.mask)
        if not self._terms.signed(party, signed, message.signature):
            raise self._fault(party, "its mask key is not signed by its pinned identity for this round")
        return wire.RosterEntry(party, message.mask, message.signature)

    def close(self) -> tuple[Sharing, Outbox]:
        present = self._close(self._enough, "too few advertised keys")
        outbox = {}
        for party in present:
            entries = tuple(self._heard[peer] for peer in self._terms.graph[party] if peer in self._heard)
            message = wire.Roster(self._session, self._number, entries)
            outbox[self._roster[party]] = wire.encode(message)
        keys = {party: entry.mask for party, entry in self._heard.items()}
        return Sharing(self._terms, self._number, keys), outbox


class Sharing(RoundStage):
    """Waits for sealed shares."""

    kind = wire.Shares

    def __init__(self, terms: Terms, number: int, keys: Mapping[int, bytes]) -> None:
        super().__init__(terms, number, sorted(keys))
        self._keys = keys

    def _accept(self, party: int, message: wire.Shares) -> wire.Shares:
        peers = [peer for peer in self._terms.graph[party] if peer in self._keys]
        if [packet.party for packet in message.packets] != peers:
            raise self._fault(party, "its shares are not one for each neighbour that takes part, in order")
        if (message.own_hash is not None) != self._terms.setup.complete:
            raise self._fault(party, "a party holds a share of its own seed on a complete graph, and only there")
        return message

    def close(self) -> tuple[Uploading, Outbox]:
        sharers = self._close(self._enough, "too few shared their secrets")
        packets = {(dealer, packet.party): packet for dealer in sharers for packet in self._heard[dealer].packets}
        outbox = {}
        for party in sharers:
            received = tuple(
                wire.Packet(dealer, packet.seed_hash, packet.key_hash, packet.sealed)
                for dealer in self._terms.graph[party]
                if (packet := packets.get((dealer, party))) is not None
            )
            outbox[self._roster[party]] = wire.encode(wire.Deliveries(self._session, self._number, received))
        ledger = unmasking.Ledger(
            keys={party: self._keys[party] for party in sharers},
            seed_commitments={party: self._heard[party].seed_commitment for party in sharers},
            seed_hashes={
                **{edge: packet.seed_hash for edge, packet in packets.items()},
                **{(party, party): self._heard[party].own_hash for party in sharers if self._terms.setup.complete},
            },
            key_hashes={edge: packet.key_hash for edge, packet in packets.items()},
        )
        return Uploading(self._terms, self._number, ledger), outbox


class Uploading(RoundStage):
    """Waits for masked vectors and adds them up as they come."""

    kind = wire.Upload

    def __init__(self, terms: Terms, number: int, ledger: unmasking.Ledger) -> None:
        super().__init__(terms, number, sorted(ledger.keys))
        self._ledger = ledger
        self._sum = np.zeros(terms.setup.length, accumulator_dtype(terms.setup.modulus_bits))

    def _accept(self, party: int, message: wire.Upload) -> None:
        setup = self._terms.setup
        try:
            vector = unpack(message.vector, setup.length, setup.modulus_bits)
        except PackingError as error:
            raise self._fault(party, f"its vector is not as agreed: {error}") from None
        self._sum += vector

    def close(self) -> tuple[Confirming, Outbox]:
        """Declare everyone else dropped: from here on their vectors are refused.

        Raises TooFewSurvivorsError also when some secret could not be reconstructed by those who are left.
        """
        survivors = self._close(self._enough, "too few sent a vector")
        tally = unmasking.Tally(self._terms.setup, self._terms.graph, self._terms.session, self._number, self._ledger)
        tally.check_reachable(survivors, survivors)
        bitmap = wire.to_bitmap(survivors, len(self._roster))
        raw = wire.encode(wire.Survivors(self._session, self._number, bitmap))
        stage = Confirming(self._terms, self._number, survivors, bitmap, tally, self._sum)
        return stage, {self._roster[party]: raw for party in survivors}


class _AfterUploads(RoundStage):
    """The survivors are fixed: a vector from anyone else is late."""

    def __init__(self, terms: Terms, number: int, expected: Sequence[int], survivors: Sequence[int]) -> None:
        super().__init__(terms, number, expected)
        self._survivors = tuple(survivors)

    def _too_late(self, party: int, number: int) -> bool:
        return number < self._number or (number == self._number and party not in self._survivors)


class Confirming(_AfterUploads):
    """Waits for the survivors' signatures on the set of survivors."""

    kind = wire.Confirm

    def __init__(
        self, terms: Terms, number: int, survivors: Sequence[int], bitmap: bytes, tally: unmasking.Tally, total: Any
    ) -> None:
        super().__init__(terms, number, survivors, survivors)
        self._bitmap = bitmap
        self._tally = tally
        self._total = total

    def _accept(self, party: int, message: wire.Confirm) -> bytes:
        signed = transcript.confirm(self._terms.session, self._number, party, self._bitmap)
        if not self._terms.signed(party, signed, message.signature):
            raise self._fault(party, "its confirmation is not a signature on the set of survivors it was sent")
        return message.signature

    def close(self) -> tuple[Unmasking, Outbox]:
        signers = self._close(self._terms.setup.threshold, "too few confirmed the survivors")
        self._tally.check_reachable(self._survivors, signers)
        needed = self._terms.setup.threshold - self._terms.setup.complete  # a party is its own witness there
        outbox = {}
        for party in signers:
            peers = [peer for peer in self._terms.graph[party] if peer in self._heard][:needed]
            entries = tuple(wire.Confirmation(peer, self._heard[peer]) for peer in peers)
            outbox[self._roster[party]] = wire.encode(wire.Confirmations(self._session, self._number, entries))
        stage = Unmasking(self._terms, self._number, self._survivors, signers, self._tally, self._total)
        return stage, outbox


class Unmasking(_AfterUploads):
    """Waits for shares of the survivors' seeds and of the dropped parties' keys."""

    kind = wire.Unmask

    def __init__(
        self,
        terms: Terms,
        number: int,
        survivors: Sequence[int],
        signers: Sequence[int],
        tally: unmasking.Tally,
        total: Any,
    ) -> None:
        super().__init__(terms, number, signers, survivors)
        self._tally = tally
        self._total = total

    def _accept(self, party: int, message: wire.Unmask) -> wire.Unmask:
        self._tally.check(party, message, self._survivors)
        following = message.following
        if following is not None:
            signed = transcript.advertise(self._terms.session, following.round, party, following.mask)
            if following.round <= self._number or not self._terms.signed(party, signed, following.signature):
                raise self._fault(party, "the key that it sent along for a later round is not signed by it for that")
        return message

    def close(self) -> Outcome:
        """Reconstruct, take the masks off, lift.

        Time: a mask expansion for each survivor, and one for each pair of a dropped and a surviving neighbour.
        Raises: TooFewSurvivorsError; FaultyPartyError for a party whose shares give another secret than it claimed.
        """
        self._close(self._terms.setup.threshold, "too few helped to unmask")
        total = self._tally.unmask(self._total, self._survivors, self._heard)
        following = {
            party: message.following for party, message in self._heard.items() if message.following is not None
        }
        return Outcome(total, tuple(self._roster[party] for party in self._survivors), following)
