"""What private standardisation costs and wins: three hospitals' visits, with four ways to scale their measurements.

    python benchmarks/standardise.py [--seeds 10] [--epsilon 3] [--share 0.2]

The job of examples/hospitals, in one process: federated averaging of a linear model, record-level noise at each.
bounds: measurements scaled to -1 ... 1 by their public bounds. private: by means and deviations with noise, for a
share of epsilon. literature: by rounded typical values, written down by hand. exact: by means and deviations of the
records, which nothing pays for. The same seeds in all rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import TensorDataset

from choral import Compute, Keep, Masked, Privacy, Run, federate
from choral.trainers.analytics.standardise import standardisation
from choral.trainers.data.standardised import Standardisation, standardised_task
from choral.trainers.federated.plan import Plan

TYPICAL = [14, 19, 92, 650, 0.1, 0.1, 0.1, 0.05, 0.2, 0.06, 0.4, 1.2, 3, 40, 0.007, 0.025, 0.03, 0.01, 0.02, 0.004]
TYPICAL += [16, 26, 110, 900, 0.13, 0.25, 0.27, 0.1, 0.3, 0.08]
SPREAD = [4, 4, 24, 350, 0.015, 0.05, 0.08, 0.04, 0.03, 0.007, 0.3, 0.5, 2, 45, 0.003, 0.02, 0.03, 0.006, 0.008, 0.003]
SPREAD += [5, 6, 34, 570, 0.02, 0.15, 0.2, 0.07, 0.06, 0.02]


def visits() -> Any:
    """The example's training code."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "hospitals"))
    import visits as code

    return code


def trained(code: Any, way: str, seed: int, epsilon: float, share: float) -> Run:
    """One run of ten rounds."""
    tables = code.tables()
    parties = {name: code.dataset(tables[name]) for name in code.SIZES}
    task = code.task(SimpleNamespace(learning_rate=0.2, batch_size=20))
    job: dict[str, Any] = {
        "rounds": 10,
        "privacy": Privacy(epsilon, 1e-5),
        "secure_sum": Masked(corrupt=1, min_survivors=3),
        "compute": Compute(seed=seed),
    }
    with tempfile.TemporaryDirectory() as folder:
        keep = Keep(ledgers=folder)
        if way == "private":
            by = standardisation(Plan.of(task, parties, **job), share=share, ledgers=Path(folder))
        else:
            by = fixed(code, way, parties)
        return federate(standardised_task(task, by), parties, **job, keep=keep)


def fixed(code: Any, way: str, parties: dict[str, TensorDataset]) -> Standardisation:
    """The ways that spend nothing."""
    if way == "literature":
        return Standardisation(means=tuple(TYPICAL), deviations=tuple(SPREAD))
    if way == "bounds":
        low, high = zip(*code.BOUNDS, strict=True)
        halves = [(each - other) / 2 for each, other in zip(high, low, strict=True)]
        return Standardisation(means=tuple(a + h for a, h in zip(low, halves, strict=True)), deviations=tuple(halves))
    whole = torch.cat([each.tensors[0] for each in parties.values()]).double()
    return Standardisation(means=tuple(whole.mean(0).tolist()), deviations=tuple(whole.std(0).tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--ways", nargs="+", default=["bounds", "private", "literature", "exact"])
    asked = parser.parse_args()
    code, base = visits(), None
    for way in asked.ways:
        runs = [trained(code, way, seed, asked.epsilon, asked.share) for seed in range(asked.seeds)]
        found = [100 * run.metrics[next(iter(run.metrics))] for run in runs]
        base = base or found
        gained = [each - other for each, other in zip(found, base, strict=True)]
        spread = stdev(gained) / len(gained) ** 0.5 if len(gained) > 1 else 0.0
        noise = max(run.spent.noise_multiplier for run in runs if run.spent is not None)
        print(f"{way}: {fmean(found):.1f} %, {fmean(gained):+.1f} +- {spread:.1f} points on {asked.ways[0]}", end="")
        print(f", noise multiplier {noise:.3f} at the hospital with the most", flush=True)


if __name__ == "__main__":
    main()
