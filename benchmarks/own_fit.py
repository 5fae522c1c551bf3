"""A user's own ``fit`` in a federation, over the same ``fit`` in a bare loop.

Both take one model, one thread and a DataLoader for each party that is made beforehand. The bare loop copies the
weights in, calls ``fit`` and adds the change to a running sum; the federation does a whole round: it seeds, checks what
``fit`` left behind, encodes, sums, and keeps a record. In turns, in one process, in processor time; a line of JSON for
each job with the ratio of the medians.

    python benchmarks/own_fit.py [--only cnn|logistic] [--rounds 15] [--scale 1.0]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
import bare

from choral import Plain, Task
from choral.trainers.federated.one_round import one_round
from choral.trainers.federated.plan import Plan
from choral.trainers.federated.session import Session


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    for inputs, targets in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def loop(job: bare.Job, datasets: dict[str, TensorDataset]) -> Callable[[], Any]:
    model = job.model()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=bare.RATE)
    start = [p.detach().clone() for p in parameters]
    loaders = {name: DataLoader(dataset, batch_size=bare.BATCH, shuffle=True) for name, dataset in datasets.items()}

    def once() -> list[torch.Tensor]:
        total = [torch.zeros_like(p) for p in start]
        for name, loader in loaders.items():
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
            fit(model, optimizer, loader)
            with torch.no_grad():
                torch._foreach_add_(total, torch._foreach_sub(parameters, start), alpha=len(datasets[name]))
        return total

    return once


def measure(name: str, rounds: int, scale: float, path: Path) -> dict[str, Any]:
    job = bare.JOBS[name]
    bare.write_parties(job, scale, path)
    datasets = {f"party-{k}": TensorDataset(*pair) for k, pair in enumerate(bare.read_parties(path))}

    def build(dataset: TensorDataset) -> Any:
        model = job.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=bare.RATE)
        return model, optimizer, DataLoader(dataset, batch_size=bare.BATCH, shuffle=True)

    task = Task(build=build, fit=fit, evaluate=lambda _: {"nothing": 0.0}, min_classes=1)
    once = loop(job, datasets)
    seconds: dict[str, list[float]] = {"federation": [], "loop": []}
    with Session.open(Plan.of(task, datasets, rounds=rounds + 1, secure_sum=Plain())) as session:
        plays: dict[str, Callable[[int], Any]] = {
            "federation": lambda number: session.keep(one_round(session, number)),
            "loop": lambda _: once(),
        }
        for number in session.rounds_left():
            for play in plays if number % 2 else reversed(plays):
                started = time.process_time()
                plays[play](number)
                seconds[play].append(time.process_time() - started)
    whole, by_loop = (statistics.median(seconds[play][1:]) for play in plays)  # the first round warms up
    return {
        "job": name,
        "parties": len(datasets),
        "rounds": rounds,
        "loop_ms_per_party": round(by_loop / len(datasets) * 1e3, 3),
        "federation_ms_per_party": round(whole / len(datasets) * 1e3, 3),
        "ratio": round(whole / by_loop, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(bare.JOBS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of parties")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in [args.only] if args.only else bare.JOBS:
            found = measure(name, args.rounds, args.scale, Path(folder) / f"{name}.safetensors")
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
