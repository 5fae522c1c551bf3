"""The server of the masked sum as trips: what to send, what is waited for, and when a round goes on without some.

    trip           asks for       goes to                                and then
    hello          Hello          the roster                             once per session; with those who are present
    reveal         Reveal         the roster                             when some are not, as long as they are enough
    keys           Advertise      who has not sent keys along            left out when everybody has
    shares         DealtShares    who has sent keys
    vector         Upload         who has shared its secrets
    confirmation   Confirm        whose vector is in the sum
    unmasking      Unmask         who has confirmed                      keys for the next round ride along

What needs no answer of its own, the nonces that open the session and a Begin where keys rode ahead, is bundled with the
next message. Whoever drops out is not asked again in its round, and at the next one it is: with a Begin, and with the
nonces as long as nothing was heard from it in this session.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from choral.protocols import argument_checks as checks
from choral.protocols.driver import (
    CollectingStage,
    Patience,
    Randomness,
    RoundTerms,
    Traffic,
    Trip,
    TripStep,
    check_patience,
    patience_at,
)
from choral.protocols.errors import SpecError, StateUsedError, TooFewSurvivorsError
from choral.protocols.interface import SumResult, SumSpec, check_spec
from choral.protocols.masking import messages, signing
from choral.protocols.masking.server.opening import Opening, ServerSession
from choral.protocols.masking.server_stages import Outcome
from choral.protocols.masking.signing import Signatures

if TYPE_CHECKING:
    from choral.protocols.masking.masked import Masked

NO_TRAINING = RoundTerms()


@dataclass(frozen=True, kw_only=True)
class ServerContext:
    """What a server brings along, whichever sum it makes.

    directory: the parties' public keys. patience: seconds that each trip is worth, or by its step; None waits for all,
    for ever. quorum: with how many answers a trip has enough when patience is over; by default the smallest sum.
    Without a quorum a trip lasts LONGEST times its patience.

    Raises: SpecError for values of another type or out of range.
    """

    directory: Mapping[str, bytes]
    randomness: Randomness
    patience: Patience = None
    quorum: int | None = None
    signatures: Signatures = field(default_factory=Signatures, repr=False)

    def __post_init__(self) -> None:
        checks.directory(self.directory)
        check_patience(self.patience)


class MaskedServerDriver:
    """See :class:`choral.protocols.driver.ServerDriver`.

    result, disputes: of the last round that succeeded. setup: of the open session, whose roster is those who were
    present.
    """

    def __init__(self, config: Masked, spec: SumSpec, context: ServerContext) -> None:
        """Raises: SpecError."""
        check_spec(spec)
        self._config, self.spec = config, spec
        self.setup = config.setup(spec, session=bytes(16))  # each opening has an identifier of its own
        self._fewest = self.setup.min_survivors
        unknown = [name for name in spec.parties if name not in context.directory]
        if unknown:
            raise SpecError(f"the directory has no key for {unknown[0]!r}")
        self._directory, self._randomness = dict(context.directory), context.randomness
        self._patience, self._signatures = context.patience, context.signatures
        self._quorum = checks.optional(context.quorum, "quorum", 1, len(spec.parties))
        self._session: ServerSession | None = None
        self._reveals = b""
        self._entered: set[str] = set()
        self._following: Mapping[int, messages.Following] = {}
        self._traffic = Traffic()
        self.number = 0
        self.result: SumResult | None = None
        self.disputes: Mapping[str, tuple[str, ...]] = {}

    @property
    def session(self) -> ServerSession:
        """Raises: StateUsedError before it is open."""
        if self._session is None:
            raise StateUsedError("the session is not open", hint="go through the trips of open()")
        return self._session

    @property
    def digest(self) -> bytes:
        """Of everything that was agreed on when the session was opened, every party's nonce included: 32 bytes."""
        return self.session.terms.session

    def _trip(
        self, step: TripStep, outbox: Mapping[str, bytes], stage: CollectingStage, quorum: int | None = None
    ) -> Trip:
        if quorum is None:
            quorum = min(self._quorum or self.setup.min_survivors, len(self.setup.roster))
        for party, raw in outbox.items():
            self._traffic.down(party, raw)

        def take(sender: str, raw: bytes) -> None:
            stage.receive(sender, raw)
            self._traffic.up(sender, raw)

        return Trip(step, outbox, stage, take=take, patience=patience_at(self._patience, step), quorum=quorum)

    # -------------------------------------------------------------------------------------------------------- opening

    def open(self) -> Iterator[Trip]:
        """See :class:`choral.protocols.driver.ServerDriver`. A new session; the one before it is over.

        Those who do not answer are left out, and the others asked anew, under terms for a roster that the server
        chose. Raises: TooFewSurvivorsError when no safe terms are left for those who are present; SpecError.
        """
        self._session, self._following, self._entered = None, {}, set()
        self.number, self.result, self.disputes = 0, None, {}
        roster = self.spec.parties
        while self._session is None:
            self.setup = self._terms_for(roster)
            opening = Opening(self.setup, self._directory, self._signatures, wraps_at=self._spec_for(roster).wraps_at)
            yield self._trip("hello", dict.fromkeys(roster, opening.invitation), opening)
            try:
                gathering, hellos = opening.close()
                yield self._trip("reveal", hellos, gathering)
                self._session, reveals = gathering.close()
            except TooFewSurvivorsError as missing:
                roster = self._present(roster, missing)
                continue
            self._reveals = reveals[roster[0]]

    def _terms_for(self, roster: tuple[str, ...]) -> messages.SumSetup:
        """Of some of the parties: opened over no fewer than is said of all, however few they are."""
        config = self._config
        if roster != self.spec.parties:  # whoever is there is no draw, whatever the roster was
            config = replace(config, cohort="chosen")
            if config.trips != 2:  # whose floor of each roster its own driver looks at
                config = replace(config, min_survivors=self._fewest, dropouts=None)
        return config.setup(self._spec_for(roster), session=self._randomness(16))

    def _spec_for(self, roster: tuple[str, ...]) -> SumSpec:
        """What is summed over those who are present."""
        return among(self.spec, roster)

    def _present(self, roster: tuple[str, ...], missing: TooFewSurvivorsError) -> tuple[str, ...]:
        """Those who answered. Raises ``missing`` where no session can be opened with them alone."""
        present = tuple(party for party in roster if party not in missing.missing)
        if len(present) < max(2, self._config.min_survivors or 2) or len(present) == len(roster):
            raise missing
        try:
            self._terms_for(present)
        except SpecError as error:
            raise missing from error
        return present

    # -------------------------------------------------------------------------------------------------------- a round

    def round(self, terms: RoundTerms = NO_TRAINING, *, lost: Iterable[str] = ()) -> Iterator[Trip]:
        """See :class:`choral.protocols.driver.ServerDriver`."""
        gone, session = frozenset(lost), self.session
        begin = self._next(terms, session.terms.session[: signing.SESSION_BYTES])
        advertising = session.begin(self.number, self._following, begun=signing.begun(begin))
        asked = tuple(party for party in advertising.waiting if party not in gone)
        if asked:
            outbox = {party: self._with_nonces(party, begin) for party in asked}
            yield self._trip("keys", outbox, advertising)
        stage: Any
        stage, outbox = advertising.close()
        self._entered.update(outbox)
        outbox = {party: raw if party in asked else bundle(begin, raw) for party, raw in outbox.items()}
        steps: tuple[TripStep, ...] = ("shares", "vector", "confirmation", "unmasking")
        for step in steps:
            yield self._trip(step, {party: raw for party, raw in outbox.items() if party not in gone}, stage)
            if step != "unmasking":
                stage, outbox = stage.close()
        self._finish(stage.close())

    def forget(self, party: str) -> bool:
        """See :class:`choral.protocols.driver.ServerDriver`. Keys for the next round, which it may have sent ahead
        whether or not they came, are lost with it, and it answers no round that it has sent keys for. So the number of
        that round is left out, and all send keys for the one after it.
        """
        if party not in self.setup.roster or self._session is None:
            return False
        self.number, self._following = self.number + 1, {}
        self._entered.discard(party)
        return True

    def _next(self, terms: RoundTerms, session: bytes) -> bytes:
        """The Begin of the next round. Raises: SpecError for other terms than RoundTerms."""
        if not isinstance(terms, RoundTerms):
            raise SpecError(f"expected RoundTerms, got {checks.shown(terms)}")
        self.number += 1
        self.result, self.disputes = None, {}
        return messages.encode(messages.Begin(session, self.number, terms.exchange, terms.weights, terms.terms))

    def _with_nonces(self, party: str, begin: bytes) -> bytes:
        return begin if party in self._entered else bundle(self._reveals, begin)

    def _finish(self, outcome: Outcome) -> None:
        self._following, self.disputes = outcome.following, outcome.disputes
        up, down = self._traffic.take(self.setup.roster)
        self.result = SumResult(total=outcome.total, survivors=outcome.survivors, bytes_up=up, bytes_down=down)


def among(spec: SumSpec, roster: tuple[str, ...]) -> SumSpec:
    """The same sum over a roster that was taken from its parties."""
    if roster == spec.parties:
        return spec
    return replace(spec, parties=roster, directory=spec.population)


def bundle(*parts: bytes) -> bytes:
    return messages.encode(messages.Bundle(parts))
