"""CoCoA+ (Ma, Smith, Jaggi, Jordan, Richtarik, Takac 2015, arXiv 1502.03508, algorithm 1), for convex tasks.

For ridge-regularised binary logistic regression, of which party k owns the block a_k of dual variables of its records:

    min_w 1/n sum_i log(1 + exp(-y_i x_i w)) + ridge/2 |w|^2,     w = 1/(ridge n) sum_i a_i y_i x_i.

A round: each party improves its block by passes of dual coordinate ascent on the local problem with sigma' = K and
sends X_k da_k / (ridge n); the server adds them all up (gamma = 1). a = 0 and w = 0 at first, whatever the model starts
from. If a party drops out, its block stays, so w remains what the dual variables say.

What a round releases: the plain sum of X_k da_k / (ridge n), read from the records outside the training loop, so
record-level privacy refuses it; and client-level privacy too, as a clipped change would not belong to the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from choral.trainers.algorithms.interface import (
    Algorithm,
    Ascend,
    Channel,
    Done,
    Exchange,
    FederationInfo,
    Party,
    Release,
    Rounds,
    Server,
    Work,
    check_positive,
    updated,
)


@dataclass(frozen=True, kw_only=True)
class CoCoA(Algorithm):
    """ridge: lambda, > 0; about 1/n is usual. passes: over the block in a round."""

    kind = "cocoa"
    releases = (
        Release(channel="update", what="X_k da_k / (ridge n), the change by the block's ascent", source="data"),
    )
    needs_loss = True
    remembers = True
    keeps = True
    by_records = True  # a sum over the party's block
    ridge: float = 0.01
    passes: int = 1

    def __post_init__(self) -> None:
        check_positive(self, "ridge", "passes")

    def channels(self, federation: FederationInfo) -> dict[str, Channel]:
        return {"update": Channel(length=federation.length, weighing="parties")}

    def round(self, server: Server, weights: torch.Tensor) -> Rounds:
        if server.number == 1:
            weights = torch.zeros_like(weights)
        mean = yield Exchange(channel="update", weights=weights)
        return updated(weights, mean.value * mean.weight)

    def work(self, party: Party, ask: Exchange) -> Work:
        return Ascend(
            dual=party.state.get("dual", torch.zeros(party.examples, dtype=torch.float64)),
            ridge=self.ridge,
            examples=party.federation.examples,
            slack=float(party.federation.parties),
            passes=self.passes,
        )

    def answer(self, party: Party, ask: Exchange, done: Done) -> torch.Tensor:
        if done.dual is not None:
            party.state["dual"] = done.dual
        return done.vector
