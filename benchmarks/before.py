"""This tree beside an earlier commit of it: rounds, masked sums, encoding and training, in processor time.

Both in turns, each in a process of its own on one thread; a line of JSON for each job with the ratio of the medians,
above 1 where this tree is slower. Whole rounds of ``federate`` are measured, their evaluation and record included: ten
parties, 100,100 weights, one local epoch of 20 records; those of "training" are of a small convolutional network.

    python benchmarks/before.py COMMIT [--turns 60] [--only "round, plain"]
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bare
import numpy as np
import torch
from driven import Driven
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
IN_A_TURN, MOST, PARTIES = 4, 100_000, 10


def linear(dataset: Any) -> Any:
    return _built(nn.Linear(1000, 100), dataset)


def convolutional(dataset: Any) -> Any:
    return _built(
        nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2304, 10)
        ),
        dataset,
    )


def _built(model: Any, dataset: Any) -> Any:
    return model, torch.optim.SGD(model.parameters(), lr=0.01), DataLoader(dataset, batch_size=10, shuffle=True)


def rounds(build: Callable[[Any], Any], shape: tuple[int, ...], classes: int, **options: Any) -> Callable[[], None]:
    """``federate`` stops after every few rounds until it is told to go on."""

    def run() -> None:
        from choral import trainers

        def made(number: int) -> Any:
            generator = torch.Generator().manual_seed(number)
            return TensorDataset(torch.randn(20, *shape, generator=generator), torch.arange(20) % classes)

        def on_round(entry: Any) -> None:
            if entry.round % IN_A_TURN == 0:
                bare.turn()

        parties = {f"p{number}": made(number) for number in range(PARTIES)}
        functions: dict[str, Any] = {"build": build, "fit": trainers.Epochs(), "evaluate": lambda _: {"nothing": 0.0}}
        if hasattr(trainers, "Keep"):
            task, keep = trainers.Task(**functions), trainers.Keep(on_round=on_round)
            trainers.federate(task, parties, rounds=MOST, keep=keep, **options)
        else:  # as it was called before there were tasks
            trainers.federate(**functions, parties=parties, rounds=MOST, on_round=on_round, **options)  # type: ignore[call-arg]

    return run


def masked_sum() -> None:
    from choral.protocols import Masked, SumSpec

    names = tuple(f"p{number}" for number in range(20))
    vectors = np.random.default_rng(0).integers(-1000, 1000, (len(names), 50_000))
    session = Masked(corrupt=1).open(SumSpec(parties=names, length=vectors.shape[1], bound=1000))
    while True:
        summing = session.begin()
        for name, vector in zip(names, vectors, strict=True):
            summing.submit(name, vector)
        if not np.array_equal(summing.finish().total, vectors.sum(0)):
            raise RuntimeError("another sum")
        bare.turn()


def encoding() -> None:
    from choral.privacy import FixedPoint

    codec = FixedPoint(bound=16.0, value_bits=28, max_weight=32)
    updates = [torch.randn(100_000, generator=torch.Generator().manual_seed(n)) / 100 for n in range(PARTIES)]
    while True:
        for _ in range(IN_A_TURN):
            codec.decode(sum(codec.encode(update, 20) for update in updates))  # type: ignore[arg-type, misc]
        bare.turn()


def jobs() -> dict[str, Callable[[], None]]:
    from choral import Masked, Plain

    return {
        "round, plain": rounds(linear, (1000,), 100, secure_sum=Plain()),
        "round, masked": rounds(linear, (1000,), 100, secure_sum=Masked(corrupt=1)),
        "masked sum": masked_sum,
        "encoding": encoding,
        "training": rounds(convolutional, (1, 16, 16), 10, secure_sum=Plain()),
    }


def measure(job: str, before: Path, turns: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--work", job]
    with (
        Driven(["env", f"PYTHONPATH={before / 'src'}", *command]) as old,
        Driven(["env", f"PYTHONPATH={ROOT / 'src'}", *command]) as new,
    ):
        spent: dict[Driven, list[float]] = {old: [], new: []}
        for process in spent:
            process.first()
        for turn in range(turns + 1):
            for process in (old, new) if turn % 2 else (new, old):
                spent[process].append(sum(process.once().cpu))
    was, now = (statistics.median(seconds[1:]) for seconds in spent.values())
    return {"job": job, "before_ms": round(1e3 * was, 2), "now_ms": round(1e3 * now, 2), "ratio": round(now / was, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default="HEAD")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--only", choices=list(jobs()))
    parser.add_argument("--work", choices=list(jobs()), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        torch.set_num_threads(1)
        jobs()[args.work]()
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [shutil.which("git") or "git", "-C", str(ROOT), "archive", args.commit]
        archive = subprocess.run(command, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        for job in [args.only] if args.only else jobs():
            print(json.dumps(measure(job, Path(folder), args.turns)), flush=True)


if __name__ == "__main__":
    main()
