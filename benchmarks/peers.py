"""Other frameworks against a bare loop on the two jobs of simulation.py: processor time of a round of one cohort.

Needs torch, and measures the peers that are installed beside it (``pip install pfl`` in an environment of its own; this
project does not depend on it). The bare loop is that of simulation.py. Interleaved, medians, one thread; a line of
JSON per framework.

    PEERS/bin/python benchmarks/peers.py [--only cnn|logistic] [--repeats 5]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Data = list[tuple[torch.Tensor, torch.Tensor]]


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


# model, parties, records of each, shape of a record, classes; batches of 10, learning rate 0.1, one local epoch
JOBS: dict[str, tuple[Callable[[], nn.Module], int, int, tuple[int, ...], int]] = {
    "cnn": (cnn, 50, 50, (1, 28, 28), 10),
    "logistic": (lambda: nn.Linear(1000, 2), 1000, 200, (1000,), 2),
}
BATCH, RATE = 10, 0.1


def bare_loop(model: nn.Module, parties: Data) -> Callable[[], Any]:
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]

    def once() -> list[torch.Tensor]:
        total = [torch.zeros_like(p) for p in start]
        for inputs, targets in parties:
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
            order = torch.randperm(len(targets))
            for first in range(0, len(order), BATCH):
                rows = order[first : first + BATCH]
                loss = F.cross_entropy(model(inputs[rows]), targets[rows])
                slopes = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    torch._foreach_add_(parameters, slopes, alpha=-RATE)
            with torch.no_grad():
                torch._foreach_add_(total, torch._foreach_sub(parameters, start), alpha=len(targets))
        return total

    return once


def pfl_round(model: nn.Module, parties: Data) -> Callable[[], Any]:
    """A round of pfl's federated averaging with its simulated backend; it goes through each party's data in order."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            self.model.train()
            return F.cross_entropy(self.model(inputs), targets)

        def metrics(self, *_: torch.Tensor) -> dict[str, Any]:  # pfl wants one
            return {}

    module = Module()
    resident = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    users = iter(range(10**9))
    data = FederatedDataset(
        lambda number: Dataset(list(parties[number]), user_id=str(number)),
        lambda: next(users) % len(parties),
    )
    backend = SimulatedBackend(training_data=data, val_data=data)
    local = NNTrainHyperParams(local_learning_rate=RATE, local_num_epochs=1, local_batch_size=BATCH)

    def once() -> Any:
        parameters = NNAlgorithmParams(
            central_num_iterations=2, evaluation_frequency=10**6, train_cohort_size=len(parties), val_cohort_size=None
        )
        algorithm: Any = FederatedAveraging()
        # Its round 0 always evaluates every party twice; round 1 is the one without.
        contexts, _, _ = algorithm.get_next_central_contexts(resident, 1, parameters, local, None)
        statistics_, metrics = backend.gather_results(resident, algorithm, central_context=contexts[0])
        return algorithm.process_aggregated_statistics(contexts[0], metrics, resident, statistics_)

    return once


PEERS: dict[str, Callable[[nn.Module, Data], Callable[[], Any]]] = {"pfl": pfl_round}


def measure(name: str, repeats: int, scale: float) -> None:
    model, count, records, shape, classes = JOBS[name]
    count = max(4, round(count * scale))
    generator = torch.Generator().manual_seed(0)
    parties = [
        (torch.randn(records, *shape, generator=generator), torch.randint(classes, (records,), generator=generator))
        for _ in range(count)
    ]
    jobs, versions = {"bare loop": bare_loop(model(), parties)}, {"bare loop": torch.__version__}
    for peer, make in PEERS.items():
        try:
            versions[peer] = importlib.metadata.version(peer)
        except importlib.metadata.PackageNotFoundError:
            print(json.dumps({"job": name, "engine": peer, "version": "not installed"}), flush=True)
            continue
        jobs[peer] = make(model(), parties)
    seconds: dict[str, list[float]] = {job: [] for job in jobs}
    for repeat in range(repeats + 1):
        for job, work in jobs.items():
            started = time.process_time()
            work()
            if repeat:  # the first is warm-up
                seconds[job].append(time.process_time() - started)
    bare = statistics.median(seconds["bare loop"])
    for job, found in seconds.items():
        line = {
            "job": name,
            "engine": job,
            "version": versions[job],
            "parties": count,
            "ms_per_party": round(statistics.median(found) / count * 1e3, 3),
            "ratio_to_bare": round(statistics.median(found) / bare, 3),
            "repeats": repeats,
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(JOBS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of parties")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in [arguments.only] if arguments.only else JOBS:
        measure(name, arguments.repeats, arguments.scale)


if __name__ == "__main__":
    main()
