"""One round of any algorithm: its exchanges, each a secure sum over the parties that are still there."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from choral.errors import ChoralError, ConfigError
from choral.privacy import EncodingError
from choral.protocols.errors import DisputedSharesError, TooFewSurvivorsError
from choral.protocols.interface import STEPS, Losses, SecureSum, Step, SumResult, SumSession, SumSpec
from choral.protocols.masking.policy import Policy
from choral.trainers.algorithms.interface import (
    Algorithm,
    Done,
    Exchange,
    Failed,
    FederationInfo,
    LocalTrainer,
    Mean,
    Party,
    Server,
    Work,
)
from choral.trainers.federated.codec import Codec
from choral.trainers.federated.failures import all_failed, beyond, kind_of
from choral.trainers.federated.participation import Participation, stream
from choral.trainers.run_folder.algorithm_state import AlgorithmState, State
from choral.trainers.run_folder.info import RunFolderError
from choral.trainers.run_folder.transcript import Transcript
from choral.trainers.task.seeding import caller_keeps_generators
from choral.trainers.task.task import DivergedError, TaskError, raised_by

_log = logging.getLogger("choral.trainers")


@dataclass
class Traffic:
    """Of one round. asked: parties it began with. survivors: of its last exchange. bytes_up, bytes_down: of each
    exchange's busiest party, summed, without a sum that failed. seconds: simulated. failed: why it was given up.
    errors: of the parties whose training failed, in words for the user alone.
    """

    asked: int = 0
    survivors: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    failed: TooFewSurvivorsError | None = None
    errors: dict[str, ChoralError] = field(default_factory=dict)

    @property
    def dropped(self) -> dict[str, str]:
        """Whose training failed, and how, in words that hold nothing of data or code."""
        return {name: kind_of(error) for name, error in self.errors.items()}


@dataclass
class Federation:
    """All that stays the same from round to round, and the memory, which does not.

    draws: decides who is asked, and is known to nobody else; the seed where that is to be rehearsed.
    """

    algorithm: Algorithm
    trainer: LocalTrainer
    federation: FederationInfo
    names: Sequence[str]
    examples: Mapping[str, int]
    codecs: Mapping[str, Codec]
    sessions: Mapping[str, SumSession]
    memory: AlgorithmState
    participation: Participation
    secure_sum: SecureSum
    seed: int
    seen: Transcript
    draws: int
    policy: Policy | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of the parameters, for errors
    succeeded: int = 0  # rounds

    def round(self, weights: torch.Tensor, number: int, start: float = 0.0) -> tuple[torch.Tensor, Traffic]:
        """The next weights, float32, shape (d,). start: simulated. The memory changes only if the round succeeds, and
        so do the weights: in a round that has too few parties left they come back as they were, and Traffic says why.

        Raises: DivergedError if they are not finite; RunFolderError if the last round's memory is missing; what the
            parties' training did, if it failed at all of them; what codec and secure sum raise but for too few
            survivors.
        """
        self.seen.round = number
        if self.succeeded and self.algorithm.remembers and not self.memory:
            raise RunFolderError(
                f"what {self.algorithm.kind} kept after round {number - 1} is missing, without which it cannot go on",
                hint=f"restore algorithm_state.{number - 1}.safetensors, or run again in a new folder",
            )
        asked = self._asked(number, start)
        try:
            return self._train(weights, number, asked), asked.traffic
        except DisputedSharesError:
            raise
        except TooFewSurvivorsError as error:
            asked.traffic.failed, asked.traffic.survivors = error, 0
            return weights, asked.traffic
        finally:
            asked.traffic.seconds = asked.lasted(self.participation)

    def _train(self, weights: torch.Tensor, number: int, asked: _Asked) -> torch.Tensor:
        server = dict(self.memory.server)
        parties = {name: dict(state) for name, state in self.memory.parties.items()}
        rooms = self._rooms(asked.parties)
        steps = self.algorithm.round(
            Server(federation=self.federation, number=self.succeeded + 1, state=server), weights
        )
        try:
            ask = next(steps)
            while True:
                losses = self.participation.dropouts.draw(
                    asked.parties, stream(self.seed, number, f"dropouts {asked.sums}")
                )
                asked.lose(losses)
                ask = steps.send(self._exchange(ask, rooms, asked, parties, number))
        except StopIteration as end:
            moved: torch.Tensor = end.value
        if not torch.isfinite(moved).all():
            raise DivergedError(
                f"the server's step diverged in round {number}: the weights are not finite",
                hint="lower the learning rates; the last good round is kept",
            )
        self.memory.server, self.memory.parties = server, parties
        self.succeeded += 1
        return moved

    def _exchange(
        self, ask: Exchange, rooms: Mapping[str, SumSession], asked: _Asked, states: dict[str, State], number: int
    ) -> Mean:
        """Keys among all who are asked, then each present party's vector, added as it comes, then the sum."""
        codec, present, traffic = self.codecs[ask.channel], asked.sending, asked.traffic
        summing = rooms[ask.channel].begin(asked.lost)
        codec.begin(present)
        working: dict[str, Party] = {}

        def orders() -> Iterator[tuple[str, Work]]:
            for name in present:
                party = Party(
                    name=name,
                    examples=self.examples[name],
                    federation=self.federation,
                    number=number,
                    state=dict(states.get(name, {})),
                )
                working[name] = party
                yield name, self.algorithm.work(party, ask)

        kept: dict[str, State] = {}
        answered: set[str] = set()
        errors: dict[str, ChoralError] = {}
        with caller_keeps_generators():
            for name, done in self.trainer.do(orders(), ask.weights, number):
                party = working.pop(name)
                vector = self._vector(codec, party, ask, done)
                if isinstance(vector, ChoralError):
                    errors[name] = vector
                    _log.warning("round %d: %s (%s)", number, vector, vector.hint)
                    if (vector := codec.stand_in(name)) is None:
                        continue
                    party.state.clear()
                self.seen.vector(name, vector)
                summing.submit(name, vector)
                answered.add(name)
                if name not in errors and (party.state or name in states):
                    kept[name] = dict(party.state)
        if missing := [name for name in present if name not in answered and name not in errors]:
            raise TaskError(
                f"the engine {type(self.trainer).__name__} made nothing of the work of party {missing[0]!r}",
                hint="LocalTrainer.do yields one result per order",
            )
        asked.fail({name: error for name, error in errors.items() if name not in answered})
        if errors and len(errors) == len(present):
            raise all_failed(errors, number)
        result: SumResult = summing.finish()
        for name in result.survivors:
            if name in kept:
                states[name] = kept[name]
        sent = [*ask.new.values(), *([ask.weights] if not asked.sums else [])]
        traffic.survivors = len(result.survivors)
        traffic.bytes_up += max(result.bytes_up.values()) + codec.more_bytes
        traffic.bytes_down += max(result.bytes_down.values()) + 4 * sum(tensor.numel() for tensor in sent)
        asked.sums += 1
        return codec.decode(result)

    def _vector(self, codec: Codec, party: Party, ask: Exchange, done: Done | Failed) -> Any:
        """What the party sends, or the error that makes it drop out."""
        if isinstance(done, Failed):
            return raised_by(done.error, f"training at party {party.name!r}")
        try:
            vector = self.algorithm.answer(party, ask, done)
        except (TaskError, DivergedError) as error:
            return error
        try:
            return codec.encode(party.name, vector)
        except EncodingError as error:
            return beyond(error, vector, f"round {party.number}, party {party.name!r}, {ask.channel}", self.shapes)

    def _asked(self, number: int, start: float) -> _Asked:
        """Everybody, or this round's cohort, each set of its size equally likely; with those that are too slow."""
        rule = self.participation
        chosen = rule.ask(len(self.names), start, stream(self.draws, number, "cohort"), self.seed)
        parties = tuple(self.names[index] for index in chosen.tolist())
        seconds = rule.device.draw([self.examples[name] for name in parties], stream(self.seed, number, "devices"))
        asked = _Asked(parties, seconds, full=len(parties) >= rule.expected(len(self.names)) or rule.cohort is None)
        asked.lost = {name: "vector" for name, late in zip(parties, rule.late(seconds), strict=True) if late}
        return asked

    def _rooms(self, asked: tuple[str, ...]) -> Mapping[str, SumSession]:
        """The sessions for those who are asked.

        Raises: TooFewSurvivorsError for fewer than a round begins with; ConfigError if more parties are promised less
            than the fewest, which the run's record tells of; what open_sessions does.
        """
        if self.participation.everybody:
            return self.sessions
        needed = self.participation.fewest(len(self.names))
        if len(asked) < needed:
            raise TooFewSurvivorsError(
                "too few parties are available",
                survivors=len(asked),
                needed=needed,
                hint="lower participation.least, or let rounds fail with participation.patience",
            )
        rooms = open_sessions(
            self.secure_sum, self.codecs, self.seen, parties=len(self.names), roster=asked, policy=self.policy
        )
        check_promises(self.sessions, needed, rooms, len(asked))
        return rooms


@dataclass
class _Asked:
    """A round's parties as it goes on. lost: at their step of the sum at hand. full: as many as were to be asked."""

    parties: tuple[str, ...]
    seconds: NDArray[np.float64]
    full: bool
    lost: dict[str, Step] = field(default_factory=dict)
    sums: int = 0
    traffic: Traffic = field(init=False)

    def __post_init__(self) -> None:
        self.traffic = Traffic(asked=len(self.parties))

    def lose(self, losses: Mapping[str, Step]) -> None:
        """Begin a sum: who is lost in it, beside those who were lost before and do not come at all.

        In the first sum, who is too slow is there for the keys, unless it is lost earlier.
        """
        if self.sums:
            self.lost = dict.fromkeys(self.lost, "keys")
        for party, step in losses.items():
            self.lost[party] = min(step, self.lost.get(party, step), key=STEPS.index)

    def fail(self, errors: Mapping[str, ChoralError]) -> None:
        """Parties whose training failed, which are seen to be gone for the rest of the round."""
        self.lost |= dict.fromkeys(errors, "vector")
        self.traffic.errors |= errors

    @property
    def sending(self) -> tuple[str, ...]:
        """Those who send a vector."""
        losses = Losses(self.lost, self.parties)
        return tuple(party for party in self.parties if losses.takes(party, "vector"))

    def lasted(self, rule: Participation) -> float:
        answered = np.array([party not in self.lost for party in self.parties], bool)
        return rule.lasted(self.seconds[answered], complete=self.full and bool(answered.all()))


def open_sessions(
    secure_sum: SecureSum,
    codecs: Mapping[str, Codec],
    seen: Transcript,
    *,
    parties: int,
    roster: tuple[str, ...] | None = None,
    policy: Policy | None = None,
) -> dict[str, SumSession]:
    """One session per channel; channels whose vectors look alike share one. parties: how many there are in all, whom
    the roster is taken from. roster: by default all parties. seen: is told of each. policy: what the parties accept.

    Raises: what the codecs' check does; what the secure sum does for a roster of that size; PolicyError.
    """
    sessions: dict[str, SumSession] = {}
    by_spec: dict[object, SumSession] = {}
    for name, codec in codecs.items():
        spec = replace(codec.spec, parties=roster or codec.spec.parties, directory=parties)
        if spec not in by_spec:
            seen.begin(secure_sum.name, spec)
            by_spec[spec] = _opened(secure_sum, spec, policy)
        sessions[name] = by_spec[spec]
        codec.check(sessions[name])
    return sessions


def _opened(secure_sum: SecureSum, spec: SumSpec, policy: Policy | None) -> SumSession:
    if policy is None:
        return secure_sum.open(spec)
    return secure_sum.open(spec, policy=replace(policy, encoding=policy.encoding or spec.encoding))


def check_promises(fewer: Mapping[str, SumSession], few: int, more: Mapping[str, SumSession], many: int) -> None:
    """Raises: ConfigError if the sum promises less over many parties than over few, as the run's record tells."""
    for channel, room in more.items():
        stated = fewer[channel].statement
        for promise, choose in (("min_survivors", max), ("corrupt", min)):
            if room.statement.get(promise, 0) < stated.get(promise, 0):
                both = choose(stated[promise], room.statement[promise])
                raise ConfigError(
                    f"the secure sum promises {promise} = {stated[promise]} over {few} parties, and"
                    f" {room.statement[promise]} over {many}",
                    hint=f"give it {promise}={both}, for both",
                )
