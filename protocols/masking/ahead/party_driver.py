"""A party of a sum whose shares are dealt a round ahead, behind one door.

    from the server             state before    step           answer                          state after
    SumSetup ... Reveals        as in :mod:`choral.protocols.masking.party_driver`, with AheadSetup
    Begin                       SharesSent      -              -                               SharesSent
    Begin, Roster               as there, where nothing was dealt ahead
    Deliveries                  SharesSent      receive        NeedsVector                     Ready
      supply                    Ready           upload         Advertise (next),               Signed; Uploaded
                                                               SignedRoster (2 trips), Upload
    SignedSurvivors (2 trips)   Signed          unmask         Unmask                          -
    Survivors (3 trips)         Uploaded        confirm        Confirm                         Confirmed
    Confirmations (3 trips)     Confirmed       unmask         Unmask                          -
    Roster (next), bundled      Advertised      share          DealtShares (next), Unmask      SharesSent
    with one of these two

Threat model: that of the party's states. Dealing for a round ends every earlier one, of which no secret is left then:
the answer to the earlier one is made in the same step, or never. What is stored says that the party may have answered
the round that it advertised keys for; restarted, it has neither keys nor shares of it and sits it out.
"""

from __future__ import annotations

from typing import Any

from choral.protocols.driver import Answer
from choral.protocols.errors import PolicyError
from choral.protocols.masking import messages
from choral.protocols.masking.ahead import messages as ahead
from choral.protocols.masking.ahead.floor import check_floor
from choral.protocols.masking.ahead.party_round import Signed, upload
from choral.protocols.masking.party_driver import MaskedPartyDriver, Round, needed
from choral.protocols.masking.party_round import Advertised, Confirmed, SharesSent
from choral.protocols.masking.policy import PartyContext, Policy
from choral.protocols.wire_format import LAST_ROUND


class AheadPartyDriver(MaskedPartyDriver):
    """See :class:`choral.protocols.driver.PartyDriver`. trips: 2 or 3, whatever the server proposes.

    Raises: as the masked sum's driver.
    """

    known = ahead.ToParty
    further = staticmethod(check_floor)

    def __init__(self, trips: ahead.Trips, context: PartyContext) -> None:
        self._trips = trips
        self._dealt: tuple[int, SharesSent] | None = None
        self._unmask = b""  # within one bundle: the answer that shares for the next round go with
        super().__init__(context)

    def _policy_for(self, setup: messages.SumSetup) -> Policy:
        """Raises: PolicyError for a setup of other trips."""
        if not isinstance(setup, ahead.AheadSetup) or setup.trips != self._trips:
            raise PolicyError(f"this party takes part in sums of {self._trips} trips, and this is none")
        return self.policy

    def _hold(self, setup: messages.SumSetup, raw: bytes) -> None:
        super()._hold(setup, raw)
        self._dealt = None

    def handle(self, raw: bytes) -> Answer:
        """See :class:`choral.protocols.driver.PartyDriver`. Raises: as the masked sum's driver."""
        try:
            return super().handle(raw)
        finally:
            self._unmask = b""

    def _take(self, message: Any, raw: bytes, key: bytes) -> Answer:
        early = self._early
        if isinstance(message, messages.Roster) and early is not None and message.round == early[0]:
            self._in_session(message)
            return self._deal(early[1], message.round, raw)
        return super()._take(message, raw, key)

    def _deal(self, advertised: Advertised, number: int, roster: bytes) -> Answer:
        """Share the secrets of a later round than the one that was begun, which is over with that."""
        self._early = None
        if self._round is not None:
            self._round.state = None
        sent, raw = advertised.share(roster, randomness=self._randomness)
        self._dealt = number, sent
        return (raw, self._unmask) if self._unmask else (raw,)

    def _is_prepared(self, number: int) -> bool:
        return super()._is_prepared(number) or (self._dealt is not None and self._dealt[0] == number)

    def _answer(self, begin: messages.Begin) -> tuple[Any, Answer]:
        dealt, self._dealt = self._dealt, None
        if dealt is not None and dealt[0] == begin.round:
            return dealt[1], ()
        return super()._answer(begin)

    def _step(self, now: Round, message: Any, raw: bytes, key: bytes) -> Answer:
        state = now.state
        if isinstance(message, messages.Deliveries) and isinstance(state, SharesSent):
            now.state = None
            now.state, now.asked = state.receive(raw, begun=now.begun), key
            return needed(now.begin)
        if isinstance(message, ahead.SignedSurvivors) and isinstance(state, Signed):
            now.state = None
            self._unmask = state.unmask(raw)
            return (self._unmask,)
        if isinstance(message, messages.Confirmations) and isinstance(state, Confirmed):
            now.state = None
            self._unmask = state.unmask(raw)
            now.confirmed = message.entries
            return (self._unmask,)
        return super()._step(now, message, raw, key)

    def supply(self, vector: Any) -> tuple[bytes, ...]:
        """See :class:`choral.protocols.driver.PartyDriver`. Keys for the next round go ahead of the vector.

        Raises: as the masked sum's driver.
        """
        now, ready = self._ready()
        state: Any
        if self._trips == 2:
            state, *sent = upload(ready, vector)
        else:
            state, *sent = ready.upload(vector)
        number = now.begin.round + 1
        keys = (self._advertise(number)[1],) if number <= LAST_ROUND else ()
        return self._supplied(now, state, (*keys, *sent))

    def __repr__(self) -> str:
        return f"<AheadPartyDriver of {self.name!r}>"
