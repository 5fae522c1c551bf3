"""Sums of shares of noise in ledgers: what they cost by every accountant, in plans, and beside other events."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import norm

from choral.errors import ConfigError
from choral.privacy import Ledger, PoissonSampledGaussian, PoissonSampledShares
from choral.privacy.accounting import other_accountants, record_level, renyi
from choral.privacy.accounting.events import REPLACE_ONE, ZERO_OUT, PlannedEvents, ReleasePlan, as_gaussians
from choral.privacy.accounting.filters import RESERVE, PrivacyFilter
from choral.privacy.accounting.record_noise import noise_multiplier
from choral.privacy.errors import BudgetExceededError
from choral.privacy.ledgers.plans import RemainingBudget, guarantee

DELTA = 1e-5


def shares(**changes: Any) -> PoissonSampledShares:
    settings: dict[str, Any] = {
        "sample_rate": 64 / 1437,
        "share": 1.06,
        "honest": 8,
        "parties": 10,
        "deviation": 8.48,
        "length": 2410,
        "stretch": 2.0**-10,
        "failure": 2.0**-40,
        "steps": 300,
    }
    return PoissonSampledShares(**{**settings, **changes})


def gaussian(event: PoissonSampledShares) -> PoissonSampledGaussian:
    """What an ideal sum of this event would be, written out."""
    sigma = event.share * math.sqrt(event.honest) / (1 + event.stretch)
    return PoissonSampledGaussian(sample_rate=event.sample_rate, noise_multiplier=sigma, steps=event.steps)


def test_a_share_counts_for_the_unknown_ones_together_and_for_the_stretch() -> None:
    assert shares().noise_multiplier == pytest.approx(1.06 * math.sqrt(8) / (1 + 2.0**-10))
    assert shares(honest=2).noise_multiplier == pytest.approx(shares().noise_multiplier / 2)


@pytest.mark.parametrize("relation", [ZERO_OUT, REPLACE_ONE])
def test_every_accountant_prices_it_as_the_gaussian_at_what_is_left_of_delta(relation: str) -> None:
    event = shares(failure=1e-8)
    ideal, left = gaussian(event), DELTA - 300 * 1e-8
    for cost in (
        record_level.epsilon,
        record_level.epsilon_rdp,
        other_accountants.epsilon_by_dp_accounting,
        record_level.bounds,
    ):
        found, expected = (cost([e], d, neighbours=relation) for e, d in ((event, DELTA), (ideal, left)))
        assert found == expected
        assert found != cost([ideal], DELTA, neighbours=relation)
    assert other_accountants.epsilon_by_prv([event], DELTA) == other_accountants.epsilon_by_prv([ideal], left)
    assert other_accountants.epsilon_on_grid_of_others([event], DELTA) == other_accountants.epsilon_on_grid_of_others(
        [ideal], left
    )
    assert (renyi.renyi(event, [2, 8], neighbours=relation) == renyi.renyi(ideal, [2, 8], neighbours=relation)).all()


def test_renyi_is_above_pld_and_one_step_of_all_records_is_the_gaussian_mechanism() -> None:
    assert record_level.epsilon([shares()], DELTA) < record_level.epsilon_rdp([shares()], DELTA)
    once = shares(sample_rate=1.0, steps=1, stretch=0.0)
    eps, mu = record_level.epsilon([once], DELTA), 1 / (1.06 * math.sqrt(8))
    delta = norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)
    assert delta == pytest.approx(DELTA - 2.0**-40, rel=1e-5)


def test_beside_other_events_and_when_something_is_spent_before() -> None:
    local = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=2.0, steps=10)
    both = record_level.epsilon([local, shares()], DELTA)
    assert both == record_level.epsilon([local, gaussian(shares())], DELTA - 300 * 2.0**-40)
    assert as_gaussians([local], DELTA) == ((local,), DELTA)
    found = noise_multiplier(both + 1, DELTA, 0.1, 10, [shares()], fixed=True)
    after = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=found, steps=10)
    assert record_level.epsilon([shares(), after], DELTA) <= both + 1


def test_failures_that_use_up_delta_are_refused() -> None:
    with pytest.raises(ConfigError, match="use up"):
        record_level.epsilon([shares(failure=DELTA / 300)], DELTA)
    assert math.isfinite(record_level.epsilon([shares(failure=0.9 * DELTA / 300)], DELTA))


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"share": 0.0},
        {"share": math.nan},
        {"honest": 0},
        {"honest": 11},
        {"stretch": -0.1},
        {"stretch": 1.0},
        {"failure": -1e-9},
        {"failure": 1.0},
        {"steps": 0},
        {"length": 0},
        {"deviation": 0.5},
        {"deviation": 2.5},  # within the theorem, but its cost is more than what accountants may leave out
        {"parties": True},
    ],
)
def test_what_it_may_not_hold(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        shares(**changes)


@pytest.mark.parametrize(
    "changes", [{"sample_rate": 1.0}, {"honest": 10}, {"share": 0.5}, {"stretch": 0.0, "failure": 0.0}]
)
def test_the_last_that_it_may_hold(changes: dict[str, Any]) -> None:
    made = shares(**changes)
    assert all(getattr(made, name) == value for name, value in changes.items())


def test_a_ledger_keeps_it_and_reads_it_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "north.jsonl")
    ledger.bind("north", DELTA)
    one = shares(steps=1)
    ledger.append(one, after=0, plan=ReleasePlan(epsilon=2.0, parts=(PlannedEvents(event=one, times=300),)))
    ledger.append(one, after=1)
    again = Ledger(tmp_path / "north.jsonl", holder="north")
    assert again.events == (one, one)
    assert b'"type":"poisson_shares"' in (tmp_path / "north.jsonl").read_bytes()
    assert again.epsilon(DELTA) == record_level.epsilon([shares(steps=2)], DELTA)
    assert guarantee(again) == record_level.epsilon([shares()], DELTA)


def test_a_filter_sets_aside_a_part_of_delta_for_failures() -> None:
    rule = PrivacyFilter(3.0, DELTA)
    event = shares()
    found = rule.cost([event])
    assert found == pytest.approx(
        PrivacyFilter(3.0, DELTA).cost([gaussian(event)]) + math.log(1 / (1 - RESERVE)) / 10, abs=0.02
    )
    assert found > rule.cost([gaussian(event)])
    most = RESERVE * DELTA / 300
    assert math.isfinite(rule.cost([shares(failure=0.999 * most)]))
    assert rule.cost([shares(failure=1.001 * most)]) == math.inf
    assert rule.cost([event, gaussian(event)]) < math.inf
    assert rule.cost([gaussian(event), event]) == math.inf  # nothing was set aside when the ledger began


def test_a_second_plan_fits_only_where_the_first_was_of_shares() -> None:
    local = PoissonSampledGaussian(sample_rate=0.01, noise_multiplier=2.0, steps=10)
    for first, more, fits in ((shares(steps=10), local, True), (local, shares(steps=10), False)):
        ledger = Ledger()
        ledger.bind("north", DELTA)
        ledger.append(first, after=0, plan=ReleasePlan(epsilon=3.0, parts=(PlannedEvents(event=first, times=1),)))
        remaining = RemainingBudget.on(ledger, 3.0, DELTA)
        if fits:
            remaining.check([more])
        else:
            with pytest.raises(BudgetExceededError):
                remaining.check([more])
