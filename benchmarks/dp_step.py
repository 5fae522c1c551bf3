"""What the private step costs: time and memory over a plain step and Opacus' own, and the noise generator's rate.

    python benchmarks/dp_step.py [--device cpu|cuda] [--repeats 30] [--only cnn transformer linear]

Same model, same records, same optimizer; medians of interleaved repeats in one run, of processor time (on a GPU of the
clock's). Opacus runs with its hooks and with its ghost clipping, without its secure mode (which needs a package that no
longer exists), so its noise is the cheap, replayable kind. Memory is the peak of one step beyond what the process held
before any, each kind in a process of its own: the kernel's high-water mark, set back (on a GPU, torch's).

The last lines compare the two ways of :mod:`choral.privacy.per_sample.ghost_norms`, written down (Dense) or kept as
factors (Outer), over positions T, input width d and output width p: time of norms and weighted sum, numbers kept, and
the choice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from check_memory import Transformer, resnet
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from choral.privacy.accounting import record_noise
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.noise.gaussian import gaussian, os_stream
from choral.privacy.per_sample import ghost_norms, layer_gradients
from choral.privacy.per_sample.model import with_per_sample_gradients

MIB = 1 << 20
Step = Callable[[], None]


class Block(nn.Module):
    """A character model's layer with attention in plain linear layers, 64 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(65, 64)
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.o(torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 8, -1) @ self.v(x))
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=2),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


CASES: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], torch.Tensor], int]] = {
    "cnn": ("26k parameters, batch 256", cnn, lambda: torch.randn(256, 1, 28, 28), 256),
    "transformer": ("layer of 55k parameters, batch 64 x 64 tokens", Block, lambda: torch.randint(65, (64, 64)), 64),
    "linear": ("digits, 650 parameters, batch 64", lambda: nn.Linear(64, 10), lambda: torch.randn(64, 64), 64),
    "deep transformer": (
        "6 layers, 256 wide, 4.8 M parameters, batch 64 x 32 tokens",
        Transformer,
        lambda: torch.randint(100, (64, 32)),
        64,
    ),
    "resnet": (
        "ResNet18 with GroupNorm, 16 wide, 0.7 M parameters, batch 64 of 32 x 32",
        resnet,
        lambda: torch.randn(64, 3, 32, 32),
        64,
    ),
}
KINDS = ("plain", "choral", "opacus hooks", "opacus ghost")
WIDTHS = ((64, 64), (256, 64), (256, 256), (1024, 256), (768, 3072))
SHAPES = [(t, d, p) for t in (1, 4, 16, 64, 256) for d, p in WIDTHS]


def step_of(kind: str, make: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor) -> Step:
    """One training step of this kind on these records; a fresh model."""
    model, records = make().to(x.device), len(x)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    settings: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": records}
    criterion = nn.functional.cross_entropy
    optimizer: torch.optim.Optimizer = sgd
    before: Callable[[], object] = lambda: None  # noqa: E731
    if kind == "choral":
        model = with_per_sample_gradients(model)
        optimizer = private = PrivateOptimizer(sgd, model, source=os_stream, **settings)
        before = lambda: private.expect(records)  # noqa: E731
    elif kind == "opacus hooks":
        model, optimizer = GradSampleModule(model), DPOptimizer(sgd, **settings)
    elif kind == "opacus ghost":
        model = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0, use_ghost_clipping=True)
        optimizer = DPOptimizerFastGradientClipping(sgd, **settings)
        criterion = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss())

    def run() -> None:
        before()
        optimizer.zero_grad()
        criterion(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return run


def data_of(case: str, device: torch.device) -> tuple[Callable[[], nn.Module], torch.Tensor, torch.Tensor]:
    _, make, inputs, records = CASES[case]
    return make, inputs().to(device), torch.randint(10, (records,)).to(device)


def seconds(run: Step, device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def status(field: str) -> int:
    """A field of this process's memory, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) << 10


def peak(run: Step, device: torch.device) -> float:
    """The most memory while `run` runs, MiB: of the process, or of torch on the GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / MIB
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is held now
    run()
    return status("VmHWM") / MIB


def memory(case: str, kind: str, device: torch.device) -> dict[str, float]:
    """In this process, peaks of the first step and of later ones over what was held before, MiB."""
    step_of(kind, CASES["linear"][1], torch.randn(2, 64).to(device), torch.zeros(2, dtype=torch.int64).to(device))()
    run = step_of(kind, *data_of(case, device))  # after a small step: libraries are loaded
    before = (torch.cuda.memory_allocated() if device.type == "cuda" else status("VmRSS")) / MIB
    first = peak(run, device) - before
    return {"first": first, "later": max(peak(run, device) for _ in range(3)) - before}


def memory_elsewhere(case: str, kind: str, device: torch.device) -> dict[str, float]:
    """The same in a process of its own, which gives large blocks back once they are free. torch counts a GPU's."""
    if device.type == "cuda":
        return memory(case, kind, device)
    command = [sys.executable, __file__, "--device", device.type, "--memory-of", case, kind]
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found: dict[str, float] = json.loads(subprocess.run(command, env=exact, check=True, capture_output=True).stdout)
    return found


def interleaved(runs: dict[str, Step], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {kind: [] for kind in runs}
    for repeat in range(repeats + 3):
        for kind, run in runs.items():
            taken = seconds(run, device)
            if repeat >= 3:
                times[kind].append(taken)
    return {kind: statistics.median(values) for kind, values in times.items()}


def step_line(case: str, repeats: int, device: torch.device) -> dict[str, object]:
    data = data_of(case, device)
    middle = interleaved({kind: step_of(kind, *data) for kind in KINDS}, repeats, device)
    peaks = {kind: memory_elsewhere(case, kind, device) for kind in KINDS}
    return {
        "step": case,
        "of": CASES[case][0],
        "plain_ms": round(1e3 * middle["plain"], 2),
        "time over plain": {kind: round(middle[kind] / middle["plain"], 2) for kind in KINDS[1:]},
        "peak MiB": {kind: round(peaks[kind]["later"], 1) for kind in KINDS},
        "peak MiB, first step": {kind: round(peaks[kind]["first"], 1) for kind in KINDS},
    }


def ghost_line(t: int, d: int, p: int, records: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Both ways for a linear layer: time of making, norms and weighted sum, and numbers kept until the sum."""
    a, g = torch.randn(records, t, d, device=device), torch.randn(records, t, p, device=device)
    weights = torch.rand(records, dtype=torch.float64)
    chosen = type(layer_gradients.per_sample(nn.Linear(d, p), a, g)["weight"]).__name__

    def dense() -> None:
        rows = ghost_norms.Dense(torch.bmm(g.mT, a).flatten(1), 1.0)
        rows.norms()
        rows.weighted_sum(weights)

    def outer() -> None:
        factors = ghost_norms.Outer(lambda part: (a[part], g[part]), records, (t, d, p), 1.0)
        factors.norms()
        factors.weighted_sum(weights)

    middle = interleaved({"Dense": dense, "Outer": outer}, repeats, device)
    return {
        "ghost": [t, d, p],
        "records": records,
        "outer over dense": round(middle["Outer"] / middle["Dense"], 2),
        "numbers, outer over dense": round(t * (d + p) / (d * p), 3),
        "MiB, dense": round(4 * records * d * p / MIB, 1),
        "chosen": chosen,
        "chosen over faster": round(middle[chosen] / min(middle.values()), 2),
    }


def drop(_: object) -> None:
    """Let a result go."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="the steps of these models, and nothing else")
    parser.add_argument("--memory-of", nargs=2, metavar=("MODEL", "KIND"), help="one measurement, in this process")
    wanted = parser.parse_args()
    device = torch.device(wanted.device)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook")  # Opacus' hooks; ours do not warn
    if wanted.memory_of:
        model, kind = wanted.memory_of
        print(json.dumps(memory(model, kind, device)))
        return
    for case in wanted.only or CASES:
        print(json.dumps(step_line(case, wanted.repeats, device)), flush=True)
    if wanted.only:
        return
    regrets, flips = [], []
    for t, d, p in SHAPES:
        records = max(4, min(64, (1 << 24) // (d * p), (1 << 24) // (t * (d + p))))
        line = ghost_line(t, d, p, records, max(wanted.repeats // 6, 3), device)
        regrets.append(line["chosen over faster"])
        flips += [(line["numbers, outer over dense"], line["outer over dense"])] if t > 1 else []
        print(json.dumps(line), flush=True)
    mean = math.exp(statistics.fmean(map(math.log, regrets)))
    print(json.dumps({"ghost": "chosen over faster", "worst": max(regrets), "geometric mean": round(mean, 3)}))
    print(
        json.dumps(
            {
                "ghost": "where Outer should be taken for time, by its share of Dense's numbers (positions > 1)",
                "outer is never slower by 10 % below": min(share for share, ratio in flips if ratio > 1.1),
                "dense is never slower by 10 % above": max(share for share, ratio in flips if ratio < 0.9),
            }
        )
    )
    count, cpu = 1 << 22, torch.device("cpu")
    ours = statistics.median(count / seconds(lambda: drop(gaussian(count, os_stream)), cpu) for _ in range(5))
    torch_rate = statistics.median(
        count / seconds(lambda: drop(torch.randn(count, dtype=torch.float64)), cpu) for _ in range(5)
    )
    print(json.dumps({"noise": "M Gaussians/s per core", "rate": ours / 1e6, "over torch.randn": ours / torch_rate}))
    started = time.process_time()
    record_noise.noise_multiplier(3.0, 1e-5, 0.01, 2000, slack=1e-3)
    print(json.dumps({"calibration": "epsilon 3, q 0.01, 2000 steps", "seconds": time.process_time() - started}))


if __name__ == "__main__":
    main()
