"""DANE (Shamir, Srebro, Zhang 2014, arXiv 1312.7853, figure 1), exact for convex losses, or inexact by SVRG passes.

A round, F_k with the ridge term included:

    1. the parties send gradients, the server forms g = grad f(w_t);
    2. w_k = argmin_w F_k(w) - (grad F_k(w_t) - eta g) . w + mu/2 |w - w_t|^2;
    3. w_{t+1} = mean_k w_k, each party counted alike.

Inexactly, party k takes passes of w <- w - step (grad f_i(w) - grad f_i(w_t) + eta g + (ridge + mu) (w - w_t)) over its
records (Konecny et al. 2016, arXiv 1610.02527, section 3.4); with eta = 1, mu = 0, one pass, that is naive
federated SVRG.
DANE assumes that the parties' objectives are alike; where they are not, mu = 0 may diverge.

What a round releases: the weighted sum of the gradients, and the plain sum of the changes. Both are read from the
records outside the training loop, so record-level privacy refuses this algorithm. Client-level privacy takes it: each
round has two sums, both clipped, noisy and charged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from choral.trainers.algorithms.gd import GRADIENT
from choral.trainers.algorithms.interface import (
    Algorithm,
    Channel,
    Exchange,
    FederationInfo,
    Gradient,
    Minimise,
    Party,
    Release,
    Rounds,
    Server,
    Svrg,
    Work,
    check_not_negative,
    check_positive,
    updated,
)
from choral.trainers.task import arguments

CHANGE = Release(channel="update", what="w_k - w_t, the change by the local minimisation", source="data")


@dataclass(frozen=True, kw_only=True)
class DANE(Algorithm):
    """eta: weight of the global gradient. mu: of the proximal term. ridge: lambda of the objective's lambda/2 |w|^2.

    solver: "newton", exact, for convex losses of moderate size; or "svrg", so many passes with this step.
    mean: of the updates, by "parties" (the paper) or "examples".
    """

    kind = "dane"
    releases = (GRADIENT, CHANGE)
    needs_loss = True
    eta: float = 1.0
    mu: float = 0.0
    ridge: float = 0.0
    solver: Literal["newton", "svrg"] = "newton"
    step: float = 0.1
    passes: int = 1
    mean: Literal["examples", "parties"] = "parties"

    def __post_init__(self) -> None:
        check_positive(self, "eta", "step", "passes")
        check_not_negative(self, "mu", "ridge")
        for name, known in (("solver", ("newton", "svrg")), ("mean", ("examples", "parties"))):
            arguments.one_of(getattr(self, name), f"{self.kind}: {name}", known)

    def channels(self, federation: FederationInfo) -> dict[str, Channel]:
        return {
            "gradient": Channel(length=federation.length),
            "update": Channel(length=federation.length, weighing=self.mean),
        }

    def round(self, server: Server, weights: torch.Tensor) -> Rounds:
        slope = (yield Exchange(channel="gradient", weights=weights)).value
        direction = updated(self.eta * self.ridge * weights, self.eta * slope)
        change = (yield Exchange(channel="update", weights=weights, new={"direction": direction})).value
        return updated(weights, change)

    def work(self, party: Party, ask: Exchange) -> Work:
        if ask.channel == "gradient":
            return Gradient()
        if self.solver == "newton":
            return Minimise(direction=ask["direction"], pull=self.ridge + self.mu)
        return Svrg(direction=ask["direction"], step=self.step, pull=self.ridge + self.mu, passes=self.passes)
