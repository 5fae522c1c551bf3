"""The server's stages within a round; :mod:`choral.protocols.masking.server.opening` gives the overview."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from choral.protocols.crypto.keys import WeakKeyError, check_x25519_public
from choral.protocols.crypto.modular_integers import PackingError, accumulator_dtype, packed_bytes, unpack
from choral.protocols.errors import FaultyPartyError
from choral.protocols.masking import messages, signing
from choral.protocols.masking.server import unmasking
from choral.protocols.masking.server_stages import Outbox, Outcome, Seen, SessionTerms, Stage, fingerprint_of


class RoundStage(Stage):
    """A stage of a round."""

    def __init__(self, terms: SessionTerms, number: int, expected: Sequence[int], seen: Seen) -> None:
        setup = terms.setup
        size = max(  # of a late vector too, so that it is called that
            messages.limit(messages.Upload, packed_bytes(setup.length, setup.modulus_bits)),
            messages.limit(messages.DealtShares, setup.neighbours),
            messages.limit(messages.Unmask, setup.holders),
        )
        session = terms.session[: signing.SESSION_BYTES]
        super().__init__(setup.roster, session, number, expected, size, seen)
        self._terms = terms
        self._taken = terms.taken

    @property
    def _begun(self) -> bytes:
        """The digest of what its parties were shown; not known yet in stages that run a round ahead."""
        return self._terms.begun[self._number]

    def _check_keys(self, party: int, number: int, keys: messages.Advertise | messages.Following, what: str) -> None:
        """Refuse keys that would make every neighbour that is sent them refuse too. Raises FaultyPartyError."""
        signed = signing.advertise(self._terms.session, number, party, keys.mask, keys.transport)
        if not self._terms.signed(party, signed, keys.signature):
            raise self._fault(party, f"{what} are not signed by its pinned identity for this round")
        for key in (keys.mask, keys.transport):
            try:
                check_x25519_public(key)
            except WeakKeyError as error:
                raise self._fault(party, f"{what} are unusable: {error}") from None

    def _fault(self, party: int, what: str) -> FaultyPartyError:
        return FaultyPartyError(self._terms.name(party), what)


class Advertising(RoundStage):
    """Waits for mask keys; those that came with an earlier round are there already."""

    kind = messages.Advertise

    def __init__(self, terms: SessionTerms, number: int, following: Mapping[int, messages.Following]) -> None:
        super().__init__(terms, number, range(len(terms.setup.roster)), {})
        for party, early in following.items():
            if early.round == number:
                self._heard[party] = messages.RosterEntry(party, early.mask, early.transport, early.signature)
                message = messages.Advertise(self._session, number, early.mask, early.transport, early.signature)
                self._seen[messages.Advertise.__name__, party] = fingerprint_of(messages.encode(message))

    def _accept(self, party: int, message: messages.Advertise) -> messages.RosterEntry:
        self._check_keys(party, self._number, message, "its keys")
        return messages.RosterEntry(party, message.mask, message.transport, message.signature)

    def close(self) -> tuple[Sharing, Outbox]:
        present = self._close(self._terms.setup.min_survivors, "too few advertised keys")
        outbox = {}
        for party in present:
            entries = tuple(self._heard[peer] for peer in self._terms.graph[party] if peer in self._heard)
            message = messages.Roster(self._session, self._number, entries)
            outbox[self._roster[party]] = messages.encode(message)
        keys = {party: entry.mask for party, entry in self._heard.items()}
        return self._sharing(keys), outbox

    def _sharing(self, keys: Mapping[int, bytes]) -> Sharing:
        """What these parties' shares are collected in."""
        return Sharing(self._terms, self._number, keys, self._seen)


class Sharing(RoundStage):
    """Waits for sealed shares."""

    kind = messages.DealtShares

    def __init__(self, terms: SessionTerms, number: int, keys: Mapping[int, bytes], seen: Seen) -> None:
        super().__init__(terms, number, sorted(keys), seen)
        self._keys = keys

    def _accept(self, party: int, message: messages.DealtShares) -> messages.DealtShares:
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
                messages.Packet(dealer, packet.seed_hash, packet.key_hash, packet.sealed)
                for dealer in self._terms.graph[party]
                if (packet := packets.get((dealer, party))) is not None
            )
            outbox[self._roster[party]] = messages.encode(messages.Deliveries(self._session, self._number, received))
        bound = unmasking.Commitments(
            keys={party: self._keys[party] for party in sharers},
            seed_commitments={party: self._heard[party].seed_commitment for party in sharers},
            seed_hashes={
                **{edge: packet.seed_hash for edge, packet in packets.items()},
                **{(party, party): self._heard[party].own_hash for party in sharers if self._terms.setup.complete},
            },
            key_hashes={edge: packet.key_hash for edge, packet in packets.items()},
        )
        return self._uploading(bound), outbox

    def _uploading(self, bound: unmasking.Commitments) -> Uploading:
        """What vectors are collected in of those who shared."""
        return Uploading(self._terms, self._number, bound, self._seen)


class Uploading(RoundStage):
    """Waits for masked vectors and adds them up as they come."""

    kind = messages.Upload

    def __init__(self, terms: SessionTerms, number: int, bound: unmasking.Commitments, seen: Seen) -> None:
        super().__init__(terms, number, sorted(bound.keys), seen)
        self._bound = bound
        self._sum = np.zeros(terms.setup.length, accumulator_dtype(terms.setup.modulus_bits))

    def _accept(self, party: int, message: messages.Upload) -> None:
        setup = self._terms.setup
        packed = messages.from_pieces(message.vector)
        if packed is None:
            raise self._fault(party, "its vector is cut into other pieces than agreed")
        try:
            vector = unpack(packed, setup.length, setup.modulus_bits)
        except PackingError as error:
            raise self._fault(party, f"its vector is not as agreed: {error}") from None
        self._sum += vector
        self._terms.taken[self._number] = self._terms.taken.get(self._number, 0) | 1 << party

    @property
    def _uploads_are_over(self) -> bool:
        return self._closed

    def close(self) -> tuple[RoundStage, Outbox]:
        """Declare everyone else dropped: from here on their vectors are refused.

        Raises TooFewSurvivorsError also when some secret could not be reconstructed by those who are left.
        """
        survivors = self._close(self._terms.setup.min_survivors, "too few sent a vector")
        tally = self._tally()
        tally.check_reachable(survivors, survivors)
        bitmap = messages.to_bitmap(survivors, len(self._roster))
        raw = messages.encode(messages.Survivors(self._session, self._number, bitmap))
        stage = Confirming(self._terms, self._number, survivors, bitmap, tally, self._sum, self._seen)
        return stage, {self._roster[party]: raw for party in survivors}

    def _tally(self) -> unmasking.Tally:
        terms = self._terms
        return unmasking.Tally(terms.setup, terms.graph, terms.session, self._number, self._bound, self._begun)


class _AfterUploads(RoundStage):
    """The survivors are fixed: a vector from anyone else is late."""

    def __init__(
        self, terms: SessionTerms, number: int, expected: Sequence[int], survivors: Sequence[int], seen: Seen
    ) -> None:
        super().__init__(terms, number, expected, seen)
        self._survivors = tuple(survivors)

    @property
    def _uploads_are_over(self) -> bool:
        return True


class Confirming(_AfterUploads):
    """Waits for the survivors' signatures on the set of survivors."""

    kind = messages.Confirm

    def __init__(
        self,
        terms: SessionTerms,
        number: int,
        survivors: Sequence[int],
        bitmap: bytes,
        tally: unmasking.Tally,
        total: Any,
        seen: Seen,
    ) -> None:
        super().__init__(terms, number, survivors, survivors, seen)
        self._bitmap = bitmap
        self._tally = tally
        self._total = total

    def _accept(self, party: int, message: messages.Confirm) -> messages.Confirm:
        signed = signing.confirm(self._terms.session, self._number, party, self._bitmap, self._begun)
        if not self._terms.signed(party, signed, message.signature):
            raise self._fault(
                party, "its confirmation is not a signature on the set of survivors and Begin it was sent"
            )
        if not set(message.unopened) <= set(self._tally.dealers(party)):
            raise self._fault(party, "it accuses a party that dealt it nothing")
        if any(one >= other for one, other in pairwise(message.unopened)):
            raise self._fault(party, "those that it accuses are not in ascending order, each once")
        return message

    def close(self) -> tuple[Unmasking, Outbox]:
        """Raises: TooFewSurvivorsError, as DisputedSharesError when it is for shares that were said not to open;
        FaultyPartyError for a dealer that too many accuse of that for it to be untrue. Nothing was revealed yet.
        """
        signers = self._close(self._terms.setup.threshold, "too few confirmed the survivors")
        self._tally.unopened = {party: frozenset(self._heard[party].unopened) for party in signers}
        self._tally.check_reachable(self._survivors, signers)
        needed = self._terms.setup.threshold - self._terms.setup.complete  # a party is its own witness there
        outbox = {}
        for party in signers:
            peers = [peer for peer in self._terms.graph[party] if peer in self._heard][:needed]
            entries = tuple(messages.Confirmation(peer, self._heard[peer].signature) for peer in peers)
            outbox[self._roster[party]] = messages.encode(messages.Confirmations(self._session, self._number, entries))
        stage = Unmasking(self._terms, self._number, self._survivors, signers, self._tally, self._total, self._seen)
        return stage, outbox


class Unmasking(_AfterUploads):
    """Waits for shares of the survivors' seeds and of the dropped parties' keys."""

    kind = messages.Unmask

    def __init__(
        self,
        terms: SessionTerms,
        number: int,
        survivors: Sequence[int],
        signers: Sequence[int],
        tally: unmasking.Tally,
        total: Any,
        seen: Seen,
    ) -> None:
        super().__init__(terms, number, signers, survivors, seen)
        self._tally = tally
        self._total = total

    def _accept(self, party: int, message: messages.Unmask) -> messages.Unmask:
        self._tally.check(party, message, self._survivors)
        following = message.following
        if following is not None:
            if following.round <= self._number:
                raise self._fault(party, "the keys that it sent along are for no later round")
            self._check_keys(party, following.round, following, "the keys that it sent along")
        return message

    def close(self) -> Outcome:
        """Reconstruct, take the masks off, lift.

        Time: a mask expansion for each survivor, and one for each pair of a dropped and a surviving neighbour.
        Raises: TooFewSurvivorsError; FaultyPartyError for a party whose shares give another secret than it claimed.
        Either way this sum is lost: each vector in it is masked with the secret that is missing. The round can only be
        repeated without that party, and the parties then refuse to answer this one (``single_use.Current``).
        """
        self._close(self._terms.setup.threshold, "too few helped to unmask")
        total = self._tally.unmask(self._total, self._survivors, self._heard)
        following = {
            party: message.following for party, message in self._heard.items() if message.following is not None
        }
        survivors = tuple(self._roster[party] for party in self._survivors)
        return Outcome(total, survivors, following, self._tally.disputes())
