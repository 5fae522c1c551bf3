"""What correlated noise gains and costs: noise in the model, time, memory, and accuracy, each as a ratio.

    python benchmarks/correlated_noise.py [--repeats 15] [--seeds 5]

Prints JSON lines. *noise*: root mean squared noise in the sums over steps at equal epsilon and delta, over that of
independent noise without sampling; "sampled" is DP-SGD with Poisson sampling, which may hide who was sampled. *time*:
making the noise of a step over making independent noise, from the same generator, medians of interleaved repeats.
*accuracy*: softmax regression on digits (1400 records, batches of 35, ten passes), plain SGD; the learning rate is the
best of three for each kind by mean accuracy over other seeds than those reported.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.privacy import Privacy
from choral.privacy.accounting import record_noise
from choral.privacy.accounting.matrix_strategies import Banded, Strategy, Tree, error
from choral.privacy.correlated.factorisation import banded, buffered
from choral.privacy.correlated.noise_streams import stream
from choral.privacy.correlated.training_loop import CorrelatedPrivacy
from choral.privacy.noise.gaussian import os_stream

INDEPENDENT = Banded((1.0,))


def noise_in_the_model(steps: int, passes: int, epsilon: float, delta: float) -> dict[str, Any]:
    multiplier = record_noise.noise_multiplier(epsilon, delta, 1.0, 1)
    independent = multiplier * error(INDEPENDENT, steps, passes)
    sampled = record_noise.noise_multiplier(epsilon, delta, 1.0 / steps, steps * passes)
    kinds: dict[str, Strategy] = {"tree": Tree(), "buffered": buffered(steps, passes)}
    kinds |= {f"banded {b}": banded(steps, passes, b) for b in (4, 16, 32, steps) if b <= steps}
    ratios = {name: multiplier * error(kind, steps, passes) / independent for name, kind in kinds.items()}
    ratios["sampled"] = sampled * math.sqrt((steps * passes + 1) / 2.0) / independent
    return {name: round(ratio, 4) for name, ratio in ratios.items()}


def seconds_and_bytes(count: int, repeats: int) -> dict[str, dict[str, float]]:
    kinds: dict[str, Strategy] = {
        "independent": INDEPENDENT,
        "buffered": buffered(100, 10),
        "banded 16": banded(100, 10, 16),
        "banded 32": banded(100, 10, 32),
        "tree": Tree(),
    }
    streams = {name: stream(kind) for name, kind in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(repeats + 1):
        for name, made in streams.items():
            started = time.perf_counter()
            made.next(count, 1e6, os_stream)
            if repeat:
                times[name].append(time.perf_counter() - started)
    limit = statistics.median(times["independent"])
    return {
        name: {"time": round(statistics.median(t) / limit, 3), "bytes per parameter": streams[name].size / count}
        for name, t in times.items()
    }


def accuracy(privacy: Privacy, learning_rate: float, seed: int) -> float:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    torch.manual_seed(seed)
    order, plain = torch.randperm(len(x)), nn.Linear(64, 10)
    train, test = order[:1400], order[1400:]
    data = DataLoader(TensorDataset(x[train], y[train]), batch_size=35, shuffle=True)
    model, optimizer, loader = privacy.wrap(plain, torch.optim.SGD(plain.parameters(), lr=learning_rate), data)
    for _ in range(privacy.epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        return float((plain(x[test]).argmax(1) == y[test]).float().mean())


def accuracies(epsilon: float, seeds: int) -> dict[str, dict[str, float]]:
    promise: dict[str, Any] = {"epsilon": epsilon, "delta": 1e-4, "epochs": 10}
    kinds: dict[str, dict[str, Any]] = {
        "independent": {"mechanism": "banded", "bands": 1},
        "tree": {"mechanism": "tree"},
        "buffered": {"mechanism": "buffered"},
        "banded 32": {"mechanism": "banded"},
    }

    def run(name: str, learning_rate: float, seed: int) -> float:
        made = CorrelatedPrivacy(**promise, **kinds[name]) if name in kinds else Privacy(**promise)
        return accuracy(made, learning_rate, seed)

    result = {}
    for name in (*kinds, "sampled"):
        tried = {rate: statistics.mean(run(name, rate, 1000 + s) for s in range(3)) for rate in (0.1, 0.3, 1.0)}
        best = max(tried, key=lambda rate: tried[rate])
        found = [run(name, best, seed) for seed in range(seeds)]
        result[name] = {
            "learning rate": best,
            "mean": round(statistics.mean(found), 3),
            "lowest": round(min(found), 3),
            "highest": round(max(found), 3),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=5)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    for epsilon in (1.0, 8.0):
        for steps, passes in ((10, 20), (100, 1), (100, 10), (1000, 10)):
            found = noise_in_the_model(steps, passes, epsilon, 1e-5)
            print(json.dumps({"epsilon": epsilon, "steps": steps, "passes": passes, "noise": found}), flush=True)
    count = 1 << 22
    print(json.dumps({"parameters": count, "time": seconds_and_bytes(count, wanted.repeats)}), flush=True)
    for epsilon in (1.0, 3.0):
        print(json.dumps({"epsilon": epsilon, "accuracy": accuracies(epsilon, wanted.seeds)}), flush=True)


if __name__ == "__main__":
    main()
