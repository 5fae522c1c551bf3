"""What a data owner's promise has cost so far."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from choral.privacy.accounting.events import NEIGHBOURS


@dataclass(frozen=True, kw_only=True)
class Spent:
    """An (epsilon, delta) statement with everything that is needed to read it.

    epsilon: the accountant's upper bound for all recorded events, at ``delta``, if their parameters, and the point at
        which they end, were fixed in advance. guarantee: what holds whoever chose, from what was seen, when to stop and
        what to train next: the cost of the whole plan, or the promise that a filter kept over several plans
        (:mod:`choral.privacy.ledgers.plans`). The two are equal when a single plan has come to its end. None where no
        plan was recorded in advance, as in older versions.
    unit: whose presence is hidden. neighbours: how two neighbouring datasets differ; they have equally many records.
    steps, noise_multiplier, sample_rate: noisy steps taken in all, and the setting of the latest ones
        (noise standard deviation over clipping norm; expected batch size over dataset size); 0 before any step.
        Where batches are fixed and noise is correlated, the rate is 1, and the noise multiplier that of the one
        Gaussian mechanism which the latest pass costs, not of a step.
    accountant: the method that computed epsilon.
    records_per_person: the most that one person holds, where that is known. person_epsilon, person_delta: what then
        holds for all records of a person together, by :func:`group_pair`; a delta of 1 is no promise.
    """

    epsilon: float
    delta: float
    unit: str = "record"
    neighbours: str = NEIGHBOURS
    accountant: str
    steps: int
    noise_multiplier: float
    sample_rate: float
    guarantee: float | None = None
    records_per_person: int | None = None
    person_epsilon: float | None = None
    person_delta: float | None = None

    @property
    def in_words(self) -> str:
        """The two numbers, and what each is good for."""
        from choral.privacy.accounting.budget import at_least, shown

        spent, delta = at_least(self.epsilon), shown(self.delta)
        said = f"epsilon {spent} at delta {delta}"
        if self.guarantee is None:
            return f"{said}, for releases that were fixed in advance"
        if self.guarantee <= self.epsilon * (1.0 + 1e-9):
            return said
        return (
            f"epsilon {at_least(self.guarantee)} at delta {delta} is guaranteed; {spent} for releases "
            "and an end that were fixed in advance"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict of JSON types."""
        return asdict(self)


def group_pair(epsilon: float, delta: float, records: int) -> tuple[float, float]:
    """Return the (epsilon, delta) of `records` records together, given that of each one.

    Between datasets that differ in k records lie k - 1 others, each a neighbour of the next, so that the bounds of k
    neighbours follow each other: (k epsilon, delta (1 + e^epsilon + ... + e^((k-1) epsilon))). Not k epsilon at the
    same delta. For any mechanism and relation; the delta is capped at 1, where nothing is promised.
    """
    if (records - 1) * epsilon > 700.0:
        return records * epsilon, 1.0
    return records * epsilon, min(math.fsum(delta * math.exp(i * epsilon) for i in range(records)), 1.0)
