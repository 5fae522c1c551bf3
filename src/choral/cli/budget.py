"""The command ``choral budget``: noise, cost, length or batch size of DP-SGD."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from choral.cli.arguments import parse


@dataclass(frozen=True, kw_only=True)
class BudgetFlags:
    """Noise, cost, length or batch size of DP-SGD with Poisson sampling.

    Give all but one of --epsilon, --noise-multiplier, --sample-rate and --steps (or --epochs): the answer is the least
    noise, the epsilon, the largest sample rate or the most steps that keep the promise.
    Unit: one record; how many there are is public. Accountant: PLD, cross-checked by RDP.
    """

    delta: float
    """Probability outside the promise; well below 1 / number of records."""
    sample_rate: float | None = None
    """Expected batch size over number of records."""
    steps: int | None = None
    """Noisy steps in all."""
    epochs: float | None = None
    """Passes over the data, in the place of steps: a sample rate q takes epochs / q steps."""
    epsilon: float | None = None
    """The promise wanted."""
    noise_multiplier: float | None = None
    """Noise standard deviation over clipping norm."""
    neighbours: Literal["zero out one record", "replace one record"] = "zero out one record"
    """What one record may be changed to unnoticed: to an empty one, or, with more noise, to any other."""
    check: bool = False
    """Also have dp-accounting compute it, as every training does; takes a second more."""
    json: bool = False
    """Print the numbers as JSON."""


def budget(words: list[str]) -> int:
    """Print the answer."""
    wanted = parse("budget", words, BudgetFlags)
    from choral.privacy.accounting.budget import budget

    answer = budget(
        epsilon=wanted.epsilon,
        noise_multiplier=wanted.noise_multiplier,
        delta=wanted.delta,
        sample_rate=wanted.sample_rate,
        steps=wanted.steps,
        epochs=wanted.epochs,
        neighbours=wanted.neighbours,
        check=wanted.check,
    )
    print(json.dumps(asdict(answer), indent=1) if wanted.json else answer)
    return 0
