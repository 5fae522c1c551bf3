"""FSVRG (Konecny, McMahan, Ramage, Richtarik 2016, arXiv 1610.02527, algorithm 4), for many parties, sparse features.

n^j = #{i: x_i^j != 0}, n_k^j the same at party k; phi^j = n^j / n, phi_k^j = n_k^j / n_k; omega^j = #{k: n_k^j != 0}.
S_k = diag(phi^j / phi_k^j), 1 where n_k^j = 0; A = diag(K / omega^j), 1 where omega^j = 0; h_k = step / n_k. A round:

    1. the parties send gradients, the server forms g = grad f(w_t);
    2. party k sets w = w_t and for each of its records i, in random order,
       w <- w - h_k (S_k (grad f_i(w) - grad f_i(w_t)) + g + ridge (w - w_t));
    3. w_{t+1} = w_t + A sum_k (n_k / n) (w_k - w_t).

The counts come first, once, as whole numbers through the secure sum: n_k^j, whether it is not 0, and n_k. S_k is then
local. Counts and S are defined for linear models (one torch.nn.Linear); scaled=False is for any model, S = A = I.
If some parties drop out while the counts are summed, phi and omega are of those that were there.

What a run releases: once, the sums of the counts; per round, the weighted sums of the gradients, and of the updates.
All three are read from the records outside the training loop, so record-level privacy refuses this algorithm: its
clipping and noise are of fit's steps. Client-level privacy takes scaled=False: each round then has two sums, a
gradient's (times gradient_scale, so that one clipping norm suits both) and an update's, both clipped, noisy and
charged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from choral.trainers.algorithms.gd import GRADIENT
from choral.trainers.algorithms.interface import (
    Algorithm,
    Channel,
    Done,
    Exchange,
    FederationInfo,
    Gradient,
    Party,
    Release,
    Rounds,
    Server,
    Svrg,
    Touch,
    Work,
    check_not_negative,
    check_positive,
    updated,
)
from choral.trainers.task import arguments

COUNTS = Release(
    channel="counts",
    what="n_k^j, the records with each feature, whether there are any, and n_k",
    source="data",
    once=True,
)
CHANGE = Release(channel="update", what="w_k - w_t, the change by variance-reduced steps", source="data")


@dataclass(frozen=True, kw_only=True)
class FSVRG(Algorithm):
    """step: h; with over_examples=False h_k = step for all. ridge: lambda of the objective's lambda/2 |w|^2.

    passes: over a party's records in a round. scaled: with S_k and A. mean: of the updates, by "examples" or "parties";
    scaled=False, over_examples=False, mean="parties" is the paper's naive federated SVRG (algorithm 3).
    gradient_scale: gradients are sent times this.
    """

    kind = "fsvrg"
    needs_loss = True
    client_hint = "FSVRG(scaled=False) has no counts"
    step: float = 1.0
    ridge: float = 0.0
    passes: int = 1
    scaled: bool = True
    over_examples: bool = True
    mean: Literal["examples", "parties"] = "examples"
    gradient_scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "step", "passes", "gradient_scale")
        check_not_negative(self, "ridge")
        arguments.one_of(self.mean, f"{self.kind}: mean", ("examples", "parties"))
        for name in ("scaled", "over_examples"):
            arguments.flag(getattr(self, name), f"{self.kind}: {name}")

    @property
    def by_records(self) -> bool:
        """The counts are of records."""
        return self.scaled

    @property
    def releases(self) -> tuple[Release, ...]:
        return (COUNTS, GRADIENT, CHANGE) if self.scaled else (GRADIENT, CHANGE)

    def channels(self, federation: FederationInfo) -> dict[str, Channel]:
        counts = Channel(
            length=2 * federation.length + 1, weighing="parties", largest_count=federation.largest, once=True
        )
        return ({"counts": counts} if self.scaled else {}) | {
            "gradient": Channel(length=federation.length),
            "update": Channel(length=federation.length, weighing=self.mean),
        }

    def round(self, server: Server, weights: torch.Tensor) -> Rounds:
        shares: dict[str, torch.Tensor] = {}
        counted = "phi" in server.state
        if self.scaled:
            if not counted:
                counts = yield Exchange(channel="counts", weights=weights)
                whole, length = (counts.value * counts.weight).round(), len(weights)
                records, holders, examples = whole[:length], whole[length:-1], whole[-1]
                server.state["phi"] = (records / examples).to(weights.dtype)
                server.state["spread"] = torch.where(holders > 0, round(counts.weight) / holders.clamp(min=1), 1.0)
            shares = {"phi": server.state["phi"].to(weights)}
        slope = (yield Exchange(channel="gradient", weights=weights)).value / self.gradient_scale
        told = {"direction": updated(self.ridge * weights, slope)} | ({} if counted else shares)
        change = (yield Exchange(channel="update", weights=weights, new=told, kept=shares)).value
        return updated(weights, change * server.state["spread"] if self.scaled else change)

    def work(self, party: Party, ask: Exchange) -> Work:
        if ask.channel == "counts":
            return Touch()
        if ask.channel == "gradient":
            return Gradient()
        return Svrg(
            direction=ask["direction"],
            step=self.step / party.examples if self.over_examples else self.step,
            shares=ask["phi"] if self.scaled else None,
            pull=self.ridge,
            passes=self.passes,
        )

    def answer(self, party: Party, ask: Exchange, done: Done) -> torch.Tensor:
        if ask.channel == "counts":
            whole = done.vector.double()
            return torch.cat([whole, (whole > 0).double(), whole.new_tensor([party.examples])])
        return done.vector * self.gradient_scale if ask.channel == "gradient" else done.vector
