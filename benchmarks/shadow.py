"""Shadow models trained as one stacked cohort against one by one: 64 small models, same batches, same results.

    python benchmarks/shadow.py [--models 64] [--repeats 5] [--threads 2] [--device cpu|cuda]

One by one is the plain torch loop with the same optimizer. Repeats alternate; ratios are medians of per-repeat ratios.
One JSON line per case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from choral.audits.attacks.shadow_models import batches, coin_members, train_shadows


def sgd(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def one_by_one(
    build: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor, members: np.ndarray, steps: int, batch: int
) -> list[nn.Module]:
    order = torch.from_numpy(batches(members, steps=steps, batch_size=batch, seed=0)).to(x.device)
    torch.manual_seed(0)
    models = [build() for _ in members]
    for model, own in zip(models, order, strict=True):
        model.to(x.device)
        optimizer = sgd(list(model.parameters()))
        for chosen in own:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    cases = {
        "digits, linear 64-10, batch 16": (lambda: nn.Linear(64, 10), 64, 16),
        "digits, 64-32-10 tanh, batch 16": (
            lambda: nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), 64, 16,
        ),
        "adult, 104-64-2 relu, batch 32": (
            lambda: nn.Sequential(nn.Linear(104, 64), nn.ReLU(), nn.Linear(64, 2)), 104, 32,
        ),
    }  # fmt: skip
    for name, (build, width, batch) in cases.items():
        torch.manual_seed(1)
        x = torch.randn(800, width, device=wanted.device)
        y = torch.randint(2, (800,), device=wanted.device)
        members = coin_members(wanted.models, len(x))
        stacked: list[float] = []
        single: list[float] = []
        gap = 0.0
        for repeat in range(wanted.repeats + 1):
            started = time.perf_counter()
            shadows = train_shadows(
                build, x, y, members, optimizer=sgd, steps=wanted.steps, batch_size=batch, device=wanted.device
            )
            middle = time.perf_counter()
            models = one_by_one(build, x, y, members, wanted.steps, batch)
            ended = time.perf_counter()
            if repeat:
                stacked.append(middle - started)
                single.append(ended - middle)
            gap = max(
                float((shadows.model(i)[key] - value).abs().max())
                for i, model in enumerate(models)
                for key, value in model.state_dict().items()
            )
        ratio = statistics.median(a / b for a, b in zip(single, stacked, strict=True))
        line = {
            "case": name, "models": wanted.models, "steps": wanted.steps, "threads": wanted.threads,
            "device": wanted.device,
            "stacked_s": round(statistics.median(stacked), 3), "one_by_one_s": round(statistics.median(single), 3),
            "ratio": round(ratio, 2), "largest_weight_difference": gap,
        }  # fmt: skip
        print(json.dumps(line))


if __name__ == "__main__":
    main()
