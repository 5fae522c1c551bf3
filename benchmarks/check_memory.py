"""What looking at a model costs in memory: the peak of a run with the checks, and of one in which they are settled.

    python benchmarks/check_memory.py [--model transformer|resnet] [--steps 3]

One JSON line for each model. Each run is a process of its own, and its peak the kernel's (`ru_maxrss`), less what the
process held before the model was made. "settled" is the same run, but that what the checks find out is put down as
known before the first step; "plain" has no privacy.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

KINDS = ("plain", "settled", "checked")


class Block(nn.Module):
    """Attention and a feed-forward part, out of linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        x = x + self.o(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v)
        return x + self.down(F.gelu(self.up(self.second(x))))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Of tokens, 6 layers, 256 wide."""

    def __init__(self, width: int = 256, layers: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(tokens)).mean(1))  # type: ignore[no-any-return]


class Residual(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.n, self.m = nn.GroupNorm(4, outer), nn.GroupNorm(4, outer)
        same = stride == 1 and inner == outer
        self.short = nn.Identity() if same else nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.m(self.b(F.relu(self.n(self.a(x))))) + self.short(x))


def resnet(width: int = 16) -> nn.Module:
    """ResNet18 for small images, with GroupNorm."""
    sizes = [(width, 1), (width, 1), *((width * 2**i, 2 - j) for i in (1, 2, 3) for j in (0, 1))]
    inner, blocks = width, []
    for outer, stride in sizes:
        blocks.append(Residual(inner, outer, stride))
        inner = outer
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.GroupNorm(4, width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "transformer": (Transformer, lambda: torch.randint(100, (64, 32))),
    "resnet": (resnet, lambda: torch.randn(64, 3, 32, 32)),
    "small": (lambda: Transformer(96, 3), lambda: torch.randint(100, (64, 32))),
}


def held() -> int:
    """What this process holds now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak(kind: str, name: str, steps: int) -> dict[str, float]:
    """In this process: its peak over what it held before, in MiB, and the seconds of the first step and the last."""
    from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
    from choral.privacy.noise.gaussian import os_stream
    from choral.privacy.per_sample.model import with_per_sample_gradients

    torch.manual_seed(0)
    torch.set_num_threads(1)
    F.cross_entropy(nn.Linear(4, 2)(torch.randn(3, 4)), torch.zeros(3, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
    before = held()
    make, inputs = MODELS[name]
    model, x = make(), inputs()
    y = torch.arange(len(x)) % 10
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    called: nn.Module = model
    optimizer: torch.optim.Optimizer = sgd
    if kind != "plain":
        called = private = with_per_sample_gradients(model)
        optimizer = PrivateOptimizer(
            sgd, private, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=len(x), source=os_stream
        )
        if kind == "settled":
            private.compared.update(model.parameters())
            private.unmixed = True
    times = []
    for _ in range(steps):
        started = time.process_time()
        if kind != "plain":
            optimizer.expect(len(x))  # type: ignore[attr-defined]
        optimizer.zero_grad()
        F.cross_entropy(called(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        times.append(time.process_time() - started)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"MiB": used / 2**20, "first": times[0], "last": times[-1]}


def measured(kind: str, name: str, steps: int = 3) -> dict[str, float]:
    """The same in a process of its own, which gives large blocks back as soon as they are free."""
    command = [sys.executable, __file__, "--model", name, "--steps", str(steps), "--kind", kind]
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found: dict[str, float] = json.loads(subprocess.run(command, env=exact, check=True, capture_output=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--kind", choices=KINDS, help="one measurement, in this process")
    wanted = parser.parse_args()
    if wanted.kind:
        print(json.dumps(peak(wanted.kind, wanted.model, wanted.steps)))
        return
    for name in [wanted.model] if wanted.model else ["transformer", "resnet"]:
        found = {kind: measured(kind, name, wanted.steps) for kind in KINDS}
        line = {
            "model": name,
            "peak MiB": {kind: round(found[kind]["MiB"]) for kind in KINDS},
            "checked over settled": round(found["checked"]["MiB"] / found["settled"]["MiB"], 3),
            "first step over later": round(found["checked"]["first"] / found["checked"]["last"], 1),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
