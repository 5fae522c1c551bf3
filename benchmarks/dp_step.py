"""What the private step costs: time and memory beside a plain step and Opacus' own two, and the generator's rate.

    python benchmarks/dp_step.py [--device cpu|cuda] [--repeats 30]

Same model, same records, same optimizer; medians of interleaved repeats in one run. Memory is the peak of three steps
above what the process had before the first, model and data made, each kind in a process of its own (on the CPU resident
memory, on a GPU what torch allocated). The last lines show where written-down gradients and kept factors cross, which
`ghost._cheaper` chooses between. Opacus runs without its
secure mode (which needs a package that no longer exists), so its noise is the cheap, replayable kind.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from choral.privacy import accounting, ghost
from choral.privacy.model import with_per_sample_gradients
from choral.privacy.noise import gaussian, os_stream
from choral.privacy.step import PrivateOptimizer


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
        return self.head(x.mean(1))


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


def steps(make: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], None]]:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, before: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            before()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        return run

    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": len(x)}
    plain, theirs, ours, ghosts = (make().to(x.device) for _ in range(4))
    sgd = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (plain, theirs, ours, ghosts)]
    wrapped = with_per_sample_gradients(ours)
    private = PrivateOptimizer(sgd[2], wrapped, source=os_stream, **settings)
    ghost_model = GradSampleModuleFastGradientClipping(ghosts, max_grad_norm=1.0, use_ghost_clipping=True)
    ghost_optimizer = DPOptimizerFastGradientClipping(sgd[3], **settings)
    criterion = DPLossFastGradientClipping(ghost_model, ghost_optimizer, nn.CrossEntropyLoss())

    def ghost_step() -> None:
        ghost_optimizer.zero_grad()
        criterion(ghost_model(x), y).backward()
        ghost_optimizer.step()

    return {
        "plain": step(plain, sgd[0], lambda: None),
        "opacus": step(GradSampleModule(theirs), DPOptimizer(sgd[1], **settings), lambda: None),
        "opacus ghost": ghost_step,
        "choral": step(wrapped, private, lambda: private.expect(len(x))),
    }


def seconds(run: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def memory(case: str, kind: str, device: str) -> float:
    command = [sys.executable, __file__, "--device", device, "--memory", case, kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def drop(_: object) -> None:
    """Let a result go."""


def peak_mib(run: Callable[[], None], device: torch.device) -> float:
    """Of three steps, above what there was before, in MiB; for a process that does nothing else."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for _ in range(3):
        run()
    cuda = device.type == "cuda"
    after = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (after - before) / 2**20


def crossing(device: torch.device) -> None:
    """Square linear layers, 64 records: seconds for norms and sum, and numbers kept, written down or as factors."""
    weights = torch.ones(64, dtype=torch.float64, device=device)
    for width, positions in ((128, 16), (256, 16), (256, 64), (512, 16), (512, 64), (512, 256), (1024, 16)):
        a, g = (torch.randn(64, positions, width, device=device) for _ in range(2))
        outer = ghost.Outer(lambda part, a=a, g=g: (a[part], g[part]), 64, (positions, width, width))

        def both(make: Callable[[], ghost.PerSample]) -> float:
            def run() -> None:
                gradients = make()
                gradients.norms()
                gradients.weighted_sum(weights)

            return statistics.median(seconds(run, device) for _ in range(5))

        dense = both(lambda outer=outer: ghost.Dense(outer.dense()))
        factors = both(lambda outer=outer: outer)
        chosen = type(ghost._cheaper(outer)).__name__
        print(
            f"{width} x {width}, {positions} positions: factors / written down {factors / dense:.2f} in time, "
            f"{2 * positions / width:.3f} in memory ({64 * width * width / 2**18:.0f} MiB written down); takes {chosen}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "KIND"), help="print one kind's peak memory and stop")
    wanted = parser.parse_args()
    device = torch.device(wanted.device)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook")  # Opacus' hooks; ours do not warn
    cases = {
        "cnn, 26k parameters, batch 256": (cnn, torch.randn(256, 1, 28, 28), torch.randint(10, (256,))),
        "transformer layer, 55k parameters, batch 64 x 64 tokens": (
            Block,
            torch.randint(65, (64, 64)),
            torch.randint(10, (64,)),
        ),
        "linear on digits, 650 parameters, batch 64": (
            lambda: nn.Linear(64, 10),
            torch.randn(64, 64),
            torch.randint(10, (64,)),
        ),
    }
    if wanted.memory:
        make, x, y = cases[wanted.memory[0]]
        print(peak_mib(steps(make, x.to(device), y.to(device))[wanted.memory[1]], device))
        return
    for name, (make, x, y) in cases.items():
        runs = steps(make, x.to(device), y.to(device))
        times: dict[str, list[float]] = {kind: [] for kind in runs}
        for repeat in range(wanted.repeats + 3):
            for kind, run in runs.items():
                taken = seconds(run, device)
                if repeat >= 3:
                    times[kind].append(taken)
        middle = {kind: statistics.median(values) for kind, values in times.items()}
        print(
            f"{name}: plain {1e3 * middle['plain']:.2f} ms; choral / plain {middle['choral'] / middle['plain']:.2f}, "
            f"opacus / plain {middle['opacus'] / middle['plain']:.2f}, opacus ghost / plain "
            f"{middle['opacus ghost'] / middle['plain']:.2f}, choral / opacus {middle['choral'] / middle['opacus']:.2f}"
        )
        peaks = {kind: memory(name, kind, wanted.device) for kind in runs}
        print("    peak memory, MiB: " + ", ".join(f"{kind} {peak:.0f}" for kind, peak in peaks.items()))
    crossing(device)
    count, cpu = 1 << 22, torch.device("cpu")
    ours = statistics.median(count / seconds(lambda: drop(gaussian(count, os_stream)), cpu) for _ in range(5))
    torch_rate = statistics.median(
        count / seconds(lambda: drop(torch.randn(count, dtype=torch.float64)), cpu) for _ in range(5)
    )
    print(
        f"noise: {ours / 1e6:.1f} M Gaussians/s on one core, {ours / torch_rate:.2f} x torch.randn "
        "(float64, replayable)"
    )
    started = time.perf_counter()
    accounting.noise_multiplier(3.0, 1e-5, 0.01, 2000, slack=1e-3)
    print(f"calibration (epsilon 3, q 0.01, 2000 steps): {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
