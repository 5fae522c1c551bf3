"""Privacy loss distributions over the whole accepted range, against an integral that has no grid of losses."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import resource
import time

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
from scipy.integrate import trapezoid
from scipy.special import ndtr

from choral.errors import ConfigError
from choral.privacy.accounting import merged_steps, other_accountants, record_level
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.loss_distributions import dominating_pairs, pld

Floats = npt.NDArray[np.float64]


def event(rate: float, noise: float, steps: int = 1) -> PoissonSampledGaussian:
    return PoissonSampledGaussian(sample_rate=rate, noise_multiplier=noise, steps=steps)


def contour_delta(rate: float, noise: float, steps: int, eps: float, order: float, *, remove: bool = True) -> float:
    """delta(eps) = 1/(2 pi i) times the integral of M(z)^T e^(-z eps) / (z (z + 1)) along re z = order.

    M(z) = E e^(z L) by the trapezoidal rule over the output x, which converges faster than any power; so does the
    one along the line. Nothing in common with the code: no grid of losses, no hockey-stick divergence, no FFT.
    """
    x = np.linspace(-12.0 * noise, 1.0 + (12.0 + 2.0 / noise) * noise, 2401)
    odds = np.expm1((x - 0.5) / noise**2) * rate
    loss, density = np.log1p(odds), np.exp(-0.5 * (x / noise) ** 2) / (math.sqrt(2.0 * math.pi) * noise) * (x[1] - x[0])
    weights, loss = (density * (1.0 + odds), loss) if remove else (density, -loss)
    tilted = weights * np.exp(order * loss)
    moment = float(tilted.sum())
    mean = float(tilted @ loss) / moment
    spread = math.sqrt(steps * float(tilted @ (loss - mean) ** 2) / moment)
    top = 12.0 / spread
    while abs(complex(tilted @ np.exp(1j * top * loss)) / moment) ** steps > 1e-13:
        top *= 1.5
    line = np.linspace(0.0, top, 1201)
    less = np.array([tilted @ np.expm1(1j * w * loss) for w in line]) / moment
    z = order + 1j * line
    height = np.exp(steps * np.log1p(less) - 1j * line * eps) / (z * (z + 1.0))
    area = float(trapezoid(height.real, line)) / math.pi
    return math.exp(steps * math.log1p(float(weights @ np.expm1(order * loss))) - order * eps) * area


# Sample rate, noise multiplier, steps, delta, and an order near the best Renyi bound's, where the integrand is tame.
SETTINGS = [
    (1e-4, 0.5, 10**6, 1e-9, 2.85),
    (1e-3, 1.0, 10**6, 1e-10, 4.9),
    (0.01, 4.0, 10_000, 1e-5, 16.0),
    (1e-5, 1.0, 10**6, 1e-6, 8.0),
    (0.05, 20.0, 20_000, 1e-10, 16.0),
    (0.5, 1.0, 10, 1e-6, 1.2),
]


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "order"), SETTINGS)
def test_both_bounds_hold_against_an_integral_without_a_grid(
    rate: float, noise: float, steps: int, delta: float, order: float
) -> None:
    """The divergence at the upper bound is at most delta, at the lower at least; a few per cent lie between them."""
    lower, upper = record_level.bounds([event(rate, noise, steps)], delta)
    settled = record_level.epsilon([event(rate, noise, steps)], delta)
    assert upper - lower <= max(0.06 * upper, 0.03)
    assert lower <= settled

    def divergence(eps: float) -> float:
        return contour_delta(rate, noise, steps, eps, order)

    assert divergence(upper) <= delta * (1 + 1e-6)
    assert divergence(settled) <= delta * (1 + 1e-6)
    assert divergence(lower) >= delta * (1 - 1e-6)
    assert divergence(settled * 0.99) > delta  # and it is no more than a per cent too much


def test_many_steps_do_not_multiply_rounding() -> None:
    """At a million steps an FFT of the whole distribution, raised to that power, is off by more than delta."""
    rare = record_level.epsilon([event(1e-6, 0.5, 10**6)], 1e-10)
    assert 0.945 < rare < 0.96  # Renyi DP says 3.86, powers of a plain FFT 7.44
    assert 7.176 < record_level.epsilon([event(1e-4, 0.5, 10**6)], 1e-9) < 7.2


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize(("rate", "noise"), [(1e-8, 0.05), (1e-3, 0.5), (0.3, 1.0), (1.0, 1.0), (0.5, 1000.0)])
def test_divergences_are_within_the_rounding_they_state(rate: float, noise: float, remove: bool) -> None:
    """Against 60 digits; at the best x, moved by what rounding may have moved it, since it is where H is largest."""
    pair = dominating_pairs.SampledGaussian(rate, noise, remove)
    low, high = pair.losses()
    eps = np.linspace(max(low, -30.0), min(high, 30.0), 41)
    value, error = pair.divergence(eps)
    with mpmath.workdps(60):
        q, s = mpmath.mpf(rate), mpmath.mpf(noise)
        for at, ours, off in zip(eps, value, error, strict=True):
            a = mpmath.mpf(float(at)) * (1 if remove else -1)
            odds = mpmath.expm1(a) + q
            if odds <= 0:
                exact = -mpmath.expm1(mpmath.mpf(float(at))) if remove else mpmath.mpf(0)
            else:
                x = s**2 * mpmath.log(odds / q) + mpmath.mpf(1) / 2
                exact = q * mpmath.ncdf((1 - x) / s) - odds * mpmath.ncdf(-x / s)
                if not remove:
                    exact = mpmath.exp(-a) * (odds * mpmath.ncdf(x / s) - q * mpmath.ncdf((x - 1) / s))
            assert abs(exact - float(ours)) <= float(off)
            assert off <= 1e-13


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("grid", [1e-2, 1e-1, 1.0])
def test_the_discretised_step_dominates_the_true_one(grid: float, remove: bool) -> None:
    """Its divergences are not below, at the grid's points and between them, mass at infinity included."""
    pair = dominating_pairs.SampledGaussian(0.2, 0.8, remove)
    loss = pld._discretised(pair, grid)
    losses = loss.losses()
    eps = np.linspace(-2.0, 8.0, 301)
    theirs = loss.infinity + np.array([loss.probs @ np.maximum(-np.expm1(at - losses), 0.0) for at in eps])
    value, _ = pair.divergence(eps)
    assert (theirs >= value * (1 - 1e-14)).all()
    assert loss.infinity >= pair.divergence(losses[-1:])[0][0]
    assert (loss.infinity > 0.0) == remove  # the loss of adding a record is at most -log(1 - rate)


def test_mass_above_the_window_counts_as_an_infinite_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tail that is cut early, coarse windows stay above fine ones: what they leave out is paid for."""
    truth = pld.bounds([(0.05, 1.0, 300)], 1e-5, 1e-4)
    uppers = [truth.upper]
    for tail in (0.1, 0.3, 0.6):
        monkeypatch.setattr(pld, "_TAIL", tail)
        uppers.append(pld.bounds([(0.05, 1.0, 300)], 1e-5, 1e-4).upper)
    assert all(before * (1 + 1e-6) < after for before, after in itertools.pairwise(uppers))


def test_mass_at_infinity_is_added_to_delta() -> None:
    """A pair that tells all with probability p costs nothing less than p in delta, and p T in T steps."""
    loss = pld._discretised(dominating_pairs.SampledGaussian(0.1, 1.0, True), 1e-3)
    leaky = dataclasses.replace(loss, infinity=1e-7)
    with_it = pld._Sum([(leaky, 50)], 1e-5, 1.0).solve()[1]
    without = pld._Sum([(loss, 50)], 1e-5, 1.0).solve()[1]
    assert with_it == pytest.approx(pld._Sum([(loss, 50)], 1e-5 - 50e-7, 1.0).solve()[1], rel=1e-4)
    assert with_it > without * 1.01
    assert pld._Sum([(leaky, 101)], 1e-5, 1.0).solve() == (0.0, math.inf)


def test_the_bound_on_rounding_covers_what_another_order_of_arithmetic_gives() -> None:
    """The tilted sum by FFT against the same by exact integer powers of a small distribution in 50 digits."""
    loss = pld._discretised(dominating_pairs.SampledGaussian(0.3, 1.5, True), 0.25)
    tried = pld._Sum([(loss, 40)], 1e-5, 1.0)
    probs, error = tried._convolved()
    with mpmath.workdps(50):
        total: dict[int, mpmath.mpf] = {0: mpmath.mpf(1)}
        one = {loss.lowest + i: mpmath.mpf(float(p)) for i, p in enumerate(loss.probs) if p > 1e-25}
        for _ in range(40):
            new: dict[int, mpmath.mpf] = {}
            for a, p in total.items():
                for b, r in one.items():
                    new[a + b] = new.get(a + b, mpmath.mpf(0)) + p * r
            total = {k: v for k, v in new.items() if v > mpmath.mpf(10) ** -45}
        for i, p in enumerate(probs):
            k = tried.low + i
            tilted = total.get(k, mpmath.mpf(0)) * mpmath.exp(mpmath.mpf(tried.tilt) * k * loss.grid - tried.log_moment)
            assert float(abs(tilted - float(p))) <= 1.01 * error + 2.1 * pld._TAIL
        assert 0.0 < error < 1e-12


def test_coarse_grids_stand_in_for_ones_that_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = pld.bounds([(0.05, 1.0, 300)], 1e-5, 1e-3)
    monkeypatch.setattr(pld, "MOST_POINTS", 1 << 10)
    coarse = pld.bounds([(0.05, 1.0, 300)], 1e-5, 1e-3)
    assert coarse.grid > fine.grid == 1e-3
    assert coarse.upper > fine.upper
    assert coarse.lower < fine.lower


# The corners of what is accepted, and places within.
CORNERS = [
    (rate, noise, steps, delta)
    for rate in (1e-8, 1e-4, 0.999999)
    for noise in (0.05, 1000.0)
    for steps in (10**6,)
    for delta in (1e-10, 1e-2)
]


def test_the_whole_range_is_answered_in_bounded_time_and_memory() -> None:
    """Each in seconds (processor time; they take less than one), all within 500 MB, upper above lower bound."""
    for rate, noise, steps, delta in CORNERS:
        start = time.process_time()
        settled = record_level.epsilon([event(rate, noise, steps)], delta)
        lower, upper = record_level.bounds([event(rate, noise, steps)], delta)
        assert 0.0 <= lower <= min(upper, settled) < math.inf
        assert time.process_time() - start < 10.0, (rate, noise, steps, delta)
    points = sum(len(loss.probs) for loss in pld._kept.values())
    assert points <= pld._KEPT_POINTS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


def test_thousands_of_unlike_steps_are_counted_as_few_that_cost_no_less() -> None:
    generator = random.Random(5)
    events = [event(generator.uniform(0.005, 0.02), generator.uniform(0.9, 3.0), 3) for _ in range(3000)]
    start = time.process_time()
    together = record_level.epsilon(events, 1e-6)
    assert time.process_time() - start < 30.0
    merged = merged_steps.merge(events)
    assert len(merged) <= merged_steps._MOST_PARTS
    assert sum(steps for _, _, steps in merged) == 9000
    few = [event(0.0125, 1.95, 9000)]
    assert (
        record_level.epsilon([event(0.005, 3.0, 9000)], 1e-6)
        < together
        < record_level.epsilon([event(0.02, 0.9, 9000)], 1e-6)
    )
    assert together > 0.5 * record_level.epsilon(few, 1e-6)
    for part in events[:50]:  # each is found again as one of no lower rate and no more noise
        assert any(q >= part.sample_rate and s <= part.noise_multiplier for q, s, _ in merged)


def test_no_more_than_memory_holds_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pld, "_KEPT_POINTS", 50_000)
    for place in range(12):
        pld.bounds([(0.01, 1.0 + 0.01 * place, 10)], 1e-5, 1e-3)
    assert 25_000 < sum(len(loss.probs) for loss in pld._kept.values()) <= pld._KEPT_POINTS


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "delta", "words"),
    [
        (1e-10, 1.0, 10, 1e-5, "sample_rate"),
        (0.1, 1e-3, 10, 1e-5, "noise_multiplier"),
        (0.1, 1e7, 10, 1e-5, "noise_multiplier"),
        (0.1, 1.0, 10**12, 1e-5, "steps"),
        (0.1, 1.0, 2**62, 1e-5, "steps"),
        (1.0, 1e-300, 1, 1e-5, "full batches"),
        (1.0, 0.2, 10**14, 1e-5, "full batches"),
        (0.1, 1.0, 10, 1e-11, "delta"),
        (0.1, 1.0, 10, 1.0, "delta"),
    ],
)
def test_what_is_out_of_range_is_refused_at_once(
    rate: float, noise: float, steps: int, delta: float, words: str
) -> None:
    start = time.process_time()
    for price in (
        record_level.epsilon,
        record_level.bounds,
        record_level.epsilon_rdp,
        other_accountants.epsilon_by_dp_accounting,
    ):
        with pytest.raises(ConfigError, match=words):
            price([event(rate, noise, steps)], delta)
    assert time.process_time() - start < 1.0


def test_rounding_of_the_normal_law_is_what_was_measured() -> None:
    """A new scipy must not be less accurate than the bound on rounding reckons with."""
    generator = np.random.default_rng(1)
    with mpmath.workdps(40):
        for z in np.concatenate([generator.uniform(-30, 0, 300), generator.uniform(0, 10, 100)]):
            exact = mpmath.ncdf(float(z))
            units = float(abs(mpmath.mpf(float(ndtr(z))) / exact - 1)) * 2.0**53
            assert units <= 3.5 * (1.0 + min(z, 0.0) ** 2)
