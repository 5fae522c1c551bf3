"""The server's stages where shares are dealt a round ahead, beside those of the masked sum.

    stage        collects       close() sends out   and goes to
    KeysAhead    Advertise      Roster              SharesAhead
    SharesAhead  DealtShares    Deliveries          Vectors, or Uploading (three trips)
    Vectors      SignedRoster, Upload   SignedSurvivors     Unmasking

Threat model: as in :mod:`choral.protocols.masking.server.opening`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import pairwise

from choral.protocols.driver import CollectingStage
from choral.protocols.errors import FaultyPartyError
from choral.protocols.masking import messages, signing
from choral.protocols.masking.ahead import messages as ahead
from choral.protocols.masking.server.round_stages import Advertising, RoundStage, Sharing, Unmasking, Uploading
from choral.protocols.masking.server.unmasking import Commitments
from choral.protocols.masking.server_stages import Outbox, Seen, SessionTerms, Stage
from choral.protocols.wire_format import Message, claims_to_be


class KeysAhead(Advertising):
    """Waits for mask keys of a round that nothing was dealt for yet."""

    known = ahead.ToServer

    def __init__(self, terms: SessionTerms, number: int, trips: ahead.Trips) -> None:
        super().__init__(terms, number, {})
        self._trips = trips

    def _sharing(self, keys: Mapping[int, bytes]) -> SharesAhead:
        return SharesAhead(self._terms, self._number, keys, self._seen, self._trips)


class SharesAhead(Sharing):
    """Waits for sealed shares."""

    known = ahead.ToServer

    def __init__(
        self, terms: SessionTerms, number: int, keys: Mapping[int, bytes], seen: Seen, trips: ahead.Trips
    ) -> None:
        super().__init__(terms, number, keys, seen)
        self._trips = trips

    def _uploading(self, bound: Commitments) -> Uploading:
        if self._trips == 3:
            return super()._uploading(bound)
        return Vectors(self._terms, self._number, bound, self._seen)


class _Viewing(RoundStage):
    """Waits for signatures on the roster of those who dealt."""

    kind = ahead.SignedRoster
    known = ahead.ToServer

    def __init__(self, terms: SessionTerms, number: int, bound: Commitments, signed: Callable[[str], None]) -> None:
        """signed: is called with each party whose signature was taken."""
        super().__init__(terms, number, sorted(bound.keys), {})
        self._bound, self._signed = bound, signed
        self.views: dict[int, ahead.SignedRoster] = {}

    @cached_property
    def _roster_of(self) -> bytes:
        """The digest of the roster of those who dealt, under the Begin that they were sent."""
        return signing.roster(self._terms.session, self._number, self._begun, self._bound.keys)

    def _accept(self, party: int, message: ahead.SignedRoster) -> ahead.SignedRoster:
        terms, dealers = self._terms, self._bound.keys
        if not terms.signed(
            party, signing.view(terms.session, self._number, party, self._roster_of), message.signature
        ):
            raise self._fault(party, "it signed another roster than it was sent, or another Begin")
        if not set(message.unopened) <= dealers.keys() - {party}:
            raise self._fault(party, "it accuses a party that dealt it nothing")
        if any(one >= other for one, other in pairwise(message.unopened)):
            raise self._fault(party, "those that it accuses are not in ascending order, each once")
        self.views[party] = message
        return message

    def receive(self, sender: str, raw: bytes) -> None:
        """Raises: what the stage does; then what its vector is refused for, if that came first."""
        super().receive(sender, raw)
        self._signed(sender)

    def close(self) -> None:
        """What comes from here on is late."""
        self._closed = True


class Vectors(Uploading):
    """Waits for masked vectors, each after its party's signature on the roster, and adds them up as they come.

    A vector that a network brings before the signature is held, one of each party, and counts once that is there.
    """

    known = ahead.ToServer

    def __init__(self, terms: SessionTerms, number: int, bound: Commitments, seen: Seen) -> None:
        super().__init__(terms, number, bound, seen)
        self.viewing = _Viewing(terms, number, bound, self._signed)
        self._early: dict[str, bytes] = {}

    def receive(self, sender: str, raw: bytes) -> None:
        """Raises: what the stage does."""
        party = self._places.get(sender) if isinstance(sender, str) else None
        awaited = party in self._expected and party not in self.viewing.views and not self._closed
        if not (awaited and claims_to_be(messages.Upload, raw) and self.is_of_round(sender, raw)):
            super().receive(sender, raw)
        elif self._early.setdefault(sender, raw) != raw:
            raise FaultyPartyError(sender, "sent a second Upload, and not the same")

    def _accept(self, party: int, message: messages.Upload) -> None:
        if party not in self.viewing.views:
            raise self._fault(party, "sent its vector before its signature on the roster")
        super()._accept(party, message)

    def _signed(self, sender: str) -> None:
        if (raw := self._early.pop(sender, None)) is not None:
            self.receive(sender, raw)

    def close(self) -> tuple[Unmasking, Outbox]:
        """Declare everyone else dropped: from here on their vectors are refused.

        Raises TooFewSurvivorsError, as DisputedSharesError when it is for shares that were said not to open;
        FaultyPartyError for a dealer that too many accuse of that for it to be untrue. Nothing was revealed yet.
        """
        survivors = self._close(self._terms.setup.min_survivors, "too few sent a vector")
        self.viewing.close()
        self._early.clear()
        views, tally = self.viewing.views, self._tally()
        tally.unopened = {party: frozenset(views[party].unopened) for party in survivors}
        tally.check_reachable(survivors, survivors)
        bitmap = messages.to_bitmap(survivors, len(self._roster))
        entries = {party: messages.Confirmation(party, views[party].signature) for party in survivors}
        outbox = {}
        for party in survivors:
            others = tuple(entry for peer, entry in entries.items() if peer != party)
            message = ahead.SignedSurvivors(self._session, self._number, bitmap, others)
            outbox[self._roster[party]] = messages.encode(message)
        stage = Unmasking(self._terms, self._number, survivors, survivors, tally, self._sum, self._seen)
        return stage, outbox


class Riding:
    """A stage, and what collects the messages that ride along with its own; only the stage is waited for.

    riding: by kind of message. A transport that retries may bring them again, in this trip or the next. Those of the
    stage's own round are its, which knows what was taken in that.
    """

    def __init__(self, stage: CollectingStage, riding: Mapping[type[Message], Stage]) -> None:
        self._stage, self._riding = stage, riding

    @property
    def waiting(self) -> tuple[str, ...]:
        return self._stage.waiting

    @property
    def heard(self) -> int:
        return self._stage.heard

    def receive(self, sender: str, raw: bytes) -> None:
        """Raises: what the stage does that the message is for."""
        for kind, collector in self._riding.items():
            if claims_to_be(kind, raw) and collector.is_of_round(sender, raw):
                collector.receive(sender, raw)
                return
        self._stage.receive(sender, raw)
