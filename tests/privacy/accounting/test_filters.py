"""The filter across plans: its condition against brute force, and the adversary who chooses as he goes.

The adversary trains once, looks at the privacy loss that came out, and then takes the second training that is worst at
that loss, each of them priced as the package prices it. His delta(epsilon) is computed from below: the first release is
an exact Gaussian, integrated over its outcomes; the second's divergence comes from discretisations that only err
downwards.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from choral.privacy import Ledger
from choral.privacy.accounting import record_level, record_noise
from choral.privacy.accounting.events import (
    REPLACE_ONE,
    ZERO_OUT,
    ClientRelease,
    CorrelatedGaussian,
    PlannedEvents,
    PoissonSampledGaussian,
    ReleasePlan,
    Search,
)
from choral.privacy.accounting.filters import PrivacyFilter
from choral.privacy.accounting.matrix_strategies import Tree
from choral.privacy.ledgers.plans import RemainingBudget, fixed_cost

EPSILON, DELTA = 3.0, 1e-5
FIRST = PoissonSampledGaussian(sample_rate=1.0, noise_multiplier=1.6, steps=1)
CHOICES = [
    *((q, 1) for q in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)),
    *((0.0005, 200), (0.01, 20), (0.1, 50)),
]


ORDERS = {
    (0.02, 1e-3): (37, 73, 103, 145),
    (0.3, 1e-3): (6, 12, 17, 23),
    (2.0, 1e-3): (2, 4, 5, 6),
    (0.02, 1e-6): (171, 341, 482, 681),
    (0.3, 1e-6): (16, 32, 45, 63),
    (2.0, 1e-6): (4, 6, 9, 12),
    (0.02, 1e-10): (381, 761, 1076, 1521),
    (0.3, 1e-10): (31, 60, 85, 120),
    (2.0, 1e-10): (6, 11, 15, 21),
    (10.0, 1e-10): (2, 4, 5, 6),
    (1e-3, 1e-10): (1025, 2048, 2897, 4096),
}


def sampled(rate: float, noise: float, steps: int = 1) -> PoissonSampledGaussian:
    return PoissonSampledGaussian(sample_rate=rate, noise_multiplier=noise, steps=steps)


@lru_cache(maxsize=64)
def divergence(rate: float, noise: float, steps: int) -> Callable[[np.ndarray], np.ndarray]:
    """A lower bound on the hockey-stick divergence of the sampled Gaussian, as a function of epsilon."""
    pld = privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        value_discretization_interval=1e-3,
        sampling_prob=rate,
        pessimistic_estimate=False,
        use_connect_dots=False,
    )
    remove = (pld.self_compose(steps) if steps > 1 else pld)._pmf_remove
    return lambda falling: np.asarray(remove.get_delta_for_epsilon(falling[::-1]))[::-1]


def delta_of_the_adversary(noises: dict[tuple[float, int], float], epsilon: float = EPSILON) -> float:
    """A lower bound on delta(epsilon) of: release FIRST, look at its loss, take the worst of these second trainings.

    The loss of a Gaussian of noise s is normal with mean 1 / (2 s^2) and deviation 1 / s under P.
    """
    s = FIRST.noise_multiplier
    edges = np.linspace(-9.0, 9.0, 6001)
    # The larger the first loss, the more is left to exceed: taken at the left end of each cell, it errs downwards.
    rest = epsilon - (1.0 / (2.0 * s * s) + edges[:-1] / s)
    worst = np.max([divergence(q, noise, t)(rest) for (q, t), noise in noises.items()], axis=0)
    return float(worst @ np.diff(norm.cdf(edges)))


def test_who_looks_before_he_chooses_breaks_the_price_for_fixed_parameters() -> None:
    """Each pair alone costs 3.000 at 1e-5 by privacy loss distributions; the best of twelve, chosen late, 2.4e-5."""
    noises = {
        (q, t): record_noise.noise_multiplier(EPSILON, DELTA, q, t, [FIRST], slack=1e-4, fixed=True) for q, t in CHOICES
    }
    for (q, t), noise in noises.items():
        assert record_level.epsilon([FIRST, sampled(q, noise, t)], DELTA) <= EPSILON
    assert delta_of_the_adversary(noises) > 2.3e-5


def test_who_looks_before_he_chooses_stays_within_what_a_ledger_admits() -> None:
    ledger = Ledger()
    ledger.bind("data", DELTA)
    ledger.append(FIRST, after=0, plan=ReleasePlan(epsilon=EPSILON, parts=(PlannedEvents(event=FIRST, times=1),)))
    room = RemainingBudget.on(ledger, EPSILON, DELTA)
    noises = {(q, t): room.noise_multiplier(q, t, slack=1e-4) for q, t in CHOICES}
    assert delta_of_the_adversary(noises) <= DELTA
    assert delta_of_the_adversary({choice: noise for choice, noise in noises.items() if choice == (1.0, 1)}) > 1e-7
    for (q, t), noise in noises.items():  # each is dearer than as a fixed pair
        assert record_level.epsilon([FIRST, sampled(q, noise, t)], DELTA) < EPSILON
        assert record_noise.noise_multiplier(EPSILON, DELTA, q, t, [FIRST], slack=1e-4) == noise


def test_the_adversary_is_computed_right() -> None:
    """With one choice, nothing is chosen: two Gaussians, whose delta is known exactly."""
    for noise in (1.0, 2.0, 5.0):
        mu = math.hypot(1 / 1.6, 1 / noise)
        exact = norm.cdf(mu / 2 - EPSILON / mu) - math.exp(EPSILON) * norm.cdf(-mu / 2 - EPSILON / mu)
        found = delta_of_the_adversary({(1.0, 1): noise})
        assert exact * 0.97 <= found <= exact


@settings(max_examples=60, deadline=None)
@given(
    epsilon=st.floats(0.05, 20.0),
    delta=st.sampled_from([1e-3, 1e-5, 1e-8]),
    noise=st.floats(0.3, 60.0),
    count=st.integers(1, 50),
)
def test_the_condition_holds_for_every_loss_at_the_cost_and_fails_below(
    epsilon: float, delta: float, noise: float, count: int
) -> None:
    """Against brute force over x, with the Gaussian's divergences alpha / (2 sigma^2)."""
    rule = PrivacyFilter(epsilon, delta)
    cost = rule.cost([sampled(1.0, noise, count)])
    a = np.asarray(rule.orders, float) - 1.0
    rho = count * (a + 1.0) / (2.0 * noise**2)

    def worst(at: float) -> float:
        def ratio(log_x: float) -> float:
            x = math.exp(log_x)
            terms = np.log(rule.weights) + a * (at + x - rho)
            return -(math.log(-math.expm1(-x)) - float(np.logaddexp.reduce(terms)))

        grid = np.linspace(-12.0, 3.0, 61)
        best = grid[np.argmin([ratio(point) for point in grid])]
        return -float(minimize_scalar(ratio, bounds=(best - 0.3, best + 0.3), method="bounded").fun)

    assert worst(cost * (1.0 + 1e-7) + 1e-9) <= math.log(delta) + 1e-6
    assert worst(cost * (1.0 - 1e-4) - 1e-6) > math.log(delta) - 1e-6
    assert math.isclose(sum(rule.weights), 1.0)
    assert cost >= record_level.epsilon([sampled(1.0, noise, count)], delta) * (1.0 - 1e-6)  # no looser order beats it


def test_orders_and_weights_depend_on_the_promise_alone_and_stay_what_they_are() -> None:
    """A ledger lives for years: its filter may not choose other orders after something was seen."""
    assert PrivacyFilter(3.0, 1e-5).orders == (3, 4, 6, 8)
    assert PrivacyFilter(3.0, 1e-5).weights == (0.1, 0.2, 0.35, 0.35)
    assert PrivacyFilter(1.0, 1e-5).orders == (5, 10, 13, 18)
    assert PrivacyFilter(8.0, 1e-5).orders == (2, 3, 4)
    assert PrivacyFilter(30.0, 1e-5).orders == (2,)
    for (epsilon, delta), orders in ORDERS.items():
        assert PrivacyFilter(epsilon, delta).orders == orders
        assert math.isclose(sum(PrivacyFilter(epsilon, delta).weights), 1.0)


def test_events_are_admitted_up_to_the_promise_and_no_further() -> None:
    events = [sampled(1.0, 4.0, 3)]
    cost = PrivacyFilter(EPSILON, DELTA).cost(events)
    low, high = 0.1, EPSILON
    for _ in range(60):  # the least promise that admits them; its orders are its own
        middle = (low + high) / 2
        low, high = (low, middle) if PrivacyFilter(middle, DELTA).admits(events) else (middle, high)
    assert PrivacyFilter(high, DELTA).admits(events)
    assert not PrivacyFilter(low, DELTA).admits(events)
    assert high == pytest.approx(PrivacyFilter(high, DELTA).cost(events), rel=1e-6)
    assert cost < EPSILON


def test_one_order_is_the_usual_conversion() -> None:
    """At epsilon 30 there is one order, 2: Canonne, Kamath, Steinke 2020, proposition 12."""
    rho = 2 / (2 * 0.4**2)
    usual = rho + math.log1p(-1 / 2) - (math.log(DELTA) + math.log(2.0)) / (2 - 1)
    assert PrivacyFilter(30.0, DELTA).cost([sampled(1.0, 0.4)]) == pytest.approx(usual, rel=1e-8)


def test_costs_add_over_plans_and_rise_with_each_event() -> None:
    rule, events = PrivacyFilter(EPSILON, DELTA), [sampled(0.1, 4.0, 10), sampled(0.01, 1.0, 20), sampled(1.0, 9.0)]
    assert rule.cost([]) == 0.0
    costs = [rule.cost(events[:count]) for count in range(1, 4)]
    assert costs == sorted(costs)
    assert rule.cost([sampled(0.1, 4.0, 5), sampled(0.1, 4.0, 5)]) == pytest.approx(rule.cost([sampled(0.1, 4.0, 10)]))
    passes = [CorrelatedGaussian(strategy=Tree(), noise=20.0, steps=8, number=k) for k in (1, 2)]
    one = math.sqrt(2) * passes[0].noise_multiplier / 2  # two Gaussians are one of so much noise
    assert rule.cost(passes) == pytest.approx(rule.cost([sampled(1.0, one)]), rel=1e-6)
    search = Search(tries=(sampled(0.01, 4.0, 100),), mean=10.0)
    assert rule.cost([search]) > rule.cost(search.tries)
    assert rule.cost([search]) > record_level.epsilon([search], DELTA)
    skellam = ClientRelease(
        mechanism="skellam", sensitivity_squared=100, share_variance=4e4, shares=3, length=9, steps=2
    )
    assert fixed_cost([skellam], DELTA) < PrivacyFilter(EPSILON, DELTA).cost([skellam]) < 2.0


def test_replacing_a_record_costs_more_than_zeroing_it_out() -> None:
    for event in (sampled(0.1, 4.0, 50), sampled(1.0, 6.0)):
        zeroed, replaced = (
            PrivacyFilter(EPSILON, DELTA, relation).cost([event]) for relation in (ZERO_OUT, REPLACE_ONE)
        )
        assert replaced > zeroed
        assert replaced > record_level.epsilon([event], DELTA, neighbours=REPLACE_ONE)


def test_the_table_of_the_guide_is_what_its_command_prints() -> None:
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, str(root / "benchmarks" / "filters.py"), "--markdown"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert printed.count("|\n") == 8
    assert printed in (root / "docs" / "privacy.md").read_text(encoding="utf-8")
