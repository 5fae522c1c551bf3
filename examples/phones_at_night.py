"""A hundred thousand phones, forty of them each night: who can be had at the hour, who is too slow, who drops out.

    python examples/phones_at_night.py [FOLDER]

Each phone is made when it is first asked. Time is simulated: a round a day, at two in the morning UTC.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Keep, Masked, Task, federate
from choral.trainers import ONCE_A_DAY, Availability, Device, Dropouts, Participation, VirtualParties

torch.set_num_threads(1)
TRUTH = torch.randn(20, generator=torch.Generator().manual_seed(1))


def phone(number: int, records: int = 30) -> TensorDataset:
    """Its owner is taken with some things more than with others, so no phone is like all of them."""
    generator = torch.Generator().manual_seed(number)
    points = torch.randn(records, 20, generator=generator) + 0.3 * torch.randn(20, generator=generator)
    points[:2] = torch.stack([TRUTH, -TRUTH])  # both classes are there
    return TensorDataset(points, (points @ TRUTH > 0).long())


def build(dataset: TensorDataset) -> Any:
    model = nn.Linear(20, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=10, shuffle=True)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    for points, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(points), labels).backward()
        optimizer.step()


TESTED = torch.randn(2_000, 20, generator=torch.Generator().manual_seed(2))


def evaluate(model: nn.Module) -> float:
    return float((model(TESTED).argmax(1) == (TESTED @ TRUTH > 0)).float().mean())


def main(out: str | None) -> None:
    run = federate(
        Task(build=build, fit=fit, evaluate=evaluate),
        VirtualParties(100_000, phone, 30),
        rounds=12,
        participation=Participation(
            cohort=40,
            draw="seed",  # a rehearsal that comes out alike each time
            availability=Availability(peak=0.3, trough=0.02, hour=3, zones=(-8, -5, 0, 1, 5.5, 8)),
            device=Device(start=20, per_example=1.0, spread=0.6),
            deadline=120,
            dropouts=Dropouts(keys=0.02, shares=0.01, vector=0.02, confirmation=0.01, unmasking=0.01),
            clock=ONCE_A_DAY,
            patience=3,
        ),
        secure_sum=Masked(min_survivors=33, corrupt=2, dropouts=7, server="semi-honest"),
        keep=Keep(out=out),
    )
    print(" day  selected  survivors  simulated  accuracy")
    for entry in run.history[1:]:
        day, seconds = int((entry.simulated_start or 0) // 86_400) + 1, entry.simulated_seconds
        said = f"failed: {entry.failed}" if entry.failed else f"{entry.metrics['accuracy']:.3f}"
        print(f"{day:4d}  {entry.selected:8d}  {entry.survivors:9d}  {seconds:7.0f} s  {said}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
