"""A session as a party keeps it, what holds of each message within one, and what a party saw of a round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from choral.protocols.crypto.keys import SigningKey
from choral.protocols.crypto.single_use import Current
from choral.protocols.driver import Agreed
from choral.protocols.errors import FaultyServerError, TooFewSurvivorsError
from choral.protocols.masking import messages, signing
from choral.protocols.masking.policy import Policy


@dataclass(frozen=True, repr=False)
class Membership:
    """What a party keeps for a session: no secret but its identity, so that whoever takes it opens no past round."""

    setup: messages.SumSetup
    session: bytes
    index: int
    identity: SigningKey
    policy: Policy
    neighbours: tuple[int, ...]
    current: Current

    @property
    def id(self) -> bytes:
        return self.session[: signing.SESSION_BYTES]

    def key(self, party: int) -> bytes:
        return self.policy.directory[self.setup.roster[party]]


def in_round(kind: type[Any], raw: bytes, member: Membership, number: int, entries: int) -> Any:
    return messages.from_server(kind, raw, member.id, messages.limit(kind, entries), number=number)


def check_order(parties: Sequence[int], allowed: Iterable[int], what: str) -> None:
    """Ascending, so that none is there twice, and only those that may be there."""
    if any(one >= other for one, other in pairwise(parties)):
        raise FaultyServerError(f"the {what} are not in ascending order, each once")
    strangers = set(parties).difference(allowed)
    if strangers:
        raise FaultyServerError(f"it sent {what} of party number {min(strangers)}, which has no place among them")


def check_holders(member: Membership, peers: Sequence[int], what: str) -> None:
    """On a complete graph a party is a holder of its own seed too."""
    holders = len(peers) + member.setup.complete
    if holders < member.setup.threshold:
        missing = [member.setup.roster[peer] for peer in member.neighbours if peer not in set(peers)]
        raise TooFewSurvivorsError(
            f"too few neighbours of {member.setup.roster[member.index]} {what}",
            survivors=holders,
            needed=member.setup.threshold,
            missing=missing,
        )


def survivors_of(member: Membership, bitmap: bytes) -> frozenset[int]:
    """Whose vectors the server says are in the sum. Raises: FaultyServerError; TooFewSurvivorsError."""
    needed, alive = member.setup.min_survivors, messages.from_bitmap(bitmap, len(member.setup.roster))
    if alive is None:
        raise FaultyServerError("the set of survivors is no set of the roster's parties")
    if member.index not in alive:
        raise FaultyServerError("it says that this party dropped out, and still asks it to help to open the sum")
    if len(alive) < needed:
        raise TooFewSurvivorsError("the sum would be over too few", survivors=len(alive), needed=needed)
    return alive


def agreed_of(
    member: Membership, begin: bytes, bitmap: bytes, confirmed: Sequence[messages.Confirmation], setup: bytes
) -> Agreed:
    """What a party may put into its receipt. confirmed: what it verified of the set in `bitmap`. setup: encoded."""
    roster = member.setup.roster
    alive = messages.from_bitmap(bitmap, len(roster)) if confirmed else None
    return Agreed(
        begin=begin,
        setup=signing.setup_digest(setup),
        session=member.session,
        roster=roster,
        survivors=None if alive is None else tuple(roster[place] for place in sorted(alive)),
        keys={roster[entry.party]: member.key(entry.party) for entry in confirmed},
        signatures={roster[entry.party]: entry.signature for entry in confirmed},
    )
