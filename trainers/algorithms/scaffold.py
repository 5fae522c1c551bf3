"""SCAFFOLD (Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, arXiv 1910.06378, algorithm 1, option II), weighted.

Each party keeps a control variate c_k, the server their weighted mean c = sum_k (n_k / n) c_k; all begin at 0. A party
steps along g - c_k + c, which takes out its drift, and afterwards reads its new variate off its own update:

    c_k+ = c_k - c + (w_t - w_k) / L,       L the sum of its steps' learning rates (option II has K eta)
    server:  w <- w + server_rate sum_S n_k (w_k - w) / sum_S n_k,     c <- c + sum_S n_k (c_k+ - c_k) / n

over the survivors S; n counts all parties, so c stays the weighted mean of all c_k. With plain SGD (w_t - w_k) / L is
the mean of the corrected gradients, so the user's optimizer must be that.

What a round releases: the weighted sums of w_k - w and of c_k+ - c_k. The second is a function of the first, of c and
of the party's earlier variate, so it costs no privacy of its own: with record-level privacy the correction is added
after the noise and all steps are charged already. (Option I computes c_k+ from the records anew; it is not offered.)
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

VARIATE = Release(channel="update", what="c_k+ - c_k, the change of the control variate", source="derived")


@dataclass(frozen=True, kw_only=True)
class Scaffold(Algorithm):
    """server_rate: the server's step size; 1 moves to the mean."""

    kind = "scaffold"
    releases = (UPDATE, VARIATE)
    remembers = True
    keeps = True
    server_rate: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "server_rate")

    def channels(self, federation: FederationInfo) -> dict[str, Channel]:
        return {"update": Channel(length=2 * federation.length)}

    def round(self, server: Server, weights: torch.Tensor) -> Rounds:
        control = server.state.get("control", torch.zeros_like(weights)).to(weights)
        mean = yield Exchange(channel="update", weights=weights, new={"control": control})
        change, variate = mean.value[: len(weights)], mean.value[len(weights) :]
        server.state["control"] = updated(control, variate * (mean.weight / server.federation.weight))
        return updated(weights, self.server_rate * change)

    def work(self, party: Party, ask: Exchange) -> Work:
        return Train(shift=ask["control"] - self._variate(party, ask), counts=True)

    def answer(self, party: Party, ask: Exchange, done: Done) -> torch.Tensor:
        if not done.path:
            raise TaskError(
                f"scaffold reads control variates off the update of party {party.name!r}, which needs plain SGD",
                hint="build torch.optim.SGD with one learning rate above 0 and no momentum",
            )
        change = -done.vector / done.path - ask["control"].to(done.vector)
        party.state["variate"] = self._variate(party, ask) + change
        return torch.cat([done.vector, change])

    @staticmethod
    def _variate(party: Party, ask: Exchange) -> torch.Tensor:
        return party.state["variate"].to(ask.weights) if party.state else torch.zeros_like(ask.weights)
