"""Engines against a bare loop: seconds of processor time to train one cohort, and a whole round with its sum.

The bare loop does the arithmetic and nothing else: one resident model, batches sliced from tensors, fused updates, a
running sum. Interleaved, medians, one thread. Prints a line of JSON per engine with the ratio to the bare loop (below 1
is faster).

    python benchmarks/simulation.py [--only cnn|logistic] [--repeats 5] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from choral import Plain
from choral.trainers.algorithms import FedAvg
from choral.trainers.algorithms.seam import LocalTrainer, Setup, Train
from choral.trainers.coders import WeightedCoder
from choral.trainers.engines import Cohort, Direct, Fastest
from choral.trainers.epochs import Epochs
from choral.trainers.local import Resident
from choral.trainers.memory import Memory
from choral.trainers.participation import Participation
from choral.trainers.rounds import Federation, open_sessions
from choral.trainers.transcript import Transcript


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2, 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, 1, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 3 * 3, 10),
    )


# model, parties of the pool, records of each, shape of a record, classes, batch size, learning rate
JOBS: dict[str, tuple[Callable[[], nn.Module], int, int, tuple[int, ...], int, int, float]] = {
    "cnn": (cnn, 50, 50, (1, 28, 28), 10, 10, 0.1),
    "logistic": (lambda: nn.Linear(1000, 2), 1000, 200, (1000,), 2, 10, 0.1),
}


def federation(resident: Resident, trainer: LocalTrainer, examples: dict[str, int], seen: Transcript) -> Federation:
    setup = Setup(
        parties=len(examples), length=resident.length, examples=sum(examples.values()), largest=256, value_bound=16.0
    )
    algorithm = FedAvg()
    coders = {
        name: WeightedCoder(examples, channel, bound=16.0, value_bits=28, guards={})
        for name, channel in algorithm.channels(setup).items()
    }
    return Federation(
        algorithm=algorithm,
        trainer=trainer,
        setup=setup,
        names=tuple(examples),
        examples=examples,
        coders=coders,
        sessions=open_sessions(Plain(), coders, seen),
        secure_sum=Plain(),
        participation=Participation(),
        memory=Memory(),
        seed=0,
        seen=seen,
    )


def bare_loop(model: nn.Module, parties: dict[str, TensorDataset], batch: int, rate: float) -> Callable[[], Any]:
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]

    def once() -> list[torch.Tensor]:
        total = [torch.zeros_like(p) for p in start]
        for dataset in parties.values():
            inputs, targets = dataset.tensors
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
            order = torch.randperm(len(targets))
            for first in range(0, len(order), batch):
                rows = order[first : first + batch]
                loss = F.cross_entropy(model(inputs[rows]), targets[rows])
                slopes = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    torch._foreach_add_(parameters, slopes, alpha=-rate)
            with torch.no_grad():
                torch._foreach_add_(total, torch._foreach_sub(parameters, start), alpha=len(targets))
        return total

    return once


def drained(results: Iterable[Any]) -> None:
    for _ in results:
        pass


def measure(name: str, repeats: int, device: torch.device, scale: float) -> None:
    build_model, count, records, shape, classes, batch, rate = JOBS[name]
    count = max(4, round(count * scale))
    generator = torch.Generator().manual_seed(0)
    parties = {
        f"party-{k}": TensorDataset(
            torch.randn(records, *shape, generator=generator).to(device),
            torch.randint(classes, (records,), generator=generator).to(device),
        )
        for k in range(count)
    }

    def build(dataset: TensorDataset) -> Any:
        model = build_model()
        return model, torch.optim.SGD(model.parameters(), lr=rate), DataLoader(dataset, batch_size=batch, shuffle=True)

    def own_loop(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        Epochs()(model, optimizer, loader)

    def resident(fit: Any) -> Resident:
        made = Resident(build=build, fit=fit, datasets=parties, guards={}, seed=0, device=device)
        for party in parties:
            made.seat(party)
        return made

    usual, known = resident(own_loop), resident(Epochs())
    weights = known.layout.read()
    orders = [(party, Train()) for party in parties]
    examples = dict.fromkeys(parties, records)
    seen = Transcript(None, None)
    fastest = Fastest(known)
    whole = federation(known, fastest, examples, seen)
    jobs: dict[str, Callable[[], Any]] = {
        "bare loop": bare_loop(build_model().to(device), parties, batch, rate),
        "resident, the user's own loop": lambda: drained(usual.do(orders, weights, 1)),
        "direct": lambda: drained(Direct(known).do(orders, weights, 1)),
        "cohort": lambda: drained(Cohort(known).do(orders, weights, 1)),
        "a whole round of federate, plain sum": lambda: whole.round(weights, 1),
    }
    seconds: dict[str, list[float]] = {job: [] for job in jobs}
    for repeat in range(repeats + 1):
        for job, work in jobs.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = clock(device)
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first is warm-up
                seconds[job].append(clock(device) - started)
    bare = statistics.median(seconds["bare loop"])
    for job, found in seconds.items():
        line = {
            "job": name,
            "engine": job,
            "chosen": type(fastest.chosen).__name__ if job.startswith("a whole") else None,
            "parties": count,
            "parameters": known.length,
            "ms_per_party": round(statistics.median(found) / count * 1e3, 3),
            "ratio_to_bare": round(statistics.median(found) / bare, 3),
            "device": str(device),
            "repeats": repeats,
        }
        print(json.dumps({key: value for key, value in line.items() if value is not None}), flush=True)


def clock(device: torch.device) -> float:
    """Processor time on a CPU, which others on the machine disturb less; wall-clock time beside an accelerator."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(JOBS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of parties")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in [arguments.only] if arguments.only else JOBS:
        measure(name, arguments.repeats, torch.device(arguments.device), arguments.scale)


if __name__ == "__main__":
    main()
