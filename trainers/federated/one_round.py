"""One round of any algorithm: its exchanges, each a secure sum over the parties that are still there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from choral.errors import ChoralError
from choral.protocols.errors import DisputedSharesError, TooFewSurvivorsError
from choral.trainers.algorithms.interface import Exchange, ExchangeMean, Rounds
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.federated.failures import kind_of
from choral.trainers.federated.round_parties import RoundParties
from choral.trainers.run_folder.algorithm_state import State
from choral.trainers.run_folder.energy import Stopwatch
from choral.trainers.run_folder.evidence.receipts import Asked, Summed
from choral.trainers.run_folder.info import RoundTimes
from choral.trainers.task.flat_vector import all_finite
from choral.trainers.task.task import DivergedError

if TYPE_CHECKING:
    from choral.trainers.federated.session import Session

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


@dataclass
class RoundOutcome:
    """What came of a round. weights: the next ones, float32, shape (d,); those before it if it failed.

    server, parties: the algorithm's states to keep; None if it failed. selected: parties it began with. survivors: of
    its last exchange. bytes_up, bytes_down: of each exchange's busiest party, summed, without a sum that failed. start,
    seconds: simulated. failed: why it was given up. errors: of the parties whose training failed, in words for the user
    alone. silent: who sent no vector, of parties elsewhere. training, server_step: how long they took. interrupted:
    whether it failed as the server was stopped. contributed: how many coordinates were of few parties, if counted.
    """

    number: int
    weights: torch.Tensor
    selected: int
    start: float
    server: State | None = None
    parties: dict[str, State] | None = None
    survivors: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    failed: ChoralError | None = None
    errors: dict[str, ChoralError] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    training: Stopwatch = field(default_factory=Stopwatch)
    server_step: Stopwatch = field(default_factory=Stopwatch)
    interrupted: bool = False
    contributed: dict[str, int] | None = None

    @property
    def dropped(self) -> dict[str, str]:
        """Whose training failed, and how, in words that hold nothing of data or code."""
        silent = dict.fromkeys(sorted(self.silent), "no vector came from it")
        return silent | {name: kind_of(error) for name, error in self.errors.items()}

    def times(self, whole: Stopwatch, evaluation: Stopwatch) -> RoundTimes:
        """whole: of the round without its evaluation."""
        return RoundTimes(
            training=self.training.seconds,
            server=self.server_step.seconds,
            evaluation=evaluation.seconds,
            processor=whole.processor,
            training_processor=self.training.processor,
        )


class Steps:
    """An algorithm's round at the server, as far as it has come. weights: the next ones, once it asks no more."""

    def __init__(self, steps: Rounds) -> None:
        self._steps = steps
        self.weights = torch.empty(0)

    def advance(self, mean: ExchangeMean | None) -> Exchange | None:
        """The next exchange, given the mean of the one before; None once it has asked all that it wants to know."""
        try:
            return next(self._steps) if mean is None else self._steps.send(mean)
        except StopIteration as end:
            self.weights = end.value
            return None


def one_round(session: Session, number: int) -> RoundOutcome:
    """What comes of round ``number``. A round that has too few parties left changes nothing, and the outcome says why.

    Raises: DivergedError if the next weights are not finite; RunFolderError if the last round's state is missing; what
        the parties' training did, if it failed at all of them; what codec and secure sum raise but for too few
        survivors.
    """
    parties = session.select(number)
    outcome = RoundOutcome(number, session.weights, len(parties.names), session.next_start, errors=parties.errors)
    outcome.silent, outcome.training = parties.silent, parties.training
    try:
        _exchanges(session, parties, outcome)
    except DisputedSharesError:
        raise
    except TooFewSurvivorsError as error:
        outcome.failed, outcome.survivors = error, 0
    finally:
        outcome.seconds = parties.lasted(session.plan.participation)
    return outcome


def _timed(watch: Stopwatch, call: Callable[[_Given], _Made], given: _Given) -> _Made:
    with watch:
        return call(given)


def _exchanges(session: Session, parties: RoundParties, outcome: RoundOutcome) -> None:
    sums: Mapping[str, Any] = session.sums_over(parties.names)
    server = session.server_view(outcome.number)
    steps, mean = Steps(session.plan.algorithm.round(server, session.weights)), None
    watch = outcome.server_step
    while (
        ask := _timed(watch, steps.advance, mean)
    ) is not None:  # FedAvg asks once, DANE twice, FSVRG twice and at first thrice
        codec = session.codecs[ask.channel]
        parties.begin_sum(session.dropouts(parties))
        told = Told.of(ask, parties.number, parties.sums)
        asked = Asked(told.exchange, ask.channel, told.digest) if session.receipts else None
        summing = sums[ask.channel].begin(told, parties)
        session.engine.answer(told, parties, summing)
        result = summing.finish()
        if parties.contributed is not None:
            parties.contributed.end(result.total)
            outcome.contributed = parties.contributed.record()
        if session.receipts and asked:
            summed = Summed(parties.names, result.survivors)
            session.receipts.add(asked, sums[ask.channel].session, summed, parties.sending)
        parties.end_sum(result.survivors)
        outcome.survivors = len(result.survivors)
        outcome.bytes_up += max(result.bytes_up.values()) + codec.more_bytes
        outcome.bytes_down += max(result.bytes_down.values()) + told.bytes_down
        mean = _timed(watch, codec.decode, result)
    if not all_finite(steps.weights):
        raise DivergedError(
            f"the server's step diverged in round {outcome.number}: the weights are not finite",
            hint="lower the learning rates; the last good round is kept",
        )
    outcome.weights, outcome.server, outcome.parties = steps.weights, dict(server.state), parties.states
