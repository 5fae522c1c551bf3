"""A user's own ``fit`` in a federation, over the same ``fit`` in a bare loop, and beside pfl.

Both take one model, one thread and a loader for each party that is made beforehand. The bare loop is federated
averaging and no more: it copies the weights in, calls ``fit``, adds the change to a running sum and moves the weights
by the mean; the federation does a whole round: it seeds, checks what ``fit`` left behind, encodes, sums, and keeps a
record. In turns, in processor time; a line of JSON for each job with the ratio of the medians.

A DataLoader takes half of the time of such small models. ``--slices``: a loader that slices the party's tensors in
order, as pfl's training does, which with ``--peer-python`` takes its turn in a process of its own.

    python benchmarks/own_fit.py [--only cnn|logistic] [--rounds 15] [--scale 1.0] [--slices]
        [--peer-python PEERS/bin/python]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
import bare
from driven import Driven, timed

from choral import Plain, Task
from choral.trainers.federated.one_round import one_round
from choral.trainers.federated.plan import Plan
from choral.trainers.federated.session import Session


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    for inputs, targets in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@dataclass(frozen=True)
class Slices:
    """Batches in the order of the records."""

    dataset: TensorDataset

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for first in range(0, len(self.dataset), bare.BATCH):
            yield tuple(tensor[first : first + bare.BATCH] for tensor in self.dataset.tensors)

    def __len__(self) -> int:
        return -(-len(self.dataset) // bare.BATCH)


def loader_of(dataset: TensorDataset, *, slices: bool) -> Any:
    return Slices(dataset) if slices else DataLoader(dataset, batch_size=bare.BATCH, shuffle=True)


def loop(job: bare.Job, datasets: dict[str, TensorDataset], *, slices: bool) -> Callable[[], Any]:
    model = job.model()
    parameters: list[torch.Tensor] = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=bare.RATE)
    weights = [p.detach().clone() for p in parameters]
    loaders = {name: loader_of(dataset, slices=slices) for name, dataset in datasets.items()}
    records = sum(map(len, datasets.values()))

    @torch.no_grad()
    def once() -> None:
        total = [torch.zeros_like(p) for p in weights]
        for name, loader in loaders.items():
            torch._foreach_copy_(parameters, weights)
            with torch.enable_grad():
                fit(model, optimizer, loader)
            torch._foreach_add_(total, torch._foreach_sub(parameters, weights), alpha=len(datasets[name]))
        torch._foreach_add_(weights, total, alpha=1 / records)

    return once


def measure(name: str, arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    job, rounds, slices = bare.JOBS[name], arguments.rounds, arguments.slices
    bare.write_parties(job, arguments.scale, path)
    datasets = {f"party-{k}": TensorDataset(*pair) for k, pair in enumerate(bare.read_parties(path))}

    def build(dataset: TensorDataset) -> Any:
        model = job.model()
        return model, torch.optim.SGD(model.parameters(), lr=bare.RATE), loader_of(dataset, slices=slices)

    task = Task(build=build, fit=fit, evaluate=lambda _: {"nothing": 0.0}, min_classes=1)
    once = loop(job, datasets, slices=slices)
    with ExitStack() as stack:
        session = stack.enter_context(Session.open(Plan.of(task, datasets, rounds=rounds + 1, secure_sum=Plain())))
        numbers = session.rounds_left()
        plays: dict[str, Callable[[], Any]] = {
            "federation": lambda: timed(lambda: session.keep(one_round(session, next(numbers)))),
            "loop": lambda: timed(once),
        }
        if arguments.peer_python:
            command = [arguments.peer_python, str(Path(__file__).with_name("peers.py")), "pfl", name, str(path)]
            pfl = stack.enter_context(Driven(command))
            pfl.first()
            plays["pfl"] = pfl.once
        seconds: dict[str, list[float]] = {play: [] for play in plays}
        for turn in range(rounds + 1):
            for play in plays if turn % 2 else reversed(plays):
                seconds[play].append(sum(plays[play]().cpu))
    each = {play: statistics.median(found[1:]) / len(datasets) * 1e3 for play, found in seconds.items()}
    return {  # the first round warms up
        "job": name,
        "parties": len(datasets),
        "rounds": rounds,
        "batches": "slices" if slices else "DataLoader",
        **{f"{play}_ms_per_party": round(found, 3) for play, found in each.items()},
        "ratio": round(each["federation"] / each["loop"], 4),
        **({"pfl_ratio": round(each["pfl"] / each["loop"], 4)} if "pfl" in each else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(bare.JOBS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of parties")
    parser.add_argument("--slices", action="store_true", help="a loader that slices tensors, in order")
    parser.add_argument("--peer-python", help="interpreter of an environment with pfl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in [args.only] if args.only else bare.JOBS:
            found = measure(name, args, Path(folder) / f"{name}.safetensors")
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
