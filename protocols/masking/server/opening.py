"""The server of the masked sum: a state per stage, which collects messages and closes once.

    stage        collects     close() sends out            and goes to
    Opening      Hello        Hellos                       Gathering
    Gathering    Reveal       Reveals                      ServerSession           (once per session)
    Advertising  Advertise    Roster                       Sharing
    Sharing      DealtShares  Deliveries                   Uploading
    Uploading    Upload       Survivors                    Confirming
    Confirming   Confirm      Confirmations                Unmasking
    Unmasking    Unmask       -                            Outcome

``receive(sender, raw)`` refuses a message without changing anything; ``sender`` is whom the transport authenticated.
The same bytes again, as from a network that retries, change nothing either, and blame nobody while the round lasts.
``close()`` may be called at any time, when everyone answered or patience ends: who has not been heard has dropped out
(except while a session opens, which needs everybody). It raises TooFewSurvivorsError when the round cannot go on.

Threat model here is the other way round: parties may send anything. A sum that comes out is the exact sum of what the
named survivors masked, or close() names who prevented it. The parties do not rely on any check made here. One that
dealt garbage to some stays in the sum as long as others hold its shares; Outcome.disputes has who accuses whom.

Trips (message up and answer down): 2 to open a session, then 5 per round, 4 when the keys rode on the round before.
Memory: one vector, whatever the number of parties, for vectors are added as they come; and 200 bytes per edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from choral.protocols import argument_checks as checks
from choral.protocols.errors import FaultyPartyError, SpecError
from choral.protocols.masking import messages, signing
from choral.protocols.masking.graph import neighbours
from choral.protocols.masking.policy import check_setup
from choral.protocols.masking.server.round_stages import Advertising
from choral.protocols.masking.server_stages import Outbox, Seen, SessionTerms, Stage


class Opening(Stage):
    """The session's parties are invited with ``encode(setup)``; every one of them must answer."""

    kind = messages.Hello

    def __init__(
        self,
        setup: messages.SumSetup,
        directory: Mapping[str, bytes],
        signatures: signing.Signatures,
        *,
        wraps_at: int | None = None,
    ) -> None:
        """wraps_at: the modulus bits at which the sum may wrap, None if it may not.

        Raises: PolicyError for an inconsistent setup; SpecError for a party that the directory does not have.
        """
        check_setup(setup, wraps_at=wraps_at)
        unknown = [name for name in setup.roster if name not in directory]
        if unknown:
            raise SpecError(f"the directory has no key for {unknown[0]!r}")
        everyone = range(len(setup.roster))
        super().__init__(setup.roster, setup.session, 0, everyone, messages.limit(messages.Hello), {})
        self._setup = setup
        self._directory = directory
        self._signatures = signatures
        self.invitation = messages.encode(setup)
        self._digest = signing.setup_digest(self.invitation)

    def _accept(self, party: int, message: messages.Hello) -> messages.Hello:
        signed = signing.hello(self._digest, party, message.commitment)
        name = self._roster[party]
        if not self._signatures.valid(self._directory[name], signed, message.signature):
            raise FaultyPartyError(name, "its Hello is not signed by its pinned identity for this setup")
        return message

    def close(self) -> tuple[Gathering, Outbox]:
        """Raises TooFewSurvivorsError unless all answered: open again without those it names."""
        self._close(len(self._roster), "a session opens with all its parties or not at all")
        entries = tuple(
            messages.HelloEntry(hello.commitment, hello.signature) for _, hello in sorted(self._heard.items())
        )
        raw = messages.encode(messages.Hellos(self._setup.session, entries))
        stage = Gathering(self._setup, self._digest, self._directory, self._signatures, entries, self._seen)
        return stage, dict.fromkeys(self._roster, raw)


class Gathering(Stage):
    """Waits for the nonces that everyone has committed to."""

    kind = messages.Reveal

    def __init__(
        self,
        setup: messages.SumSetup,
        digest: bytes,
        directory: Mapping[str, bytes],
        signatures: signing.Signatures,
        hellos: Sequence[messages.HelloEntry],
        seen: Seen,
    ) -> None:
        super().__init__(setup.roster, setup.session, 0, range(len(setup.roster)), messages.limit(messages.Hello), seen)
        self._setup = setup
        self._digest = digest
        self._directory = directory
        self._signatures = signatures
        self._hellos = hellos

    def _accept(self, party: int, message: messages.Reveal) -> bytes:
        if signing.commitment(self._digest, party, message.nonce) != self._hellos[party].commitment:
            raise FaultyPartyError(self._roster[party], "revealed another nonce than it had committed to")
        return message.nonce

    def close(self) -> tuple[ServerSession, Outbox]:
        """Raises TooFewSurvivorsError unless all revealed; one that will not could otherwise steer the graph."""
        everyone = self._close(len(self._roster), "a session opens with all its parties or not at all")
        nonces = tuple(self._heard[party] for party in everyone)
        session = signing.session_digest(self._digest, [hello.commitment for hello in self._hellos], nonces)
        graph = neighbours(len(self._roster), self._setup.neighbours, signing.graph_seed(session))
        terms = SessionTerms(self._setup, self._directory, self._signatures, session, graph)
        return ServerSession(terms), dict.fromkeys(
            self._roster, messages.encode(messages.Reveals(self._setup.session, nonces))
        )


class ServerSession:
    """An open session, between rounds."""

    def __init__(self, terms: SessionTerms) -> None:
        self.terms = terms
        self._last = 0

    def begin(
        self,
        number: int,
        following: Mapping[int, messages.Following] | None = None,
        *,
        begun: bytes = signing.NO_BEGIN,
    ) -> Advertising:
        """Start round ``number``; ``following`` are the keys that rode on an earlier round, ``begun`` the digest of
        the Begin that the parties are shown.

        Raises: SpecError unless the number is greater than the last.
        """
        number = checks.whole(number, "the round's number", 1, (1 << 32) - 1)
        if number <= self._last:
            raise SpecError(f"expected a round after {self._last}, got {number}: parties refuse to run one twice")
        self._last = number
        self.terms.begun[number] = begun
        return Advertising(self.terms, number, following or {})
