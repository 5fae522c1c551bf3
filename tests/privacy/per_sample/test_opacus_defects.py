"""What Opacus 1.6.0 gets wrong in record-level DP-SGD, each set right or refused; one test per defect.

Those that are not here are tested where the code is:

- samplers and batch samplers of any class, workers, collate functions: test_loader.test_refused and its neighbours;
- drop_last, steps per epoch, a dataset smaller than a batch: test_engine.test_rate_and_steps, test_batches_of_more_...;
- adaptive clipping: an empty batch (test_clipping.test_adaptive_clipping_survives_empty_batches), counts over virtual
  batches (test_adaptive_counts_are_kept_over_chunks), what it costs (test_adaptive_clipping_costs_what_flat_does and,
  of the noise itself, test_adaptive_sum_and_count_are_one_vector_no_longer_than_one);
- position embeddings: test_positions; tied weights: test_models.test_tied_weights_...; LSTM, nn.MultiheadAttention:
  test_layers; BatchNorm, in eval mode too: test_models.test_batchnorm_is_refused_even_in_eval_or_without_weights;
- copies that train the original: test_models.test_copy_whose_forward_trains_the_original_is_refused.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

from choral.privacy import AdaptiveClip, Ledger, Privacy, PrivacyEngine, UnsupportedLoaderError, UnsupportedModelError
from choral.privacy.accounting import record_level, record_noise
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.dpsgd.clipped_sum import ClippedSum
from choral.privacy.per_sample.model import with_per_sample_gradients

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
    engine = PrivacyEngine(PRIVACY, holder="a", ledger=Ledger(), passes=1)
    assert engine.spent().epsilon == 0.0


def test_steps_are_counted_and_not_phases(problem: Any, loop: Callable[..., int]) -> None:
    """Opacus: len(accountant) counts runs of equal settings."""
    engine = PrivacyEngine(PRIVACY, holder="a", ledger=Ledger(), passes=2)
    model = problem.model()
    for _ in range(2):
        loop(*engine.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader()))
    assert engine.spent().steps == 20


def test_the_count_of_adaptive_clipping_is_accounted_for(problem: Any) -> None:
    """Opacus before 1.6 charged for the vector's noise alone: 2.70 for 7.06 at z = 1, sigma_u = 0.6, q = 0.1, T = 100.

    Our ledger is charged for z, the noise that vector and count have together; `share` is z^2 / (2 sigma_u)^2.
    """
    share = 1.0 / (2 * 0.6) ** 2
    privacy = Privacy(epsilon=3.0, delta=1e-3, max_grad_norm=AdaptiveClip(share=share))
    ledger, model = Ledger(), problem.model()
    wrapped = PrivacyEngine(privacy, holder="a", ledger=ledger, passes=1).wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader()
    )
    next(iter(wrapped[2]))
    charged = ledger.events[0].noise_multiplier
    released = []
    for _ in range(10):
        wrapped[1].max_grad_norm = 1.0
        wrapped[1]._release(ClippedSum(list(model.parameters()), [torch.zeros(83, dtype=torch.float64)], 0.0))
        released += [p.grad.reshape(-1) * wrapped[1].expected_batch_size for p in model.parameters()]
    noise = float(torch.cat(released).std())
    assert noise == pytest.approx(charged / math.sqrt(1 - share), rel=0.15)  # false alarms: 1e-9; without, 0.45 off
    spent = {z: record_level.epsilon([event(z)], 1e-5) for z in (1.0, 1.0 / math.sqrt(1 - share))}
    assert list(spent.values()) == pytest.approx([7.05, 2.70], abs=0.02)


def event(z: float) -> PoissonSampledGaussian:
    return PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=z, steps=100)


def test_several_processes_on_one_dataset_are_refused(tmp_path: Path) -> None:
    """Opacus: equal seeds of ranks correlate their samples, and an empty batch of one rank leaves the others waiting.

    Two real processes; each may still keep a promise for data of its own, as parties of a federation do.
    """
    code = f"""
import sys, torch
from torch import distributed
from torch.utils.data import DataLoader, TensorDataset
from choral.privacy import PrivacyEngine, Ledger, Privacy, PrivacyError
loader = DataLoader(TensorDataset(torch.randn(40, 6), torch.zeros(40)), batch_size=10)
model = torch.nn.Linear(6, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
privacy = Privacy(epsilon=3.0, delta=1e-3)
distributed.init_process_group(
    "gloo", init_method="file://{tmp_path}/meet", rank=int(sys.argv[1]), world_size=int(sys.argv[2]))
try:
    privacy.wrap(model, optimizer, loader)
    print("wrapped")
except PrivacyError as error:
    print(error)
    PrivacyEngine(privacy, holder=f"party {{sys.argv[1]}}", ledger=Ledger(), passes=1).wrap(model, optimizer, loader)
    print("its own data")
"""
    for size, said in ((1, ["wrapped"]), (2, ["torch.distributed runs 2 processes", "its own data"])):
        ranks = [
            warm_python.start(["-c", code, str(rank), str(size)], stdout=subprocess.PIPE, text=True)
            for rank in range(size)
        ]
        for heard in [rank.communicate(timeout=120)[0] for rank in ranks]:
            assert all(words in heard for words in said), heard
        (tmp_path / "meet").unlink(missing_ok=True)


def test_epsilon_is_of_the_life_of_the_data_not_of_a_round(problem: Any, loop: Callable[..., int]) -> None:
    ledger, model = Ledger(), problem.model()
    generous = Privacy(epsilon=30.0, delta=1e-3)
    costs = []
    for _ in range(3):  # a worker that starts afresh each round, with the same data
        engine = PrivacyEngine(generous, holder="a", ledger=ledger, passes=3 - len(costs))
        loop(*engine.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader()))
        costs.append(engine.spent().epsilon)
    assert costs == sorted(costs)
    assert costs[-1] == record_level.epsilon(ledger.events, 1e-3) > 1.5 * costs[0]


def test_groups_of_one_value_do_not_erase_features() -> None:
    private = with_per_sample_gradients(nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(4, 4)))
    with pytest.raises(UnsupportedModelError, match="layer 1 normalises groups of one value"):
        private(torch.randn(3, 6))


def test_full_batches_are_not_charged_as_poisson_samples(make_problem: Any) -> None:
    """All records in every step: no amplification, and the noise of the plain Gaussian mechanism."""
    problem = make_problem(n=50, batch_size=50)
    _, optimizer, loader = problem.wrapped(Privacy(epsilon=3.0, delta=1e-3), passes=10)
    assert optimizer.noise_multiplier == pytest.approx(record_noise.noise_multiplier(3.0, 1e-3, 1.0, 10), rel=2e-3)
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
