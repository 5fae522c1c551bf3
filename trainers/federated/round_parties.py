"""The parties of one round as it goes on: who was selected, who dropped out and when, whose training failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from choral.errors import ChoralError
from choral.protocols.interface import STEPS, Losses, Step
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.federated.participation import Participation, stream
from choral.trainers.run_folder.algorithm_state import State

if TYPE_CHECKING:
    from choral.trainers.federated.party import TrainingParty


@dataclass
class RoundParties:
    """names: who was selected. seconds: until each answers, simulated. full: as many as were to be selected.

    lost: who dropped out, at a step of the sum at hand. sums: made so far. told: the exchange of the sum at hand.
    errors: of those whose training failed. answered: who sent a vector into the sum at hand.
    states: each party's own, as it would be kept if the round ended here.
    """

    number: int
    names: tuple[str, ...]
    seconds: NDArray[np.float64]
    full: bool
    lost: dict[str, Step]
    states: dict[str, State]
    sums: int = 0
    told: Told | None = None
    errors: dict[str, ChoralError] = field(default_factory=dict)
    answered: dict[str, TrainingParty] = field(default_factory=dict)

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
    seconds = rule.device.draw([examples[name] for name in selected], stream(seed, number, "devices"))
    return RoundParties(
        number=number,
        names=selected,
        seconds=seconds,
        full=len(selected) >= rule.expected(len(names)) or rule.cohort is None,
        lost={name: "vector" for name, late in zip(selected, rule.late(seconds), strict=True) if late},
        states={name: dict(state) for name, state in states.items()},
    )
