"""What sums with integer noise cost: published goldens, and the bounds against divergences summed term by term."""

from __future__ import annotations

import doctest
import math
from fractions import Fraction
from typing import Any

import dp_accounting
import numpy as np
import pytest
from msgspec.structs import replace
from scipy import stats
from scipy.special import logsumexp

from choral.errors import ConfigError
from choral.privacy.accounting import client_level, client_noise
from choral.privacy.accounting.client_level import epsilon, renyi, settled, tau
from choral.privacy.accounting.client_noise import calibrate
from choral.privacy.accounting.events import ClientRelease
from choral.privacy.accounting.filters import PrivacyFilter
from choral.privacy.client_level.client_noise_shares import design, squared_norm_bound
from choral.privacy.errors import AccountingError, BudgetExceededError

D = 1 << 20


def release(mechanism: Any = "discrete_gaussian", **changes: Any) -> ClientRelease:
    fields: dict[str, Any] = {"sensitivity_squared": 100, "share_variance": 9.0, "shares": 10, "length": 64}
    return ClientRelease(mechanism=mechanism, **(fields | changes))


def planned(mechanism: Any, bits: int) -> ClientRelease:
    """The facts' setting: n = 100 clients, all honest, d = 2^20, clip 1, 10 times as much noise, 1000 rounds."""
    scheme = design(mechanism=mechanism, bits=bits, length=D, clients=100, holders=100, ratio=10.0)
    return replace(scheme.release(100), steps=1000)


def test_the_doctest() -> None:
    assert doctest.testmod(client_level).failed == 0


def test_goldens_of_tau_and_of_the_norm() -> None:
    assert tau(100, 1.0) * D == pytest.approx(574, abs=0.5)
    assert tau(100, 1.5**2) * D == pytest.approx(0.0024, abs=5e-5)
    assert tau(1, 0.5) == 0.0
    assert math.sqrt(squared_norm_bound(1000.0, D)) / 1000 == pytest.approx(1.12412, abs=1e-5)


@pytest.mark.parametrize(
    ("mechanism", "bits", "published"),
    [
        # Discrete Gaussian: recomputed here at 400 orders between 1 and 60; coarser orders give 75.6 at 14 bits.
        ("discrete_gaussian", 14, 75.43),
        ("discrete_gaussian", 16, 23.65),
        ("discrete_gaussian", 18, 19.36),
        ("discrete_gaussian", 20, 19.07),
        ("skellam", 14, 82.8),
        ("skellam", 16, 24.05),
        ("skellam", 18, 20.17),
        ("skellam", 20, 19.83),
    ],
)
def test_goldens_of_epsilon_by_bits(mechanism: str, bits: int, published: float) -> None:
    assert epsilon([planned(mechanism, bits)], 1e-5) == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize(("lost", "published"), [(10, 20.7), (20, 22.4), (40, 27.1)])
def test_goldens_of_noise_that_dropouts_took_away(lost: int, published: float) -> None:
    event = replace(planned("discrete_gaussian", 18), shares=100 - lost)
    assert epsilon([event], 1e-5) == pytest.approx(published, abs=0.05)


def test_continuous_gaussian_is_exact() -> None:
    event = release("gaussian", sensitivity_squared=1, share_variance=100.0, shares=1, steps=1000)
    exact = dp_accounting.get_epsilon_gaussian(10.0 / math.sqrt(1000), 1e-5)
    assert epsilon([event], 1e-5) == pytest.approx(exact, rel=1e-9)
    assert client_level._by_renyi([event], 1e-5) == pytest.approx(19.05, abs=0.005)  # the facts' RDP value


def sum_of_shares(mechanism: str, shares: int, variance: float) -> np.ndarray:
    """The mass function of the sum on -200..200 by convolution: an oracle that knows no theorem."""
    ks = np.arange(-200, 201)
    if mechanism == "skellam":
        return np.asarray(stats.skellam.pmf(ks, shares * variance / 2, shares * variance / 2))
    one = np.exp(-(ks**2) / (2 * variance))
    one /= one.sum()
    total = one
    for _ in range(shares - 1):
        total = np.convolve(total, one, mode="same")
    return total


def divergence(mass: np.ndarray, shift: int, order: float) -> float:
    p, q = mass[: len(mass) - shift], mass[shift:]
    keep = (p > 1e-280) & (q > 1e-280)
    # What underflows is left out, so this is the divergence or a little less.
    return float(logsumexp(order * np.log(p[keep]) + (1 - order) * np.log(q[keep])) / (order - 1))


@pytest.mark.parametrize("mechanism", ["discrete_gaussian", "skellam"])
@pytest.mark.parametrize("variance", [0.3, 0.5, 1.0, 4.0, 9.0])
@pytest.mark.parametrize("shares", [1, 2, 5])
def test_the_bound_is_above_the_divergence_summed_directly(mechanism: str, variance: float, shares: int) -> None:
    mass = sum_of_shares(mechanism, shares, variance)
    for shift in (1, 2, 3):
        for order in (2.0, 3.0, 8.0):
            event = release(mechanism, sensitivity_squared=shift**2, share_variance=variance, shares=shares, length=1)
            exact, bound = divergence(mass, shift, order), float(renyi(event, [order])[0])
            assert exact <= bound * (1 + 1e-9)
            if variance >= 4 and mechanism == "discrete_gaussian":
                assert bound <= exact * 1.001
            # Several coordinates are independent: the divergences of (shift, ..., shift) add.
            event = replace(event, length=3, sensitivity_squared=3 * shift**2)
            assert 3 * exact <= float(renyi(event, [order])[0]) * (1 + 1e-9)


def test_tau_is_needed() -> None:
    """The sum of three coarse discrete Gaussians diverges by a quarter more than one Gaussian of their variance."""
    mass = sum_of_shares("discrete_gaussian", 3, 0.15)
    event = release(sensitivity_squared=1, share_variance=0.15, shares=3, length=1)
    assert divergence(mass, 1, 4.0) > float(renyi(replace(event, mechanism="gaussian"), [4.0])[0]) * 1.2
    assert divergence(mass, 1, 4.0) <= float(renyi(event, [4.0])[0])


def test_skellam_by_hand() -> None:
    """Order 3, D^2 = 100 in 64 coordinates, so D1 = 80, and mu = 90 or 0.9: each branch of the minimum in turn."""
    many, few = release("skellam"), release("skellam", share_variance=0.09)
    assert float(renyi(many, [3.0])[0]) == pytest.approx(3 * 100 / 180 + (5 * 100 + 6 * 80) / (4 * 90**2), rel=1e-12)
    assert float(renyi(few, [3.0])[0]) == pytest.approx(3 * 100 / 1.8 + 3 * 80 / 1.8, rel=1e-12)


def test_discrete_gaussian_by_hand() -> None:
    """D^2 = 4 in 64 coordinates, so D1 = 4, and variance 1.2 in all: each branch of the minimum in turn."""
    made, distance = release(sensitivity_squared=4, share_variance=0.6, shares=2), 10.0 * math.exp(-0.6 * math.pi**2)
    grown = 3 / 2 * (4 / 1.2 + 2 * 4 * distance / math.sqrt(1.2) + 64 * distance**2)
    assert float(renyi(made, [3.0])[0]) == pytest.approx(grown, rel=1e-12)
    assert float(renyi(made, [50.0])[0]) == pytest.approx(50 * 4 / 2.4 + 64 * distance, rel=1e-12)


def test_skellam_is_bounded_at_integer_orders_only() -> None:
    assert np.isinf(renyi(release("skellam"), [2.5])[0])
    assert np.isfinite(renyi(release("skellam"), [2.0, 3.0])).all()


@pytest.mark.parametrize("mechanism", ["discrete_gaussian", "skellam"])
def test_epsilon_is_above_the_exact_trade_off_of_one_coordinate(mechanism: str) -> None:
    mass = sum_of_shares(mechanism, 4, 4.0)
    for delta in (1e-2, 1e-5):
        eps = epsilon([release(mechanism, sensitivity_squared=9, share_variance=4.0, shares=4, length=1)], delta)
        p, q = mass[:-3], mass[3:]
        assert np.maximum(p - math.exp(eps) * q, 0).sum() <= delta
        assert np.maximum(p - math.exp(eps / 2) * q, 0).sum() > delta, "the bound says nothing"


def test_mixed_releases_compose() -> None:
    parts = [release(), release("gaussian", sensitivity_squared=1, share_variance=4.0, shares=1), release("skellam")]
    whole = epsilon(parts, 1e-5)
    assert max(epsilon([part], 1e-5) for part in parts) < whole < sum(epsilon([part], 1e-5) for part in parts)


def test_a_bound_below_the_continuous_gaussian_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_level, "_by_renyi", lambda *_: 0.01)
    with pytest.raises(AccountingError, match="below the continuous"):
        epsilon([release()], 1e-5)


def test_calibration_uses_the_budget_and_not_more() -> None:
    def event(ratio: float) -> ClientRelease:
        return design(mechanism="skellam", bits=18, length=500, clients=50, holders=30, ratio=ratio).release(30)

    for spent in ([], [event(3.0)] * 4):
        ratio = calibrate(5.0, 1e-5, event, 10, spent)
        together = [*spent, *[event(ratio)] * 10]
        cost = PrivacyFilter(5.0, 1e-5).cost(together) if spent else epsilon(together, 1e-5)
        assert 5.0 * (1 - client_noise.SLACK) <= cost <= 5.0
    with pytest.raises(BudgetExceededError, match="is spent"):
        calibrate(1.0, 1e-5, event, 10, [event(2.0)] * 20)
    with pytest.raises(BudgetExceededError, match="no amount of noise"):
        calibrate(0.5, 1e-5, lambda _: release(), 100)
    with pytest.raises(ConfigError):
        calibrate(-1.0, 1e-5, event, 10)
    with pytest.raises(ConfigError):
        calibrate(1.0, 0.0, event, 10)


def test_settling_replaces_what_was_paid_for() -> None:
    paid, real = release(shares=6), release(shares=9, settles=True)
    assert settled([paid, real, paid]) == (release(shares=9), release(shares=6))
    assert settled([paid, paid]) == (release(shares=6, steps=2),)
    assert epsilon([paid, real], 1e-5) == epsilon([release(shares=9)], 1e-5) < epsilon([paid], 1e-5)


@pytest.mark.parametrize(
    "chain",
    [
        [release(settles=True)],
        [release(shares=6), release(shares=9, settles=True), release(shares=9, settles=True)],
        [release(shares=6), release(shares=5, settles=True)],
        [release(shares=6), release(shares=9, share_variance=10.0, settles=True)],
        [release(shares=6), release(shares=9, sensitivity_squared=99, settles=True)],
        [release(shares=6), release("skellam", shares=9, settles=True)],
        [release(shares=6), release(shares=9, steps=2, settles=True)],
    ],
    ids=["nothing before", "twice", "fewer shares", "more noise", "shorter vectors", "other noise", "other steps"],
)
def test_settling_cannot_make_anything_else_cheaper(chain: list[ClientRelease]) -> None:
    with pytest.raises(AccountingError):
        epsilon(chain, 1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"share_variance": 0.0}, {"share_variance": math.nan}, {"shares": 0}, {"sensitivity_squared": 0}, {"steps": 0}],
    ids=str,
)
def test_events_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        release(**changes)


def test_variance_is_what_the_ledger_says() -> None:
    scheme = design(mechanism="skellam", bits=16, length=10, clients=10, holders=10, ratio=1.0)
    assert Fraction(scheme.release(3).share_variance) == scheme.share_variance
