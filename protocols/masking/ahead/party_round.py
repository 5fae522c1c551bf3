"""A party's steps in a round of two trips, where they differ from :mod:`choral.protocols.masking.party_round`.

    step     from        takes            gives                  to
    share    Advertised  Roster           DealtShares            SharesSent     (in the round before)
    receive  SharesSent  Deliveries       -                      Ready
    upload   Ready       its own vector   SignedRoster, Upload   Signed
    unmask   Signed      SignedSurvivors  Unmask                 -

There is no confirmation: what stands for it is that a holder answers only for who has signed the very roster that it
was shown itself, and for a set that is large enough. docs/two-trips.md has the argument.
"""

from __future__ import annotations

from typing import Any

from choral.protocols.crypto.single_use import Once
from choral.protocols.errors import FaultyServerError
from choral.protocols.masking import messages, signing
from choral.protocols.masking.ahead.messages import SignedRoster, SignedSurvivors, ToParty, survivors_limit
from choral.protocols.masking.membership import check_holders, survivors_of
from choral.protocols.masking.party_round import AwaitingSurvivors, Ready, chosen_shares, unmasking, waiting_of


def upload(ready: Ready, vector: Any) -> tuple[Signed, bytes, bytes]:
    """Mask the vector, and sign whom it is masked with. Raises: as :meth:`Ready.upload`."""
    uploaded, raw = ready.upload(vector)
    waiting = waiting_of(uploaded)
    signed = signing.view(waiting.member.session, waiting.number, waiting.member.index, waiting.roster)
    unopened = tuple(sorted(waiting.partners - waiting.held.keys()))
    view = SignedRoster(waiting.member.id, waiting.number, waiting.member.identity.sign(signed), unopened)
    return Signed(waiting), messages.encode(view), raw


class Signed(Once[AwaitingSurvivors]):
    """Has sent its masked vector and its signature on the roster; waits for the set of survivors."""

    def unmask(self, survivors: bytes) -> bytes:
        """Reveal one share of each neighbour, if all of these survivors signed just this party's roster.

        Raises: FaultyServerError when the set leaves this party out, has a party outside of the roster, or one whose
        signature is missing or on another roster; TooFewSurvivorsError when it is smaller than ``min_survivors``, or
        has too few holders; StateUsedError when a later round has begun.
        """
        waiting = self._take()
        member, number, me = waiting.member, waiting.number, waiting.member.index
        member.current.check(number)
        setup, limit = member.setup, survivors_limit(len(member.setup.roster))
        message = messages.from_server(SignedSurvivors, survivors, member.id, limit, number=number, known=ToParty)
        alive = survivors_of(member, message.bitmap)
        for peer in sorted(alive - {me}):
            if peer not in waiting.partners:
                raise FaultyServerError(f"{setup.roster[peer]} survives and was not in the roster shown to this party")
        if [entry.party for entry in message.entries] != sorted(alive - {me}):
            raise FaultyServerError("its signatures are not one for each other survivor, in order")
        for entry in message.entries:
            signed = signing.view(member.session, number, entry.party, waiting.roster)
            if not member.policy.signatures.valid(member.key(entry.party), signed, entry.signature):
                raise FaultyServerError(
                    f"what {setup.roster[entry.party]} signed is not the roster shown to this party: the server showed"
                    " different rosters, or different models"
                )
        check_holders(member, sorted(alive - {me}), "to unmask anyone")
        return unmasking(member, number, chosen_shares(waiting, alive))
