"""The plan of banded correlated noise in shares: sized for the fewest survivors, and refused where it is not proved."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from scipy.linalg import toeplitz

from choral.errors import ConfigError
from choral.privacy import BandedPlan, CorrelatedPrivacy, Ledger, Privacy, PrivacyError, SharesParty, SharesTerms
from choral.privacy.accounting import record_level
from choral.privacy.accounting.events import REPLACE_ONE, PoissonSampledGaussian
from choral.privacy.ledgers.plans import RemainingBudget
from choral.privacy.record_shares.plan import plan_shares
from choral.privacy.record_shares.refusals import refuse_broken_promise, refuse_weak_sum
from choral.privacy.record_shares.terms import SECURE_SUM_FAILURE

DELTA = 1e-4


def promise(**changes: Any) -> CorrelatedPrivacy:
    settings: dict[str, Any] = {"epsilon": 2.0, "delta": DELTA, "mechanism": "banded", "bands": 4}
    return CorrelatedPrivacy(**settings | changes, noise="distributed")


def terms(**changes: Any) -> SharesTerms:
    settings: dict[str, Any] = {
        "records": 400,
        "batch_size": 50,
        "steps": 20,
        "parties": 10,
        "min_survivors": 9,
        "length": 100,
        "most_records": 60,
    }
    return SharesTerms(**settings | changes)


def planned(**changes: Any) -> BandedPlan:
    plan = plan_shares(promise(), terms(**changes))
    assert isinstance(plan, BandedPlan)
    return plan


@pytest.mark.parametrize(("survivors", "colluders"), [(9, 1), (6, 2), (10, 1)])
def test_noise_is_sized_for_the_honest_among_the_fewest_survivors(survivors: int, colluders: int) -> None:
    """h shares in each row and no more are counted on; and the promise is used up but for its slack."""
    plan = plan_shares(promise(colluders=colluders), terms(min_survivors=survivors))
    assert isinstance(plan, BandedPlan)
    honest = survivors - colluders
    assert plan.honest == plan.event.honest == honest
    assert plan.event.share == pytest.approx(plan.noise_multiplier / math.sqrt(honest))
    least = plan.share * math.sqrt(honest) / math.hypot(*plan.coefficients)  # of one participation, of three
    cost = record_level.epsilon([PoissonSampledGaussian(sample_rate=1.0, noise_multiplier=least, steps=3)], DELTA)
    assert 0.99 * 2.0 < cost <= 2.0
    assert plan.epsilon(DELTA) <= 2.0
    fewer = dataclasses.replace(plan, terms=terms(min_survivors=survivors - 1), noise_multiplier=plan.noise_multiplier)
    lacking = dataclasses.replace(fewer, noise_multiplier=plan.share * math.sqrt(honest - 1))
    assert lacking.epsilon(DELTA) > 2.0  # the same shares, one party less


def test_each_pass_is_counted_once_and_a_part_of_one_as_a_whole() -> None:
    """T = 16 steps of 8 a pass: twice; 17: three times, as much as 24."""
    noise = {steps: planned(steps=steps).noise_multiplier for steps in (16, 17, 24)}
    assert noise[16] < noise[17]
    norm = {steps: math.hypot(*planned(steps=steps).coefficients) for steps in noise}
    assert noise[17] / norm[17] == pytest.approx(noise[24] / norm[24], rel=2e-3)
    assert noise[17] / norm[17] == pytest.approx(math.sqrt(1.5) * noise[16] / norm[16], rel=2e-3)


def test_replacing_one_takes_twice_the_noise() -> None:
    zeroed = planned()
    replaced = plan_shares(promise(neighbours=REPLACE_ONE), terms())
    assert replaced.noise_multiplier == pytest.approx(2 * zeroed.noise_multiplier, rel=2e-3)


def test_batches_rows_and_failures_are_those_of_fixed_batches() -> None:
    plan = planned()
    assert plan.separation == 8
    assert plan.rows == 8  # of 60 records the most in one of eight batches
    assert plan.event.failure == SECURE_SUM_FAILURE  # nothing is drawn that could pass a cap
    assert planned(records=401).separation == 9


def test_the_grid_is_as_fine_as_the_norm_of_c_asks_for() -> None:
    """r over |C| is 8 at least, |C| computed; the event has a lower bound of it."""
    plan = planned()
    c = toeplitz(np.r_[plan.coefficients, np.zeros(36)], np.zeros(40))
    least = plan.grid.deviation(plan.share) / float(np.linalg.norm(c, 2))
    assert least >= plan.event.deviation >= 8.0


def test_no_noise_that_can_be_drawn_passes_the_bound() -> None:
    """The largest w for |z| <= 13.5 is 13.5 times the largest row sum of |C^-1|, computed by the dense inverse."""
    plan = planned()
    c = toeplitz(np.r_[plan.coefficients, np.zeros(16)], np.zeros(20))
    gain = float(np.abs(np.linalg.inv(c)).sum(axis=1).max())
    assert gain > 1.5
    most = 13.5 * gain * plan.grid.deviation(plan.share) + plan.rows * 2.0**plan.grid.coarse
    assert most <= plan.bound <= 1.01 * most + 3


def test_a_record_that_is_added_would_move_others_and_so_nothing_is_said_of_it() -> None:
    drawn = plan_shares(Privacy(2.0, DELTA, noise="distributed"), terms(declared=True))
    assert "add or remove one record as well" in drawn.neighbours()
    assert planned(declared=True).neighbours() == "zero out one record"


def test_it_is_written_down_and_read_again() -> None:
    plan = planned()
    fields = dataclasses.asdict(plan)
    again = BandedPlan(**{**fields, "terms": SharesTerms(**fields["terms"]), "coefficients": [*plan.coefficients]})
    assert again == plan
    assert again.event == plan.event


def test_bands_are_as_many_as_are_asked_for_or_fit() -> None:
    assert len(planned().coefficients) == 4
    left_open = plan_shares(promise(bands=None), terms())
    assert isinstance(left_open, BandedPlan)
    assert len(left_open.coefficients) == 8
    with pytest.raises(ConfigError, match="bands is 9, expected 1 to 8"):
        plan_shares(promise(bands=9), terms())
    with pytest.raises(ConfigError, match="every record takes part in every step"):
        plan_shares(promise(bands=1), terms(batch_size=400))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coefficients": (1.0, 0.2, 0.3)}, "numbers that do not grow"),
        ({"coefficients": tuple(0.9**k for k in range(9))}, "C has 9 bands, and a record takes part every 8 steps"),
        ({"coefficients": (0.5,)}, "expected 1 and then"),
    ],
)
def test_other_matrices_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(planned(), **changes)


def test_a_party_refuses_a_plan_of_another_kind_of_noise_or_of_other_bands() -> None:
    plan, poisson = planned(), plan_shares(Privacy(2.0, DELTA, noise="distributed"), terms())
    refuse_broken_promise(promise(), plan)
    refuse_broken_promise(promise(bands=None), plan)
    with pytest.raises(PrivacyError, match="the plan has 4 bands, and 3 are promised"):
        refuse_broken_promise(promise(bands=3), plan)
    with pytest.raises(PrivacyError, match="fixed batches and correlated noise, and the promise of batches that are"):
        refuse_broken_promise(Privacy(2.0, DELTA, noise="distributed"), plan)
    with pytest.raises(PrivacyError, match="drawn at random and independent noise, and the promise of fixed"):
        refuse_broken_promise(promise(), poisson)
    with pytest.raises(PrivacyError, match="costs epsilon"):
        refuse_broken_promise(promise(), dataclasses.replace(plan, noise_multiplier=0.97 * plan.noise_multiplier))
    with pytest.raises(PrivacyError, match="may be opened over 8 parties"):
        refuse_weak_sum(plan, parties=10, min_survivors=8, corrupt=1)
    with pytest.raises(PrivacyError, match="withstands 0 corrupt parties"):
        refuse_weak_sum(plan, parties=10, min_survivors=9, corrupt=0)


def test_what_survivors_would_have_cost_is_that_of_the_record_with_the_fewest() -> None:
    """Three passes: all in full but for three sums, which one record may be in."""
    plan = planned()
    full, fewest = plan.realised([10] * 20, DELTA), plan.realised([9] * 20, DELTA)
    assert full < plan.realised([10] * 17 + [9] * 3, DELTA) == fewest <= 2.0
    with pytest.raises(ConfigError, match="other than 9 to 10 survivors"):
        plan.realised([8], DELTA)


def test_a_ledger_that_has_spent_asks_for_more_noise() -> None:
    ledger = Ledger()
    SharesParty(promise(epsilon=0.3), plan_shares(promise(epsilon=0.3), terms()), holder="a", ledger=ledger)
    small = plan_shares(promise(epsilon=0.3), terms(steps=8))
    ledger.append(small.event, after=0, plan=RemainingBudget.on(ledger, 0.3, DELTA).plan(small.event, 8))
    left = RemainingBudget.on(ledger, 2.0, DELTA)
    after = plan_shares(promise(), terms(), ledgers=[left])
    assert after.noise_multiplier > 1.02 * planned().noise_multiplier
    SharesParty(promise(), after, holder="a", ledger=ledger)


def test_more_steps_than_a_bound_can_be_computed_of_are_refused_before_memory_is() -> None:
    """What stands in a stranger's offer is such a plan before anybody has agreed to it."""
    plan = planned()
    with pytest.raises(ConfigError, match=r"steps is 2147483648, expected at most 1048576"):
        dataclasses.replace(plan, terms=terms(steps=1 << 31))
    with pytest.raises(ConfigError, match=r"steps is 2147483648"):
        planned(steps=1 << 31)
    assert dataclasses.replace(plan, terms=terms(steps=1 << 20)).bound > 0
