"""The white-box bound covers the truth: 200 runs each of the real sampling and noise, epsilon from the accountant."""

from __future__ import annotations

import numpy as np
import pytest

from choral.audits.lower_bounds.separation import likelihood_scores, separation, white_box_bound
from choral.audits.lower_bounds.trade_off import epsilon_of_mu
from choral.errors import ConfigError
from choral.privacy import Ledger
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.ledgers.spending import spent_by_records

CANARIES, DELTA = 1000, 1e-5


def scores(rate: float, noise: float, steps: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Of one run of DP-SGD in which each canary has a coordinate of its own: exactly its law."""
    inside = rng.random(CANARIES) < 0.5
    drawn = (rng.random((steps, CANARIES)) < rate) & inside
    released = drawn + rng.normal(size=(steps, CANARIES)) * noise
    return likelihood_scores(released, rate=rate, noise=noise), inside


def truth(rate: float, noise: float, steps: int) -> float:
    ledger = Ledger()
    ledger.bind("data", DELTA)
    ledger.append(PoissonSampledGaussian(sample_rate=rate, noise_multiplier=noise, steps=steps), after=0)
    return spent_by_records(ledger, DELTA).epsilon


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "epsilon", "least"),
    [
        (0.1, 3.943, 100, 1.0, 0.4),
        (0.1, 1.386, 100, 4.0, 2.5),
        (0.1, 0.936, 100, 8.0, 3.5),
        (1.0, 10.81, 100, 4.0, 2.5),
    ],
)
def test_it_covers_the_truth(rate: float, noise: float, steps: int, epsilon: float, least: float) -> None:
    """At most 5 % may be above: of 200, more than 20 have probability 6e-4 at 5 %, and here nearly none are."""
    true = truth(rate, noise, steps)
    assert true == pytest.approx(epsilon, rel=0.01)
    rng = np.random.default_rng(11)
    found = np.array([white_box_bound(*scores(rate, noise, steps, rng), delta=DELTA).epsilon for _ in range(200)])
    assert (found > true).sum() <= 20
    assert np.median(found) >= least, np.median(found)


def test_of_noise_alone_it_is_positive_one_time_in_twenty() -> None:
    """Of 400, Binomial(400, .05) lies in 6 to 36 but for 1e-3; the bound is exact, so it is not far below either."""
    rng = np.random.default_rng(12)
    found = [separation(rng.normal(size=300), rng.random(300) < 0.5) for _ in range(400)]
    assert 6 <= sum(mu > 0.0 for mu in found) <= 36


def test_the_confidence_is_exact_for_two_normal_samples() -> None:
    """The share of bounds above the true separation is 5 %: of 400, 6 to 36 but for 1e-3."""
    rng = np.random.default_rng(13)
    above = 0
    for _ in range(400):
        inside = rng.random(300) < 0.5
        above += separation(rng.normal(size=300) + 0.9 * inside, inside) > 0.9
    assert 6 <= above <= 36


def test_the_assumption_is_printed_and_bad_scores_are_refused() -> None:
    rng = np.random.default_rng(14)
    bound = white_box_bound(rng.normal(size=100), np.arange(100) % 2 == 0, delta=DELTA)
    assert "normal and independent" in bound.assumptions[0]
    assert bound.ceiling > 100.0
    assert epsilon_of_mu(1.0, DELTA) == pytest.approx(4.38, abs=0.01)
    with pytest.raises(ConfigError, match="expected"):
        likelihood_scores(np.zeros(5), rate=0.1, noise=1.0)
    with pytest.raises(ConfigError, match="do not vary"):
        separation(np.zeros(100), np.arange(100) % 2 == 0)
    with pytest.raises(ConfigError, match="ten finite"):
        separation(np.arange(12.0), np.arange(12) < 3)
    with pytest.raises(ConfigError, match="ten finite"):
        separation(np.full(100, np.nan), np.arange(100) % 2 == 0)
