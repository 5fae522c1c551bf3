"""What a second process is worth to pooled training: `centralize` under torchrun, gloo, one thread each.

    python benchmarks/data_parallel.py [--repeats 3] [--rounds 4] [--only digits mlp cnn]

One process and two train the same task in turns; each measures every call of the task's own fit after the first, in
processor time and by the clock. One JSON line for each task: seconds of a pass (medians), the busiest process's where
there are two; what two are worth, K = one's seconds over two's; and the efficiency e = K - 1 of the price table's
formula, K = 1 + (k - 1) e. By processor time e is what the division of batches and the exchange of gradients leave on
cores of one's own; by the clock it is this machine's at this moment, whose load is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Compute, Task, centralize

RECORDS = 2048
TASKS = {  # model, shape of a record, batch
    "digits": (lambda: nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), (64,), 16),
    "mlp": (lambda: nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10)), (784,), 128),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 10),
        ),
        (1, 28, 28),
        64,
    ),
}  # fmt: skip


def worker(name: str, rounds: int, processes: int) -> None:
    """Train, and print this process's medians."""
    torch.set_num_threads(1)
    make, shape, batch = TASKS[name]
    spent: list[tuple[float, float]] = []

    def build(dataset: Any) -> Any:
        model = make()  # type: ignore[no-untyped-call]
        return model, torch.optim.SGD(model.parameters(), lr=0.05), DataLoader(dataset, batch, shuffle=True)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        processor, clock = time.process_time(), time.perf_counter()
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        spent.append((time.process_time() - processor, time.perf_counter() - clock))

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(RECORDS, *shape), torch.randint(0, 10, (RECORDS,)))
    task = Task(build=build, fit=fit, evaluate=lambda _: {"loss": 0.0}, parties={"all": data})
    centralize(task, rounds=rounds, data_parallel=processes > 1, compute=Compute(seed=0, device="cpu"))
    medians = [statistics.median(column) for column in zip(*spent[1:], strict=True)]
    print("LINE " + json.dumps(medians), flush=True)


def once(name: str, rounds: int, processes: int) -> tuple[float, float]:
    """Seconds of a pass: processor time of the busiest process, and the longest by the clock."""
    own = [__file__, "--worker", name, "--rounds", str(rounds), "--processes", str(processes)]
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *own], capture_output=True, text=True, check=False, env=environment)
    lines = [json.loads(line.split("LINE ", 1)[1]) for line in done.stdout.splitlines() if "LINE " in line]
    if done.returncode or len(lines) != processes:
        raise RuntimeError(done.stderr[-2000:])
    return max(line[0] for line in lines), max(line[1] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, given.rounds, given.processes)
        return
    for name in given.only:
        goes = [[once(name, given.rounds, count) for count in (1, 2)] for _ in range(given.repeats)]
        one, two = ([statistics.median(go[place][kind] for go in goes) for kind in (0, 1)] for place in (0, 1))
        parameters = sum(parameter.numel() for parameter in TASKS[name][0]().parameters())  # type: ignore[misc, no-untyped-call]
        line: dict[str, Any] = {"task": name, "parameters": parameters, "batch": TASKS[name][2]}
        for kind, word in enumerate(("processor", "clock")):
            line[word] = {
                "one": round(one[kind], 4),
                "two": round(two[kind], 4),
                "worth": round(one[kind] / two[kind], 3),
                "efficiency": round(one[kind] / two[kind] - 1, 3),
            }
        print(json.dumps(line | {"load": os.getloadavg()[0]}), flush=True)


if __name__ == "__main__":
    main()
