"""The plan: its noise, its cost by two accountants, its cap, its bound, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy import stats

from choral.errors import ConfigError
from choral.privacy import AdaptiveClip, PerLayerClip, PoissonSampledGaussian, Privacy, PrivacyError
from choral.privacy.accounting import other_accountants, record_level
from choral.privacy.accounting.events import REPLACE_ONE, ZERO_OUT
from choral.privacy.errors import AccountingError
from choral.privacy.record_shares import plan as plan_module
from choral.privacy.record_shares.plan import ALSO_ADD_OR_REMOVE, plan_shares
from choral.privacy.record_shares.refusals import refuse_broken_promise, refuse_weak_sum
from choral.privacy.record_shares.terms import CAP_FAILURE, SharesTerms, rows_of

DELTA = 1e-5


def terms(**changes: Any) -> SharesTerms:
    """Digits, ten parties, eight honest survivors."""
    settings: dict[str, Any] = {
        "records": 1437,
        "batch_size": 64,
        "steps": 300,
        "parties": 10,
        "min_survivors": 9,
        "length": 2410,
        "most_records": 144,
    }
    return SharesTerms(**{**settings, **changes})


def promise(epsilon: float = 1.0, **changes: Any) -> Privacy:
    return Privacy(epsilon, DELTA, noise="distributed", **changes)


@pytest.mark.parametrize("relation", [ZERO_OUT, REPLACE_ONE])
def test_the_plan_costs_what_is_promised_and_no_less_than_a_thousandth_of_it(relation: str) -> None:
    plan = plan_shares(promise(neighbours=relation), terms())
    cost = plan.epsilon(DELTA, neighbours=relation)
    assert 0.998 <= cost <= 1.0
    whole = msgspec.structs.replace(plan.event, steps=300)
    assert cost <= record_level.epsilon_rdp([whole], DELTA, neighbours=relation)
    # From the figures alone: dp-accounting's own code, at delta less the failures.
    rate, sigma = 64 / 1437, plan.noise_multiplier / (1 + plan.event.stretch)
    ideal = PoissonSampledGaussian(sample_rate=rate, noise_multiplier=sigma, steps=300)
    left = DELTA - 300 * (2.0**-40 + 2.0**-60)
    assert other_accountants.epsilon_by_dp_accounting([ideal], left, 1e-4, neighbours=relation) <= 1.0


def test_the_noise_is_that_of_dp_sgd_on_the_pooled_records_but_for_a_thousandth() -> None:
    from choral.privacy.accounting.record_noise import noise_multiplier

    plan = plan_shares(promise(), terms())
    pooled = noise_multiplier(1.0, DELTA, 64 / 1437, 300)
    assert 1.0 < plan.noise_multiplier / pooled < 1.003
    assert plan.honest == 8
    assert plan.share == plan.noise_multiplier / math.sqrt(8)
    assert 8 <= plan.grid.deviation(plan.share) < 16


def test_failures_of_the_sum_and_of_the_cap_are_paid_for_out_of_delta() -> None:
    plan, failing = plan_shares(promise(), terms()), plan_shares(promise(), terms(failure=1e-8))
    assert plan.event.failure == 2.0**-40 + 2.0**-60
    assert failing.noise_multiplier > 1.005 * plan.noise_multiplier
    assert 0.998 <= failing.epsilon(DELTA) <= 1.0
    assert failing.epsilon(DELTA - 300 * 1e-8) > 1.0


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0, 4.0, 8.0])
def test_digits_take_at_most_eighteen_bits_and_the_sum_cannot_wrap(epsilon: float) -> None:
    for batch in (64, 128):
        plan = plan_shares(promise(epsilon), terms(batch_size=batch))
        assert 12 <= plan.bits <= 18
        assert 2 * plan.terms.parties * plan.bound < 2**plan.bits <= 4 * plan.terms.parties * plan.bound
    fashion = terms(
        records=60_000, batch_size=8192, steps=100, parties=100, min_survivors=91, length=39_700, most_records=600
    )
    assert plan_shares(promise(3.0), fashion).bits <= 22


@pytest.mark.parametrize(("records", "batch"), [(144, 64), (50, 64), (5, 64), (1, 64), (144, 1), (10**6, 64)])
def test_the_cap_is_the_least_that_is_passed_with_probability_two_to_the_minus_sixty(records: int, batch: int) -> None:
    rate = Fraction(batch, max(1437, records))
    rows = rows_of(records, rate)
    q = float(rate)

    def mass(k: int) -> float:
        choices = math.lgamma(records + 1) - math.lgamma(k + 1) - math.lgamma(records - k + 1)
        return math.exp(choices + k * math.log(q) + (records - k) * math.log1p(-q))

    reached = [math.fsum(mass(k) for k in range(least, min(records, least + 60) + 1)) for least in (rows, rows - 1)]
    assert rows == records or reached[0] <= CAP_FAILURE
    assert reached[1] > CAP_FAILURE
    # While fewer than `rows` of the *other* records are drawn, the cap does not bind, with one record more or less.
    assert rows == records or stats.binom.sf(rows - 1, records - 1, float(rate)) <= CAP_FAILURE


def test_where_every_record_is_taken_the_cap_is_all_of_them() -> None:
    assert rows_of(144, Fraction(1)) == 144
    plan = plan_shares(promise(), terms(batch_size=1437, steps=10))
    assert plan.terms.rows == 144
    assert plan.event.sample_rate == 1.0


def test_realised_figures_are_of_the_survivors_and_below_the_promise() -> None:
    plan = plan_shares(promise(), terms())
    worst = plan.epsilon(DELTA)
    assert plan.realised([9] * 300, DELTA) == pytest.approx(worst, rel=1e-9)
    full, mixed = plan.realised([10] * 300, DELTA), plan.realised([9, 10] * 150, DELTA)
    assert full < mixed < worst
    nine = msgspec.structs.replace(plan.event, honest=9, steps=300)
    assert full == record_level.epsilon([nine], DELTA)
    assert plan.realised([10] * 100, DELTA) < full
    for count in (8, 11):
        with pytest.raises(ConfigError, match="9 to 10"):
            plan.realised([10, count], DELTA)


def odometer(low: float, high: float, printed: float, points: int = 150) -> float:
    """The true delta of the figure that is printed at `printed` when one may stop anywhere between two mu^2: optimal
    stopping of the privacy loss, N(v / 2, v) once the information is v, by backward induction."""
    from scipy.optimize import brentq

    def exact(epsilon: float, v: float) -> float:
        mu = math.sqrt(v)
        return float(stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu))

    steps = np.linspace(low, high, points + 1)
    figures = [brentq(lambda e, v=v: exact(e, v) - printed, 0, 30) for v in steps]
    width = math.sqrt(steps[1] - steps[0]) / 4
    loss = np.arange(-3, 10, width)
    kernel = stats.norm.pdf(np.arange(-24, 25) * width, (steps[1] - steps[0]) / 2, 4 * width)
    kernel /= kernel.sum()

    def paid(figure: float) -> Any:
        return np.maximum(-np.expm1(np.minimum(figure - loss, 0.0)), 0.0)

    value = paid(figures[-1])
    for figure in figures[-2::-1]:
        padded = np.pad(value, 24, mode="edge")
        value = np.maximum(paid(figure), np.convolve(padded, kernel[::-1], "valid"))
    return float((value * stats.norm.pdf(loss, low / 2, math.sqrt(low)) * width).sum())


def test_a_figure_printed_afterwards_is_no_bound_where_survivors_may_be_picked() -> None:
    """Why `realised` says its condition: 1.5 and 3.5 times the delta that stands beside it."""
    assert odometer(1 / 1.11, 1.0, DELTA) == pytest.approx(1.5 * DELTA, rel=0.02)
    assert odometer(0.5, 1.0, DELTA) == pytest.approx(3.5 * DELTA, rel=0.02)
    assert odometer(0.999, 1.0, DELTA) < 1.06 * DELTA  # hardly a choice: what is printed is nearly true


def test_relations_that_hold_are_said() -> None:
    counted, declared = plan_shares(promise(), terms()), plan_shares(promise(), terms(declared=True))
    assert counted.neighbours() == ZERO_OUT
    assert declared.neighbours() == f"{ZERO_OUT}; {ALSO_ADD_OR_REMOVE}"
    assert declared.noise_multiplier == counted.noise_multiplier


def test_the_mean_is_in_gradients() -> None:
    plan = plan_shares(promise(max_grad_norm=0.3), terms(length=4))
    total = np.array([0, 1 << 10, -(1 << 10), 7], dtype=np.int64)
    assert plan.mean(total) == pytest.approx(total * (0.3 * 2.0**-plan.grid.coarse / 64))
    for wrong in (total[:3], total.astype(np.float64)):
        with pytest.raises(ConfigError, match="expected int64"):
            plan.mean(wrong)


@pytest.mark.parametrize(
    "changes",
    [
        {"records": 0},
        {"batch_size": 1438},
        {"steps": 0},
        {"parties": 8},
        {"min_survivors": 0},
        {"length": True},
        {"most_records": 0},
        {"declared": 1},
        {"failure": -1e-12},
        {"failure": 1e-3},
        {"most_records": 1 << 22, "records": 1 << 22, "batch_size": 1 << 22},
    ],
)
def test_terms_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        terms(**changes)


def test_promises_that_cannot_be() -> None:
    for wrong in ({"colluders": 0}, {"colluders": True}, {"colluders": 1.0}, {"noise": "central"}):
        with pytest.raises(ConfigError):
            Privacy(1.0, DELTA, **{"noise": "distributed", **wrong})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="AdaptiveClip"):
        promise(max_grad_norm=AdaptiveClip())
    with pytest.raises(ConfigError, match="each party adds for itself"):
        plan_shares(Privacy(1.0, DELTA), terms())
    with pytest.raises(ConfigError, match="at least 10"):
        plan_shares(promise(colluders=9), terms())
    with pytest.raises(ConfigError, match="delta"):
        plan_shares(promise(), terms(records=10**6, most_records=10**5))
    with pytest.raises(ConfigError, match="half of"):
        plan_shares(promise(), terms(failure=1e-7))


def test_a_plan_of_numbers_that_do_not_fit() -> None:
    plan = plan_shares(promise(), terms())
    for changes in ({"colluders": 9}, {"colluders": 0}, {"noise_multiplier": 0.0}, {"noise_multiplier": math.nan}):
        with pytest.raises(ConfigError):
            dataclasses.replace(plan, **changes)
    for clip in (0.0, math.nan, True):
        with pytest.raises(ConfigError):
            dataclasses.replace(plan, clip=clip)
    with pytest.raises(ConfigError, match="does not fit 63 bits"):
        dataclasses.replace(plan, terms=terms(parties=2**54))


def test_a_plan_of_less_noise_than_was_solved_for_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own cost decides, whatever calibration says."""
    solved = plan_module.noise_multiplier
    monkeypatch.setattr(plan_module, "noise_multiplier", lambda *args, **kw: 0.99 * solved(*args, **kw))
    with pytest.raises(AccountingError, match="costs more than it was calibrated for"):
        plan_shares(promise(), terms())


def test_each_party_holds_the_plan_against_its_own_promise() -> None:
    plan = plan_shares(promise(colluders=2), terms())
    refuse_broken_promise(promise(colluders=2), plan)
    refuse_broken_promise(promise(1.5), plan)
    for own, words in (
        (promise(0.99, colluders=2), "costs epsilon"),
        (promise(colluders=3), "3 are promised"),
        (promise(colluders=2, max_grad_norm=0.5), "clips to 1"),
        (promise(colluders=2, neighbours=REPLACE_ONE), "costs epsilon"),
        (promise(colluders=2, max_grad_norm=PerLayerClip(0.5)), "clips to 1"),
    ):
        with pytest.raises(PrivacyError, match=words):
            refuse_broken_promise(own, plan)
    less = dataclasses.replace(plan, noise_multiplier=0.99 * plan.noise_multiplier)
    with pytest.raises(PrivacyError, match="costs epsilon"):
        refuse_broken_promise(promise(colluders=2), less)
    with pytest.raises(ConfigError):
        refuse_broken_promise(Privacy(1.0, DELTA), plan)
    with pytest.raises(ConfigError, match="below 1/n"):
        refuse_broken_promise(Privacy(9.0, 1e-3, noise="distributed", colluders=2), plan)


def test_sums_that_are_weaker_than_the_plan_are_refused() -> None:
    plan = plan_shares(promise(), terms())
    refuse_weak_sum(plan, parties=10, min_survivors=9, corrupt=1)
    refuse_weak_sum(plan, parties=9, min_survivors=10, corrupt=4)
    for parties, survivors, corrupt, words in (
        (11, 9, 1, "11 parties"),
        (10, 8, 1, "8 honest ones and 1 colluders"),
        (10, 9, 0, "0 corrupt"),
    ):
        with pytest.raises(PrivacyError, match=words):
            refuse_weak_sum(plan, parties=parties, min_survivors=survivors, corrupt=corrupt)
    # Masked(corrupt=1, dropouts=1) of ten opens over six: five honest ones are not eight.
    with pytest.raises(PrivacyError, match="opened over 6"):
        refuse_weak_sum(plan, parties=10, min_survivors=6, corrupt=1)
