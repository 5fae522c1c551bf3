"""What a probe saw of one training, and how a test of it is written down."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence, Sized

import numpy as np
import numpy.typing as npt

from choral.audits.findings.evidence import ProbeCheck
from choral.audits.probes.records import Floats, ProbeLayout
from choral.privacy import Spent

FALSE_ALARMS = 1e-6
"""Of each check on an honest trainer; the canaries have 1 - confidence."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """One training. released: of each step, shape (steps, layout.length), times batch size over clipping norm.

    drawn: how often each record was in each step, shape (steps, records), canaries first. inside: the canaries'
    coins. spent: what the ledger says. step: between neighbours of the grid that the releases are on, in their unit;
    0 for floats.
    """

    layout: ProbeLayout
    released: Floats
    drawn: npt.NDArray[np.int64]
    inside: npt.NDArray[np.bool_]
    spent: Spent
    step: float = 0.0

    @property
    def loud(self) -> Floats:
        """How often each canary that is in was drawn in each step; shape (steps, canaries)."""
        return np.asarray(self.drawn[:, : self.layout.canaries] * self.inside.astype(np.float64), dtype=np.float64)

    @property
    def noise(self) -> float:
        return float(self.spent.noise_multiplier or 0.0)


def check(
    name: str, p_value: float, finding: str, fault: str, numbers: tuple[float, float], *assumptions: str
) -> ProbeCheck:
    """One test as data. finding: what is said if it holds; fault: if not. numbers: expected and observed."""
    violated = p_value < FALSE_ALARMS
    return ProbeCheck(
        name=name,
        violated=violated,
        expected=numbers[0],
        observed=numbers[1],
        p_value=min(float(p_value), 1.0),
        false_alarms=FALSE_ALARMS,
        finding=fault if violated else finding,
        assumptions=assumptions,
    )


def windows(trainings: Sequence[Sized]) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Parts of a schedule in which something may be wrong that is right in others: name and the steps' places.

    trainings: something of each step; the places are those of all trainings, one after another.
    """
    lengths = [len(each) for each in trainings]
    alike = len(set(lengths)) == 1
    steps, runs = (lengths[0], len(lengths)) if alike else (sum(lengths), 1)
    places = np.arange(steps)
    parts = [("in all steps", places)]
    for every in range(2, 7):
        parts += [(f"in every {every}th step from step {n + 1} on", places[n::every]) for n in range(every)]
    for cut in {max(steps // part, 1) for part in (2, 3, 4, 8)}:
        parts += [(f"in the last {cut} steps", places[-cut:]), (f"in the first {cut} steps", places[:cut])]
    parts += [(f"in step {place + 1}", places[place : place + 1]) for place in places]
    for where, part in parts:
        yield where, np.concatenate([part + steps * training for training in range(runs)])


def paid_for(made: int, paid: int, what: str) -> ProbeCheck:
    """Whether every step or sum that was made is in the ledger. Exact."""
    return check(
        f"Every {what} is in the ledger",
        0.0 if made > paid else 1.0,
        f"{made} {what}s were made, {paid} are paid for.",
        f"{made} {what}s were made, and {paid} are paid for.",
        (float(paid), float(made)),
    )
