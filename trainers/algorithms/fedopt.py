"""FedAdam and FedYogi (Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan 2021, arXiv 2003.00295, alg. 2).

The parties train as in FedAvg; the server takes the mean update D as a pseudo-gradient and makes an adaptive step:

    m <- beta1 m + (1 - beta1) D
    v <- beta2 v + (1 - beta2) D^2                          FedAdam
    v <- v - (1 - beta2) D^2 sign(v - D^2)                  FedYogi
    w <- w + server_rate m / (sqrt(v) + tau)

with m = 0 and v = tau^2 before the first round, and no bias correction, as in the paper.

What a round releases: as FedAvg. The server's moments are functions of it; m and v stay on the server.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from choral.trainers.algorithms.fedavg import FedAvg
from choral.trainers.algorithms.interface import Exchange, Rounds, Server, check_below_one, check_positive, updated


@dataclass(frozen=True, kw_only=True)
class FedAdam(FedAvg):
    """server_rate: the server's step size, about the change of a coordinate per round. beta1, beta2: decay of the
    moments, in [0, 1). tau: how adaptive; the smaller, the more. The paper tunes server_rate and tau over powers of 10.
    """

    kind = "fedadam"
    remembers = True
    server_rate: float = 0.03
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        check_positive(self, "server_rate", "tau")
        check_below_one(self, "beta1", "beta2")

    def round(self, server: Server, weights: torch.Tensor) -> Rounds:
        change = (yield Exchange(channel="update", weights=weights)).value
        first = server.state.get("first_moment", torch.zeros_like(change))
        second = server.state.get("second_moment", torch.full_like(change, self.tau**2))
        first = self.beta1 * first + (1 - self.beta1) * change
        second = self.second(second, change**2)
        server.state.update(first_moment=first, second_moment=second)
        return updated(weights, self.server_rate * first / (second.sqrt() + self.tau))

    def second(self, moment: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return self.beta2 * moment + (1 - self.beta2) * square


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdam):
    """As :class:`FedAdam`, but the second moment moves by at most (1 - beta2) D^2, so it forgets large ones slowly."""

    kind = "fedyogi"

    def second(self, moment: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return moment - (1 - self.beta2) * square * torch.sign(moment - square)
