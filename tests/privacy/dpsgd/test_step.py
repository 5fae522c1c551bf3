"""The private step against loops written by hand. False-alarm rates: 1e-7 for each statistical test."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from choral.privacy import BudgetExceededError, Privacy, PrivacyError, UnsupportedModelError, unwrap
from choral.privacy.dpsgd import clipped_sum, private_optimizer
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.noise.gaussian import noise_grid, os_stream
from choral.privacy.per_sample.ghost_norms import Dense
from choral.privacy.per_sample.model import with_per_sample_gradients

ALARM = 1e-7


def silent(count: int) -> bytes:
    """A source whose Gaussians are (almost) zero: radius 0, so steps show the clipped sum alone."""
    return b"\xff" * count


def optimizer_of(
    model: nn.Module, clip: float, source: Any = silent, *, expected: int = 10, noise: float = 1.0, lr: float = 1.0
) -> tuple[Any, PrivateOptimizer]:
    private = with_per_sample_gradients(model)
    return private, PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=lr),
        private,
        noise_multiplier=noise,
        max_grad_norm=clip,
        expected_batch_size=expected,
        source=source,
    )


def gradient(model: Any, optimizer: PrivateOptimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.expect(len(x))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def by_hand(model: nn.Module, x: torch.Tensor, y: torch.Tensor, clip: float) -> torch.Tensor:
    """Sum of clipped gradients, one record at a time, float64."""
    model = model.double()
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for i in range(len(x)):
        parts = torch.autograd.grad(
            nn.functional.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1]), list(model.parameters())
        )
        g = torch.cat([p.reshape(-1) for p in parts])
        total += g * min(1.0, clip / float(g.norm()))
    return total


@pytest.mark.parametrize("clip", [0.05, 0.5, 1e3])
@pytest.mark.parametrize("drawn", [1, 3, 17])
def test_clipped_sum_equals_a_hand_loop(problem: Any, clip: float, drawn: int) -> None:
    x, y = problem.x[:drawn], problem.y[:drawn]
    got = gradient(*optimizer_of(problem.model(), clip, expected=7), x, y)
    want = by_hand(problem.model(), x, y, clip) / 7  # the expected size, whatever was drawn
    assert (got - want).norm() <= 3e-3 * want.norm() + 1e-3 * clip / 7


@pytest.mark.parametrize("clip", [0.01, 1.0])
def test_sensitivity_is_the_clipping_norm(problem: Any, clip: float) -> None:
    """Removing any one record moves the sum by at most C (and not by far less: the clip is not too tight)."""
    x, y = problem.x[:12].clone(), problem.y[:12]
    x[3] *= 1e4  # a record with an enormous gradient
    whole = gradient(*optimizer_of(problem.model(), clip, expected=1), x, y).double()
    moved = []
    for i in range(12):
        rest = [j for j in range(12) if j != i]
        part = gradient(*optimizer_of(problem.model(), clip, expected=1), x[rest], y[rest]).double()
        moved.append(float((whole - part).norm()))
    assert 0.99 * clip < max(moved) <= clip * (1 + 2**-9)


@pytest.mark.parametrize("columns", [1, 1000, 1024, 5000, 1 << 22])
def test_long_rows_are_clipped_to_the_clipping_norm(columns: int) -> None:
    """Float32 norms of long rows are too small: 0.2 % at 4 million equal columns, more than any margin."""
    _, optimizer = optimizer_of(nn.Linear(2, 1), clip=1.0)
    rows = torch.full((2, columns), 0.1 + 3.0 / math.sqrt(columns))
    (clip, _), _, _ = optimizer._clip_factors([Dense(rows[:, : columns // 3]), Dense(rows[:, columns // 3 :])])
    for i in range(2):
        assert 0.999 < float(clip[i]) * float(rows[i].double().norm()) <= 1.0


def test_noise_has_the_standard_deviation_that_is_accounted_for(problem: Any) -> None:
    model, optimizer = optimizer_of(problem.model(), clip=0.5, source=os_stream, noise=1.7, expected=4, lr=0.0)
    draws, before = [], torch.cat([p.reshape(-1) for p in model.parameters()])
    for _ in range(400):
        optimizer._release(
            clipped_sum.ClippedSum(optimizer.params, [torch.zeros(len(before), dtype=torch.float64)], 0.0)
        )
        draws.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy())
    x = np.concatenate(draws).astype(float)
    scale = 1.7 * 0.5 / 4
    count = len(x)
    # Within the 2^-10 that the grid adds, and never below.
    ratio = (count - 1) * x.var(ddof=1) / scale**2
    assert stats.chi2.cdf(ratio, count - 1) > ALARM
    assert stats.chi2.cdf(ratio / (1 + 2**-10) ** 2, count - 1) < 1 - ALARM
    assert stats.kstest(x / x.std(), "norm").pvalue > ALARM


def test_noise_of_pieces_is_fresh_and_sized_for_the_whole(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding may move all coordinates together: the noise of a piece pays for the grid of all of them."""
    whole, asked = sum(p.numel() for p in problem.model().parameters()), []
    honest = private_optimizer.grid_gaussian

    def noted(*given: Any) -> np.ndarray:
        asked.append((given[0], given[3], given[5]))
        return honest(*given)

    monkeypatch.setattr(private_optimizer, "grid_gaussian", noted)
    monkeypatch.setattr(clipped_sum, "_PIECE", 40)
    monkeypatch.setattr(private_optimizer, "_CACHED", 7)
    _, optimizer = optimizer_of(plain := problem.model(), clip=0.5, source=os_stream, expected=1)
    before = torch.cat([p.detach().reshape(-1) for p in plain.parameters()])
    optimizer.step_empty()
    assert [length for length, _, _ in asked] == [7] * 6 + [6] + [7] * 5
    assert {(grid, of) for _, grid, of in asked} == {(noise_grid(0.5, whole), whole)}
    made = before - torch.cat([p.detach().reshape(-1) for p in plain.parameters()])
    assert len(made.unique()) == whole


def test_an_empty_batch_steps_with_noise_alone(problem: Any) -> None:
    plain = problem.model()
    _, optimizer = optimizer_of(plain, clip=1.0, source=os_stream)
    before = [p.detach().clone() for p in plain.parameters()]
    optimizer.step_empty()
    assert all(not torch.equal(p, b) for p, b in zip(plain.parameters(), before, strict=True))
    assert all(p.grad is None for p in plain.parameters())


def test_one_step_for_each_batch(problem: Any) -> None:
    model, optimizer = optimizer_of(problem.model(), clip=1.0)
    gradient(model, optimizer, problem.x[:4], problem.y[:4])
    nn.functional.cross_entropy(model(problem.x[:4]), problem.y[:4]).backward()
    with pytest.raises(BudgetExceededError, match="without a fresh batch"):
        optimizer.step()


def test_raw_gradients_do_not_outlive_the_step(problem: Any) -> None:
    model, optimizer = optimizer_of(problem.model(), clip=1.0)
    gradient(model, optimizer, problem.x[:4], problem.y[:4])
    assert all(p.grad_sample is None and p.grad is not None for p in model.parameters())
    assert not model.uses
    assert not any(hasattr(m, "activations") for m in model._module.modules())


def test_a_first_batch_that_is_not_finite_does_not_pass_for_checked(problem: Any) -> None:
    model, optimizer = optimizer_of(problem.model(), clip=1.0)
    released = gradient(model, optimizer, problem.x[:4] * math.nan, problem.y[:4])
    assert not model.checked
    assert torch.equal(released, torch.zeros_like(released))


def test_raw_gradients_of_parameters_outside_the_optimizer_are_dropped(problem: Any) -> None:
    plain = problem.model()
    model = with_per_sample_gradients(plain)
    _, optimizer = optimizer_of(plain, clip=1.0)
    optimizer.original_optimizer.param_groups[0]["params"] = list(plain[2].parameters())
    gradient_of = nn.functional.cross_entropy
    optimizer.expect(4)
    gradient_of(model(problem.x[:4]), problem.y[:4]).backward()
    optimizer.step()
    assert plain[0].weight.grad is None
    assert plain[2].weight.grad is not None


def test_the_original_optimizer_cannot_step(problem: Any) -> None:
    plain = problem.model()
    original = torch.optim.SGD(plain.parameters(), lr=1.0)
    model, optimizer, loader = Privacy(epsilon=5.0, delta=1e-3).wrap(plain, original, problem.loader())
    before = [p.detach().clone() for p in plain.parameters()]
    x, y = next(iter(loader))
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(PrivacyError, match="original optimizer") as caught:
        original.step()
    assert "wrap()" in caught.value.hint
    assert all(torch.equal(p, b) for p, b in zip(plain.parameters(), before, strict=True))
    optimizer.step()
    with pytest.raises(PrivacyError, match="original optimizer"):
        original.step()
    unwrap(model)
    nn.functional.cross_entropy(plain(x), y).backward()
    assert plain[0].weight.grad is not None
    original.step()


def test_no_raw_gradient_is_left_for_another_optimizer(problem: Any) -> None:
    plain = problem.model()
    model, optimizer = optimizer_of(plain, clip=1.0)
    other = torch.optim.SGD(plain.parameters(), lr=1.0)
    before = [p.detach().clone() for p in plain.parameters()]
    for _ in range(2):  # the first step keeps autograd's gradients for its check: not there either
        optimizer.expect(4)
        nn.functional.cross_entropy(model(problem.x[:4]), problem.y[:4]).backward()
        assert all(p.grad is None for p in plain.parameters())
        other.step()
        assert all(torch.equal(p, b) for p, b in zip(plain.parameters(), before, strict=True))
        optimizer.original_optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        assert not model.averages


@pytest.mark.parametrize("when", ["frozen before the step", "frozen while wrapped"])
def test_freezing_does_not_let_a_raw_gradient_through(problem: Any, when: str) -> None:
    plain = problem.model()
    plain[0].requires_grad_(when == "frozen before the step")
    model, optimizer = optimizer_of(plain, clip=1.0)
    plain[0].requires_grad_(True)
    before = plain[0].weight.detach().clone()
    optimizer.expect(4)
    nn.functional.cross_entropy(model(problem.x[:4]), problem.y[:4]).backward()
    assert plain[0].weight.grad is None
    plain[0].requires_grad_(False)
    optimizer.step()
    assert torch.equal(plain[0].weight, before)


def test_what_was_not_released_is_not_applied(problem: Any) -> None:
    """A parameter of the optimizer that is neither trained nor the model's, with a gradient from elsewhere."""
    model, optimizer = optimizer_of(problem.model(), clip=1.0)
    foreign = nn.Parameter(torch.zeros(3), requires_grad=False)
    optimizer.original_optimizer.add_param_group({"params": [foreign]})
    optimizer.expect(4)
    nn.functional.cross_entropy(model(problem.x[:4]), problem.y[:4]).backward()
    foreign.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(foreign, torch.zeros(3))


def test_closure_is_refused(problem: Any) -> None:
    _, optimizer = optimizer_of(problem.model(), clip=1.0)
    optimizer.expect(1)
    with pytest.raises(PrivacyError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_gradient_accumulation_is_refused(problem: Any) -> None:
    model, optimizer = optimizer_of(problem.model(), clip=1.0)
    optimizer.expect(4)
    for _ in range(2):
        nn.functional.cross_entropy(model(problem.x[:4]), problem.y[:4]).backward()
    with pytest.raises(PrivacyError, match="two backward passes"):
        optimizer.step()


def test_dropped_or_repeated_records_are_refused(problem: Any) -> None:
    for rows in ([0, 1, 2], [0, 1, 2, 3, 0]):
        model, optimizer = optimizer_of(problem.model(), clip=1.0)
        optimizer.expect(4)
        nn.functional.cross_entropy(model(problem.x[rows]), problem.y[rows]).backward()
        with pytest.raises(UnsupportedModelError, match=f"{len(rows)} samples, but 4 records"):
            optimizer.step()


def test_evaluation_between_forward_and_step_leaves_no_trace(problem: Any) -> None:
    """A forward pass in train mode without backward must not disturb the next batch's gradients."""
    model, optimizer = optimizer_of(problem.model(), clip=1.0, lr=0.0)
    clean = gradient(model, optimizer, problem.x[:4], problem.y[:4])
    model(problem.x[50:90])
    again = gradient(model, optimizer, problem.x[:4], problem.y[:4])
    assert torch.equal(clean, again)


def test_adam_momentum_schedulers_and_state_are_the_users(problem: Any, loop: Callable[..., int]) -> None:
    plain = problem.model()
    adam = torch.optim.Adam(plain.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(adam, 1, gamma=0.5)
    model, optimizer, loader = Privacy(epsilon=5.0, delta=1e-3).wrap(plain, adam, problem.loader())
    assert optimizer.param_groups is adam.param_groups
    loop(model, optimizer, loader)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.005
    later = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.original_optimizer._opt_called = True
    assert later.get_last_lr() == [0.005]
    state = optimizer.state_dict()
    assert state["state"][0]["step"] == len(loader)
    optimizer.load_state_dict(state)
