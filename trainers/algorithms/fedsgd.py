"""Federated SGD, one secure sum a step (McMahan et al. 2017, arXiv 1602.05629); with noise in shares, DP-SGD.

A step: every party draws each of its records with probability q = B / N, sums the gradients of those drawn, and the
server steps with the sum over B:

    g = sum over all drawn records of grad f_i(w) / B
    m <- momentum m + g,                    w <- w - learning_rate m                                   optimizer "sgd"
    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,
    w <- w - learning_rate m' / (sqrt(v') + tau),  m' and v' without bias                              optimizer "adam"

A round is `steps_per_round` steps; the weights move after each, at the server alone. **A party never makes two steps
between two sums**, keeps nothing from one to the next, and does not see its own noisy gradient again: see
docs/noise-in-shares.md for what several local steps would cost. What the server does with an opened sum is
post-processing of it.

What a round releases: the sum of the drawn records' gradients, `steps_per_round` times. With
``Privacy(noise="distributed")`` each record's is clipped and the sum has noise, to which each party adds a share
(:mod:`choral.privacy.record_shares`); B is the divisor, never the number of those drawn, nor of who survived. With
``CorrelatedPrivacy(mechanism="banded", noise="distributed")`` batches are fixed, each record in one of N / B. Without
privacy the mean is weighted by the survivors' records: sums over q times the number of records of those in the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from choral.errors import ConfigError
from choral.trainers.algorithms.interface import (
    Algorithm,
    Batch,
    Channel,
    Exchange,
    FederationInfo,
    Party,
    Release,
    Rounds,
    Server,
    Work,
    check_below_one,
    check_positive,
    updated,
)
from choral.trainers.task import arguments

GRADIENT = Release(channel="update", what="sum of grad f_i(w_t) over the records drawn for a step", source="data")


@dataclass(frozen=True, kw_only=True)
class FedSGD(Algorithm):
    """batch_size: B, records that a step draws on average at all parties together. steps_per_round: secure sums, each
    with a step of the server, in a round. learning_rate: the server's, which the task's schedule multiplies.
    optimizer: the server's, "sgd" with `momentum`, or "adam" with `beta1`, `beta2` and `tau`.
    """

    kind = "fedsgd"
    releases = (GRADIENT,)
    needs_loss = True
    in_shares = True
    paced = True
    remembers = True
    batch_size: int = 64
    steps_per_round: int = 10
    learning_rate: float = 0.5
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    tau: float = 1e-8

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "tau")
        arguments.one_of(self.optimizer, "optimizer", ("sgd", "adam"))
        for name in ("batch_size", "steps_per_round"):
            arguments.whole_number(getattr(self, name), f"{self.kind}: {name}", 1, "such as 64, and 10 steps")
        check_below_one(self, "momentum", "beta1", "beta2")

    def channels(self, federation: FederationInfo) -> dict[str, Channel]:
        return {"update": Channel(length=federation.length, sums=self.steps_per_round)}

    def round(self, server: Server, weights: torch.Tensor) -> Rounds:
        """Raises: ConfigError for a batch of more records than there are."""
        rate = self.learning_rate * server.pace
        self.rate_of(server.federation.examples)
        for step in range(self.steps_per_round):
            new = {"step": torch.tensor(step)}
            ask = Exchange(channel="update", weights=weights, new=new, moved=step > 0)
            weights = updated(weights, -rate * self._direction(server, (yield ask).value))
        return weights

    def share_steps(self, examples: int) -> tuple[int, int]:
        self.rate_of(examples)
        return self.batch_size, self.steps_per_round

    def rate_of(self, examples: int) -> float:
        """q, for so many records. Raises: ConfigError for a batch of more than there are."""
        if self.batch_size > examples:
            raise ConfigError(
                f"{self.kind}: batch_size is {self.batch_size}, and all parties together have {examples} records",
                hint="batch_size counts the records of a step at all parties together",
            )
        return self.batch_size / examples

    def _direction(self, server: Server, gradient: torch.Tensor) -> torch.Tensor:
        """What the server moves against, of this gradient and those before it."""
        steps = server.state.get("steps", torch.zeros((), dtype=torch.float64)) + 1
        first = server.state.get("first_moment", torch.zeros_like(gradient))
        server.state["steps"] = steps
        if self.optimizer == "sgd":
            if not self.momentum:
                return gradient
            server.state["first_moment"] = first = self.momentum * first + gradient
            return first
        second = server.state.get("second_moment", torch.zeros_like(gradient))
        server.state["first_moment"] = first = self.beta1 * first + (1 - self.beta1) * gradient
        server.state["second_moment"] = second = self.beta2 * second + (1 - self.beta2) * gradient**2
        count = float(steps)
        scale: torch.Tensor = (second / (1 - self.beta2**count)).sqrt() + self.tau
        direction: torch.Tensor = first / (1 - self.beta1**count) / scale
        return direction

    def work(self, party: Party, ask: Exchange) -> Work:
        step = int(ask["step"])
        row = (party.number - 1) * self.steps_per_round + step
        return Batch(rate=self.rate_of(party.federation.examples), step=step, row=row)
