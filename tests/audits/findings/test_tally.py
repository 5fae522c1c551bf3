"""What counts as a check that held: it was tested, it could have failed, and it did not; each probe counts once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

import choral.audits
from choral.audits import audit_scores, compare
from choral.audits.attacks.membership import lira_offline
from choral.audits.findings.tally import beyond_attack, every_check, tally
from choral.audits.findings.verdict import evidence_checks
from choral.audits.report.html import comparison_page
from choral.trainers.run_folder.run import Run

Make = Callable[..., Run]


@pytest.mark.parametrize(
    ("claimed", "ceiling", "counts"), [(3.0, 3.7, True), (8.0, 3.7, False), (3.7, 3.7, False), (None, 3.7, False)]
)
def test_an_attack_counts_only_if_some_outcome_would_have_refuted_the_claim(
    evidence: SimpleNamespace, claimed: float | None, ceiling: float, counts: bool
) -> None:
    attack = evidence.attack("not violated" if claimed else "no claim", claimed=claimed)
    bounds = tuple(msgspec.structs.replace(bound, ceiling=ceiling) for bound in attack.bounds)
    (check,) = evidence_checks([msgspec.structs.replace(attack, bounds=bounds)], None, None)
    assert (check.verdict, check.refutable) == ("holds", counts)
    assert dict(tally([check])) == ({"holds": 1} if counts else {})


def test_an_attack_without_a_deciding_bound_counts_for_nothing(evidence: SimpleNamespace) -> None:
    (check,) = evidence_checks([evidence.attack(design="split", bounds=(), decisive="", null=None)], None, None)
    assert not check.refutable


@pytest.fixture
def compared(make_run: Make, evidence: SimpleNamespace):
    """Two private arms, whose promise one probe was made for; the attack on the first could not have refuted it."""
    arms = {name: [make_run(name, seed) for seed in range(2)] for name in ("cloud", "cloud-dp", "federated-dp")}
    weak = evidence.attack(claimed=8.0)
    shared = evidence.probe(violated=False)
    strong = msgspec.structs.replace(shared.canaries, claimed=3.0)
    shared = msgspec.structs.replace(shared, canaries=msgspec.structs.replace(strong, claimed=8.0))
    found = {name: SimpleNamespace(attacks=(weak,), probe=shared, failed="") for name in ("cloud-dp", "federated-dp")}
    return compare(arms), found, arms


def test_a_probe_that_two_arms_share_counts_once(compared, evidence: SimpleNamespace) -> None:
    report, found, _ = compared
    shared = found["cloud-dp"].probe
    checks = evidence_checks((), shared, None)

    def audited(arm):
        if arm.audit is None or not arm.claim:
            return arm
        changed = msgspec.structs.replace(arm.audit, probe=shared, checks=(*arm.audit.checks, *checks))
        return msgspec.structs.replace(arm, audit=changed)

    both = msgspec.structs.replace(report, arms=tuple(map(audited, report.arms)))
    assert sum(arm.audit is not None and arm.audit.probe is not None for arm in both.arms) == 2
    assert len(every_check(both)) == len(every_check(report)) + len(checks)


def test_the_page_first_says_which_claims_no_attack_could_have_refuted(compared) -> None:
    report, found, _ = compared

    def attacked(arm):
        if not arm.claim:
            return arm
        attacks = found[arm.name].attacks
        checks = (*arm.audit.checks, *evidence_checks(attacks, None, None))
        return msgspec.structs.replace(arm, audit=msgspec.structs.replace(arm.audit, attacks=attacks, checks=checks))

    page = msgspec.structs.replace(report, arms=tuple(map(attacked, report.arms)))
    said = beyond_attack(page)
    assert said.startswith("No attack here could have refuted cloud-dp at ε\u00a0=\u00a0")
    assert "too weak: they reach 3.70" in said
    assert "federated-dp" in said
    html = comparison_page(page)
    assert html.index("No attack here could have refuted") < html.index(">What is promised</h2>")
    assert "checks that could have failed" in html
    assert "2 more could not have failed here" in html
    assert html.count("Could not have failed here.") == 2
    assert "no attack was run on it" in beyond_attack(report)


def test_the_null_control_says_that_it_cannot_see_shared_coins() -> None:
    """Twenty canaries to a coin, whose scores are alike and know nothing of a model. The bound is positive far more
    often than its error probability of 5 %, and the control, whose coins are independent, cannot notice."""
    rng = np.random.default_rng(7)
    positives = 0
    for _ in range(40):
        members = np.repeat(rng.random(20) < 0.5, 20)
        scores = np.repeat(rng.normal(size=20), 20) + 0.01 * rng.normal(size=400)
        try:
            found = audit_scores(scores, members, design="coins", delta=1e-5, null_draws=1)
        except choral.ChoralError:  # so few heads or tails that the coins do not look fair
            continue
        positives += found.bounds[0].epsilon > 0
        assert found.null is not None
        assert any("share a coin" in said for said in found.null.blind_to)
    assert positives > 40 * 0.25  # at 5 % the chance of this is below 1e-5


def test_membership_scores_are_exported_and_say_what_they_return() -> None:
    from scipy.stats import norm

    for name in ("confidences", "lira_offline", "lira_online", "logit_gap", "loss_threshold", "rmia"):
        assert name in choral.audits.__all__
        assert callable(getattr(choral.audits, name))
    rng = np.random.default_rng(0)
    shadows, members = rng.normal(size=(8, 5)), np.zeros((8, 5), bool)
    target = rng.normal(size=5)
    z = (target - shadows.mean(axis=0)) / shadows.std(axis=0)
    np.testing.assert_allclose(lira_offline(target, shadows, members), -np.log(norm.cdf(-z)))
    assert "-ln Phi(-z)" in (lira_offline.__doc__ or "")


def test_headlines_quote_what_is_guaranteed_where_that_is_more_than_was_spent(compared) -> None:
    """A server that picks who survives makes the realised figure one that was not fixed in advance."""
    report, _, _ = compared

    def promised(arm):
        return (
            msgspec.structs.replace(arm, claim=msgspec.structs.replace(arm.claim, guarantee=9.87)) if arm.claim else arm
        )

    page = msgspec.structs.replace(report, arms=tuple(map(promised, report.arms)))
    assert {arm.claim.quoted for arm in page.arms if arm.claim} == {9.87}
    assert beyond_attack(page).count("9.87") == 2
    assert comparison_page(page).count("9.87") >= 6  # lead, cards, both tables
    assert "9.87" not in comparison_page(report)
