"""What a one-run audit adds to a training: canaries among the records, scored at the end.

    python benchmarks/audit_overhead.py [--canaries 400] [--epochs 5] [--repeats 3] [--threads 1]

A private and a plain training of a small convolutional network on random images, with and without canaries,
alternating. The number of records and of steps is the user's; half of the canaries are added to it. Audited time:
coins, training, scores, bounds, ROC and null control. One JSON line per case; the ratio is the median over repeats of
audited / plain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from choral.audits.attacks.canaries import loss_scores, record_canaries
from choral.audits.attacks.score_audit import audit_training
from choral.privacy import Privacy, unwrap

RECORDS, BATCH = 12_000, 128


class Records(Dataset[Any]):
    def __init__(self, records: list[Any]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.records[index]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2), nn.Tanh(), nn.Conv2d(16, 32, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(800, 10)
    )


def train(data: Any, epochs: int, private: bool) -> nn.Module:
    model: Any = network()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    loader: Any = DataLoader(data, BATCH, shuffle=True)
    if private:
        model, optimizer, loader = Privacy(epsilon=3.0, delta=1e-5, epochs=epochs).wrap(model, optimizer, loader)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return unwrap(model) if private else model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--canaries", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    data = TensorDataset(torch.randn(RECORDS, 1, 28, 28), torch.randint(10, (RECORDS,)))
    for private in (False, True):
        times: dict[str, list[float]] = {"plain": [], "audited": []}
        for repeat in range(wanted.repeats + 1):
            started = time.process_time()
            train(data, wanted.epochs, private)
            middle = time.process_time()
            canaries = record_canaries(wanted.canaries, (1, 28, 28), 10)
            audit_training(
                lambda chosen, private=private: train(ConcatDataset([data, Records(chosen)]), wanted.epochs, private),  # type: ignore[misc]
                loss_scores, canaries, delta=1e-5, claimed=3.0,
            )  # fmt: skip
            ended = time.process_time()
            if repeat:
                times["plain"].append(middle - started)
                times["audited"].append(ended - middle)
        ratio = statistics.median(b / a for a, b in zip(times["plain"], times["audited"], strict=True))
        line = {
            "case": "private" if private else "plain", "records": RECORDS, "canaries": wanted.canaries,
            "epochs": wanted.epochs, "threads": wanted.threads, "clock": "process CPU",
            "training_s": round(statistics.median(times["plain"]), 2),
            "audited_s": round(statistics.median(times["audited"]), 2), "ratio": round(ratio, 3),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
