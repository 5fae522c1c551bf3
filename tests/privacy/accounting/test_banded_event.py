"""Steps of correlated noise in shares on a ledger: what they cost, against exact Gaussians and brute force."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from choral.errors import ConfigError
from choral.privacy import BandedShares, Ledger, LedgerError, PlannedEvents, PoissonSampledGaussian, ReleasePlan
from choral.privacy.accounting import record_level
from choral.privacy.accounting.banded_shares import participations
from choral.privacy.accounting.events import REPLACE_ONE, ZERO_OUT, as_gaussians
from choral.privacy.accounting.filters import PrivacyFilter

DELTA = 1e-5
COEFFICIENTS = (1.0, 0.5, 0.3)


def step(number: int = 1, steps: int = 1, **changes: Any) -> BandedShares:
    settings: dict[str, Any] = {
        "coefficients": COEFFICIENTS,
        "separation": 5,
        "share": 2.0,
        "honest": 4,
        "parties": 6,
        "deviation": 10.0,
        "length": 30,
        "stretch": 1e-3,
        "failure": 2.0**-40,
    }
    return BandedShares(**settings | changes, number=number, steps=steps)


def exact_epsilon(mu: float, delta: float) -> float:
    """The epsilon of a Gaussian mechanism of sensitivity over noise mu (Balle and Wang 2018, theorem 8)."""
    return float(
        brentq(lambda e: norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta, 0.0, 100.0)
    )


def test_a_record_is_in_the_steps_of_one_remainder_by_brute_force() -> None:
    """Any steps of any ledger, in any order, twice or with holes: 300 at random against counting one by one."""
    generator = np.random.default_rng(3)
    for _ in range(300):
        m = int(generator.integers(3, 7))
        known = [
            step(int(generator.integers(1, 20)), int(generator.integers(1, 17)), separation=m)
            for _ in range(generator.integers(1, 6))
        ]
        counts = [0] * m
        for event in known:
            for number in range(event.number, event.number + event.steps):
                counts[number % m] += 1
        assert [count for _, count in participations(known)] == [max(counts)]


def test_events_of_a_stranger_are_counted_without_walking_their_steps() -> None:
    """A ledger may come from anybody; each step looked at, these would take a week."""
    many, m = 10**15, 10**12
    event = step(m - 3, many + 7, separation=m)  # remainders m - 3 to m - 1, then 0 to 3, in one pass more
    other = step(2, 10, separation=m)
    assert participations([event]) == [(event.kind, 1001)]
    assert participations([event, other]) == [(event.kind, 1002)]
    assert participations([event, step(4, 10, separation=m)]) == [(event.kind, 1001)]


def test_unlike_steps_are_counted_each_for_itself() -> None:
    found = participations([step(1), step(2), step(1, share=3.0), step(6), step(2, share=3.0)])
    assert sorted((event.share, count) for event, count in found) == [(2.0, 2), (3.0, 1)]


@pytest.mark.parametrize("rows", [1, 4, 5, 6, 14, 15, 16])
def test_sensitivity_is_that_of_c_over_all_records(rows: int) -> None:
    """The largest |C x| over records of each place, contributions in any directions: never above |c| sqrt(k).

    With equality where the last participation is so early that its column of C is whole.
    """
    c = sum(np.diag(np.full(rows - lag, value), -lag) for lag, value in enumerate(COEFFICIENTS) if lag < rows)
    largest = 0.0
    for first in range(5):
        places = list(range(first, rows, 5))
        for signs in itertools.product((1.0, -1.0), repeat=len(places)):
            x = np.zeros(rows)
            x[places] = signs
            largest = max(largest, float(np.linalg.norm(c @ x)))
    ((event, count),) = participations([step(1, rows)])
    assert largest <= event.norm * math.sqrt(count) * (1 + 1e-12)
    if rows % 5 in (0, 3, 4):
        assert largest == pytest.approx(event.norm * math.sqrt(count))


@pytest.mark.parametrize(("steps", "times"), [(1, 1), (5, 1), (6, 2), (30, 6)])
@pytest.mark.parametrize(("neighbours", "distance"), [(ZERO_OUT, 1.0), (REPLACE_ONE, 2.0)])
def test_it_costs_one_gaussian_of_the_unknown_noise(steps: int, times: int, neighbours: str, distance: float) -> None:
    """Against the exact formula at delta less the failures, from one event of all steps and from one event a step."""
    mu = distance * math.sqrt(times * (1 + 0.25 + 0.09)) * 1.001 / (2.0 * math.sqrt(4))
    expected = exact_epsilon(mu, DELTA - steps * 2.0**-40)
    for events in ([step(1, steps)], [step(number) for number in range(1, steps + 1)]):
        assert record_level.epsilon(events, DELTA, neighbours=neighbours) == pytest.approx(expected, rel=1e-6)
        low, high = record_level.bounds(events, DELTA, neighbours=neighbours)
        assert low <= expected <= high * (1 + 1e-9)


def test_failures_of_each_step_are_taken_off_delta() -> None:
    _, left = as_gaussians([step(1, 7, failure=1e-7), step(8, failure=1e-7)], DELTA)
    assert left == pytest.approx(DELTA - 8e-7)


def test_the_filter_counts_a_ledger_as_what_it_costs_and_not_step_by_step() -> None:
    rule = PrivacyFilter(3.0, DELTA)
    one = PoissonSampledGaussian(sample_rate=1.0, noise_multiplier=step().noise_multiplier, steps=2)
    several = [step(number) for number in range(1, 9)]
    plain, counted = rule.cost([one]), rule.cost(several)
    assert plain < counted < 1.05 * plain  # a sixteenth of delta is set aside
    assert rule.cost([step(1, 8)]) == pytest.approx(counted)
    assert rule.cost([one, *several]) == math.inf  # after noise of another kind nothing was set aside


def test_a_plan_covers_its_steps_by_number_and_its_ledger_is_read_again(tmp_path: Path) -> None:
    planned = PlannedEvents(event=step(), times=12)
    assert planned.whole == (step(1, 12),)
    assert planned.covers(step(7))
    assert not planned.covers(step(7, share=2.1))
    with pytest.raises(ConfigError, match="number is 2, expected 1"):
        PlannedEvents(event=step(2), times=3)
    ledger = Ledger(tmp_path / "a.jsonl")
    ledger.bind("north", DELTA)
    ledger.append(step(1), after=0, plan=ReleasePlan(epsilon=3.0, parts=(planned,)))
    ledger.append(step(2), after=1)
    again = Ledger(tmp_path / "a.jsonl", holder="north")
    assert again.events == (step(1), step(2))
    assert b'"banded_shares"' in (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(LedgerError):
        again.append("banded", after=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"separation": 2}, "C has 3 bands, and a record takes part every 2 steps"),
        ({"coefficients": (2.0, 1.0)}, "coefficients are"),
        ({"coefficients": (1.0, -0.1)}, "coefficients are"),
        ({"share": 0.0}, "share is 0.0"),
        ({"honest": 7}, "honest is 7 of 6"),
        ({"stretch": 1.0}, "stretch is 1.0"),
        ({"failure": -1e-9}, "failure -1e-09"),
        ({"deviation": 2.0}, "too few for 6 parties"),
        ({"number": 0}, "number is 0"),
        ({"steps": 1.5}, "steps is 1.5"),
    ],
)
def test_what_is_no_such_step_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        step(**changes)
