"""All statistics of a hundred parties in one secure sum: time, traffic, rank errors of quantiles, errors of means.

    python benchmarks/joint_statistics.py     100 parties, 100,000 records, 50 columns, 100 bins, epsilon 1 in all
    python benchmarks/joint_statistics.py --exact  the same without noise

Noise is sized for nine parties of ten that survive, a tenth of all being colluders. Time is of all parties and the
server together, in this process; making the tables is not counted.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from choral import Masked, Privacy, federated_statistics
from choral.trainers import Categories, Count, Covariance, FederatedStatistics, Histogram, Mean, Quantiles, Table
from choral.trainers.analytics.part import Statistic

SHARES = (0.25, 0.5, 0.75)


def made_up(records: int, columns: int, seed: int) -> dict[str, np.ndarray]:
    """Columns on [0, 100] of unlike shapes: normal, skewed, with two peaks; and a label."""
    generator = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for at in range(columns):
        kind, centre = at % 3, 30 + 40 * (at / columns)
        if kind == 0:
            values = generator.normal(centre, 12, records)
        elif kind == 1:
            values = generator.gamma(2.0, 8.0, records)
        else:
            values = np.where(
                generator.random(records) < 0.4, generator.normal(25, 6, records), generator.normal(75, 8, records)
            )
        found[f"c{at:02}"] = np.clip(values, 0, 100)
    found["label"] = generator.integers(0, 5, records)
    found["sex"] = generator.integers(0, 2, records)
    return found


def wanted_of(columns: list[str], bins: int) -> dict[str, Statistic]:
    """Count, mean, variance, histogram and quantiles of each column, their covariances, labels, a table."""
    wanted: dict[str, Statistic] = {"records": Count(column="label"), "label": Categories(tuple(range(5)))}
    wanted["label and sex"] = Table({"label": tuple(range(5)), "sex": (0, 1)})
    wanted["covariance"] = Covariance(dict.fromkeys(columns, (0, 100)), weight=len(columns) / 2)
    edges = np.linspace(0, 100, bins + 1).tolist()
    for name in columns:
        wanted[name] = Mean(0, 100)
        wanted[f"{name} histogram"] = Histogram(edges, column=name)
        wanted[f"{name} quartiles"] = Quantiles(SHARES, 0, 100, column=name)
    return wanted


def measured(found: FederatedStatistics, whole: dict[str, np.ndarray], columns: list[str]) -> dict[str, float]:
    """Largest rank error of a quantile, and error of a mean over the range, in per cent; covariances in deviations."""
    ranks, means, errors = [], [], []
    for name in columns:
        for share in SHARES:
            value = found[f"{name} quartiles"][f"quantile {share:g}"].value
            assert value is not None
            ranks.append(abs(float(np.mean(whole[name] <= value)) - share))
        mean = found[name]["mean"].value
        assert mean is not None
        means.append(abs(mean - float(whole[name].mean())) / 100.0)
    exact = np.cov(np.stack([whole[name] for name in columns]))
    deviations = np.sqrt(np.diag(exact))
    for i, first in enumerate(columns):
        for j, second in enumerate(columns[i:], i):
            each = found["covariance"][f"covariance {first}, {second}"].value
            assert each is not None
            errors.append(abs(each - exact[i, j]) / (deviations[i] * deviations[j]))
    return {
        "largest rank error %": 100 * max(ranks),
        "mean rank error %": 100 * float(np.mean(ranks)),
        "largest error of a mean, % of the range": 100 * max(means),
        "largest error of a covariance, in deviations": max(errors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parties", type=int, default=100)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--columns", type=int, default=50)
    parser.add_argument("--bins", type=int, default=100)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    wanted = parser.parse_args()
    columns = [f"c{at:02}" for at in range(wanted.columns)]
    asked = wanted_of(columns, wanted.bins)
    promise = (
        None if wanted.exact else Privacy(wanted.epsilon, 1e-6, noise="distributed", colluders=wanted.parties // 10)
    )
    for seed in range(wanted.seeds):
        whole = made_up(wanted.records, wanted.columns, seed)
        cuts = np.array_split(np.arange(wanted.records), wanted.parties)
        parties = {
            f"party-{at:03}": {name: column[cut] for name, column in whole.items()} for at, cut in enumerate(cuts)
        }
        clock, processor = time.perf_counter(), time.process_time()
        found = federated_statistics(
            parties, asked, privacy=promise, secure_sum=Masked(min_survivors=wanted.parties * 9 // 10)
        )
        seconds, busy = time.perf_counter() - clock, time.process_time() - processor
        told = measured(found, whole, columns)
        if wanted.exact:
            for name in columns:
                counts = np.histogram(whole[name], np.linspace(0, 100, wanted.bins + 1))[0]
                bins = [each.value for label, each in found[f"{name} histogram"].items() if label.startswith("count")]
                assert bins == counts.tolist(), name
        print(f"seed {seed}: {seconds:.2f} s on the clock, {busy:.2f} s of processor time; ", end="")
        print(f"{found.bytes_up} bytes up and {found.bytes_down} down at the busiest party; ", end="")
        print(", ".join(f"{name} {value:.3g}" for name, value in told.items()))


if __name__ == "__main__":
    main()
