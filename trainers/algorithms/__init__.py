"""Federated algorithms, one file each; `seam` says what they and the engines have in common."""

from __future__ import annotations

from choral.trainers.algorithms.fedavg import FedAvg
from choral.trainers.algorithms.seam import Algorithm

KINDS: dict[str, type[Algorithm]] = {kind.kind: kind for kind in (FedAvg,)}

__all__ = ["KINDS", "Algorithm", "FedAvg"]
