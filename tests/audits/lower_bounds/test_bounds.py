"""Bounds on epsilon: published goldens, slow oracles written down from the definitions, and what nothing may pass."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import trapezoid
from scipy.special import ndtri
from sklearn.metrics import roc_auc_score

from choral.audits.lower_bounds import one_run, trade_off, trials
from choral.audits.lower_bounds.roc import area, checked_scores, roc
from choral.audits.lower_bounds.trials import Counts
from choral.errors import ConfigError, DataError
from choral.privacy.accounting import record_level
from choral.privacy.accounting.events import PoissonSampledGaussian

# (m, r, v, delta) -> one-run bound, f-DP bound; beta = .05. The first two one-run values are printed in Steinke et al.
# 2023 as .673 and 2.675; all were computed by an independent implementation (jax_privacy 1.0).
GOLDENS = [
    (1000, 100, 75, 1e-4, 0.672985, 0.84172),
    (100000, 1510, 1439, 1e-5, 2.675851, 3.30908),
    (1000, 100, 75, 1e-5, 0.69947, 1.00592),
    (1000, 100, 95, 1e-5, 2.165176, 3.3233),
    (1000, 100, 100, 1e-5, 3.465376, 5.54903),
    (1000, 1000, 700, 1e-5, 0.731740, 1.37198),
]


@pytest.mark.parametrize(("m", "r", "v", "delta", "plain", "gaussian"), GOLDENS)
def test_one_run_goldens(m: int, r: int, v: int, delta: float, plain: float, gaussian: float) -> None:
    assert one_run.lower_bound(m, r, v, delta=delta) == pytest.approx(plain, abs=5e-6)
    assert trade_off.lower_bound(m, r, v, delta=delta) == pytest.approx(gaussian, abs=1e-5)


@pytest.mark.parametrize(
    ("shift", "plain", "gaussian"), [(1, 1.13346, 2.164749), (2, 2.311945, 4.7218075), (4, 4.395568, 9.133752)]
)
def test_goldens_of_shifted_scores(shift: float, plain: float, gaussian: float) -> None:
    # 10k scores in, 10k out, delta 1e-6: one-sided guesses, Bonferroni over the corners of the ROC's concave hull.
    n = 10_000
    base = ndtri((np.arange(n) + 0.5) / n)
    order = np.argsort(-np.concatenate([base + shift, base]))
    inside = order < n
    hull: list[tuple[int, int]] = []
    for point in zip(np.append(0, np.cumsum(~inside)), np.append(0, np.cumsum(inside)), strict=True):
        while len(hull) > 1 and _left_turn(hull[-2], hull[-1], point):
            hull.pop()
        hull.append((int(point[0]), int(point[1])))
    beta = 0.05 / len(hull)
    best = max(hull[1:], key=lambda p: one_run.lower_bound(2 * n, sum(p), p[1], delta=1e-6, beta=beta) if p[1] else 0.0)
    assert one_run.lower_bound(2 * n, sum(best), best[1], delta=1e-6, beta=beta) == pytest.approx(plain, abs=1e-5)
    found = max(trade_off.lower_bound(2 * n, sum(p), p[1], delta=1e-6, beta=beta) for p in hull[1 : len(hull) // 3 : 5])
    assert found == pytest.approx(gaussian, rel=2e-2)
    assert found <= gaussian + 1e-5


def _left_turn(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    return bool((b[0] - a[0]) * (c[1] - a[1]) >= (b[1] - a[1]) * (c[0] - a[0]))


def test_one_run_p_value_matches_exact_fractions() -> None:
    m, r, v, delta = 40, 17, 12, Fraction(1, 100)
    for odds in (Fraction(1), Fraction(3, 2), Fraction(4)):  # e^epsilon
        q = odds / (1 + odds)
        mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
        worst = max(sum(mass[v - i : v]) / i for i in range(1, v + 1))
        exact = min(sum(mass[v:]) + 2 * m * delta * worst, 1)
        assert one_run.p_value(math.log(odds), m, r, v, float(delta)) == pytest.approx(float(exact), rel=1e-12)


def test_one_run_without_delta_is_the_binomial_interval() -> None:
    # q <= the Clopper-Pearson lower limit of v of r, by scipy's own.
    low = stats.binomtest(75, 100).proportion_ci(confidence_level=0.9, method="exact").low
    assert one_run.lower_bound(1000, 100, 75, delta=0.0) == pytest.approx(math.log(low / (1 - low)), rel=1e-7)


def test_more_canaries_cost_with_delta_and_not_without() -> None:
    with_delta = [one_run.lower_bound(m, 100, 90, delta=1e-4) for m in (100, 1000, 5000)]
    assert with_delta == sorted(with_delta, reverse=True)
    assert with_delta[0] > with_delta[-1] + 0.1
    assert one_run.lower_bound(10**6, 100, 90, delta=0.0) == one_run.lower_bound(100, 100, 90, delta=0.0)


def test_fdp_recursion_matches_a_plain_one() -> None:
    def refuted(mu: float, m: int, c: int, right: int, beta: float) -> bool:  # as printed, with scipy.stats
        r, h = beta * right / m, beta * (c - right) / m
        for i in range(right - 1, -1, -1):
            raised = max(h, stats.norm.cdf(stats.norm.ppf(r) - mu)) if r < 1 else 1.0
            r += i / (c - i) * (raised - h)
            h = raised
        return bool(r + h > c / m)

    for m, c, right in ((60, 30, 22), (500, 40, 40), (80, 80, 55)):
        found = trade_off.lower_bound_mu(m, c, right)
        assert refuted(0.999 * found, m, c, right, 0.05)
        assert not refuted(1.001 * found, m, c, right, 0.05)


def test_the_gaussian_of_mu_costs_what_the_accountant_says() -> None:
    for mu, delta in ((0.5, 1e-5), (1.0, 1e-5), (3.0, 1e-6)):
        event = PoissonSampledGaussian(sample_rate=1.0, noise_multiplier=1.0 / mu, steps=1)
        assert trade_off.epsilon_of_mu(mu, delta) == pytest.approx(record_level.epsilon([event], delta), rel=2e-3)
    assert trade_off.epsilon_of_mu(1.0, 1e-5) == pytest.approx(4.38, abs=5e-3)
    assert trade_off.epsilon_of_mu(0.0, 1e-5) == 0.0


def test_two_sided_goldens() -> None:
    counts = Counts(true_positives=300, false_negatives=200, false_positives=100, true_negatives=400)
    assert trials.upper_rate(200, 500, 0.025) == pytest.approx(0.44443, abs=5e-6)
    assert trials.upper_rate(100, 500, 0.025) == pytest.approx(0.23779, abs=5e-6)
    assert trials.clopper_pearson(counts, delta=1e-5) == pytest.approx(0.84858, abs=5e-6)
    assert trials.gaussian(counts, delta=1e-5) == pytest.approx(3.646, abs=5e-4)
    few = Counts(true_positives=50, false_negatives=450, false_positives=0, true_negatives=500)
    assert trials.clopper_pearson(few, delta=1e-5) == pytest.approx(2.324, abs=5e-4)


@pytest.mark.parametrize(("count", "tried"), [(0, 7), (3, 7), (7, 7), (100, 500)])
def test_rates_match_scipys_exact_interval(count: int, tried: int) -> None:
    found = trials.rate_interval(count, tried, 0.9)
    oracle = stats.binomtest(count, tried).proportion_ci(confidence_level=0.9, method="exact")
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=1e-12)


def test_a_bound_may_come_from_either_direction() -> None:
    rare = Counts(true_positives=20, false_negatives=480, false_positives=0, true_negatives=500)
    turned = Counts(true_positives=500, false_negatives=0, false_positives=480, true_negatives=20)
    assert trials.clopper_pearson(rare, delta=1e-5) == pytest.approx(trials.clopper_pearson(turned, delta=1e-5))
    assert trials.joint_beta(rare, delta=1e-5) == pytest.approx(trials.joint_beta(turned, delta=1e-5), rel=1e-4)


@pytest.mark.parametrize(
    "counts", [(300, 200, 100, 400), (30, 20, 4, 46), (500, 0, 0, 500), (260, 240, 250, 250), (2, 48, 40, 10)]
)
def test_joint_beta_matches_draws_from_the_posterior(counts: tuple[int, int, int, int]) -> None:
    tp, fn, fp, tn = counts
    found = trials.joint_beta(
        Counts(true_positives=tp, false_negatives=fn, false_positives=fp, true_negatives=tn), delta=1e-3
    )
    rng = np.random.default_rng(11)
    fnr, fpr = rng.beta(0.5 + fn, 0.5 + tp, 400_000), rng.beta(0.5 + fp, 0.5 + tn, 400_000)
    with np.errstate(divide="ignore", invalid="ignore"):
        sides = [(1 - 1e-3 - a) / b for a, b in ((fnr, fpr), (fpr, fnr), (1 - fnr, 1 - fpr), (1 - fpr, 1 - fnr))]
        needed = np.log(np.maximum(np.nanmax(sides, axis=0), 1.0))
    # The smallest epsilon whose region holds the draw, by draw; found has rank .05 (5 sigma = .0017).
    assert abs(np.mean(needed <= found + 1e-9) - 0.05) < 0.002 or (found == 0.0 and np.mean(needed <= 0) >= 0.05)


def test_ceilings_are_what_perfect_guesses_give_and_need_so_many_canaries() -> None:
    for epsilon, guessed in ((1.0, 1.0), (3.0, 0.2), (5.0, 0.5)):
        needed = one_run.canaries_needed(epsilon, guessed=guessed, delta=1e-5)
        assert one_run.ceiling(needed, one_run.guesses_of(needed, guessed), delta=1e-5) >= epsilon
        fewer = needed - 4  # guesses are even
        assert one_run.ceiling(fewer, one_run.guesses_of(fewer, guessed), delta=1e-5) < epsilon
    with pytest.raises(ConfigError, match="no number of canaries"):
        one_run.canaries_needed(8.0, guessed=0.2, delta=1e-5)
    assert trials.ceiling(500, 500, delta=1e-5) == pytest.approx(
        math.log(500) - math.log(math.log(40)) - 0.004, abs=1e-2
    )


def test_power_against_a_gaussian() -> None:
    # The facts of the literature: mu = 1 (true epsilon 4.38), best share of guesses. 40 draws: means err by about .05.
    rng = np.random.default_rng(3)
    for m, share, wanted in ((200, 0.2, 1.13), (1000, 0.1, 1.63), (5000, 0.05, 2.16), (20000, 0.02, 2.48)):
        found = []
        for _ in range(40):
            inside = rng.random(m) < 0.5
            ordered = inside[np.argsort(-(rng.normal(size=m) + inside))]
            half = one_run.guesses_of(m, share) // 2
            right = int(ordered[:half].sum() + (~ordered[-half:]).sum())
            found.append(one_run.lower_bound(m, 2 * half, right, delta=1e-5))
        assert np.mean(found) == pytest.approx(wanted, abs=0.15)
        assert max(found) < 4.38


@pytest.mark.parametrize(
    ("counts", "delta", "beta", "error"),
    [
        ((10, 5, 6), 0.0, 0.05, DataError),
        ((4, 5, 3), 0.0, 0.05, DataError),
        ((10, 0, 0), 0.0, 0.05, DataError),
        ((10, 5, 2.0), 0.0, 0.05, DataError),
        ((10, 5, 3), -0.1, 0.05, ConfigError),
        ((10, 5, 3), math.nan, 0.05, ConfigError),
        ((10, 5, 3), 0.0, 0.0, ConfigError),
        ((10, 5, 3), 0.0, math.nan, ConfigError),
    ],
)
def test_bad_counts_and_levels(counts: tuple[int, int, int], delta: float, beta: float, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        one_run.lower_bound(*counts, delta=delta, beta=beta)
    with pytest.raises(error, match="expected"):
        trade_off.lower_bound(*counts, delta=delta or 1e-5, beta=beta)


def test_bad_two_sided_counts() -> None:
    with pytest.raises(DataError, match="at least one of each"):
        Counts(true_positives=0, false_negatives=0, false_positives=1, true_negatives=1)
    with pytest.raises(DataError, match="integer >= 0"):
        Counts(true_positives=-1, false_negatives=2, false_positives=1, true_negatives=1)


def test_roc_matches_scikit_learn_ties_included() -> None:
    rng = np.random.default_rng(5)
    members = rng.random(400) < 0.3
    scores = np.round(rng.normal(size=400) + members, 1)
    found = roc(scores, members)
    assert found.auc.value == pytest.approx(roc_auc_score(members, scores), rel=1e-12)
    corners = [(p.false_positive_rate, p.true_positive_rate) for p in found.points]
    assert corners[0] == (0.0, 0.0)
    assert corners[-1] == (1.0, 1.0)
    assert trapezoid([y for _, y in corners], [x for x, _ in corners]) == pytest.approx(found.auc.value, abs=1e-3)
    outside = np.sort(scores[~members])[::-1]
    for at in found.at:
        allowed = int(at.wanted * len(outside))
        assert at.true_positive_rate.value == pytest.approx(np.mean(scores[members] > outside[allowed]))
        assert at.resolved == (len(outside) * at.wanted >= 1)


def test_a_rate_that_is_reached_to_the_last_non_member_counts() -> None:
    """Of 1,000 non-members, ten are a hundredth, and one a thousandth."""
    scores = np.concatenate([np.arange(1000.0), np.arange(1000.0) + 0.5])
    at = {found.wanted: found for found in roc(scores, np.arange(2000) >= 1000).at}
    assert (at[0.01].false_positive_rate.value, at[0.01].true_positive_rate.value) == (0.01, 0.011)
    assert (at[0.001].false_positive_rate.value, at[0.001].true_positive_rate.value) == (0.001, 0.002)
    assert at[0.01].resolved
    assert at[0.001].resolved


def test_a_thinned_curve_keeps_its_ends_and_what_is_seen_without_a_false_positive() -> None:
    """Where rates are drawn on a logarithmic axis, what is told at a rate of zero is what matters."""
    members = np.arange(5000) < 2500
    scores = np.random.default_rng(3).normal(size=5000) + 2.0 * members
    points = roc(scores, members).points
    assert len(points) < 350
    assert [points[0].true_positive_rate, points[-1].false_positive_rate, points[-1].true_positive_rate] == [0, 1, 1]
    blind = max(point.true_positive_rate for point in points if point.false_positive_rate == 0)
    assert blind == np.mean(scores[members] > scores[~members].max()) > 0


def test_delong_covers_the_true_area() -> None:
    # 1500 draws, true area Phi(1/sqrt 2) = .7602: a count below .93 or above .97 is a 3.5-sigma event; seed fixed.
    rng = np.random.default_rng(9)
    members = np.arange(120) < 50
    true = stats.norm.cdf(1 / math.sqrt(2))
    hits = [area(rng.normal(size=120) + members, members) for _ in range(1500)]
    assert 0.93 < np.mean([interval.low <= true <= interval.high for interval in hits]) < 0.97


def test_a_perfect_area_still_has_an_interval() -> None:
    found = area(np.arange(20.0), np.arange(20) >= 10)
    assert found.value == 1.0
    assert found.low == pytest.approx(0.025**0.1)


@pytest.mark.parametrize(
    ("scores", "members", "said"),
    [
        ([1.0, 2.0], [1], "2 scores but 1 memberships"),
        ([], [], "no scores"),
        ([1.0, math.nan, 2.0], [1, 0, 1], "not finite"),
        ([1.0, math.inf, 2.0], [1, 0, 1], "not finite"),
        ([1.0, 2.0], [1, 2], "neither 0 nor 1"),
        ([1.0, 2.0], [1, 1], "all 2 scores are of members"),
        ([1.0, 1.0], [1, 0], "all 2 scores are equal"),
        ([[1.0, 2.0]], [1, 0], "one dimension"),
        (["a", "b"], [1, 0], "not numbers"),
    ],
)
def test_bad_scores(scores: list[float], members: list[int], said: str) -> None:
    with pytest.raises(DataError, match=said):
        checked_scores(scores, members)
