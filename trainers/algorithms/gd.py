"""Gradient descent over parties: the yardstick. One gradient of all records per round.

A round: every party contributes n_k grad F_k(w); the server steps w <- w - rate (sum_k n_k grad F_k(w) / n + ridge w).
A party's full batch in one step of FedAvg is the same.

What a round releases: the weighted sum of the parties' gradients. They are read from the records outside the training
loop, so each party's own noise does not cover them. ``Privacy(noise="distributed")`` does: each record's gradient is
clipped, each party adds a share of the noise to their sum, and the divisor is n, whoever survived; it is FedSGD with
every record in every step (q = 1), and the ridge, of weights that all know, costs nothing. Client-level privacy clips
each party's gradient as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from choral.trainers.algorithms.interface import (
    Algorithm,
    Exchange,
    Gradient,
    Party,
    Release,
    Rounds,
    Server,
    Work,
    check_not_negative,
    check_positive,
    updated,
)

GRADIENT = Release(channel="gradient", what="grad F_k(w_t), the gradient of the mean loss", source="data")


@dataclass(frozen=True, kw_only=True)
class GD(Algorithm):
    """rate: step size, which the task's schedule multiplies. ridge: lambda of the term lambda/2 |w|^2 that is added to
    the objective.
    """

    kind = "gd"
    releases = (Release(channel="update", what=GRADIENT.what, source="data"),)
    needs_loss = True
    in_shares = True
    paced = True
    rate: float = 0.1
    ridge: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "rate")
        check_not_negative(self, "ridge")

    def round(self, server: Server, weights: torch.Tensor) -> Rounds:
        mean = yield Exchange(channel="update", weights=weights)
        return updated(weights, -self.rate * server.pace * (mean.value + self.ridge * weights.to(mean.value)))

    def share_steps(self, examples: int) -> tuple[int, int]:
        return examples, 1

    def work(self, party: Party, ask: Exchange) -> Work:
        return Gradient()
