"""The jobs that frameworks are compared on, and a bare loop that does their arithmetic and nothing else.

Imports torch and safetensors alone, so that the environment of each framework can import it. The bare loop: one
resident model, batches sliced from tensors, fused updates, a running sum; batches of 10, learning rate 0.1, one local
epoch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

BATCH, RATE = 10, 0.1
Parties = Sequence[tuple[torch.Tensor, torch.Tensor]]  # inputs and targets of each


@dataclass(frozen=True)
class Job:
    """parties: that a round asks, all there are. records: of each. shape: of a record."""

    model: Callable[[], nn.Module]
    parties: int
    records: int
    shape: tuple[int, ...]
    classes: int


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


JOBS = {
    "cnn": Job(cnn, 50, 50, (1, 28, 28), 10),
    "logistic": Job(lambda: nn.Linear(1000, 2), 1000, 200, (1000,), 2),
}


def write_parties(job: Job, scale: float, path: Path) -> None:
    """Random records, in one file that every process maps into its memory. scale: of the number of parties."""
    count, generator = max(4, round(job.parties * scale)), torch.Generator().manual_seed(0)
    inputs = torch.randn(count, job.records, *job.shape, generator=generator)
    targets = torch.randint(job.classes, (count, job.records), generator=generator)
    save_file({"inputs": inputs, "targets": targets}, path)


@cache
def read_parties(path: str | Path) -> Parties:
    """Once in a process: a worker that is handed this function by name has it from its own import."""
    kept = load_file(path)
    return list(zip(kept["inputs"], kept["targets"], strict=True))


def epoch(model: nn.Module, parameters: list[torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """One party's training."""
    order = torch.randperm(len(targets))
    for first in range(0, len(order), BATCH):
        rows = order[first : first + BATCH]
        loss = F.cross_entropy(model(inputs[rows]), targets[rows])
        slopes = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, slopes, alpha=-RATE)


def bare_loop(model: nn.Module, parties: Parties) -> Callable[[], Any]:
    """A function that does a round: every party from the same weights, and the weighted sum of the changes."""
    parameters: list[torch.Tensor] = list(model.parameters())
    start = [p.detach().clone() for p in parameters]

    def once() -> list[torch.Tensor]:
        total = [torch.zeros_like(p) for p in start]
        for inputs, targets in parties:
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
            epoch(model, parameters, inputs, targets)
            with torch.no_grad():
                torch._foreach_add_(total, torch._foreach_sub(parameters, start), alpha=len(targets))
        return total

    return once


def turn(**facts: Any) -> None:
    """In a process that simulation.py drives: say that a round is done, and wait for the word to do the next."""
    print("\nturn " + json.dumps(facts), flush=True)
    if sys.stdin.readline() != "go\n":
        sys.exit("nobody drives this process any more")
