"""Federated algorithms, one file each; `interface` says what they and the engines have in common."""

from __future__ import annotations

import difflib

from choral.errors import ConfigError
from choral.trainers.algorithms.cocoa import CoCoA
from choral.trainers.algorithms.dane import DANE
from choral.trainers.algorithms.fedavg import FedAvg
from choral.trainers.algorithms.fednova import FedNova
from choral.trainers.algorithms.fedopt import FedAdam, FedYogi
from choral.trainers.algorithms.fedprox import FedProx
from choral.trainers.algorithms.fedsgd import FedSGD
from choral.trainers.algorithms.fsvrg import FSVRG
from choral.trainers.algorithms.gd import GD
from choral.trainers.algorithms.interface import Algorithm
from choral.trainers.algorithms.scaffold import Scaffold

KINDS: dict[str, type[Algorithm]] = {
    kind.kind: kind for kind in (FedAvg, FedProx, Scaffold, FedAdam, FedYogi, FedNova, FedSGD, FSVRG, DANE, GD, CoCoA)
}


def algorithm_named(given: Algorithm | str | None) -> Algorithm:
    """The algorithm that is meant: itself, that of a name with its usual settings, or FedAvg for none.

    Raises: ConfigError for an unknown name, a class, or anything else.
    """
    if given is None:
        return FedAvg()
    if isinstance(given, Algorithm):
        return given
    if isinstance(given, str) and given.lower() in KINDS:
        return KINDS[given.lower()]()
    if isinstance(given, type) and issubclass(given, Algorithm):
        raise ConfigError(f"algorithm is the class {given.__name__}", hint=f"make one of it: {given.__name__}()")
    known = ", ".join(KINDS)
    near = difflib.get_close_matches(str(given).lower(), KINDS, n=1)
    raise ConfigError(
        f"algorithm is {given!r:.80}, expected an Algorithm, or one of {known}",
        hint=f"did you mean {near[0]!r}?" if near else "such as choral.trainers.algorithms.FedProx(mu=0.1)",
    )


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
    "FedSGD",
    "FedYogi",
    "Scaffold",
    "algorithm_named",
]
