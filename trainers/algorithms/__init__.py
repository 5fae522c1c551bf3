"""Federated algorithms, one file each; `seam` says what they and the engines have in common."""

from __future__ import annotations

from choral.trainers.algorithms.cocoa import CoCoA
from choral.trainers.algorithms.dane import DANE
from choral.trainers.algorithms.fedavg import FedAvg
from choral.trainers.algorithms.fednova import FedNova
from choral.trainers.algorithms.fedopt import FedAdam, FedYogi
from choral.trainers.algorithms.fedprox import FedProx
from choral.trainers.algorithms.fsvrg import FSVRG
from choral.trainers.algorithms.gd import GD
from choral.trainers.algorithms.scaffold import Scaffold
from choral.trainers.algorithms.seam import Algorithm

KINDS: dict[str, type[Algorithm]] = {
    kind.kind: kind for kind in (FedAvg, FedProx, Scaffold, FedAdam, FedYogi, FedNova, FSVRG, DANE, GD, CoCoA)
}

__all__ = [
    "DANE",
    "FSVRG",
    "GD",
    "KINDS",
    "Algorithm",
    "CoCoA",
    "FedAdam",
    "FedAvg",
    "FedNova",
    "FedProx",
    "FedYogi",
    "Scaffold",
]
