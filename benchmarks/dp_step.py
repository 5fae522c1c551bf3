"""What the private step costs: time over a plain step and over Opacus' own, and the noise generator's rate.

    python benchmarks/dp_step.py [--device cpu|cuda] [--repeats 30]

Same model, same records, same optimizer; medians of interleaved repeats in one run. Opacus runs without its
secure mode (which needs a package that no longer exists), so its noise is the cheap, replayable kind.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from choral.privacy import accounting
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
    plain, theirs, ours = (make().to(x.device) for _ in range(3))
    sgd = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (plain, theirs, ours)]
    wrapped = with_per_sample_gradients(ours)
    private = PrivateOptimizer(sgd[2], wrapped, source=os_stream, **settings)
    return {
        "plain": step(plain, sgd[0], lambda: None),
        "opacus": step(GradSampleModule(theirs), DPOptimizer(sgd[1], **settings), lambda: None),
        "choral": step(wrapped, private, lambda: private.expect(len(x))),
    }


def seconds(run: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def drop(_: object) -> None:
    """Let a result go."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=30)
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
            f"opacus / plain {middle['opacus'] / middle['plain']:.2f}, choral / opacus "
            f"{middle['choral'] / middle['opacus']:.2f}"
        )
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
