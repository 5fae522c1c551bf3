"""The intervals against scipy's own tests, a printed table, and their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from choral.audits.findings.schema import DataOwner
from choral.audits.findings.statistics import difference_interval, mean_interval, spreads

VALUES = [0.961, 0.972, 0.958, 0.969, 0.975]
OTHERS = [0.871, 0.902, 0.850, 0.893, 0.866, 0.881]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_mean_interval_matches_scipy(count: int) -> None:
    values = VALUES[:count]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, count - 1, loc=np.mean(values), scale=stats.sem(values))
    assert found.mean == pytest.approx(np.mean(values), rel=1e-14)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.values == tuple(values)


def test_mean_interval_uses_the_printed_table() -> None:
    # Student's t, two-sided 95 %: 4.303 at 2 degrees of freedom, 2.262 at 9 (any printed table).
    for values, t in (([1.0, 2.0, 3.0], 4.303), (list(range(10)), 2.262)):
        spread = np.std(values, ddof=1) / math.sqrt(len(values))
        assert mean_interval(values).half_width / spread == pytest.approx(t, abs=5e-4)


def test_one_seed_has_no_interval() -> None:
    found = mean_interval([0.9])
    assert (found.mean, found.low, found.high, found.half_width) == (0.9, None, None, None)
    found = difference_interval([0.9], VALUES)
    assert found.low is None
    assert found.high is None


def test_paired_difference_matches_the_paired_t_test() -> None:
    ours, theirs = OTHERS[:5], VALUES
    found = mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])
    oracle = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), rel=1e-10)


def test_unpaired_difference_matches_welch() -> None:
    found = difference_interval(OTHERS, VALUES)
    oracle = stats.ttest_ind(OTHERS, VALUES, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), rel=1e-10)
    assert found.mean == pytest.approx(np.mean(OTHERS) - np.mean(VALUES))
    assert found.values == ()


def test_equal_values_give_an_interval_of_no_width() -> None:
    assert mean_interval([0.5, 0.5, 0.5]).half_width == 0
    assert difference_interval([0.5, 0.5], [0.25, 0.25]).half_width == 0


def test_the_interval_covers_the_truth_in_95_of_100_draws() -> None:
    # 4000 draws: the count is Binomial(4000, .95); outside [.935, .965] is a 4-sigma event, and the seed is fixed.
    # The usual mistakes fail: a normal quantile covers 81 % at n = 3, dividing by n instead of n - 1 covers 91 %.
    draws = np.random.default_rng(7).normal(size=(4000, 3))
    found = [mean_interval(list(map(float, row))) for row in draws]
    covered = np.mean([estimate.low <= 0 <= estimate.high for estimate in found])
    assert 0.935 < covered < 0.965


@pytest.mark.parametrize("values", [[], [math.nan], [0.1, math.inf]])
def test_bad_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_interval(values)
    with pytest.raises(ValueError, match="finite"):
        difference_interval(values, VALUES)


def holders(epsilons: list[float], rates: list[float | None]) -> list[DataOwner]:
    return [
        DataOwner(name=str(n), examples=10 * n, epsilon=e, steps=1, noise_multiplier=1.0 + n, sample_rate=q)
        for n, (e, q) in enumerate(zip(epsilons, rates, strict=True))
    ]


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_spreads_match_numpys_quantiles(count: int) -> None:
    epsilons = [0.5, 8.0, 3.0, 2.0, 5.5, 1.25, 7.0][:count]
    rates: list[float | None] = [0.3, 0.01, 0.2, 0.7, 0.9, 0.4, 0.35][:count]
    found = {spread.name: spread for spread in spreads(holders(epsilons, rates))}
    assert list(found) == ["epsilon", "noise_multiplier", "sample_rate", "examples"]
    for name, values in (
        ("epsilon", epsilons),
        ("sample_rate", rates),
        ("noise_multiplier", [1.0 + n for n in range(count)]),
        ("examples", [10 * n for n in range(count)]),
    ):
        row = found[name]
        expected = np.quantile(np.array(values, dtype=float), [0, 0.25, 0.5, 0.75, 1])
        assert (row.least, row.lower, row.median, row.upper, row.greatest) == pytest.approx(tuple(expected))


def test_one_holder_has_no_spread_and_a_missing_number_leaves_its_quantity_out() -> None:
    assert spreads(holders([1.0], [0.1])) == ()
    assert [row.name for row in spreads(holders([1.0, 2.0], [0.1, None]))] == [
        "epsilon",
        "noise_multiplier",
        "examples",
    ]


def test_the_interval_of_a_share_stays_within_its_range() -> None:
    """Three accuracies near 1 have a Student interval that passes 1; of it, only what is possible is stated."""
    plain = mean_interval([0.93, 0.98, 0.999])
    share = mean_interval([0.93, 0.98, 0.999], share=True)
    assert plain.high is not None
    assert plain.high > 1.0
    assert (share.low, share.high) == (plain.low, 1.0)
    assert share.half_width == pytest.approx(plain.half_width)
