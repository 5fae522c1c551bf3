"""Epsilon and calibration against goldens, closed forms, quadrature and dp-accounting."""

from __future__ import annotations

import contextlib
import doctest
import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.gdp import compute_eps_poisson
from scipy.optimize import brentq
from scipy.stats import norm

from choral.errors import ConfigError
from choral.privacy.accounting import budget, merged_steps, other_accountants, record_level, record_noise, renyi
from choral.privacy.accounting.events import (
    ADD_OR_REMOVE,
    REPLACE_ONE,
    ZERO_OUT,
    CorrelatedGaussian,
    PoissonSampledGaussian,
    Search,
    check_relation,
    replaces,
)
from choral.privacy.accounting.filters import PrivacyFilter
from choral.privacy.accounting.matrix_strategies import Tree
from choral.privacy.errors import AccountingError, BudgetExceededError
from choral.privacy.loss_distributions import pld

DELTA = 1e-5


def event(rate: float, noise: float, steps: int = 1) -> PoissonSampledGaussian:
    return PoissonSampledGaussian(sample_rate=rate, noise_multiplier=noise, steps=steps)


# Recomputed with dp-accounting 0.6.0 at grid 1e-4; RDP with its default orders; PRV and GDP with Opacus 1.6.0.
GOLDENS = [
    (0.01, 4.0, 10_000, "0.9470", "1.0355", "0.9569", "0.9424"),
    (0.01, 1.0, 1000, "1.8282", "2.1014", "1.8384", "1.6177"),
    (256 / 60_000, 1.1, 14_062, "2.3817", "2.5966", "2.3917", "2.3243"),
    (0.1, 1.0, 100, "7.0466", "7.9039", "7.0571", "6.0071"),
    (1.0, 10.0, 100, "4.3772", "4.7285", "4.3874", "4.3899"),
]


@pytest.mark.parametrize(("rate", "noise", "steps", "by_pld", "by_rdp", "by_prv", "by_gdp"), GOLDENS)
def test_goldens(rate: float, noise: float, steps: int, by_pld: str, by_rdp: str, by_prv: str, by_gdp: str) -> None:
    low, high = other_accountants.epsilon_by_prv([event(rate, noise, steps)], DELTA)
    assert f"{high:.4f}" == by_prv
    assert low < float(by_pld) < high
    other_accountants.check_by_prv((float(by_pld) - 0.01, float(by_pld)), (low, high), DELTA)
    assert f"{pld.epsilon([(rate, noise, steps)], DELTA, 1e-4):.4f}" == by_pld
    assert f"{record_level.epsilon_rdp([event(rate, noise, steps)], DELTA):.4f}" == by_rdp
    assert f"{record_level.epsilon([event(rate, noise, steps)], DELTA):.4f}" == by_pld


@pytest.mark.parametrize(("rate", "noise", "steps", "by_pld", "by_rdp", "by_prv", "by_gdp"), GOLDENS)
def test_gdp_is_no_guarantee(
    rate: float, noise: float, steps: int, by_pld: str, by_rdp: str, by_prv: str, by_gdp: str
) -> None:
    """The central limit theorem of Gaussian DP says less than what is spent, wherever batches are sampled."""
    with np.errstate(all="ignore"):
        gdp = compute_eps_poisson(steps=steps, noise_multiplier=noise, sample_rate=rate, delta=DELTA)
    assert f"{gdp:.4f}" == by_gdp
    assert (gdp < float(by_pld)) == (rate < 1.0)  # with full batches its number is an upper bound: Gaussians again


def test_the_bracket_of_prv_holds_mixtures_and_long_runs() -> None:
    for events in ([event(0.1, 2.0, 50), event(0.02, 1.0, 300)], [event(0.001, 0.8, 300_000)], [event(0.5, 30.0)]):
        other_accountants.check_by_prv(
            record_level.bounds(events, DELTA), other_accountants.epsilon_by_prv(events, DELTA), DELTA
        )


@pytest.mark.parametrize("wrong", [0.95, 1.05])
def test_disagreement_with_prv_raises(wrong: float) -> None:
    events = [event(0.01, 1.0, 1000)]
    lower, upper = record_level.bounds(events, DELTA)
    bracket = other_accountants.epsilon_by_prv(events, DELTA)
    with pytest.raises(AccountingError, match="outside the bracket"):
        other_accountants.check_by_prv((wrong * lower, wrong * upper), bracket, DELTA)


@pytest.mark.parametrize(
    ("ours", "excluded"),
    [
        ((0.5, 1.0 - 0.9e-4), False),
        ((0.5, 1.0 - 1.1e-4), True),
        ((1.2 + 1.1e-4, 2.0), False),  # 1e-4, and 1e-5 of 1.2
        ((1.2 + 1.2e-4, 2.0), True),
    ],
)
def test_brackets_exclude_each_other_beyond_rounding(ours: tuple[float, float], excluded: bool) -> None:
    with pytest.raises(AccountingError, match="outside") if excluded else contextlib.nullcontext():
        other_accountants.check_by_prv(ours, (1.0, 1.2), DELTA)


def test_goldens_of_one_gaussian() -> None:
    assert f"{record_level.epsilon([event(1.0, 1.0)], DELTA):.6f}" == "4.377178"
    assert record_noise.noise_multiplier(1.0, DELTA, 1.0, 1) == pytest.approx(3.730632, rel=1e-5)


def test_golden_of_calibration() -> None:
    assert f"{record_noise.noise_multiplier(1.0, DELTA, 0.1, 100):.4f}" == "3.9417"


@pytest.mark.parametrize(("rate", "noise"), [(1.0, 0.8), (1.0, 3.0), (0.3, 1.0), (0.05, 0.7), (0.9, 2.0)])
def test_one_step_against_quadrature(rate: float, noise: float) -> None:
    """Sum (p - e^eps q)+ over a fine grid for both neighbours; no formula in common with the code."""
    x, h = np.linspace(-12 * noise, 12 * noise + 1, 1_000_001, retstep=True)
    q = norm.pdf(x, 0, noise)
    p = (1 - rate) * q + rate * norm.pdf(x, 1, noise)

    def delta_of(eps: float) -> float:
        return float(h * max(np.maximum(p - math.exp(eps) * q, 0).sum(), np.maximum(q - math.exp(eps) * p, 0).sum()))

    exact = brentq(lambda eps: math.log(max(delta_of(eps), 1e-300) / DELTA), 1e-3, 30.0, xtol=1e-6)
    ours = record_level.epsilon([event(rate, noise)], DELTA)
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
    noise = record_noise.noise_multiplier(600.0, DELTA, 0.1, 50)
    assert 599.9 < record_level.epsilon([event(0.1, noise, 50)], DELTA) <= 600.0


def test_tiny_epsilons_are_no_disagreement() -> None:
    """RDP says 0 and PLD, on its grid, a little more: both are right to within rounding."""
    tiny = [event(7.86e-6, 116.0, 29)]
    assert record_level.epsilon_rdp(tiny, 4.2e-7) == 0.0
    assert 0.0 <= record_level.epsilon(tiny, 4.2e-7) < 1e-4
    other_accountants.check_others(((7.86e-6, 116.0, 29),), 4.2e-7)


def test_rdp_is_never_below_pld() -> None:
    for rate, noise, steps, *_ in GOLDENS:
        one = [event(rate, noise, steps)]
        assert record_level.epsilon_rdp(one, DELTA) >= record_level.epsilon(one, DELTA)


def test_many_unlike_steps_are_all_counted_and_none_as_less_than_it_costs() -> None:
    """Thousands of kinds become a few hundred: each step stands in one of no smaller rate and no more noise."""
    kinds = {(0.001 * 1.0005**i, 4.0 / 1.0003**i): 1 + i % 3 for i in range(3000)}
    merged = merged_steps._told_apart(kinds)
    assert len(merged) <= merged_steps._MOST_PARTS
    assert sum(steps for *_, steps in merged) == sum(kinds.values())
    dear = sorted(merged, reverse=True)  # in these, more rate comes with less noise
    assert all(a[1] <= b[1] for a, b in pairwise(dear))
    left, place = 0, -1
    for (rate, noise), steps in sorted(kinds.items(), reverse=True):
        if left == 0:
            place += 1
            left = dear[place][2]
        assert dear[place][0] >= rate
        assert dear[place][1] <= noise
        left -= steps
    assert left == 0


def test_another_accountant_is_asked_where_its_rounding_allows_and_believed_by_a_number_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its rounding is of 1e-15 for each step: within a thousandth of delta for 1,000 steps down to 1e-9."""
    asked = []
    monkeypatch.setattr(other_accountants, "_by_dp_accounting", lambda merged, *_: asked.append(merged) or math.nan)
    merged = ((1e-4, 4.0, 1000),)
    other_accountants.check_others(merged, 0.9e-9)
    assert asked == []
    with pytest.raises(AccountingError, match=r"say .* and nan"):
        other_accountants.check_others(merged, 1.1e-9)
    assert asked == [merged]


@pytest.mark.parametrize(
    ("steps", "delta", "trusted"), [(9_999, 1e-9, True), (10_001, 1e-9, False), (10**6, 1.1e-7, True)]
)
def test_others_are_trusted_where_their_rounding_is_a_hundredth_of_delta(
    steps: int, delta: float, trusted: bool
) -> None:
    halves = [event(0.1, 1.0, steps // 2), event(0.1, 2.0, steps - steps // 2)]
    assert other_accountants.trusts_others(halves, delta) is trusted


def test_disagreement_of_the_accountants_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pld.bounds
    monkeypatch.setattr(
        record_level.pld, "bounds", lambda *a: pld.EpsilonBounds(*(1.5 * each for each in real(*a)[:2]), a[2])
    )
    with pytest.raises(AccountingError, match="RDP"):
        record_level.epsilon([event(0.0311, 1.234, 777)], DELTA)


def test_calibration_compares_with_dp_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pld.bounds
    monkeypatch.setattr(
        record_level.pld, "bounds", lambda *a: pld.EpsilonBounds(0.0, 0.9 * real(*a).upper, a[2])
    )  # too low: RDP cannot see it
    with pytest.raises(AccountingError, match="same privacy loss distribution"):
        record_noise.noise_multiplier(2.345, DELTA, 0.0312, 321)


@pytest.mark.parametrize("target", [0.1, 1.0, 3.0, 8.0, 30.0])
@pytest.mark.parametrize(("rate", "steps"), [(1.0, 40), (0.3, 100), (0.01, 2000), (0.5, 1)])
def test_calibration_spends_all_and_no_more(target: float, rate: float, steps: int) -> None:
    noise = record_noise.noise_multiplier(target, DELTA, rate, steps)
    cost = record_level.epsilon([event(rate, noise, steps)], DELTA)
    assert target * (1 - 1e-4) <= cost <= target


def test_calibration_reckons_with_what_was_spent() -> None:
    spent = [event(0.1, 2.5, 100)]
    noise = record_noise.noise_multiplier(3.0, DELTA, 0.1, 100, spent, fixed=True)
    assert 2.99 < record_level.epsilon([*spent, event(0.1, noise, 100)], DELTA) <= 3.0
    assert noise > record_noise.noise_multiplier(3.0, DELTA, 0.1, 100)
    late = record_noise.noise_multiplier(3.0, DELTA, 0.1, 100, spent)  # by a filter, since it may have been looked at
    assert noise < late
    assert 2.99 < PrivacyFilter(3.0, DELTA).cost([*spent, event(0.1, late, 100)]) <= 3.0


def test_exhausted_budget_has_no_calibration() -> None:
    with pytest.raises(BudgetExceededError, match="is spent"):
        record_noise.noise_multiplier(1.0, DELTA, 0.1, 1, [event(0.1, 1.0, 100)])
    with pytest.raises(BudgetExceededError, match="is spent"):
        record_noise.noise_multiplier(1.0, DELTA, 0.1, 1, [event(0.1, 1.0, 100)], fixed=True)


def test_many_small_steps() -> None:
    noise = record_noise.noise_multiplier(0.1, 1e-6, 0.001, 100_000)
    assert 0.0999 < record_level.epsilon([event(0.001, noise, 100_000)], 1e-6) <= 0.1


def test_steps_within() -> None:
    steps = budget.steps_within(3.0, DELTA, 0.01, 1.0)
    assert record_level.epsilon([event(0.01, 1.0, steps)], DELTA) <= 3.0
    assert record_level.epsilon([event(0.01, 1.0, steps + 1)], DELTA) > 3.0
    assert budget.steps_within(0.1, DELTA, 1.0, 1.0) == 0


def test_budget_solves_either_way() -> None:
    there = budget.budget(epsilon=3.0, delta=DELTA, sample_rate=0.01, steps=2000)
    back = budget.budget(noise_multiplier=there.noise_multiplier, delta=DELTA, sample_rate=0.01, steps=2000)
    assert back.epsilon == there.epsilon <= 3.0 < back.epsilon_rdp
    assert "zero out one record" in str(there)
    with pytest.raises(ConfigError, match="exactly one"):
        budget.budget(delta=DELTA, sample_rate=0.01, steps=2000)


def test_budget_solves_for_each_of_the_four() -> None:
    """What one of them is solved for gives back the others, and a little more of it breaks the promise."""
    known = {"epsilon": 3.0, "noise_multiplier": 1.0, "sample_rate": 0.01}
    steps = budget.budget(delta=DELTA, **known)
    assert steps.steps == budget.steps_within(3.0, DELTA, 0.01, 1.0)
    rate = budget.budget(delta=DELTA, epsilon=3.0, noise_multiplier=1.0, steps=2000)
    assert 2.9999 < rate.epsilon <= 3.0
    assert by_dp_accounting(rate.sample_rate * 1.001, 1.0, 2000) > 3.0
    assert budget.budget(delta=DELTA, epsilon=3.0, sample_rate=rate.sample_rate, steps=2000).noise_multiplier == (
        pytest.approx(1.0, rel=1e-4)
    )
    with pytest.raises(BudgetExceededError, match="nothing fits"):
        budget.budget(delta=DELTA, epsilon=0.1, noise_multiplier=1.0, sample_rate=1.0)


def by_dp_accounting(rate: float, noise: float, steps: int) -> float:
    return other_accountants.epsilon_by_dp_accounting([event(rate, noise, steps)], DELTA, 1e-4)


@pytest.mark.parametrize(("target", "epochs"), [(3.0, 10), (0.5, 10), (3.0, 2.5), (20.0, 1)])
def test_the_largest_batch_for_these_passes(target: float, epochs: float) -> None:
    rate, steps = budget.sample_rate_within(target, DELTA, 1.0, epochs=epochs)
    assert steps == math.ceil(epochs / rate - 1e-9)
    assert by_dp_accounting(rate, 1.0, steps) <= target * (1 + 1e-3)  # its grid is the coarser one there
    if rate < 1.0:  # a larger one costs too much, whether it takes as many steps or fewer
        for more in (1.002, 1.05, 1.5):
            larger = min(rate * more, 1.0)
            assert by_dp_accounting(larger, 1.0, math.ceil(epochs / larger - 1e-9)) > target


def test_batches_grow_with_the_promise_and_shrink_with_the_passes() -> None:
    rates = [budget.sample_rate_within(eps, DELTA, 1.0, epochs=5)[0] for eps in (1.0, 2.0, 4.0)]
    assert rates == sorted(set(rates))
    rates = [budget.sample_rate_within(2.0, DELTA, 1.0, epochs=count)[0] for count in (1, 5, 10)]
    assert rates == sorted(set(rates), reverse=True)


@pytest.mark.parametrize("bad", [{}, {"steps": 10, "epochs": 1}, {"epochs": 0.0}, {"epochs": math.nan}, {"steps": 0}])
def test_bad_lengths(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        budget.sample_rate_within(1.0, DELTA, 1.0, **bad)  # type: ignore[arg-type]


def test_nothing_costs_nothing() -> None:
    assert record_level.epsilon([], DELTA) == record_level.epsilon_rdp([], DELTA) == 0.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_epsilon(bad: float) -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        record_noise.noise_multiplier(bad, DELTA, 0.1, 10)


def test_rounding_of_ffts_stays_out_of_the_answer() -> None:
    """Full batches have a closed form; composed by FFT, epsilon must not come out below it at the smallest delta."""
    for delta in (1e-3, 1e-6, pld.SMALLEST_DELTA):
        exact = dp_accounting.get_epsilon_gaussian(2.0 / math.sqrt(100), delta)
        assert exact <= pld.epsilon([(1.0, 2.0, 100)], delta, 1e-2) <= exact * (1 + 1e-4)


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, math.nan, 1e-12])
def test_bad_delta(bad: float) -> None:
    with pytest.raises(ConfigError, match="delta"):
        record_level.epsilon([event(0.1, 1.0)], bad)


@pytest.mark.parametrize(
    ("rate", "noise", "steps"), [(0.0, 1, 1), (1.1, 1, 1), (0.1, 0, 1), (0.1, math.nan, 1), (0.1, 1, 0)]
)
def test_bad_event(rate: float, noise: float, steps: int) -> None:
    with pytest.raises(ConfigError):
        event(rate, noise, steps)


@pytest.mark.parametrize(
    ("last", "beyond", "said"),
    [
        ((1e-9, 1.0, 1), (0.9e-9, 1.0, 1), "sample_rate is 9e-10"),
        ((0.5, 0.01, 1), (0.5, 0.0099, 1), "noise_multiplier is 0.0099"),
        ((0.5, 1e6, 1), (0.5, 1.1e6, 1), r"noise_multiplier is 1.1e\+06"),
        ((0.5, 1.0, 2**24), (0.5, 1.0, 2**24 + 1), "16777217 sampled steps"),
        ((1.0, 1e-6, 1), (1.0, 0.9e-6, 1), "full batches have noise multipliers 9e-07"),
        ((1.0, 2e-6, 4), (1.0, 1.9e-6, 4), "full batches have noise multipliers 1.9e-06"),
        ((1.0, 1e9, 2**24 + 1), (1.0, 1.1e9, 1), r"to 1.1e\+09"),
    ],
)
def test_the_last_that_is_accounted_for_and_the_next_that_is_refused(
    last: tuple[float, float, int], beyond: tuple[float, float, int], said: str
) -> None:
    kept = event(1.0, 1.0)
    assert last in merged_steps.merge([kept, event(*last)])
    with pytest.raises(ConfigError, match=said):
        merged_steps.merge([kept, event(*beyond)])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"strategy": "tree"}, "strategy is a str, expected one of"),
        ({"noise": 0.0}, "noise is 0"),
        ({"noise": math.nan}, "noise is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"number": 0}, "number is 0"),
    ],
)
def test_an_event_of_correlated_noise_has_a_strategy_and_noise(bad: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CorrelatedGaussian(**{"strategy": Tree(), "noise": 1.0, "steps": 1, "number": 1, **bad})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "hint"), [(ADD_OR_REMOVE, "The number of records is public"), ("any", "word for word"), ("", "")]
)
def test_a_promise_states_one_of_two_relations_word_for_word(words: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="expected 'zero out one record' or 'replace one record'") as caught:
        check_relation(words)
    assert hint in caught.value.hint
    for offered in (ZERO_OUT, REPLACE_ONE):
        check_relation(offered)


@pytest.mark.parametrize("tries", [(event(0.1, 1.0), "training"), "training", ()])
def test_the_tries_of_a_search_are_events_of_training(tries: Any) -> None:
    with pytest.raises(ConfigError, match=r"tries of a search are|no events for its tries"):
        Search(tries=tries, mean=2.0)


def test_no_other_relation_has_a_cost() -> None:
    assert [replaces(words) for words in (ZERO_OUT, ADD_OR_REMOVE, REPLACE_ONE)] == [False, False, True]
    with pytest.raises(ConfigError, match="neighbours is 'any', of which no record's cost is known"):
        record_level.epsilon([event(0.1, 1.0)], DELTA, neighbours="any")


def test_a_noise_outside_the_bracket_is_taken_from_within() -> None:
    cases = [(0.0, 4.0), (3.0, math.inf), (2.0, 8.0)]
    assert [record_noise._between(low, high) for low, high in cases] == [2.0, 6.0, 4.0]


def test_the_examples_in_the_docstring() -> None:
    assert doctest.testmod(record_level) == (0, 3)
    assert doctest.testmod(record_noise) == (0, 1)
    assert doctest.testmod(budget) == (0, 1)


def test_accounting_imports_no_torch() -> None:
    code = "import sys, choral.privacy.accounting.budget; sys.exit('torch' in sys.modules or 'opacus' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_our_orders_are_those_of_dp_accounting() -> None:
    from dp_accounting.rdp import rdp_privacy_accountant

    assert list(renyi.RENYI_ORDERS) == list(rdp_privacy_accountant.DEFAULT_RDP_ORDERS)
