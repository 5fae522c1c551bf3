"""What would have refuted: one right guess fewer would not have; scores of the stated area do half the time."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtri

from choral.audits import SampleSplit, audit_scores
from choral.audits.attacks.score_bounds import plain_bound
from choral.audits.findings.text import refuting_words
from choral.audits.lower_bounds import trade_off, trials
from choral.audits.lower_bounds.guessing import FixedShares
from choral.audits.lower_bounds.refuting import by_guesses
from choral.audits.lower_bounds.separation import white_box_bound

DELTA = 1e-5


@pytest.mark.parametrize("claimed", [1.0, 3.0])
def test_one_guess_fewer_would_not_have(claimed: float) -> None:
    """By the bounds themselves, which are computed by bisection over epsilon."""
    rng = np.random.default_rng(1)
    inside = rng.random(600) < 0.5
    found = audit_scores(rng.normal(size=600), inside, design="coins", delta=DELTA, claimed=claimed)
    for bound, compute in zip(
        found.bounds,
        (lambda *a: plain_bound(DELTA, *a), lambda *a: trade_off.lower_bound(*a[:3], delta=DELTA, beta=a[3])),
        strict=True,
    ):
        assert bound.refuting is not None
        guesses, right = bound.refuting.counts["guesses"], bound.refuting.counts["right"]
        assert compute(600, guesses, right, 0.05 / 4) > claimed
        assert compute(600, guesses, right - 1, 0.05 / 4) <= claimed
        assert f"{right} of {guesses} right (AUC" in f"{refuting_words(bound)}".replace(", AUC", " (AUC")
    assert "would have refuted it from" in found.sentence


def test_scores_of_that_area_refute_about_as_often_as_not() -> None:
    """Normal scores whose expected count is the one needed: of 24 more than 2 but for 2e-5 at one half, and the
    three other shares, which pay for their part, add some."""
    rng = np.random.default_rng(2)
    first = audit_scores(rng.normal(size=1000), rng.random(1000) < 0.5, design="coins", delta=DELTA, claimed=1.5)
    refuting = first.bounds[0].refuting
    assert refuting is not None
    assert refuting.auc is not None
    mu = np.sqrt(2.0) * ndtri(refuting.auc)
    refuted = 0
    for _ in range(24):
        inside = rng.random(1000) < 0.5
        made = audit_scores(
            rng.normal(size=1000) + mu * inside, inside, design="coins", delta=DELTA, claimed=1.5, null_draws=1
        )
        refuted += made.finding == "violated"
    assert 3 <= refuted <= 23, refuted


def test_a_claim_above_the_ceiling_has_no_such_count() -> None:
    rng = np.random.default_rng(3)
    inside = rng.random(50) < 0.5
    found = audit_scores(rng.normal(size=50), inside, design="coins", delta=DELTA, claimed=8.0)
    assert found.bounds[0].refuting is None
    assert refuting_words(found.bounds[0]) == ""
    assert "would have refuted" not in found.sentence
    assert by_guesses(FixedShares().tests(50, 0.05), lambda *_: False) is None
    split = audit_scores(
        rng.normal(size=600), rng.random(600) < 0.5, design="coins", delta=DELTA, claimed=1.0, guessing=SampleSplit()
    )
    assert split.bounds[0].refuting is not None
    assert split.bounds[0].refuting.counts["guesses"] <= 300


def test_of_trainings_it_is_the_fewest_true_positives() -> None:
    rng = np.random.default_rng(4)
    inside = np.arange(1000) < 500
    found = audit_scores(
        rng.normal(size=1000) + 0.5 * inside, inside, design="runs", delta=DELTA, claimed=1.0, guessing=1.5
    )
    exact = found.bounds[0]
    assert exact.refuting is not None
    least = exact.refuting.counts["true_positives"]
    for count, above in ((least, True), (least - 1, False)):
        counts = trials.Counts(**{**exact.counts, "true_positives": count, "false_negatives": 500 - count})
        assert (trials.clopper_pearson(counts, delta=DELTA) > 1.0) == above


def test_of_a_separation_it_is_the_area_of_the_scores_themselves() -> None:
    """Scores placed so that their t statistic has just that area, and a little more and less."""
    inside = np.arange(800) % 2 == 0
    base = ndtri((np.arange(400) + 0.5) / 400)
    base = base / base.std(ddof=1)
    plain = white_box_bound(np.repeat(base, 2), inside, delta=DELTA, claimed=2.0)
    assert plain.refuting is not None
    assert plain.refuting.auc is not None
    mu = np.sqrt(2.0) * ndtri(plain.refuting.auc)
    for factor, above in ((1.01, True), (0.99, False)):
        scores = np.repeat(base, 2) + factor * mu * inside
        assert (white_box_bound(scores, inside, delta=DELTA).epsilon > 2.0) == above
