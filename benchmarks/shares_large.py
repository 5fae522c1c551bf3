"""Noise in shares beside the trusted cloud, where parties or models are larger: pictures, and a small transformer.

    CHORAL_DATA=DIR python benchmarks/shares_large.py fashion --seeds 0 1 2   # minutes a run
    CHORAL_DATA=DIR python benchmarks/shares_large.py shakespeare --seeds 0 1 2 3 4

*fashion*: Fashion-MNIST, softmax regression on scattering coefficients (benchmarks/scattering.py), 100 parties, uneven
by label, 90 honest survivors, epsilon 3. *shakespeare*: LoRA on a transformer of one block, which was trained without
privacy on the first half of the text; that half is taken to be public. The parties are the twenty who say most in the
second half, 18 honest survivors, epsilon 4; a record is 32 characters, and none is in two of them. Delta is 1e-5.

Cloud and shares have one setting each task, which nobody tuned. Shares are through `Plain`; `--equal` trains three
steps with draws and noise of known seeds through `Plain` and through `Masked`, and compares the weights.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import fashion_mnist
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

import choral.privacy
from choral import Compute, Masked, Participation, Plain, Privacy, centralize, federate
from choral.privacy.record_shares import party as party_module
from choral.protocols import SecureSum
from choral.trainers import FedSGD, Run, Schedule, Task, lora

DATA = Path(os.environ.get("CHORAL_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data"))
DELTA, WINDOW, WIDTH = 1e-5, 32, 64
START: dict[str, torch.Tensor] = {}  # of the transformer, once it was trained on the public half


@dataclass(frozen=True, kw_only=True)
class Job:
    """make: the task, of a seed. missing: parties that may be missing or collude, of as many as there are."""

    epsilon: float
    batch_size: int
    passes: int
    learning_rate: float
    momentum: float
    clip: float
    corrupt: int
    dropouts: int
    make: Callable[[Job, int], Task]

    @property
    def missing(self) -> int:
        return self.corrupt + self.dropouts


def task_of(job: Job, model: Callable[[], nn.Module], parties: dict[str, Any], test: tuple[torch.Tensor, ...]) -> Task:
    """Of records (x, y), a loss for each record, and the accuracy on test records."""

    def build(dataset: Any) -> Any:
        made = model()
        trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=job.learning_rate, momentum=job.momentum)
        return made, optimizer, DataLoader(dataset, batch_size=min(job.batch_size, len(dataset)), shuffle=True)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        scores, y = model(batch[0]), batch[1]
        if scores.ndim == 2:
            return F.cross_entropy(scores, y, reduction="none")
        return F.cross_entropy(scores.transpose(1, 2), y, reduction="none").mean(1)

    def fit(model: nn.Module, optimizer: Any, loader: Any) -> None:
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    @torch.no_grad()
    def evaluate(model: nn.Module) -> float:
        x, y = test
        right = sum(int((model(a).argmax(-1) == b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))  # type: ignore[misc, no-untyped-call]
        return right / y.numel()

    return Task(build=build, fit=fit, evaluate=evaluate, parties=parties, loss=loss, schedule=Schedule(kind="cosine"))


def fashion(job: Job, seed: int) -> Task:
    """100 parties, whose shares of each label are Dirichlet of .5."""
    x, y = fashion_mnist.records("linear", "train")
    draws = np.random.default_rng(seed)
    places: list[list[int]] = [[] for _ in range(100)]
    for label in range(10):
        those = draws.permutation(np.flatnonzero(y.numpy() == label))
        cuts = (np.cumsum(draws.dirichlet([0.5] * 100))[:-1] * len(those)).astype(int)
        for party, part in zip(places, np.split(those, cuts), strict=True):
            party += part.tolist()
    whole = TensorDataset(x, y)
    parties = {f"p{number:02d}": Subset(whole, part) for number, part in enumerate(places) if part}
    return task_of(job, lambda: fashion_mnist.linear(x.shape[1]), parties, fashion_mnist.records("linear", "t10k"))


class Block(nn.Module):
    """Codes, shape (n, t), to logits of the next code at each place: causal attention over one head, then a layer."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.codes, self.places = nn.Embedding(symbols, WIDTH), nn.Embedding(WINDOW, WIDTH)
        self.query, self.key, self.value, self.project = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, symbols)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.codes(x) + self.places.weight[: x.shape[1]]
        a = self.first(h)
        scores = self.query(a) @ self.key(a).transpose(1, 2) / WIDTH**0.5
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        h = h + self.project(scores.masked_fill(later, -torch.inf).softmax(2) @ self.value(a))
        found: torch.Tensor = self.out(h + self.narrow(F.gelu(self.wide(self.second(h)))))
        return found


def shakespeare(job: Job, seed: int) -> Task:
    """The twenty who say most in the second half; a tenth of what each says is held out. The start is one for all."""
    text = gzip.decompress((DATA / "tinyshakespeare" / "input.txt.gz").read_bytes()).decode("ascii")
    number = {symbol: place for place, symbol in enumerate(sorted(set(text)))}
    middle = text.index("\n\n", len(text) // 2)
    said: Counter[str] = Counter()
    speeches: dict[str, str] = {}
    for speech in text[middle:].strip().split("\n\n"):
        name, _, words = speech.partition("\n")
        speeches[name] = speeches.get(name, "") + words + "\n"
        said[name] += len(words)

    def records(words: str) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.tensor([number[symbol] for symbol in words])
        rows = codes[: (len(codes) - 1) // WINDOW * WINDOW + 1]
        return rows[:-1].view(-1, WINDOW), rows[1:].view(-1, WINDOW)

    parts = {name: records(speeches[name]) for name, _ in said.most_common(20)}
    parties = {name: TensorDataset(x[: -len(x) // 10], y[: -len(x) // 10]) for name, (x, y) in parts.items()}
    held = [torch.cat([part[at][-len(part[at]) // 10 :] for part in parts.values()]) for at in (0, 1)]
    if not START:
        START.update(pretrained(*records(text[:middle]), symbols=len(number)))

    def model() -> nn.Module:
        made = Block(len(number))
        made.load_state_dict(START)
        return lora(made, rank=4)

    del seed  # of the LoRA factors, which the run has
    return task_of(job, model, parties, (held[0], held[1]))


def pretrained(x: torch.Tensor, y: torch.Tensor, *, symbols: int) -> dict[str, torch.Tensor]:
    """Six passes of Adam over the public half."""
    torch.manual_seed(0)
    model = Block(symbols)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for a, b in DataLoader(TensorDataset(x.repeat(6, 1), y.repeat(6, 1)), batch_size=64, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(a).transpose(1, 2), b).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.state_dict()


JOBS = {
    "fashion": Job(
        epsilon=3.0, batch_size=16384, passes=20, learning_rate=0.4, momentum=0.9, clip=8.0, corrupt=5, dropouts=5,
        make=fashion,
    ),
    "shakespeare": Job(
        epsilon=4.0, batch_size=1024, passes=10, learning_rate=0.5, momentum=0.9, clip=1.0, corrupt=1, dropouts=1,
        make=shakespeare,
    ),
}  # fmt: skip


def trained(job: Job, task: Task, arm: str, seed: int, secure_sum: SecureSum | None = None, rounds: int = 0) -> Run:
    """One run. rounds: by default as many as passes; of one step each where given."""
    promise: dict[str, Any] = {"epsilon": job.epsilon, "delta": DELTA, "max_grad_norm": job.clip}
    common: dict[str, Any] = {"compute": Compute(seed=seed, device="cpu"), "rounds": rounds or job.passes}
    if arm == "cloud":
        return centralize(task, privacy=Privacy(**promise), **common)
    parties, records = len(task.parties), sum(len(dataset) for dataset in task.parties.values())
    return federate(
        task,
        algorithm=FedSGD(
            batch_size=job.batch_size,
            steps_per_round=1 if rounds else math.ceil(records / job.batch_size),
            learning_rate=job.learning_rate,
            momentum=job.momentum,
        ),
        privacy=Privacy(**promise, noise="distributed", colluders=job.corrupt),
        secure_sum=secure_sum or Plain(),
        participation=Participation(least=parties - job.dropouts),
        **common,
    )


def equal(job: Job) -> bool:
    """Whether three steps through Plain and Masked end at the same weights, to the bit."""
    real, task = party_module.SharesParty, job.make(job, 0)
    least = len(task.parties) - job.dropouts
    states = []
    for secure_sum in (Plain(), Masked(corrupt=job.corrupt, dropouts=job.dropouts, min_survivors=least)):

        def known(*args: Any, holder: str, **rest: Any) -> Any:
            return real(*args, holder=holder, source=np.random.default_rng(list(holder.encode())).bytes, **rest)

        with mock.patch.object(choral.privacy, "SharesParty", known):
            states.append(trained(job, task, "shares", 0, secure_sum, rounds=3).state)
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("task", choices=list(JOBS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--equal", action="store_true", help="Plain against Masked, instead")
    given = parser.parse_args()
    torch.set_num_threads(1)
    job = JOBS[given.task]
    if given.equal:
        print(json.dumps({"task": given.task, "Plain and Masked are equal to the bit": equal(job)}))
        return
    losses = []
    for seed in given.seeds:
        task, scores, begun = job.make(job, seed), {}, time.process_time()
        for arm in ("cloud", "shares"):
            run = trained(job, task, arm, seed)
            scores[arm] = round(100 * run.metrics["accuracy"], 2)
            scores["start"] = round(100 * run.history[0].metrics["accuracy"], 2)
        losses.append(scores["cloud"] - scores["shares"])
        line = {"task": given.task, "seed": seed, **scores, "cpu_seconds": round(time.process_time() - begun)}
        print(json.dumps(line), flush=True)
    error = float(np.std(losses, ddof=1) / len(losses) ** 0.5) if len(losses) > 1 else None
    print(
        json.dumps({"task": given.task, "shares_below_cloud": round(float(np.mean(losses)), 3), "error": error}),
        flush=True,
    )


if __name__ == "__main__":
    main()
