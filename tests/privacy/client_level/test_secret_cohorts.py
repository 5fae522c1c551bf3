"""Client-level noise of a trusted server whose cohorts are secret: its cost, its divisor, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from choral.errors import ConfigError
from choral.privacy import AdaptiveClip, ClientPrivacy, ClientPrivacyEngine, Ledger, PoissonSampledGaussian
from choral.privacy.accounting import client_level, record_level
from choral.privacy.accounting.events import ClientRelease, SampledClientRelease
from choral.privacy.accounting.other_accountants import epsilon_by_dp_accounting
from choral.privacy.client_level.central import CentralScheme
from choral.privacy.ledgers.spending import spent_by_clients

RATE, DELTA = 0.02, 1e-6


def sampled(ratio: float, steps: int = 1, rate: float = RATE) -> SampledClientRelease:
    release = CentralScheme(length=10, ratio=ratio, sample_rate=rate).release(1)
    assert isinstance(release, SampledClientRelease)
    return SampledClientRelease(
        **{name: getattr(release, name) for name in release.__struct_fields__ if name != "steps"}, steps=steps
    )


def test_the_cost_is_that_of_the_poisson_sampled_gaussian_mechanism() -> None:
    """Held against dp-accounting; and at q = 1 against the exact trade-off of the Gaussian mechanism."""
    cost = client_level.epsilon([sampled(1.3, steps=150), sampled(1.3, steps=50)], DELTA)
    gaussian = [PoissonSampledGaussian(sample_rate=RATE, noise_multiplier=1.3, steps=200)]
    assert cost == pytest.approx(record_level.epsilon(gaussian, DELTA), rel=1e-9)
    assert cost == pytest.approx(epsilon_by_dp_accounting(gaussian, DELTA), rel=1e-3)
    plain = ClientRelease(
        mechanism="gaussian", sensitivity_squared=1, share_variance=1.3**2, shares=1, length=10, steps=200
    )
    assert cost < 0.1 * client_level.epsilon([plain], DELTA)
    everybody = client_level.epsilon([sampled(1.3, steps=200, rate=1.0)], DELTA)
    assert everybody == pytest.approx(client_level.epsilon([plain], DELTA), rel=1e-3)


def test_with_sums_of_everybody_it_composes() -> None:
    plain = ClientRelease(mechanism="gaussian", sensitivity_squared=1, share_variance=25.0, shares=1, length=10)
    both = client_level.epsilon([sampled(1.3, steps=100), plain, plain], DELTA)
    one = PoissonSampledGaussian(sample_rate=1.0, noise_multiplier=5.0, steps=2)
    known = [PoissonSampledGaussian(sample_rate=RATE, noise_multiplier=1.3, steps=100), one]
    assert both == pytest.approx(epsilon_by_dp_accounting(known, DELTA), rel=1e-3)
    orders = (2.0, 8.0, 32.0)
    everybody = client_level.renyi(sampled(1.3, rate=1.0), orders)
    assert np.all(client_level.renyi(sampled(1.3), orders) < everybody)
    assert everybody == pytest.approx(client_level.renyi(plain, orders) * 25 / 1.69)


def test_the_engine_needs_less_noise_and_divides_by_the_number_expected(tmp_path: Path) -> None:
    promise = {"epsilon": 2.0, "delta": DELTA, "noise": "central"}
    sizes: dict[str, Any] = {"clients": 5000, "length": 3, "rounds": 100}
    whole = ClientPrivacyEngine(ClientPrivacy(**promise), ledger=Ledger(), **sizes)
    path = tmp_path / "clients.jsonl"
    engine = ClientPrivacyEngine(ClientPrivacy(**promise, sample_rate=RATE), ledger=Ledger(path), **sizes)
    assert engine.ratio < 0.2 * whole.ratio
    for survivors in (80, 120):
        total = np.full(3, round(50 / engine.scheme.grid), dtype=np.int64)
        mean = np.asarray(engine.begin().decode(total, survivors=survivors))
        assert np.abs(mean - 50 / 100).max() < 6.5 * engine.ratio / 100 < 0.08  # fails once in 1e9; of 80 it is 0.625
    spent = spent_by_clients(Ledger(path), DELTA)
    assert (spent.steps, spent.sample_rate) == (2, RATE)
    assert spent.accountant == client_level.SAMPLED_ACCOUNTANT
    assert 1.9 < spent.guarantee <= 2.0
    assert '"sampled_clients"' in path.read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise": "distributed"}, "whoever runs the rounds knows who was selected"),
        ({"noise": "local"}, "whoever runs the rounds knows who was selected"),
        ({"clip": AdaptiveClip()}, "how many were selected"),
        ({"min_survivors": 5}, "how many were selected"),
        ({"sample_rate": 0.0}, "expected a number between 0 and 1"),
        ({"sample_rate": 1.0}, "expected a number between 0 and 1"),
        ({"sample_rate": math.nan}, "expected a number between 0 and 1"),
        ({"sample_rate": True}, "expected a number between 0 and 1"),
    ],
)
def test_a_promise_that_nobody_can_keep_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ClientPrivacy(**({"epsilon": 1.0, "delta": DELTA, "noise": "central", "sample_rate": RATE} | changes))


@pytest.mark.parametrize(
    "changes", [{"sample_rate": 0.0}, {"sample_rate": 1.5}, {"mechanism": "skellam"}, {"shares": 2}, {"settles": True}]
)
def test_an_event_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    plain = {"mechanism": "gaussian", "sensitivity_squared": 1, "share_variance": 1.0, "shares": 1, "length": 3}
    with pytest.raises(ConfigError):
        SampledClientRelease(**(plain | {"sample_rate": RATE} | changes))
