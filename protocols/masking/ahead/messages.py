"""The messages of sums whose shares are dealt a round ahead, beside those of :mod:`choral.protocols.masking.messages`.

| message | way | size |
|---|---|---|
| AheadSetup | down | that of SumSetup and 16 more |
| SignedRoster | up | ENVELOPE + 66 + 5 m (m: packets that did not open) |
| SignedSurvivors | down | ENVELOPE + ceil(n / 8) + 5 + 72 m (m: survivors) |

A round of two trips whose shares rode on the one before costs a party at most ceil(b d / 8) + 199 k + 574 bytes up and
298 k + 72 v + n / 8 + 457 down, v being the survivors: what four trips do, with v for t.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from choral.protocols.masking import messages
from choral.protocols.masking.messages import Confirmation, Message, SumSetup
from choral.protocols.wire_format import ENVELOPE, MAX_PARTIES, Index, RoundNumber, SessionId, Signature

Trips = Literal[2, 3]


class AheadSetup(SumSetup, frozen=True):
    """A setup whose rounds take two or three trips. floor: the fewest honest vectors in a sum of it, which every party
    computes again.
    """

    trips: Trips = 3
    floor: Annotated[int, Meta(ge=2, lt=MAX_PARTIES)] = 2


class SignedRoster(Message, frozen=True):
    """A party's signature on the digest of the roster that its vector is masked for. Sent ahead of the vector.

    unopened: the neighbours, ascending, whose packets did not open, so that this party holds no share of theirs.
    """

    session: SessionId
    round: RoundNumber
    signature: Signature
    unopened: Annotated[tuple[Index, ...], Meta(max_length=MAX_PARTIES)]


class SignedSurvivors(Message, frozen=True):
    """Whose vectors are in the sum, as in Survivors, and each one's signature on the roster, but the receiver's own."""

    session: SessionId
    round: RoundNumber
    bitmap: Annotated[bytes, Meta(min_length=1, max_length=MAX_PARTIES // 8)]
    entries: Annotated[tuple[Confirmation, ...], Meta(max_length=MAX_PARTIES)]


ToServer = messages.ToServer | SignedRoster
ToParty = AheadSetup | messages.AfterSetup | SignedSurvivors


def roster_limit(neighbours: int) -> int:
    """The largest size in bytes of a SignedRoster."""
    return ENVELOPE + 66 + 5 * neighbours


def survivors_limit(parties: int) -> int:
    """The largest size in bytes of SignedSurvivors over so many parties."""
    return ENVELOPE + -(-parties // 8) + 5 + 72 * parties
