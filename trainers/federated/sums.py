"""The secure sums of a federation: a session for each kind of vector, over everybody or over one round's parties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from choral.errors import ConfigError
from choral.protocols.errors import TooFewSurvivorsError
from choral.protocols.interface import SecureSum, SumSession, SumSpec
from choral.protocols.masking.policy import Policy
from choral.trainers.federated.codec import Codec
from choral.trainers.federated.participation import Participation
from choral.trainers.run_folder.transcript import Transcript


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What opens sessions. parties: how many there are in all, whom rosters are from. policy: what they accept."""

    secure_sum: SecureSum
    codecs: Mapping[str, Codec]
    transcript: Transcript
    parties: int
    policy: Policy | None

    def open(self, roster: tuple[str, ...] | None = None) -> dict[str, SumSession]:
        """One session per channel; channels whose vectors look alike share one. roster: by default all parties.

        Raises: what the codecs' check does; what the secure sum does for a roster of that size; PolicyError.
        """
        sessions: dict[str, SumSession] = {}
        by_spec: dict[object, SumSession] = {}
        for name, codec in self.codecs.items():
            spec = replace(codec.spec, parties=roster or codec.spec.parties, directory=self.parties)
            if spec not in by_spec:
                self.transcript.begin(self.secure_sum.name, spec)
                by_spec[spec] = self._opened(spec)
            sessions[name] = by_spec[spec]
            codec.check(sessions[name])
        return sessions

    def open_for(
        self, selected: tuple[str, ...], rule: Participation, fewest: Mapping[str, SumSession]
    ) -> Mapping[str, SumSession]:
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

    def _opened(self, spec: SumSpec) -> SumSession:
        if self.policy is None:
            return self.secure_sum.open(spec)
        policy = replace(self.policy, encoding=self.policy.encoding or spec.encoding)
        return self.secure_sum.open(spec, policy=policy)


def check_promises(fewer: Mapping[str, SumSession], few: int, more: Mapping[str, SumSession], many: int) -> None:
    """Raises: ConfigError if the sum promises less over many parties than over few, as the run's record tells."""
    for channel, session in more.items():
        stated = fewer[channel].statement
        for promise, choose in (("min_survivors", max), ("corrupt", min)):
            if session.statement.get(promise, 0) < stated.get(promise, 0):
                both = choose(stated[promise], session.statement[promise])
                raise ConfigError(
                    f"the secure sum promises {promise} = {stated[promise]} over {few} parties, and"
                    f" {session.statement[promise]} over {many}",
                    hint=f"give it {promise}={both}, for both",
                )
