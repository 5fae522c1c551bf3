"""The server's stages within a round; :mod:`choral.protocols.server` gives the overview."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from choral.protocols import messages as wire
from choral.protocols import transcript, unmasking
from choral.protocols.errors import FaultyPartyError
from choral.protocols.integers import PackingError, accumulator_dtype, packed_bytes, unpack
from choral.protocols.stages import Outbox, Outcome, Stage, Terms


class RoundStage(Stage):
    """A stage of a round."""

    def __init__(self, terms: Terms, number: int, expected: Sequence[int]) -> None:
        setup = terms.setup
        size = max(  # of a late vector too, so that it is called that
            wire.limit(wire.Upload, packed_bytes(setup.length, setup.modulus_bits)),
            wire.limit(wire.Shares, setup.neighbours),
            wire.limit(wire.Unmask, setup.holders),
        )
        session = terms.session[: transcript.SESSION_BYTES]
        super().__init__(setup.roster, session, number, expected, size)
        self._terms = terms

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
                message = wire.Advertise(self._session, number, early.mask, early.signature)
                self._seen[party] = self._fingerprint(message)

    def _accept(self, party: int, message: wire.Advertise) -> wire.RosterEntry:
        signed = transcript.advertise(self._terms.session, self._number, party, message.mask)
        if not self._terms.signed(party, signed, message.signature):
            raise self._fault(party, "its mask key is not signed by its pinned identity for this round")
        return wire.RosterEntry(party, message.mask, message.signature)

    def close(self) -> tuple[Sharing, Outbox]:
        present = self._close(self._terms.setup.min_survivors, "too few advertised keys")
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
        sharers = self._close(self._terms.setup.min_survivors, "too few shared their secrets")
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
        survivors = self._close(self._terms.setup.min_survivors, "too few sent a vector")
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
