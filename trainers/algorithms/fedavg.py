"""Federated averaging (McMahan, Moore, Ramage, Hampson, Aguera y Arcas 2017, arXiv 1602.05629).

A round: every party starts from the global weights w, trains on its own data, and contributes n_k (w_k - w) and n_k,
its number of examples; the server moves to w + sum n_k (w_k - w) / sum n_k.

What a round releases: the weighted sum of the updates and the sum of the counts over the survivors. With a secure
sum the server learns nothing else; with ``Plain`` it sees each party's update and count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from choral.trainers.algorithms.interface import Algorithm, Exchange, Release, Rounds, Server, updated

UPDATE = Release(channel="update", what="w_k - w_t, the change by the party's training", source="fit")


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """The mean of the parties' updates, weighted by their example counts."""

    kind = "fedavg"
    releases = (UPDATE,)

    def round(self, server: Server, weights: torch.Tensor) -> Rounds:
        mean = yield Exchange(channel="update", weights=weights)
        return updated(weights, mean.value)
