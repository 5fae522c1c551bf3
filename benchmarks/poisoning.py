"""Parties that poison, against the plain mean and robust means over random groups, on digits.

    python benchmarks/poisoning.py [--share 0.04] [--seeds 5] [--rules mean median trimmed geometric]
    python benchmarks/poisoning.py --bare      sums without masks: the same totals to the bit, a third of the time
    python benchmarks/poisoning.py --cost      bytes and time of one round, beside one sum over all

A hundred parties of like data, federated averaging of a linear model through masked sums, groups of five. The zoo:
sign flips and scaled updates of ten times the norm; the inner-product attack (Xie et al. 2020), which sends ten times
the honest mean backwards; "a little is enough" (Baruch et al. 2019), the honest mean less 1.5 deviations in each
coordinate; flipped labels; one party with ten times the records, and a flipped update of ten times the norm. The third
and the fourth know all honest updates.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

import torch
from torch.utils.data import TensorDataset

from choral import Compute, Encoding, Grouped, Masked, federate
from choral.protocols import Plain
from choral.protocols.interface import SecureSum, SumSession, SumSpec
from choral.trainers import Split, Training
from choral.trainers.algorithms.interface import Done, Failed, Work
from choral.trainers.data import TASKS
from choral.trainers.engines.fastest import Fastest

ATTACKS = ("none", "flip", "scale", "inner product", "a little", "labels", "weight")


@dataclasses.dataclass
class Poisoned:
    """A trainer whose attackers send something else. See :class:`choral.trainers.algorithms.interface.LocalTrainer`."""

    inner: Any
    attack: str
    attackers: frozenset[str]

    @property
    def length(self) -> int:
        return int(self.inner.length)

    def do(
        self, orders: Iterable[tuple[str, Work]], weights: torch.Tensor, round_number: int
    ) -> Iterator[tuple[str, Done | Failed]]:
        made = list(self.inner.do(orders, weights, round_number))
        honest = torch.stack([done.vector for name, done in made if name not in self.attackers])
        for name, done in made:
            if name in self.attackers:
                done = dataclasses.replace(done, vector=poison(self.attack, done.vector, honest))
            yield name, done


def poison(attack: str, own: torch.Tensor, honest: torch.Tensor) -> torch.Tensor:
    """What an attacker sends in the place of its own update. honest: the others' updates, shape (parties, d)."""
    if attack in ("flip", "weight"):
        return -10.0 * own
    if attack == "scale":
        return 10.0 * own
    if attack == "inner product":
        return -10.0 * honest.mean(dim=0)
    if attack == "a little":
        return honest.mean(dim=0) - 1.5 * honest.std(dim=0)
    return own


def trained(attack: str, sums: SecureSum, share: float, seed: int, rounds: int) -> Any:
    """A run with so many attackers. The heavy party is one alone."""
    split, training = (
        Split(kind="iid", parties=100),
        Training(learning_rate=0.5, batch_size=8, local_epochs=2, hidden=0),
    )
    task = TASKS["digits"](split, training, seed, None)
    names = sorted(task.parties)
    generator = torch.Generator().manual_seed(seed)
    count = 0 if attack == "none" else 1 if attack == "weight" else round(share * len(names))
    attackers = frozenset(names[at] for at in torch.randperm(len(names), generator=generator)[:count].tolist())
    parties = dict(task.parties)
    if attack == "labels":
        for name in attackers:
            features, labels = parties[name].tensors
            parties[name] = TensorDataset(features, 9 - labels)
    if attack == "weight":  # the cap of a weight is by the largest party: it has the attacker's records ten times
        for name in attackers:
            parties[name] = TensorDataset(*(torch.cat([tensor] * 10) for tensor in parties[name].tensors))
    return federate(
        dataclasses.replace(task, parties=parties, engine=None, min_classes=1, held_out=None, evaluate_party=None),
        rounds=rounds,
        secure_sum=sums,
        encoding=Encoding(value_bound=1024.0, value_bits=32),
        compute=Compute(seed=seed, engine=lambda resident: Poisoned(Fastest(resident), attack, attackers)),
    )


class Bare(Masked):
    """A masked sum whose masks are left out, of which the total is the same."""

    def open(self, spec: SumSpec, *, policy: Any = None) -> SumSession:
        del policy
        return Plain().open(spec)


def sums_of(rule: str, share: float, *, bare: bool = False) -> SecureSum:
    sums = Bare(corrupt=1) if bare else Masked(corrupt=1)
    return sums if rule == "mean" else Grouped(sums=sums, robust=rule, attackers=share)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.04)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rules", nargs="+", default=["mean", "median", "trimmed", "geometric"])
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS))
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--cost", action="store_true")
    asked = parser.parse_args()
    for rule in asked.rules:
        sums = sums_of(rule, asked.share, bare=asked.bare)
        if asked.cost:
            clock = time.process_time()
            run = trained("none", sums, asked.share, 0, asked.rounds)
            seconds = time.process_time() - clock
            up, down = (max(getattr(entry, way) for entry in run.history[1:]) for way in ("bytes_up", "bytes_down"))
            print(f"{rule}: {up} bytes up and {down} down a round at the busiest party, ", end="")
            print(f"{seconds / asked.rounds:.2f} s of processor time a round, training included", flush=True)
            continue
        for attack in asked.attacks:
            runs = [trained(attack, sums, asked.share, seed, asked.rounds) for seed in range(asked.seeds)]
            found = [run.metrics["accuracy"] for run in runs]
            shown = ", ".join(f"{100 * each:.1f}" for each in found)
            print(f"{rule}, {attack}: {100 * fmean(found):.1f} % ({shown})", flush=True)


if __name__ == "__main__":
    main()
