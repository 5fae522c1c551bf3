"""Noise in shares beside the trusted cloud's and each party's own: digits, and incomes; docs/noise-in-shares.md.

    python examples/noise_in_shares.py digits --epsilons 1 2 4 8    # ten parties, 8 honest survivors
    python examples/noise_in_shares.py adult --epsilons 0.5 1       # twenty parties, 18 honest survivors

Digits: each configuration has the settings that `benchmarks/tune_digits.py` chose for it at that budget, at epsilon 1,
and of cloud and shares at 8, out of its wider grid (`--wide`), and on other, public pictures: no record of the digits
was looked at.
Adult: one setting for all, which nobody tuned. Shares are through `Plain`, which ends with the weights of `Masked` to
the bit where draws and noise are the same. Their noise is sized for the worst case; here nobody drops out, so that it
is larger than need be, by 12 % of ten parties and 5 % of twenty.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

from choral import Compute, Participation, Plain, Privacy, centralize, federate
from choral.protocols import SecureSum
from choral.trainers import FedSGD, Run, Schedule, Split, Task, Training
from choral.trainers.data import TASKS

DELTA, DATA = 1e-5, os.environ.get("CHORAL_DATA")
PARTIES, HIDDEN = {"digits": 10, "adult": 20}, {"digits": 32, "adult": 0}  # 0 is a linear model


class Chosen(NamedTuple):
    """How one configuration is trained at one budget. batch_size: of all parties together. clip: of a record.

    steps: of federated SGD in a pass; by default the nearest number.
    """

    batch_size: int
    learning_rate: float
    passes: int
    cosine: bool
    clip: float
    steps: int | None = None


WIDE = {  # of the wider grid
    "cloud": {1.0: Chosen(64, 0.083, 40, True, 3.0), 8.0: Chosen(128, 4.0, 40, True, 1.0)},
    "shares": {1.0: Chosen(128, 0.167, 40, True, 3.0, steps=12), 8.0: Chosen(128, 4.0, 40, True, 1.0, steps=12)},
    "own": {1.0: Chosen(256, 0.167, 40, True, 3.0)},
}
NARROW = {  # batch size and learning rate: twenty passes, a constant rate, clipping norm 1
    "cloud": {2.0: (128, 1.0), 4.0: (128, 2.0)},
    "shares": {2.0: (256, 2.0), 4.0: (64, 1.0)},
    "own": {2.0: (128, 0.25), 4.0: (256, 1.0), 8.0: (256, 1.0)},
}
ADULT = Chosen(1024, 1.0, 5, False, 1.0)  # of all configurations, at each budget


def loaded(name: str, batch_size: int, chosen: Chosen, seed: int) -> Task:
    """The task, split unevenly by label."""
    training = Training(
        rounds=chosen.passes, batch_size=batch_size, learning_rate=chosen.learning_rate, hidden=HIDDEN[name]
    )
    task = TASKS[name](Split(parties=PARTIES[name], alpha=0.5), training, seed, DATA)
    schedule = Schedule(kind="cosine" if chosen.cosine else "constant")
    return dataclasses.replace(task, min_classes=1, schedule=schedule)  # some of twenty parties know one class alone


def trained(arm: str, epsilon: float, seed: int, name: str = "digits", secure_sum: SecureSum | None = None) -> Run:
    """One run. cloud: DP-SGD on pooled records. shares: such batches over all parties, one may drop out and one
    collude. own: FedAvg whose parties add all of their noise. secure_sum: of shares; by default Plain.
    """
    chosen = ADULT
    if name == "digits":
        chosen = WIDE[arm].get(epsilon) or Chosen(*NARROW[arm][epsilon], 20, False, 1.0)
    batch_size = round(chosen.batch_size / PARTIES[name]) if arm == "own" else chosen.batch_size
    task = loaded(name, batch_size, chosen, seed)
    common: dict[str, Any] = {"rounds": chosen.passes, "compute": Compute(seed=seed, device="cpu")}
    promise = Privacy(epsilon, DELTA, max_grad_norm=chosen.clip)
    if arm == "cloud":
        return centralize(task, privacy=promise, **common)
    if arm == "own":
        return federate(task, privacy=promise, secure_sum=Plain(), **common)
    records = sum(len(dataset) for dataset in task.parties.values())
    steps = chosen.steps or round(records / batch_size)
    return federate(
        task,
        algorithm=FedSGD(batch_size=batch_size, steps_per_round=steps, learning_rate=chosen.learning_rate),
        privacy=dataclasses.replace(promise, noise="distributed", colluders=1),
        secure_sum=secure_sum or Plain(),
        participation=Participation(least=PARTIES[name] - 1),
        **common,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("task", choices=list(PARTIES), nargs="?", default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--arms", nargs="+", choices=list(WIDE), default=list(WIDE))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for epsilon in given.epsilons:
        found: dict[str, list[float]] = {}
        for arm in given.arms:
            found[arm] = [100 * trained(arm, epsilon, seed, given.task).metrics["accuracy"] for seed in given.seeds]
            scores = ", ".join(f"{score:.1f}" for score in found[arm])
            print(f"epsilon {epsilon:g}  {arm:7s} {mean(found[arm]):.1f}  ({scores})", flush=True)
        for arm in found.keys() - {"cloud"} if "cloud" in found else ():
            losses = [cloud - score for cloud, score in zip(found["cloud"], found[arm], strict=True)]
            error = stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
            print(f"epsilon {epsilon:g}  {arm:7s} {mean(losses):.2f} +- {error:.2f} below the cloud", flush=True)


if __name__ == "__main__":
    main()
