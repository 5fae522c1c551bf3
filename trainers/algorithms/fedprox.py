"""FedProx (Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith 2020, arXiv 1812.06127, algorithm 2).

As FedAvg, but each party minimises F_k(w) + mu/2 |w - w_t|^2: its training is pulled back to where it began. Here the
pull mu (w - w_t) is added to the gradient of each of the user's own steps. mu = 0 is FedAvg. (The paper's server takes
the plain mean of parties sampled in proportion to their counts; here all take part, weighted by their counts.)

What a round releases: as FedAvg. With record-level privacy the pull is added after the noise; it depends on no record
but through earlier noisy steps, and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from choral.trainers.algorithms.fedavg import FedAvg
from choral.trainers.algorithms.interface import Exchange, Party, Train, Work, check_not_negative


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """mu: weight of the proximal term, >= 0; the paper tries 0.001 to 1. mu times the step size must stay below 1."""

    kind = "fedprox"
    mu: float = 0.01

    def __post_init__(self) -> None:
        check_not_negative(self, "mu")

    def work(self, party: Party, ask: Exchange) -> Work:
        return Train(pull=self.mu)
