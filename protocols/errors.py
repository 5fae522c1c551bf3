"""Errors of the protocols: one type per kind of culprit, and ``blame`` says who that is by name.

| type | who is to blame |
|---|---|
| SpecError | the caller: it asked for something that cannot be summed safely |
| InputError | the caller: a party's own vector does not fit what was agreed |
| StateUsedError | whoever runs a step a second time: the caller, or the server that made it |
| MessageError | the sender of bytes that are no message of the protocol |
| FaultyPartyError | the party that it names |
| FaultyServerError | the server |
| FaultyPartyOrServerError | the party that it names, or the server that carried its message |
| PolicyError | the server, or whoever set it up: its terms are weaker than this party accepts |
| LateVectorError | nobody but time: the vector came after its owner was declared dropped |
| TooFewSurvivorsError | nobody, or all who are missing |
| GarbledSumError | some party in the sum, which cannot be told |
| DisputedSharesError | the dealer that it names, or those who accuse it |
| KeyDisputeError | the dealer that it names, or the party that confirms another key |
"""

from __future__ import annotations

from collections.abc import Sequence

from choral.errors import ChoralError

SERVER = "the server"
CALLER = "the caller"


class ProtocolError(ChoralError):
    """A secure sum was refused or stopped. The subclasses say who is to blame.

    blame: a party's name, ``"the server"``, ``"the caller"``, or "" when nobody can be blamed.
    """

    blame: str = ""


class SpecError(ProtocolError):
    """The caller asked for something that cannot be summed safely."""

    blame = CALLER


class InputError(ProtocolError):
    """A party's own vector has another type, shape or range than was agreed on. Nothing of it was sent."""

    blame = CALLER


class StateUsedError(ProtocolError):
    """A step was asked for a second time. A state holds its secrets for one step only; this one is empty."""

    blame = "the server that asked twice, or the caller that kept a used state"


class PolicyError(ProtocolError):
    """The server's terms are weaker than this party's policy. The party has sent nothing under them."""

    blame = SERVER


class FaultyServerError(ProtocolError):
    """The server broke the protocol: the party stops the round."""

    blame = SERVER


class MessageError(ProtocolError):
    """Bytes that are no message of this protocol and version, or one that is too large."""

    def __init__(self, sender: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"from {sender}: {message}", hint=hint)
        self.blame = sender


class FaultyPartyError(ProtocolError):
    """A party broke the protocol."""

    def __init__(self, party: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{party}: {message}", hint=hint)
        self.blame = self.party = party


class FaultyPartyOrServerError(ProtocolError):
    """A party's message does not fit, and it cannot be told whether the party or the server that carried it did it."""

    def __init__(self, party: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{party}, or the server: {message}", hint=hint)
        self.party = party
        self.blame = f"{party} or {SERVER}"


class LateVectorError(ProtocolError):
    """A vector arrived after its owner was declared dropped: it was thrown away unread, as it must be.

    By then the owner's mask secret may be known to the server, which could unmask the vector.
    """

    def __init__(self, party: str) -> None:
        super().__init__(f"{party}: the vector came after the round went on without it and was thrown away")
        self.blame = self.party = party


_WAIT = "repeat the round when more parties are there, or set up the next session for more dropouts"


class TooFewSurvivorsError(ProtocolError):
    """Fewer parties are left than the sum needs. What they had sent stays masked.

    survivors, needed: counts of parties. missing: the names of those that are gone, where they are known.
    """

    def __init__(
        self, what: str, *, survivors: int, needed: int, missing: Sequence[str] = (), hint: str = _WAIT
    ) -> None:
        named = f" (missing: {', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''})" if missing else ""
        super().__init__(f"{what}: {survivors} of the {needed} parties needed are left{named}", hint=hint)
        self.survivors = survivors
        self.needed = needed
        self.missing = tuple(missing)


class GarbledSumError(ProtocolError):
    """The sum does not open to what the parties agreed on: some of what is in it is not under the key it says.

    Nobody can tell which party's, for that would take opening one alone. The round's sum is lost.
    """

    blame = "a party in the sum"

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="repeat the round; if it happens again, leave some parties out")


class DisputedSharesError(TooFewSurvivorsError):
    """Too few hold a share of a party's secret, for some say that what it dealt them does not open. One side lies."""

    def __init__(self, dealer: str, accusers: Sequence[str], *, survivors: int, needed: int) -> None:
        who = ", ".join(accusers)
        super().__init__(
            f"too few hold a share of {dealer}'s secret: {who} say that what it dealt them does not open",
            survivors=survivors,
            needed=needed,
            hint="one side of the dispute lies: open the next session without one of them, or without both",
        )
        self.dealer = dealer
        self.accusers = tuple(accusers)
        self.blame = f"{dealer} or {who}"


class KeyDisputeError(ProtocolError):
    """Two parties hold different keys: the dealer dealt two, or one confirms what it was not dealt."""

    def __init__(self, dealer: str, party: str) -> None:
        super().__init__(
            f"{party} confirms another key than was dealt here by {dealer}",
            hint="nothing was encrypted yet: open the next session without one of them",
        )
        self.dealer, self.party = dealer, party
        self.blame = f"{dealer} or {party}"
