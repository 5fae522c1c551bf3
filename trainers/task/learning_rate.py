"""A learning rate that changes from round to round, alike at every party and in the cloud."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from choral.errors import ConfigError
from choral.trainers.task import arguments


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the learning rates of the optimizer that ``build`` makes are multiplied by in each round.

    Raises: ConfigError for a kind that is none, or numbers out of range.
    """

    kind: Literal["constant", "cosine", "step"] = "constant"
    """constant; cosine: from 1 to ``final`` over all rounds; step: times ``decay`` after every ``every`` rounds."""
    final: float = 0.0
    """cosine: the factor that a round after the last one would have."""
    decay: float = 0.1
    """step: factor of each step."""
    every: int = 10
    """step: rounds from one step to the next."""
    warmup: int = 0
    """Rounds in which the factor first rises in equal steps to 1."""

    def __post_init__(self) -> None:
        arguments.one_of(self.kind, "schedule.kind", ("constant", "cosine", "step"))
        arguments.own_numbers(self, "Schedule")
        if not (0 <= self.final <= 1 and 0 < self.decay <= 1 and self.every >= 1 and self.warmup >= 0):
            raise ConfigError(
                "expected 0 <= schedule.final <= 1, 0 < decay <= 1, every >= 1, warmup >= 0; got"
                f" {self.final:g}, {self.decay:g}, {self.every}, {self.warmup}",
                hint="warmup and every are whole numbers of rounds",
            )

    @property
    def constant(self) -> bool:
        return self.kind == "constant" and not self.warmup

    def factor(self, number: int, rounds: int) -> float:
        """Of round ``number``, from 1, of so many."""
        if number <= self.warmup:
            return number / (self.warmup + 1)
        past = number - 1 - self.warmup
        if self.kind == "cosine":
            share = past / max(rounds - self.warmup, 1)
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * share)) / 2
        return float(self.decay ** (past // self.every)) if self.kind == "step" else 1.0

    def record(self) -> dict[str, Any] | None:
        """For run.json; None for a constant rate."""
        return None if self.constant else asdict(self)


@dataclass(frozen=True)
class Rates:
    """A schedule, by default constant, over the rounds of one run."""

    schedule: Schedule | None
    rounds: int

    @property
    def constant(self) -> bool:
        return self.schedule is None or self.schedule.constant

    def factor(self, number: int) -> float:
        """What learning rates are multiplied by in round ``number``, from 1."""
        return 1.0 if self.schedule is None else self.schedule.factor(number, self.rounds)


CONSTANT = Rates(None, 1)
