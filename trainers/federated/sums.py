"""The secure sums of a federation: a session for each kind of vector, over everybody or over one round's parties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from choral.errors import ConfigError
from choral.protocols.errors import TooFewSurvivorsError
from choral.protocols.interface import SecureSum, SumRound, SumSession, SumSpec
from choral.protocols.masking.ahead.floor import stated_ahead
from choral.protocols.masking.ahead.messages import AheadSetup
from choral.protocols.masking.masked import Masked
from choral.protocols.masking.policy import Policy
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.federated.codec import Codec
from choral.trainers.federated.participation import Participation
from choral.trainers.federated.round_parties import RoundParties
from choral.trainers.run_folder.transcript import Transcript


@dataclass(frozen=True, kw_only=True)
class OpenSum:
    """The session of one kind of vector. place: among the sessions that the transcript tells of. terms: the digest of
    the training terms. plain: the sum shows the server every vector, and nothing is signed.
    """

    session: SumSession
    place: int
    transcript: Transcript
    terms: bytes
    plain: bool

    def begin(self, told: Told, parties: RoundParties) -> SumRound:
        """The round's next sum, among all who were selected, less those who are to drop out.

        They sign the digest of what they are told: that they see the same; in a plain sum nobody does.
        Raises: as the session.
        """
        self.transcript.begin_sum(told.exchange + 1, told.ask.channel, session=self.place, told=told.bytes_down)
        return self.session.begin(parties.lost, None if self.plain else told.terms(self.terms))


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What opens sessions. parties: how many there are in all, whom rosters are from. policy: what they accept.

    terms: the digest of the training terms, which the parties sign with each session.
    """

    secure_sum: SecureSum
    codecs: Mapping[str, Codec]
    transcript: Transcript
    parties: int
    policy: Policy | None
    terms: bytes

    def open(self, roster: tuple[str, ...] | None = None) -> dict[str, OpenSum]:
        """One session per channel; channels whose vectors look alike share one. roster: by default all parties.

        Raises: what the codecs' check does; what the secure sum does for a roster of that size; PolicyError.
        """
        sessions: dict[str, OpenSum] = {}
        by_spec: dict[object, OpenSum] = {}
        for name, codec in self.codecs.items():
            spec = replace(codec.spec, parties=roster or codec.spec.parties, directory=self.parties, terms=self.terms)
            if spec not in by_spec:
                place = self.transcript.open_session(self.secure_sum.name, spec)
                by_spec[spec] = OpenSum(
                    session=self._opened(spec),
                    place=place,
                    transcript=self.transcript,
                    terms=self.terms,
                    plain=self.secure_sum.name == "plain",
                )
            sessions[name] = by_spec[spec]
            codec.check(sessions[name].session)
        return sessions

    def open_for(
        self, selected: tuple[str, ...], rule: Participation, fewest: Mapping[str, OpenSum]
    ) -> Mapping[str, OpenSum]:
        """The sessions for a round's parties. fewest: those over the fewest that a round begins with.

        Raises: TooFewSurvivorsError for fewer than that; ConfigError if more parties are promised less than the fewest,
            which the run's record tells of; what `open` does.
        """
        needed = rule.fewest(self.parties)
        if len(selected) < needed:
            raise TooFewSurvivorsError(
                "too few parties are available",
                survivors=len(selected),
                needed=needed,
                hint="lower participation.least, or let rounds fail with participation.patience",
            )
        sessions = self.open(selected)
        check_promises(fewest, needed, sessions, len(selected))
        return sessions

    def check_between(self, fewest: Mapping[str, OpenSum], few: int, names: Sequence[str]) -> None:
        """Of masked sums in two trips: whether fewer than all of these parties are promised less than the fewest.

        Where the dropouts are a share of the roster, the floor falls with each one more. Raises: as `open_for` would.
        """
        summing = self.secure_sum
        if not isinstance(summing, Masked) or summing.trips != 2:
            return
        for many in range(few + 1, len(names)):
            spec = SumSpec(parties=tuple(names[:many]), length=1, bound=1, directory=self.parties)
            setup = summing.setup(spec, session=bytes(16))
            if isinstance(setup, AheadSetup):
                states = {"corrupt": setup.corrupt, **stated_ahead(setup, summing.min_survivors)}
                for channel in fewest.values():
                    _check_promises(channel.session.statement, few, states, many)

    def _opened(self, spec: SumSpec) -> SumSession:
        if self.policy is None:
            return self.secure_sum.open(spec)
        own = self.policy
        policy = replace(own, encoding=own.encoding or spec.encoding, terms=own.terms or spec.terms)
        return self.secure_sum.open(spec, policy=policy)


def check_promises(fewer: Mapping[str, OpenSum], few: int, more: Mapping[str, OpenSum], many: int) -> None:
    """Raises: ConfigError if the sum promises less over many parties than over few, as the run's record tells."""
    for channel, summing in more.items():
        _check_promises(fewer[channel].session.statement, few, summing.session.statement, many)


def _check_promises(stated: Mapping[str, Any], few: int, states: Mapping[str, Any], many: int) -> None:
    for promise, choose in (("min_survivors", max), ("corrupt", min)):
        if states.get(promise, 0) < stated.get(promise, 0):
            both = choose(stated[promise], states[promise])
            counted = states.get("trips") == 2 and promise == "min_survivors"
            raise ConfigError(
                f"the secure sum promises {promise} = {stated[promise]} over {few} parties, and"
                f" {states[promise]} over {many}",
                hint=f"give it min_survivors={min(stated[promise], states[promise])}, for both, or dropouts as a count"
                if counted
                else f"give it {promise}={both}, for both",
            )
