"""Digits among ten parties: noise in shares beside the trusted cloud's and each party's own; docs/noise-in-shares.md.

    python examples/noise_in_shares.py --seeds 3 --epsilons 1 4

Shares are through `Plain`, which ends with the weights of `Masked` to the bit where draws and noise are the same. The
noise is sized for 8 honest survivors of ten. Learning rates are compared on the scores that are printed, for each
configuration alike, and the best mean over the seeds is taken: optimistic for each, and no budget covers it.
"""

from __future__ import annotations

import argparse
from statistics import mean
from typing import Any

from choral import Compute, Participation, Plain, Privacy, centralize, federate
from choral.trainers import FedSGD, Run, Split, Training
from choral.trainers.data.sets.digits import load

ROUNDS, DELTA, BATCH, OWN_BATCH = 20, 1e-5, 64, 16


def trained(arm: str, epsilon: float, rate: float, seed: int) -> Run:
    """One run. cloud: DP-SGD on pooled records. shares: the same batches over all parties. own: the configuration
    federated-dp of digits.toml, FedAvg whose parties add all of their noise.
    """
    training = Training(rounds=ROUNDS, batch_size=OWN_BATCH if arm == "own" else BATCH, learning_rate=rate)
    task = load(Split(parties=10, alpha=0.5), training, seed)
    common: dict[str, Any] = {"rounds": ROUNDS, "compute": Compute(seed=seed, device="cpu")}
    if arm == "cloud":
        return centralize(task, privacy=Privacy(epsilon, DELTA), **common)
    if arm == "own":
        return federate(task, privacy=Privacy(epsilon, DELTA), secure_sum=Plain(), **common)
    steps = -(-1438 // BATCH)  # of a pass over the pooled records
    return federate(
        task,
        algorithm=FedSGD(batch_size=BATCH, steps_per_round=steps, learning_rate=rate),
        privacy=Privacy(epsilon, DELTA, noise="distributed", colluders=1),
        secure_sum=Plain(),
        participation=Participation(least=9),
        **common,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    given = parser.parse_args()
    for epsilon in given.epsilons:
        for arm in ("cloud", "shares", "own"):
            found = {
                rate: [100 * trained(arm, epsilon, rate, seed).metrics["accuracy"] for seed in range(given.seeds)]
                for rate in given.rates
            }
            best = max(found, key=lambda rate: mean(found[rate]))
            scores = ", ".join(f"{score:.1f}" for score in found[best])
            print(f"epsilon {epsilon:g}  {arm:7s} {mean(found[best]):.1f}  (rate {best:g}: {scores})", flush=True)


if __name__ == "__main__":
    main()
