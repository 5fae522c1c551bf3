"""What a data holder's promise has cost so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from choral.privacy.events import NEIGHBOURS


@dataclass(frozen=True, kw_only=True)
class Spent:
    """An (epsilon, delta) statement with everything that is needed to read it.

    epsilon: the accountant's upper bound for all recorded events, at ``delta``.
    unit: whose presence is hidden. neighbours: how two neighbouring datasets differ; they have equally many records.
    steps, noise_multiplier, sample_rate: noisy steps taken in all, and the setting of the latest ones
        (noise standard deviation over clipping norm; expected batch size over dataset size); 0 before any step.
        Where batches are fixed and noise is correlated, the rate is 1, and the noise multiplier that of the one
        Gaussian mechanism which the latest pass costs, not of a step.
    accountant: the method that computed epsilon.
    """

    epsilon: float
    delta: float
    unit: str = "record"
    neighbours: str = NEIGHBOURS
    accountant: str
    steps: int
    noise_multiplier: float
    sample_rate: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict of JSON types."""
        return asdict(self)
