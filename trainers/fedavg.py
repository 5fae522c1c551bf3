"""Federated averaging (McMahan, Moore, Ramage, Hampson, Aguera y Arcas 2017, arXiv 1602.05629).

A round: every party starts from the global weights w, trains on its own data, and contributes n_k (w_k - w) and n_k,
its number of examples; the server moves to w + sum n_k (w_k - w) / sum n_k.

What a round releases: the weighted sum of the updates and the sum of the counts over the survivors. With a secure
sum the server learns nothing else; with ``Plain`` it sees each party's update and count.
"""

from __future__ import annotations

import torch


def server_step(weights: torch.Tensor, mean_update: torch.Tensor) -> torch.Tensor:
    """The next global weights from the weighted mean update, both of shape (d,)."""
    return weights + mean_update.to(weights.dtype).to(weights.device)
