"""The server of a masked sum whose shares are dealt a round ahead, as trips.

    trip           asks for                            goes to              and then
    hello, reveal  as in the masked sum
    keys           Advertise                           all                  where not all have dealt for this round
    shares         DealtShares                         who has sent keys
    vector         Advertise (next), SignedRoster,     who has dealt
                   Upload
    confirmation   Confirm                             whose vector came    of three trips
    unmasking      DealtShares (next), Unmask          whose vector came

A round that all have dealt for takes the last two or three. Else all deal anew, under a later number than any that they
have sent keys for: a party answers no round twice.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from choral.protocols.driver import RoundTerms, Trip
from choral.protocols.errors import TooFewSurvivorsError
from choral.protocols.interface import SumSpec
from choral.protocols.masking import messages, signing
from choral.protocols.masking.ahead import messages as ahead
from choral.protocols.masking.ahead.floor import promised
from choral.protocols.masking.ahead.server_stages import KeysAhead, Riding, Vectors
from choral.protocols.masking.server.driver import NO_TRAINING, MaskedServerDriver, ServerContext, bundle
from choral.protocols.masking.server.round_stages import Sharing, Uploading
from choral.protocols.masking.server_stages import Outbox

if TYPE_CHECKING:
    from choral.protocols.masking.masked import Masked


class _Dealt(NamedTuple):
    """What a round begins with: who deals in it, by what it is delivered."""

    number: int
    uploading: Uploading
    deliveries: Outbox


class AheadServerDriver(MaskedServerDriver):
    """See :class:`choral.protocols.driver.ServerDriver`."""

    def __init__(self, trips: ahead.Trips, config: Masked, spec: SumSpec, context: ServerContext) -> None:
        """Raises: SpecError."""
        super().__init__(config, spec, context)
        self._trips = trips
        self._dealt: _Dealt | None = None
        self._asked = 0  # the last round that keys were asked for

    @property
    def promised(self) -> int:
        """Over how few parties no sum is opened, as it is stated."""
        return promised(self.setup, self._config.min_survivors)

    def open(self) -> Iterator[Trip]:
        """See :class:`choral.protocols.driver.ServerDriver`."""
        self._dealt, self._asked = None, 0
        return super().open()

    def round(self, terms: RoundTerms = NO_TRAINING, *, lost: Iterable[str] = ()) -> Iterator[Trip]:
        """See :class:`choral.protocols.driver.ServerDriver`."""
        gone, session = frozenset(lost), self.session
        dealt, self._dealt = self._dealt, None
        if dealt is None or not set(self.setup.roster) - gone <= dealt.deliveries.keys():
            self.number, dealt = max(self.number, self._asked), None
        begin = self._next(terms, session.terms.session[: signing.SESSION_BYTES])
        session.terms.begun[self.number] = signing.begun(begin)
        if dealt is None:
            dealt = yield from self._deal(begin, gone)
            outbox = dealt.deliveries
        else:
            outbox = {party: bundle(begin, raw) for party, raw in dealt.deliveries.items()}
        yield from self._sum(dealt.uploading, outbox, gone)

    def _deal(self, begin: bytes, gone: frozenset[str]) -> Generator[Trip, None, _Dealt]:
        """Two trips in which all deal for this very round."""
        keys = KeysAhead(self.session.terms, self.number, self._trips)
        asked = [party for party in keys.waiting if party not in gone]
        self._asked = self.number
        yield self._trip("keys", {party: self._with_nonces(party, begin) for party in asked}, keys)
        sharing, rosters = keys.close()
        self._entered.update(rosters)
        yield self._trip("shares", rosters, sharing)
        return _Dealt(self.number, *sharing.close())

    def _sum(self, uploading: Uploading, deliveries: Outbox, gone: frozenset[str]) -> Iterator[Trip]:
        """The trips of the sum, with what is dealt for the next one."""
        self._asked = following = self.number + 1
        self.session.terms.begun[following] = signing.NO_BEGIN  # what it will be is not known yet
        keys = KeysAhead(self.session.terms, following, self._trips)
        riding: dict[type[messages.Message], Any] = {messages.Advertise: keys}
        if isinstance(uploading, Vectors):
            riding[ahead.SignedRoster] = uploading.viewing
        stage: Any = uploading
        yield self._trip("vector", self._without(gone, deliveries), Riding(stage, riding))
        stage, outbox = stage.close()
        sharing: Sharing | None
        try:
            sharing, rosters = keys.close()
            riding[messages.DealtShares] = sharing
        except TooFewSurvivorsError:
            sharing, rosters = None, {}
        if self._trips == 3:
            yield self._trip("confirmation", self._without(gone, outbox), Riding(stage, riding))
            stage, outbox = stage.close()
        outbox = {party: bundle(raw, rosters[party]) if party in rosters else raw for party, raw in outbox.items()}
        yield self._trip("unmasking", self._without(gone, outbox), Riding(stage, riding))
        self._finish(stage.close())
        if sharing is not None:
            self._keep(following, sharing)

    def _keep(self, number: int, sharing: Sharing) -> None:
        """What was dealt for the next round, if it is enough for one."""
        try:
            self._dealt = _Dealt(number, *sharing.close())
        except TooFewSurvivorsError:
            self._dealt = None

    def _without(self, gone: frozenset[str], outbox: Mapping[str, bytes]) -> Outbox:
        return {party: raw for party, raw in outbox.items() if party not in gone}

    def forget(self, party: str) -> bool:
        """See :class:`choral.protocols.driver.ServerDriver`. What it has dealt is of no use: all deal anew."""
        if not super().forget(party):
            return False
        self._dealt = None
        return True
