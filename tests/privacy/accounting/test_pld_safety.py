"""Each term that keeps the bounds on epsilon on the safe side, by making what it pays for large."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import mpmath
import numpy as np
import pytest

from choral.privacy.loss_distributions import dominating_pairs, pld

STEPS, DELTA = 40, 1e-5


@pytest.fixture
def loss() -> pld._Loss:
    return pld._discretised(dominating_pairs.SampledGaussian(0.1, 1.0, True), 1e-2)


def tried(loss: pld._Loss, **changes: Any) -> pld._Sum:
    return pld._Sum([(dataclasses.replace(loss, known={}, **changes), STEPS)], DELTA, 1.0)


@pytest.fixture
def whole(loss: pld._Loss) -> pld._Sum:
    return tried(loss)


def with_sum(whole: pld._Sum, probs: pld.Floats, error: float, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    monkeypatch.setattr(whole, "_convolved", lambda: (probs, error))
    return whole.solve()


@pytest.mark.parametrize("share", [1e-2, 1e-1, 0.5])
def test_what_lies_above_the_window_counts_as_infinite(
    whole: pld._Sum, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Against the finer truth, the window that holds all: cut off the upper part, and epsilon must not fall."""
    probs, _ = whole._convolved()
    truth = with_sum(whole, probs, 0.0, monkeypatch)[1]
    beyond = np.cumsum(np.maximum(probs, 0.0)[::-1])[::-1]
    cut = int(np.searchsorted(-beyond, -share))
    monkeypatch.setattr(pld, "_TAIL", float(beyond[cut]))
    whole.high = whole.low + cut - 1
    assert with_sum(whole, probs[:cut], 0.0, monkeypatch)[1] >= truth


def test_an_answer_below_the_window_is_its_lower_end(whole: pld._Sum, monkeypatch: pytest.MonkeyPatch) -> None:
    probs, _ = whole._convolved()
    truth = whole.solve()[1]
    start = math.ceil(truth / whole.grid) - whole.low + 20
    whole.low += start
    assert with_sum(whole, probs[start:], 0.0, monkeypatch)[1] == pytest.approx(whole.low * whole.grid)
    assert whole.low * whole.grid > truth


def test_rounding_of_the_convolution_is_paid_for_on_both_sides(
    whole: pld._Sum, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the error did within its bound: entries that came out too small, or too large."""
    probs, _ = whole._convolved()
    lower, upper = with_sum(whole, probs, 0.0, monkeypatch)
    error = 1e-3 * float(probs.max())
    assert with_sum(whole, probs - error, error, monkeypatch)[1] >= upper - 1e-9
    assert with_sum(whole, probs + error, error, monkeypatch)[0] <= lower + 1e-9


def test_rounding_of_exponents_is_paid_for_on_both_sides(whole: pld._Sum) -> None:
    lower, upper = whole.solve()
    size = whole.size_of_exponents
    whole.size_of_exponents = 1e13
    wide = whole.solve()
    assert wide[1] > upper + 1e-4
    assert wide[0] < lower - 1e-4 or lower == 0.0
    assert 0.0 < size < 1e4


def test_rounding_of_divergences_and_added_mass_lower_the_lower_bound(loss: pld._Loss) -> None:
    fine = pld._discretised(dominating_pairs.SampledGaussian(0.1, 1.0, True), 1e-3)
    plain = tried(fine).solve()
    assert 0.0 < plain[0] < plain[1]
    by_error, by_mass = tried(fine, error=1e-6).solve(), tried(fine, added=1e-2).solve()
    assert by_error[1] == by_mass[1] == plain[1]
    assert by_error[0] < plain[0] - 0.1  # 40 steps of 1e-6 are four times delta
    assert by_mass[0] < plain[0] - 0.01  # 40 times 1 % of the mass


@pytest.mark.parametrize("seed", range(20))
def test_the_equation_for_epsilon_is_solved_to_either_side(seed: int) -> None:
    generator = np.random.default_rng(seed)
    losses = np.sort(generator.uniform(0.0, 10.0 ** generator.uniform(-3, 3), 50))[::-1]
    mass = generator.exponential(size=50) * 10.0 ** generator.uniform(-9, -6)
    delta = float(mass.sum()) * generator.uniform(0.05, 0.4)
    up, down = pld._solve(losses, mass, 0.0, delta), pld._solve(losses, mass, 0.0, delta, down=True)
    assert up is not None
    assert down is not None

    def divergence(eps: float) -> mpmath.mpf:
        pairs_ = zip(losses, mass, strict=True)
        return sum(mpmath.mpf(float(m)) * -mpmath.expm1(mpmath.mpf(eps) - float(x)) for x, m in pairs_ if x > eps)

    with mpmath.workdps(40):
        assert divergence(up) <= delta <= divergence(down)
    assert up - down <= 1e-9 * max(1.0, up)


def test_divergences_that_rounding_let_rise_are_raised_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A divergence may not grow with eps: the value before is the one that is too low."""
    pair = dominating_pairs.SampledGaussian(0.1, 1.0, True)
    low, _ = pair.losses()
    place = 40
    real = dominating_pairs.SampledGaussian.divergence

    def bumped(self: dominating_pairs.SampledGaussian, eps: pld.Floats) -> tuple[pld.Floats, pld.Floats]:
        value, error = real(self, eps)
        value[place] -= 2.0 * (value[place] - value[place + 1])
        return value, error

    monkeypatch.setattr(dominating_pairs.SampledGaussian, "divergence", bumped)
    made = pld._connect(pair, 1e-2)
    losses = made.losses()
    first = math.floor(low / 1e-2)
    value, _ = real(pair, (first + np.arange(len(losses), dtype=np.float64)) * 1e-2)
    theirs = made.infinity + np.array([made.probs @ np.maximum(-np.expm1(at - losses), 0.0) for at in losses])
    kept = np.arange(len(losses)) != place
    assert (theirs[kept] >= value[kept] * (1.0 - 1e-12)).all()
