"""The parties of one round as it goes on: who was selected, who dropped out and when, whose training failed.

`PartiesHere` are those that this process plays: all of them, where a federation is one process or led by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from choral.errors import ChoralError
from choral.privacy import Ledger
from choral.protocols.contributors import ContributorCount
from choral.protocols.interface import STEPS, Losses, Step, SumRound
from choral.trainers.algorithms.interface import Exchange, LocalTrainer, Work
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.federated.codec import Codec
from choral.trainers.federated.failures import all_failed, nothing_made
from choral.trainers.federated.participation import Device, Participation, stream
from choral.trainers.federated.party import TrainingParty
from choral.trainers.federated.terms.training_terms import TrainingTerms
from choral.trainers.run_folder.algorithm_state import State
from choral.trainers.run_folder.energy import Stopwatch
from choral.trainers.run_folder.transcript import Transcript
from choral.trainers.task.flat_vector import several
from choral.trainers.task.seeding import caller_keeps_generators


@dataclass
class RoundParties:
    """names: who was selected. seconds: until each answers, simulated. full: as many as were to be selected.

    lost: who dropped out, at a step of the sum at hand. sums: made so far. errors: of those whose training failed.
    silent: of those elsewhere, who sent no vector; why, nobody here knows. answered: who sent a vector into the sum at
    hand. states: each party's own, as it would be kept if the round ended here. training: how long it took.
    contributed: counts who moves what, where that tells of anything.
    """

    number: int
    names: tuple[str, ...]
    seconds: NDArray[np.float64]
    full: bool
    lost: dict[str, Step]
    states: dict[str, State]
    sums: int = 0
    errors: dict[str, ChoralError] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    answered: dict[str, TrainingParty] = field(default_factory=dict)
    training: Stopwatch = field(default_factory=Stopwatch)
    contributed: ContributorCount | None = None

    def begin_sum(self, losses: Mapping[str, Step]) -> None:
        """Who drops out in it, beside those who did before and do not come at all.

        In the first sum, who is too slow is there for the keys, unless it drops out earlier.
        """
        if self.sums:
            self.lost = dict.fromkeys(self.lost, "keys")
        for party, step in losses.items():
            self.lost[party] = min(step, self.lost.get(party, step), key=STEPS.index)
        self.answered = {}

    def fail(self, errors: Mapping[str, ChoralError]) -> None:
        """Parties whose training failed, which are seen to be gone for the rest of the round."""
        self.lost |= dict.fromkeys(errors, "vector")
        self.errors |= errors

    def end_sum(self, survivors: Sequence[str]) -> None:
        """A party's own state counts only if it survived."""
        for name in survivors:
            if (party := self.answered.get(name)) is not None:
                party.settle(survived=True)
                if party.state is not None:
                    self.states[name] = party.state
        self.answered = {}
        self.sums += 1

    @property
    def sending(self) -> tuple[str, ...]:
        """Those who send a vector."""
        losses = Losses(self.lost, self.names)
        return tuple(party for party in self.names if losses.takes(party, "vector"))

    def lasted(self, rule: Participation) -> float:
        """Simulated seconds."""
        answered = np.array([party not in self.lost for party in self.names], bool)
        return rule.lasted(self.seconds[answered], complete=self.full and bool(answered.all()))


def select(
    rule: Participation,
    names: Sequence[str],
    examples: Mapping[str, int],
    *,
    number: int,
    start: float,
    draws: int,
    seed: int,
    states: Mapping[str, State],
) -> RoundParties:
    """Everybody, or this round's cohort, each set of its size equally likely; with those that are too slow.

    start: of the round, simulated. draws: decides who is selected, and is known to nobody else. states: of the parties
    before the round, which stay as they are.
    """
    chosen = rule.select(len(names), start, stream(draws, number, "cohort"), seed)
    selected = tuple(names[index] for index in chosen.tolist())
    if rule.device == Device():  # they answer at once
        seconds = np.zeros(len(selected))
    else:
        seconds = rule.device.draw([examples[name] for name in selected], stream(seed, number, "devices"))
    return RoundParties(
        number=number,
        names=selected,
        seconds=seconds,
        full=len(selected) >= rule.expected(len(names)) or rule.cohort is None,
        lost={name: "vector" for name, late in zip(selected, rule.late(seconds), strict=True) if late},
        states={name: dict(state) for name, state in states.items()},
    )


@dataclass(frozen=True, kw_only=True)
class PartiesHere:
    """The parties that this process plays, made when they are selected and let go when they have sent.

    ledgers: by party, for promises of records. codecs: the server's halves, which make the parties' here.
    """

    terms: TrainingTerms
    trainer: LocalTrainer
    examples: Mapping[str, int]
    ledgers: Mapping[str, Ledger]
    codecs: Mapping[str, Codec]
    transcript: Transcript

    def answer(self, told: Told, parties: RoundParties, summing: SumRound) -> None:
        """Every present party's vector, added as it comes. Who fails is noted in ``parties``, and so is each state.

        Raises: what the training did, if it failed at all parties; TaskError if the trainer left a party out; what
            codec and sum raise.
        """
        ask, present = told.ask, parties.sending
        codec = self.codecs[ask.channel]
        codec.begin(present, lambda: told.digest)
        working: dict[str, TrainingParty] = {}
        errors: dict[str, ChoralError] = {}

        def orders() -> Iterator[tuple[str, Work]]:
            for name in present:
                party = working[name] = self._party(name, ask, codec, parties)
                if (needs := summing.needs(name)) is not None:
                    party.check(needs, told)
                yield name, party.order(told)

        with caller_keeps_generators():
            trained = parties.training.over(self.trainer.do(orders(), ask.weights, parties.number))
            for name, done in several(trained, len(ask.weights)):
                party = working.pop(name)
                encoded = party.answer(done)
                if party.error is not None:
                    errors[name] = party.error
                if encoded is None:
                    continue
                self.transcript.vector(name, encoded.vector)
                summing.submit(name, encoded.vector)
                if parties.contributed is not None:
                    parties.contributed.add(encoded.vector)
                codec.take(encoded)
                parties.answered[name] = party
        if missing := [name for name in present if name not in parties.answered and name not in errors]:
            raise nothing_made(self.trainer, missing[0])
        parties.fail({name: error for name, error in errors.items() if name not in parties.answered})
        if errors and len(errors) == len(present):
            raise all_failed(errors, parties.number)

    def _party(self, name: str, ask: Exchange, codec: Codec, parties: RoundParties) -> TrainingParty:
        examples = self.examples[name]
        return TrainingParty(
            name,
            self.terms,
            {ask.channel: codec.party(examples)},
            examples=examples,
            ledger=self.ledgers.get(name),
            state=parties.states.get(name),
        )
