"""Sums of the parties' own evaluations: of each number, weighted by the records that it is of, and of those records.

They go through a secure sum like the vectors of training, in a session of their own, and are released **in the clear**:
no noise is added, no promise covers them and no ledger is charged. So they are part of the terms that the parties sign,
by name, and a party that was not asked for them at the beginning is never asked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from choral.errors import ConfigError
from choral.trainers.algorithms.interface import Channel, Release
from choral.trainers.federated.codec import Encoding, WeightedCodec
from choral.trainers.task.evaluation import evaluated
from choral.trainers.task.flat_vector import Layout
from choral.trainers.task.task import EvaluateParty, Task, TaskError

if TYPE_CHECKING:
    from choral.trainers.local_steps.resident_model import Resident

CHANNEL = "site metrics"
IN_THE_CLEAR = "in the clear, no epsilon"


def metrics_codec(metrics: tuple[str, ...], encoding: Encoding, cap: int, roster: tuple[str, ...]) -> WeightedCodec:
    """Both halves of the mean over all held-out records. cap: of the records that a party may say it has."""
    own = Encoding(value_bound=encoding.value_bound, value_bits=encoding.value_bits)
    return WeightedCodec(Channel(length=len(metrics)), own, cap=cap, roster=roster)


def metrics_releases(metrics: tuple[str, ...]) -> list[dict[str, Any]]:
    """What becomes known, for the run's record."""
    if not metrics:
        return []
    what = f"{', '.join(metrics)} of each party's held-out records, summed with their number: {IN_THE_CLEAR}"
    return [asdict(Release(channel=CHANNEL, what=what, source="data"))]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What one party says of a model: its ``evaluate_party`` on the records that it holds out.

    Raises (when called): TaskError for a number that it does not return.
    """

    metrics: tuple[str, ...]
    evaluate: EvaluateParty
    records: Any
    model: nn.Module
    layout: Layout
    seed: int

    @property
    def examples(self) -> int:
        return len(self.records)

    def __call__(self, weights: torch.Tensor) -> torch.Tensor:
        """float32, shape (metrics,)."""
        self.layout.write(weights)
        found = evaluated(lambda model: self.evaluate(model, self.records), self.model, self.seed)
        if missing := [name for name in self.metrics if name not in found]:
            raise TaskError(f"evaluate_party returned no {missing[0]!r}", hint=f"it returned {', '.join(found)}")
        return torch.tensor([found[name] for name in self.metrics], dtype=torch.float32)


def judge_of(task: Task, metrics: tuple[str, ...], resident: Resident, most: int) -> Judge | None:
    """None where nothing was agreed on. most: records that a party may have.

    Raises: ConfigError for a task that holds out no records here, or more than were agreed on.
    """
    if not metrics:
        return None
    held, evaluate = list((task.held_out or {}).values()), task.evaluate_party
    if evaluate is None or len(held) != 1 or not 1 <= len(held[0]) <= most:
        raise ConfigError(
            "sums of the parties' own evaluations were asked for, and the task holds out no records here",
            hint="give Task(held_out={NAME: dataset}, evaluate_party=f) with f(model, dataset)",
        )
    return Judge(
        metrics=metrics,
        evaluate=evaluate,
        records=held[0],
        model=resident.model,
        layout=resident.layout,
        seed=resident.seed,
    )
