"""The parties' half of an exchange: each does its work, encodes what it answers, and sends it into the sum."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from choral.errors import ChoralError
from choral.privacy import EncodingError
from choral.protocols.interface import SumRound
from choral.trainers.algorithms.interface import (
    Algorithm,
    Done,
    Exchange,
    Failed,
    FederationInfo,
    LocalTrainer,
    Party,
    Work,
)
from choral.trainers.federated.codec import Codec
from choral.trainers.federated.failures import all_failed, beyond
from choral.trainers.federated.round_parties import RoundParties
from choral.trainers.run_folder.algorithm_state import State
from choral.trainers.run_folder.transcript import Transcript
from choral.trainers.task.seeding import caller_keeps_generators
from choral.trainers.task.task import DivergedError, TaskError, raised_by

_log = logging.getLogger("choral.trainers")


@dataclass
class PartyAnswer:
    """One party in one exchange, with a copy of its own state: what it is to compute, and what it sends of that."""

    algorithm: Algorithm
    party: Party
    had_state: bool

    @classmethod
    def begin(
        cls, algorithm: Algorithm, name: str, examples: int, federation: FederationInfo, parties: RoundParties
    ) -> PartyAnswer:
        state = parties.states.get(name)
        view = Party(
            name=name, examples=examples, federation=federation, number=parties.number, state=dict(state or {})
        )
        return cls(algorithm, view, state is not None)

    def work(self, ask: Exchange) -> Work:
        return self.algorithm.work(self.party, ask)

    def vector(self, ask: Exchange, done: Done | Failed, codec: Codec, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """What the party sends, whole numbers; or the error that makes it drop out."""
        if isinstance(done, Failed):
            return raised_by(done.error, f"training at party {self.party.name!r}")
        try:
            vector = self.algorithm.answer(self.party, ask, done)
        except (TaskError, DivergedError) as error:
            return error
        try:
            return codec.encode(self.party.name, vector)
        except EncodingError as error:
            where = f"round {self.party.number}, party {self.party.name!r}, {ask.channel}"
            return beyond(error, vector, where, shapes)

    @property
    def state(self) -> State | None:
        """What the party keeps, if it survives; None if it keeps nothing and never did."""
        return dict(self.party.state) if self.party.state or self.had_state else None


@dataclass(frozen=True, kw_only=True)
class PartiesHere:
    """All parties, computed by this process's trainer: what a round asks, and where they send their vectors.

    shapes: of the model's parameters, for errors.
    """

    algorithm: Algorithm
    trainer: LocalTrainer
    federation: FederationInfo
    examples: Mapping[str, int]
    codecs: Mapping[str, Codec]
    transcript: Transcript
    shapes: Mapping[str, tuple[int, ...]]

    def answer(self, ask: Exchange, parties: RoundParties, summing: SumRound) -> None:
        """Every present party's vector, added as it comes. Who fails is noted in ``parties``, and so is each state.

        Raises: what the training did, if it failed at all parties; TaskError if the trainer left a party out; what
            codec and sum raise.
        """
        codec, present = self.codecs[ask.channel], parties.sending
        codec.begin(present)
        working: dict[str, PartyAnswer] = {}
        errors: dict[str, ChoralError] = {}

        def orders() -> Iterator[tuple[str, Work]]:
            for name in present:
                one = PartyAnswer.begin(self.algorithm, name, self.examples[name], self.federation, parties)
                working[name] = one
                yield name, one.work(ask)

        with caller_keeps_generators():
            for name, done in self.trainer.do(orders(), ask.weights, parties.number):
                one = working.pop(name)
                vector = one.vector(ask, done, codec, self.shapes)
                if isinstance(vector, ChoralError):
                    errors[name] = vector
                    _log.warning("round %d: %s (%s)", parties.number, vector, vector.hint)
                    if (vector := codec.stand_in(name)) is None:
                        continue
                self.transcript.vector(name, vector)
                summing.submit(name, vector)
                parties.answered[name] = None if name in errors else one.state
        if missing := [name for name in present if name not in parties.answered and name not in errors]:
            raise TaskError(
                f"the engine {type(self.trainer).__name__} made nothing of the work of party {missing[0]!r}",
                hint="LocalTrainer.do yields one result per order",
            )
        parties.fail({name: error for name, error in errors.items() if name not in parties.answered})
        if errors and len(errors) == len(present):
            raise all_failed(errors, parties.number)
