"""Epsilon and calibration against goldens, closed forms, quadrature and dp-accounting."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from choral.errors import ConfigError
from choral.privacy import accounting, pld
from choral.privacy.errors import AccountingError, BudgetExceededError
from choral.privacy.events import PoissonSampledGaussian

DELTA = 1e-5


def event(rate: float, noise: float, steps: int = 1) -> PoissonSampledGaussian:
    return PoissonSampledGaussian(sample_rate=rate, noise_multiplier=noise, steps=steps)


# Recomputed with dp-accounting 0.6.0 at grid 1e-4; RDP with its default orders.
GOLDENS = [
    (0.01, 4.0, 10_000, "0.9470", "1.0355"),
    (0.01, 1.0, 1000, "1.8282", "2.1014"),
    (256 / 60_000, 1.1, 14_062, "2.3817", "2.5966"),
    (0.1, 1.0, 100, "7.0466", "7.9039"),
    (1.0, 10.0, 100, "4.3772", "4.7285"),
]


@pytest.mark.parametrize(("rate", "noise", "steps", "by_pld", "by_rdp"), GOLDENS)
def test_goldens(rate: float, noise: float, steps: int, by_pld: str, by_rdp: str) -> None:
    assert f"{pld.epsilon([(rate, noise, steps)], DELTA, 1e-4):.4f}" == by_pld
    assert f"{accounting.epsilon_rdp([event(rate, noise, steps)], DELTA):.4f}" == by_rdp
    assert f"{accounting.epsilon([event(rate, noise, steps)], DELTA):.4f}" == by_pld


def test_goldens_of_one_gaussian() -> None:
    assert f"{accounting.epsilon([event(1.0, 1.0)], DELTA):.6f}" == "4.377178"
    assert accounting.noise_multiplier(1.0, DELTA, 1.0, 1) == pytest.approx(3.730632, rel=1e-5)


def test_golden_of_calibration() -> None:
    assert f"{accounting.noise_multiplier(1.0, DELTA, 0.1, 100):.4f}" == "3.9417"


@pytest.mark.parametrize(("rate", "noise"), [(1.0, 0.8), (1.0, 3.0), (0.3, 1.0), (0.05, 0.7), (0.9, 2.0)])
def test_one_step_against_quadrature(rate: float, noise: float) -> None:
    """Sum (p - e^eps q)+ over a fine grid for both neighbours; no formula in common with the code."""
    x, h = np.linspace(-12 * noise, 12 * noise + 1, 1_000_001, retstep=True)
    q = norm.pdf(x, 0, noise)
    p = (1 - rate) * q + rate * norm.pdf(x, 1, noise)

    def delta_of(eps: float) -> float:
        return float(h * max(np.maximum(p - math.exp(eps) * q, 0).sum(), np.maximum(q - math.exp(eps) * p, 0).sum()))

    exact = brentq(lambda eps: math.log(max(delta_of(eps), 1e-300) / DELTA), 1e-3, 30.0, xtol=1e-6)
    ours = accounting.epsilon([event(rate, noise)], DELTA)
    assert exact - 1e-5 <= ours <= exact * (1 + 1e-4)


def test_composition_against_direct_convolution() -> None:
    """Two different mechanisms, composed by np.convolve of dp-accounting's distributions, no FFT of ours."""
    grid = 1e-3
    first = privacy_loss_distribution.from_gaussian_mechanism(
        2.0, sampling_prob=0.2, value_discretization_interval=grid
    )
    second = privacy_loss_distribution.from_gaussian_mechanism(
        1.5, sampling_prob=0.1, value_discretization_interval=grid
    )
    oracle = first.self_compose(20).compose(second.self_compose(30)).get_epsilon_for_delta(DELTA)
    assert pld.epsilon([(0.2, 2.0, 20), (0.1, 1.5, 30)], DELTA, grid) == pytest.approx(oracle, rel=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    rate=st.floats(0.002, 1.0),
    noise=st.floats(0.7, 20.0),
    steps=st.integers(1, 1000),
    delta=st.sampled_from([1e-3, 1e-5, 1e-8]),
)
def test_agrees_with_dp_accounting(rate: float, noise: float, steps: int, delta: float) -> None:
    oracle = privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=1e-2
    )
    expected = oracle.self_compose(steps).get_epsilon_for_delta(delta)
    ours = pld.epsilon([(rate, noise, steps)], delta, 1e-2)
    assert ours == pytest.approx(expected, rel=2e-5, abs=1e-6) if expected < 500 else ours > 490


def test_hopeless_noise_has_a_large_epsilon_not_an_error() -> None:
    assert 1000 < pld.epsilon([(0.640625, 0.5, 1174)], DELTA, 1e-2) < 2000
    assert pld.epsilon([(1.0, 0.01, 1)], DELTA, 1e-2) > 5000


def test_finer_grids_only_tighten() -> None:
    values = [pld.epsilon([(0.05, 1.2, 300)], DELTA, grid) for grid in (1e-1, 1e-2, 1e-3, 1e-4)]
    assert values == sorted(values, reverse=True)


def test_large_epsilons_agree_with_dp_accounting() -> None:
    for noise, steps in ((0.15, 50), (0.12, 50), (0.11, 50)):
        oracle = privacy_loss_distribution.from_gaussian_mechanism(
            noise, sampling_prob=0.1, value_discretization_interval=1e-2
        )
        expected = oracle.self_compose(steps).get_epsilon_for_delta(DELTA)
        assert 300 < expected < 700
        assert pld.epsilon([(0.1, noise, steps)], DELTA, 1e-2) == pytest.approx(expected, rel=1e-4)
    noise = accounting.noise_multiplier(600.0, DELTA, 0.1, 50)
    assert 599.9 < accounting.epsilon([event(0.1, noise, 50)], DELTA) <= 600.0


def test_tiny_epsilons_are_no_disagreement() -> None:
    """RDP says 0 and PLD, on its grid, a little more: both are right to within rounding."""
    tiny = [event(7.86e-6, 116.0, 29)]
    assert accounting.epsilon_rdp(tiny, 4.2e-7) == 0.0
    assert 0.0 <= accounting.epsilon(tiny, 4.2e-7) < 1e-4
    accounting._agree(((7.86e-6, 116.0, 29),), 4.2e-7)


def test_rdp_is_never_below_pld() -> None:
    for rate, noise, steps, _, _ in GOLDENS:
        one = [event(rate, noise, steps)]
        assert accounting.epsilon_rdp(one, DELTA) >= accounting.epsilon(one, DELTA)


def test_disagreement_of_the_accountants_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pld.epsilon
    monkeypatch.setattr(accounting.pld, "epsilon", lambda *a: 1.5 * real(*a))
    with pytest.raises(AccountingError, match="RDP"):
        accounting.epsilon([event(0.0311, 1.234, 777)], DELTA)


def test_calibration_compares_with_dp_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pld.epsilon
    monkeypatch.setattr(accounting.pld, "epsilon", lambda *a: 0.9 * real(*a))  # too low: RDP cannot see it
    with pytest.raises(AccountingError, match="same privacy loss distribution"):
        accounting.noise_multiplier(2.345, DELTA, 0.0312, 321)


@pytest.mark.parametrize("target", [0.1, 1.0, 3.0, 8.0, 30.0])
@pytest.mark.parametrize(("rate", "steps"), [(1.0, 40), (0.3, 100), (0.01, 2000), (0.5, 1)])
def test_calibration_spends_all_and_no_more(target: float, rate: float, steps: int) -> None:
    noise = accounting.noise_multiplier(target, DELTA, rate, steps)
    cost = accounting.epsilon([event(rate, noise, steps)], DELTA)
    assert target * (1 - 1e-4) <= cost <= target


def test_calibration_reckons_with_what_was_spent() -> None:
    spent = [event(0.1, 2.5, 100)]
    noise = accounting.noise_multiplier(3.0, DELTA, 0.1, 100, spent)
    assert 2.99 < accounting.epsilon([*spent, event(0.1, noise, 100)], DELTA) <= 3.0
    assert noise > accounting.noise_multiplier(3.0, DELTA, 0.1, 100)


def test_exhausted_budget_has_no_calibration() -> None:
    with pytest.raises(BudgetExceededError, match="is spent"):
        accounting.noise_multiplier(1.0, DELTA, 0.1, 1, [event(0.1, 1.0, 100)])


def test_many_small_steps() -> None:
    noise = accounting.noise_multiplier(0.1, 1e-6, 0.001, 100_000)
    assert 0.0999 < accounting.epsilon([event(0.001, noise, 100_000)], 1e-6) <= 0.1


def test_steps_within() -> None:
    steps = accounting.steps_within(3.0, DELTA, 0.01, 1.0)
    assert accounting.epsilon([event(0.01, 1.0, steps)], DELTA) <= 3.0
    assert accounting.epsilon([event(0.01, 1.0, steps + 1)], DELTA) > 3.0
    assert accounting.steps_within(0.1, DELTA, 1.0, 1.0) == 0


def test_budget_solves_either_way() -> None:
    there = accounting.budget(epsilon=3.0, delta=DELTA, sample_rate=0.01, steps=2000)
    back = accounting.budget(noise_multiplier=there.noise_multiplier, delta=DELTA, sample_rate=0.01, steps=2000)
    assert back.epsilon == there.epsilon <= 3.0 < back.epsilon_rdp
    assert "add or remove one record" in str(there)
    with pytest.raises(ConfigError, match="exactly one"):
        accounting.budget(delta=DELTA, sample_rate=0.01, steps=2000)


def test_nothing_costs_nothing() -> None:
    assert accounting.epsilon([], DELTA) == accounting.epsilon_rdp([], DELTA) == 0.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_epsilon(bad: float) -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        accounting.noise_multiplier(bad, DELTA, 0.1, 10)


def test_rounding_of_ffts_stays_out_of_the_answer() -> None:
    """Full batches have a closed form; composed by FFT, epsilon must not come out below it at the smallest delta."""
    for delta in (1e-3, 1e-6, pld.SMALLEST_DELTA):
        exact = dp_accounting.get_epsilon_gaussian(2.0 / math.sqrt(100), delta)
        assert exact <= pld.epsilon([(1.0, 2.0, 100)], delta, 1e-2) <= exact * (1 + 1e-4)


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, math.nan, 1e-12])
def test_bad_delta(bad: float) -> None:
    with pytest.raises(ConfigError, match="delta"):
        accounting.epsilon([event(0.1, 1.0)], bad)


@pytest.mark.parametrize(
    ("rate", "noise", "steps"), [(0.0, 1, 1), (1.1, 1, 1), (0.1, 0, 1), (0.1, math.nan, 1), (0.1, 1, 0)]
)
def test_bad_event(rate: float, noise: float, steps: int) -> None:
    with pytest.raises(ConfigError):
        event(rate, noise, steps)


def test_the_examples_in_the_docstring() -> None:
    result = doctest.testmod(accounting)
    assert (result.attempted, result.failed) == (3, 0)


def test_accounting_imports_no_torch() -> None:
    code = "import sys, choral.privacy.accounting; sys.exit('torch' in sys.modules or 'opacus' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
