"""A coordinator that looks at what the first job released before it makes up the second, whose noise a site's ledger
chooses: the worst second job at each outcome keeps all of it within what is promised.

The first job is one release of all records, an exact Gaussian. Its losses are integrated over; the second job's
divergence comes from discretisations that only err downwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from scipy.stats import norm
from site_federation import PROMISE, Direct, Federation, offer_for, served

from choral.jobs.settings import PrivacySettings, Settings
from choral.network.site.budget import budget_of, open_ledger, spent_of
from choral.network.site.terms import promise_of, terms_of
from choral.privacy.accounting import record_noise
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.trainers.task.settings import Training

PROMISED, DELTA, FIRST = 3.0, 1e-3, 2.2
CHOICES = [(30, 1), (10, 1), (3, 1), (1, 1), (10, 4), (3, 10), (1, 20), (30, 5)]  # batch size and rounds


def job(federation: Federation, title: str, epsilon: float, batch: int, rounds: int) -> Settings:
    settings = federation.settings(
        privacy=PrivacySettings(epsilon=epsilon, delta=DELTA),
        training=Training(rounds=rounds, batch_size=batch, learning_rate=0.1),
    )
    return replace(settings, serve=replace(settings.serve, job=title))


def divergence(rate: float, noise: float, steps: int) -> Callable[[np.ndarray], np.ndarray]:
    """A lower bound on the hockey-stick divergence, as a function of epsilons that fall."""
    one = privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        sampling_prob=rate,
        pessimistic_estimate=False,
        use_connect_dots=False,
        value_discretization_interval=1e-3,
    )
    removed = (one.self_compose(steps) if steps > 1 else one)._pmf_remove
    return lambda falling: np.asarray(removed.get_delta_for_epsilon(falling[::-1]))[::-1]


def delta_of_who_looks(first: float, seconds: list[tuple[float, float, int]]) -> float:
    """At the promise: of the first Gaussian and then the worst, at its loss, of these (rate, noise, steps)."""
    edges = np.linspace(-9.0, 9.0, 3001)
    rest = PROMISED - (1.0 / (2.0 * first * first) + edges[:-1] / first)
    worst = np.max([divergence(*each)(rest) for each in seconds], axis=0)
    return float(worst @ np.diff(norm.cdf(edges)))


def test_whoever_chooses_the_second_job_by_the_firsts_outcome_stays_within_the_promise(tmp_path: Path) -> None:
    names = ("alpha", "beta", "gamma")  # of 30 records each
    federation = Federation(tmp_path, names=names, promise=PROMISE.replace("UNIT", "record"))
    served(Direct(federation), job(federation, "first", FIRST, 30, 1))
    folder = federation.site("alpha")
    ledger, data = open_ledger(folder, "points"), folder.settings.data["points"]
    (event,) = ledger.events
    assert isinstance(event, PoissonSampledGaussian)
    assert (event.sample_rate, event.steps) == (1.0, 1)
    seconds, careless = [], []
    for batch, rounds in CHOICES:
        offer = offer_for(federation, job(federation, f"second-{batch}-{rounds}", PROMISED, batch, rounds))
        terms = terms_of(offer.terms)
        asked = promise_of(terms.privacy, len(federation.names))
        rate, steps = batch / data.records, -(-data.records // batch) * rounds
        noise = budget_of(data, ledger, asked, terms, offer.settings).noise
        assert noise is not None
        seconds.append((rate, noise, steps))
        fixed = record_noise.noise_multiplier(PROMISED, DELTA, rate, steps, [event], slack=1e-4, fixed=True)
        assert fixed <= noise
        careless.append((rate, fixed, steps))
    at_sites, by_fixed_prices = (delta_of_who_looks(event.noise_multiplier, each) for each in (seconds, careless))
    assert at_sites <= DELTA < by_fixed_prices
    assert spent_of(ledger) <= PROMISED
