"""The server of a sum under a shared key: it hands sealed keys on, and adds ciphertexts; it holds no key.

    stage        collects     close() sends out            and goes to
    Opening      KeyHello     KeyHellos                    Dealing
    Dealing      KeyDeal      KeyDealt                     Confirming
    Confirming   KeyConfirm   KeyConfirmations             Session        (once per session)
    Adding       Ciphertext   SumPieces                    Totalling (BFV), Relayed (CKKS)
    Totalling    TotalPiece   -                            Total

``receive(sender, raw)`` refuses a message without changing anything; ``sender`` is whom the transport authenticated.
The stages that hand out the key need everybody. In a round whoever has not sent all of its vector has dropped out: what
it sent is subtracted again, exactly. Each piece is checked whole before any of it is added.

In BFV one surviving party, by default the first of the roster, decrypts the sum and reports it; should it not answer,
ask the next with :meth:`Totalling.ask`. In CKKS every survivor gets the encrypted sum and the server learns no value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from choral.protocols.errors import (
    FaultyPartyError,
    SpecError,
    StateUsedError,
    TooFewSurvivorsError,
)
from choral.protocols.homomorphic.shared import messages as wire
from choral.protocols.homomorphic.shared import setup as terms
from choral.protocols.homomorphic.shared.server_round import Adding, Terms
from choral.protocols.homomorphic.shared.setup import DEALER, KeyDisputeError
from choral.protocols.masking import messages as base
from choral.protocols.masking import signing as transcript

Outbox = dict[str, bytes]
"""What to send to whom, by party name."""

M = TypeVar("M", bound=base.Message)


class _Stage:
    """One message of one kind from each of ``expected``."""

    def __init__(self, known: Terms, expected: tuple[int, ...]) -> None:
        self._terms = known
        self._expected = expected
        self._heard: dict[int, Any] = {}
        self._closed = False

    @property
    def waiting(self) -> tuple[str, ...]:
        """Who has not been heard."""
        return tuple(self._terms.roster[party] for party in self._expected if party not in self._heard)

    def _take(self, kind: type[M], sender: str, raw: bytes) -> tuple[int, M] | None:
        """The sender's place and message, or None when it repeats itself. Raises: MessageError, FaultyPartyError."""
        party = self._terms.place(sender)
        entries = len(self._terms.roster)
        message = wire.read(kind, raw, sender=sender, limit=wire.limit(kind, entries))
        if getattr(message, "session", b"") != self._terms.setup.session:
            raise FaultyPartyError(sender, f"its {kind.__name__} is of another session")
        if self._heard.get(party) == message:
            return None
        if self._closed or party not in self._expected or party in self._heard:
            raise FaultyPartyError(sender, f"its {kind.__name__} is one too many, or too late")
        return party, message

    def _close(self) -> list[Any]:
        """What everyone sent, in roster order. Raises: StateUsedError; TooFewSurvivorsError unless all did."""
        if self._closed:
            raise StateUsedError(f"the stage {type(self).__name__} is closed")
        self._closed = True
        if self.waiting:
            raise TooFewSurvivorsError(
                "a session opens with all its parties or not at all",
                survivors=len(self._heard),
                needed=len(self._expected),
                missing=self.waiting,
            )
        return [self._heard[party] for party in self._expected]


class Opening(_Stage):
    """The session's parties are invited with ``invitation``; every one of them must answer."""

    def __init__(self, setup: wire.KeySetup, directory: Mapping[str, bytes], signatures: transcript.Signatures) -> None:
        """Raises: PolicyError for an inconsistent setup; SpecError for a party that the directory does not have."""
        plan = terms.check_setup(setup)
        unknown = [name for name in setup.roster if name not in directory]
        if unknown:
            raise SpecError(f"the directory has no key for {unknown[0]!r}")
        super().__init__(Terms(setup, plan, directory, signatures), tuple(range(len(setup.roster))))
        self.invitation = base.encode(setup)
        self._digest = transcript.setup_digest(self.invitation)

    def receive(self, sender: str, raw: bytes) -> None:
        """Raises: MessageError, FaultyPartyError; then nothing has changed."""
        found = self._take(wire.KeyHello, sender, raw)
        if found:
            party, message = found
            signed = terms.hello(self._digest, party, message.public, message.nonce)
            if not self._terms.signed(party, signed, message.signature):
                raise FaultyPartyError(sender, "its KeyHello is not signed by its pinned identity for this setup")
            self._heard[party] = message

    def close(self) -> tuple[Dealing, Outbox]:
        """Raises: TooFewSurvivorsError unless all answered: open again without those it names."""
        hellos, known = self._close(), self._terms
        entries = tuple(wire.HelloEntry(hello.public, hello.nonce, hello.signature) for hello in hellos)
        session = terms.session_digest(
            self._digest, b"".join(hello.public for hello in hellos), b"".join(hello.nonce for hello in hellos)
        )
        raw = base.encode(wire.KeyHellos(known.setup.session, entries))
        fixed = Terms(known.setup, known.plan, known.directory, known.signatures, session)
        return Dealing(fixed), dict.fromkeys(known.roster, raw)


class Dealing(_Stage):
    """Waits for the dealer's sealed seeds."""

    def __init__(self, known: Terms) -> None:
        super().__init__(known, (DEALER,))

    def receive(self, sender: str, raw: bytes) -> None:
        """Raises: MessageError, FaultyPartyError; then nothing has changed."""
        found = self._take(wire.KeyDeal, sender, raw)
        if found:
            party, message = found
            known = self._terms
            if not known.signed(party, terms.deal(known.session, message.commitment), message.signature):
                raise FaultyPartyError(sender, "its KeyDeal is not signed by its pinned identity for this session")
            if len(message.sealed) != len(known.roster) - 1:
                raise FaultyPartyError(sender, f"expected {len(known.roster) - 1} sealed keys")
            self._heard[party] = message

    def close(self) -> tuple[Confirming, Outbox]:
        """Raises: TooFewSurvivorsError when the dealer has not dealt."""
        (deal,) = self._close()
        known = self._terms
        others = [name for place, name in enumerate(known.roster) if place != DEALER]
        outbox = {
            name: base.encode(wire.KeyDealt(known.setup.session, deal.commitment, sealed, deal.signature))
            for name, sealed in zip(others, deal.sealed, strict=True)
        }
        fixed = Terms(known.setup, known.plan, known.directory, known.signatures, known.session, deal.commitment)
        return Confirming(fixed), outbox


class Confirming(_Stage):
    """Waits until everyone has signed which key it holds."""

    def __init__(self, known: Terms) -> None:
        super().__init__(known, tuple(range(len(known.roster))))

    def receive(self, sender: str, raw: bytes) -> None:
        """Raises: MessageError, FaultyPartyError; KeyDisputeError for another key than was dealt."""
        found = self._take(wire.KeyConfirm, sender, raw)
        if found:
            party, message = found
            known = self._terms
            signed = terms.confirm(known.session, party, message.commitment)
            if not known.signed(party, signed, message.signature):
                raise FaultyPartyError(sender, "its KeyConfirm is not signed by its pinned identity for this session")
            if message.commitment != known.commitment:
                raise KeyDisputeError(known.roster[DEALER], sender)
            self._heard[party] = message

    def close(self) -> tuple[Session, Outbox]:
        """Raises: TooFewSurvivorsError unless all confirmed."""
        entries = tuple(wire.ConfirmEntry(message.commitment, message.signature) for message in self._close())
        raw = base.encode(wire.KeyConfirmations(self._terms.setup.session, entries))
        return Session(self._terms), dict.fromkeys(self._terms.roster, raw)


class Session:
    """An open session, between rounds."""

    def __init__(self, known: Terms) -> None:
        self.terms = known
        self._last = 0

    def begin(self, number: int) -> Adding:
        """Raises: SpecError unless the number is greater than the last: parties refuse to run a round twice."""
        if number <= self._last:
            raise SpecError(f"expected a round after {self._last}, got {number}: parties refuse to run one twice")
        self._last = number
        return Adding(self.terms, number)
