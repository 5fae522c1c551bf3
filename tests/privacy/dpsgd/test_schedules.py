"""Learning-rate schedulers on either optimizer, and mixed precision; warnings are errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from choral.privacy import Privacy, PrivacyError
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.per_sample import ghost_norms, layer_gradients
from choral.privacy.per_sample.model import with_per_sample_gradients

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=40),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("to", ["original before", "original after", "private"])
@pytest.mark.parametrize(("name", "chunks"), [*((name, 7) for name in SCHEDULERS), ("StepLR", None)])
def test_schedulers_set_the_users_learning_rate(problem: Any, name: str, to: str, chunks: int | None) -> None:
    make = SCHEDULERS[name]
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    reference, wanted = make(plain), []
    model = problem.model()
    original = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = make(original) if to == "original before" else None
    privacy = Privacy(epsilon=5.0, delta=1e-3, max_physical_batch_size=chunks)
    private, optimizer, loader = privacy.wrap(model, original, problem.loader())
    scheduler = scheduler or make(original if to == "original after" else optimizer)
    arguments = (1.0,) if name == "ReduceLROnPlateau" else ()  # a metric of public data
    rates = []
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(private(x), y).backward()
        optimizer.step()
        if optimizer.stepped:
            rates.append(original.param_groups[0]["lr"])
            scheduler.step(*arguments)
            wanted.append(plain.param_groups[0]["lr"])
            plain.step()
            reference.step(*arguments)
    assert rates == wanted
    assert len(rates) == 10
    assert len(set(rates)) > 1


def test_a_scheduler_steps_after_a_pass_of_empty_batches(make_problem: Any) -> None:
    _, optimizer, _ = make_problem(n=200).wrapped()
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step_empty()
    scheduler.step()  # torch would warn that no optimizer.step() came before
    assert optimizer.param_groups[0]["lr"] == 0.05


def prelu_mixes_types() -> bool:
    """Old torch cannot: there such a layer is refused under autocast, by name."""
    try:
        nn.functional.prelu(torch.zeros(2, 1, dtype=torch.bfloat16), torch.zeros(1))
    except RuntimeError:
        return False
    return True


class Sequence(nn.Module):
    """Linear, convolution, embedding and normalising layers: each way of making per-sample gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.norm, self.wide = nn.LayerNorm(8), nn.Linear(8, 16)
        self.slope = nn.PReLU(1) if prelu_mixes_types() else nn.ReLU()
        self.head = nn.Linear(16, 3)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.mix(self.embed(t).mT).mT)
        return self.head(self.slope(self.wide(x)).mean(1))


@pytest.mark.parametrize("backward_inside", [False, True])
def test_bfloat16_autocast_trains_and_is_clipped(backward_inside: bool) -> None:
    """The release moves by at most C with a record, and is the sum of the clipped gradients, up to bfloat16."""
    torch.manual_seed(0)
    model = Sequence()
    x, y = torch.randint(11, (9, 12)), torch.randint(3, (9,))
    clip = 0.3

    def released(rows: int, scale: float = 1.0) -> torch.Tensor:
        private = with_per_sample_gradients(copy.deepcopy(model))
        optimizer = PrivateOptimizer(
            torch.optim.SGD(private.parameters(), lr=0.0),
            private,
            noise_multiplier=1.0,
            max_grad_norm=clip,
            expected_batch_size=1,
            source=lambda count: b"\xff" * count,
        )
        for number in range(2):  # the first is checked, without autocast, and must be left before backward()
            inside = backward_inside and number == 1
            optimizer.expect(rows)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = private(x[:rows])
                loss = scale * nn.functional.cross_entropy(output.float(), y[:rows])
                if inside:
                    loss.backward()
                    optimizer.step()
            if not inside:
                loss.backward()
                optimizer.step()
        assert output.dtype is torch.bfloat16
        return torch.cat([p.grad.double().reshape(-1) for p in private.parameters()])

    wide = copy.deepcopy(model).double()
    want = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for i in range(9):
        rows = torch.autograd.grad(
            nn.functional.cross_entropy(wide(x[i : i + 1]), y[i : i + 1]), list(wide.parameters())
        )
        g = torch.cat([r.reshape(-1) for r in rows])
        want += g * min(1.0, clip / float(g.norm()))
    assert (released(9) - want).norm() < 0.05 * want.norm()
    for scale in (1.0, 1e3):
        moved = (released(9, scale) - released(8, scale)).norm()
        assert float(moved) <= clip * (1 + 2**-9)
    assert float(moved) > 0.95 * clip  # at the bound, where norms rounded to bfloat16 would be 2^-9 off
    sums = released(1, 1e3).norm()
    assert 0.999 * clip < float(sums) <= clip * (1 + 2**-10)


def longest_released(layer: nn.Module, x: torch.Tensor, clip: float, *, step_inside: bool) -> float:
    """The longest that a single record's release gets, backward() under autocast, without noise."""
    longest = 0.0
    for row in x:
        private = with_per_sample_gradients(nn.Sequential(copy.deepcopy(layer)))
        optimizer = PrivateOptimizer(
            torch.optim.SGD(private.parameters(), lr=0.0),
            private,
            noise_multiplier=1.0,
            max_grad_norm=clip,
            expected_batch_size=1,
            source=lambda count: b"\xff" * count,
        )
        for number in range(2):  # the first is checked
            optimizer.expect(1)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=number == 1):
                private(row[None]).float().square().sum().backward()
                if step_inside:
                    optimizer.step()
            if not step_inside:
                optimizer.step()
        longest = max(longest, math.hypot(*(float(p.grad.double().norm()) for p in private.parameters())))
    return longest


def test_norms_of_products_are_not_rounded_by_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many positions whose inputs all round down to 1 in bfloat16: products made so have norms 0.4 % too small."""
    monkeypatch.setattr(ghost_norms, "_SMALL", 0)
    torch.manual_seed(0)
    x = torch.full((1, 16, 64), 1.0 + 2.0**-8 - 2.0**-15)
    layer = nn.Linear(64, 64, bias=False)
    assert type(layer_gradients.per_sample(layer, x, torch.randn(1, 16, 64))["weight"]) is ghost_norms.Outer
    assert 0.999 < longest_released(layer, x, 1.0, step_inside=True) <= 1.0 + 2.0**-10


def test_gradients_are_not_rounded_by_autocast() -> None:
    """A rule that makes bfloat16 gradients makes bfloat16 norms, up to 0.2 % too small for some record."""
    torch.manual_seed(0)
    longest = longest_released(nn.Conv1d(8, 8, 3), torch.randn(20, 8, 12), 1.0, step_inside=False)
    assert 0.999 < longest <= 1.0 + 2.0**-10


def test_loss_scaling_is_refused(problem: Any) -> None:
    """A scaler leaves out steps by what the data's gradients are, and would find none in p.grad."""
    private, optimizer, loader = problem.wrapped()
    scaler = torch.amp.GradScaler("cpu")
    x, y = next(iter(loader))
    scaler.scale(nn.functional.cross_entropy(private(x), y)).backward()
    with pytest.raises(PrivacyError, match="GradScaler") as caught:
        scaler.step(optimizer)
    assert "bfloat16" in caught.value.hint
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    disabled.step(optimizer)
    assert optimizer.stepped
