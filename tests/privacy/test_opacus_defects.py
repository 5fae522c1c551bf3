"""What Opacus 1.6.0 gets wrong in record-level DP-SGD, each set right or refused; one test per defect.

Covered where the code is: the position embedding, tied weights, BatchNorm in eval mode and copies in test_models,
steps per epoch and small datasets in test_guard, workers and collate functions in test_loader.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

from choral.privacy import Guard, Ledger, Privacy, UnsupportedLoaderError, UnsupportedModelError, accounting
from choral.privacy.model import with_per_sample_gradients

PRIVACY = Privacy(epsilon=3.0, delta=1e-3)


def test_sample_rate_is_not_one_over_the_number_of_batches(make_problem: Any) -> None:
    _, optimizer, loader = make_problem(n=101, batch_size=100).wrapped()
    assert float(loader.batch_sampler.sampler.rate) == 100 / 101  # Opacus: 1/2
    assert optimizer.expected_batch_size == 100  # Opacus: 50


def test_weighted_sampler_is_not_silently_discarded(problem: Any) -> None:
    sampler = WeightedRandomSampler([1.0] * 200, num_samples=128)
    with pytest.raises(UnsupportedLoaderError, match="WeightedRandomSampler"):
        problem.wrapped(sampler=sampler, shuffle=False)


def test_a_pass_has_as_many_steps_as_the_users_loader(make_problem: Any) -> None:
    problem = make_problem(n=930, batch_size=10)
    assert len(problem.wrapped()[2]) == len(problem.loader()) == 93  # Opacus: 92


def test_empty_batches_step(make_problem: Any, loop: Callable[..., int]) -> None:
    """One record expected per batch: a third of the batches are empty, and each is a step of noise all the same."""
    problem = make_problem(n=300, batch_size=1)
    model = problem.model()
    steps = []
    private, optimizer, loader = problem.wrapped(Privacy(epsilon=3.0, delta=1e-3), model)
    inner = optimizer.original_optimizer
    inner.step, step = lambda: (steps.append(1), step())[1], inner.step
    shown = loop(private, optimizer, loader)
    assert len(steps) == len(loader) == 300
    assert 130 < shown < 250  # 300 (1 - 1/e) = 190; outside with probability < 1e-8


def test_the_divisor_is_the_expected_batch_size(problem: Any) -> None:
    """Dividing by the realised size would tell it, and would double the sensitivity."""
    private, optimizer, _ = problem.wrapped()
    optimizer._source = lambda count: b"\xff" * count  # noise 0
    gradients = []
    for rows in ([0], [0, 0, 0]):
        optimizer.expect(len(rows))
        nn.functional.cross_entropy(private(problem.x[rows]), problem.y[rows]).backward()
        optimizer.original_optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in private.parameters()]))
    torch.testing.assert_close(gradients[1], 3 * gradients[0], rtol=1e-2, atol=1e-3)


def test_noise_does_not_replay_from_the_seed(problem: Any) -> None:
    def released() -> torch.Tensor:
        torch.manual_seed(7)
        private, optimizer, _ = problem.wrapped()
        optimizer.step_empty()
        return torch.cat([p.detach().reshape(-1) for p in private.parameters()])

    assert not torch.equal(released(), released())


def test_spending_is_known_before_the_first_step(problem: Any) -> None:
    guard = Guard(PRIVACY, holder="a", ledger=Ledger(), passes=1)
    assert guard.spent().epsilon == 0.0


def test_epsilon_is_of_the_life_of_the_data_not_of_a_round(problem: Any, loop: Callable[..., int]) -> None:
    ledger, model = Ledger(), problem.model()
    generous = Privacy(epsilon=30.0, delta=1e-3)
    costs = []
    for _ in range(3):  # a worker that starts afresh each round, with the same data
        guard = Guard(generous, holder="a", ledger=ledger, passes=3 - len(costs))
        loop(*guard.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader()))
        costs.append(guard.spent().epsilon)
    assert costs == sorted(costs)
    assert costs[-1] == accounting.epsilon(ledger.events, 1e-3) > 1.5 * costs[0]


def test_groups_of_one_value_do_not_erase_features() -> None:
    private = with_per_sample_gradients(nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(4, 4)))
    with pytest.raises(UnsupportedModelError, match="layer 1 normalises groups of one value"):
        private(torch.randn(3, 6))


def test_full_batches_are_not_charged_as_poisson_samples(make_problem: Any) -> None:
    """All records in every step: no amplification, and the noise of the plain Gaussian mechanism."""
    problem = make_problem(n=50, batch_size=50)
    _, optimizer, loader = problem.wrapped(Privacy(epsilon=3.0, delta=1e-3), passes=10)
    assert optimizer.noise_multiplier == pytest.approx(accounting.noise_multiplier(3.0, 1e-3, 1.0, 10), rel=2e-3)
    assert len(next(iter(loader))[0]) == 50
    assert len(loader) == 1


def test_no_warning_and_inplace_activations(problem: Any, loop: Callable[..., int]) -> None:
    """Opacus' backward hooks warn at every step and forbid in-place layers; warnings are errors in these tests."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    loop(*problem.wrapped(model=model))


def test_a_user_loader_is_left_as_it_was(problem: Any) -> None:
    loader = problem.loader()
    model = problem.model()
    PRIVACY.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    assert isinstance(loader, DataLoader)
    assert sum(len(x) for x, _ in loader) == 200
