"""Parties that this process does not play: what the server knows of them, and who stands in for them in a session.

What is different from parties that are here is in one place, whoever carries the messages: no data set of a party is
known, nor how many records it has; what was agreed on beforehand stands in for that. Its ledgers, its trainer and its
half of the sum are at the party; the server has the algorithm, its half of the sum, and the evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from choral.errors import ConfigError
from choral.privacy import AdaptiveClip
from choral.protocols.interface import SumRound
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.federated.participation import Participation
from choral.trainers.federated.round_parties import RoundParties
from choral.trainers.federated.virtual_parties import DistantParties

if TYPE_CHECKING:
    from choral.trainers.federated.plan import Plan
    from choral.trainers.federated.session import Session
    from choral.trainers.run_folder.evidence.sealing import Signatories


class OpenChannel(Protocol):
    """A sum of one channel, as a round begins it."""

    def begin(self, told: Told, parties: RoundParties) -> SumRound: ...


class Engine(Protocol):
    """Who has the parties answer."""

    def answer(self, told: Told, parties: RoundParties, summing: Any) -> None:
        """Every present party's vector into the sum. Who fails is noted in ``parties``."""
        ...


class DistantEngine(Engine, Protocol):
    """Has parties answer that are elsewhere."""

    def sums_over(self, selected: tuple[str, ...]) -> Mapping[str, OpenChannel]:
        """The sums of a round by channel, among those who are there. Raises: TooFewSurvivorsError."""
        ...

    def judged(self, number: int, weights: torch.Tensor) -> Mapping[str, float]:
        """What the parties say of the model after a round, as a mean over all their held-out records; or nothing."""
        ...

    def signatories(self) -> Signatories | None:
        """Who signs the run's manifest; None where that is nobody."""
        ...


class Elsewhere(Protocol):
    """What a session is given for its parties if they are elsewhere.

    metrics: of their own evaluations, whose sums are released in the clear after each round. begun: the round that they
    were told of last, before a restart; it is never asked for again.
    """

    metrics: tuple[str, ...]
    begun: int

    def engine(self, session: Session) -> DistantEngine:
        """Called once, when the session has its terms, its codecs and its model."""
        ...


def check_distant(plan: Plan, elsewhere: Elsewhere | None) -> None:
    """Raises: ConfigError for what can only be rehearsed, and for what needs the parties' records here."""
    if (elsewhere is None) is isinstance(plan.parties, DistantParties):
        raise ConfigError("parties that are elsewhere go with what reaches them, and only they do")
    if elsewhere is None:
        return
    rule = plan.participation
    simulated = {"availability", "device", "deadline", "dropouts", "clock"}
    usual = Participation()
    if given := sorted(name for name in simulated if getattr(rule, name) != getattr(usual, name)):
        raise ConfigError(
            f"participation.{given[0]} rehearses what happens by itself where parties are elsewhere",
            hint="leave it out; [serve] says how long is waited for whom",
        )
    if not rule.everybody:
        raise ConfigError(
            "a cohort or a rate, with parties that are elsewhere: all of them are asked in every round",
            hint="leave out participation.cohort and rate; a round goes on without those who are away",
        )
    if isinstance(clip := getattr(plan.privacy, "clip", getattr(plan.privacy, "max_grad_norm", None)), AdaptiveClip):
        raise ConfigError(
            f"a clipping norm that adapts ({clip!r:.80}) follows what a party elsewhere does not see, or forgets",
            hint="give a fixed one",
        )
    if plan.keep.transcript == "rehearsal":
        raise ConfigError(
            "a transcript of a rehearsal holds each party's vector, which a server of parties elsewhere never sees",
            hint='"messages" records all that it sees',
        )
