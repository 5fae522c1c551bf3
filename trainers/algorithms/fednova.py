"""FedNova (Wang, Liu, Liang, Joshi, Poor 2020, arXiv 2007.07481, equation 5 with plain SGD at the parties).

Parties that make more local steps t_k move further, so FedAvg minimises an objective that leans to them. FedNova
averages the change per step, and moves by the mean number of steps:

    w <- w + (sum_k p_k t_k) sum_k p_k (w_k - w) / t_k,          p_k = n_k / n.

If all t_k are equal it is FedAvg. For SGD without momentum t_k is the count of steps, as here (the paper's a_k = 1).

What a round releases: the weighted sums of (w_k - w) reference / t_k and of t_k, the reference being public: rounded to
fixed point, a change per step would be off by as many roundings as there are steps. With record-level privacy t_k is
fixed by the public number of steps in a pass, whatever the records, so t_k costs nothing and the other is the update,
rescaled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from choral.trainers.algorithms.fedavg import UPDATE
from choral.trainers.algorithms.interface import (
    Algorithm,
    Channel,
    Done,
    Exchange,
    FederationInfo,
    Party,
    Release,
    Rounds,
    Server,
    Train,
    Work,
    check_positive,
    updated,
)
from choral.trainers.task.task import TaskError

STEPS = Release(channel="update", what="t_k, the number of local steps", source="derived")


@dataclass(frozen=True, kw_only=True)
class FedNova(Algorithm):
    """max_steps: the most steps that a party may make in a round; with it t_k is sent in fixed point. reference: the
    steps, known to all, to which changes are scaled before they are rounded: about as many as are usual.
    """

    kind = "fednova"
    releases = (UPDATE, STEPS)
    max_steps: int = 4096
    reference: int = 64

    def __post_init__(self) -> None:
        check_positive(self, "max_steps", "reference")

    def channels(self, federation: FederationInfo) -> dict[str, Channel]:
        return {"update": Channel(length=federation.length + 1)}

    def round(self, server: Server, weights: torch.Tensor) -> Rounds:
        mean = (yield Exchange(channel="update", weights=weights)).value
        steps = mean[-1] * self.max_steps / server.federation.value_bound
        return updated(weights, steps / self.reference * mean[:-1])

    def work(self, party: Party, ask: Exchange) -> Work:
        return Train(counts=True)

    def answer(self, party: Party, ask: Exchange, done: Done) -> torch.Tensor:
        if done.path is None or not 1 <= done.steps <= self.max_steps:
            raise TaskError(
                f"fednova: party {party.name!r} made {done.steps} steps, {'not ' if done.path is None else ''}with"
                f" plain SGD; expected 1 to {self.max_steps} with torch.optim.SGD, one learning rate, no momentum",
                hint="use such an optimizer, a larger max_steps, or FedAvg",
            )
        share = party.federation.value_bound * done.steps / self.max_steps
        # float64: the step count must not be rounded to float32 before the fixed point
        scaled = done.vector.double() * (self.reference / done.steps)
        return torch.cat([scaled, done.vector.new_tensor([share], dtype=torch.float64)])
