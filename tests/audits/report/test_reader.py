"""What a report says first: the recommendation, the plain reading, trust, hazards, and the short printed form."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from choral.audits import Comparison, compare
from choral.audits.findings.context import Context
from choral.audits.findings.whole import Composed
from choral.audits.report.html import comparison_page
from choral.audits.report.reader.hazards import hazards
from choral.audits.report.reader.summary import page_one, plain_reading, recommended, releases, trust_rows
from choral.errors import ConfigError
from choral.trainers import Run


@pytest.fixture
def report(arms: dict[str, list[Run]]) -> Comparison:
    return compare(arms)


def holding(report: Comparison) -> Comparison:
    """The same, with evidence that holds: the runs of these tests have no ledgers."""
    arms = [
        msgspec.structs.replace(arm, audit=msgspec.structs.replace(arm.audit, verdict="holds")) if arm.audit else arm
        for arm in report.arms
    ]
    return msgspec.structs.replace(report, arms=tuple(arms))


def test_without_evidence_nothing_is_recommended(report: Comparison) -> None:
    assert any(arm.claim and arm.audit and arm.audit.verdict != "holds" for arm in report.arms)
    assert recommended(report).arm is None


def test_the_cheapest_within_the_tolerance_is_recommended(report: Comparison) -> None:
    found = recommended(holding(report).stated(tolerance=0.2))
    assert found.arm is not None
    assert found.arm.name == "federated-dp"  # cloud-dp is better, and takes the data away from their owners
    assert "within 20.0 points of cloud" in found.sentence
    near = recommended(holding(report).stated(tolerance=0.05))
    assert near.arm is None
    assert "The nearest is federated-dp" in near.sentence


def test_where_none_is_recommended_page_one_is_about_the_nearest_with_its_price(report: Comparison) -> None:
    near = holding(report).stated(tolerance=0.01)
    answers = dict(page_one(near))
    assert "The nearest is federated-dp" in answers["Recommended"]
    assert "a run)" in answers["Recommended"]
    assert answers["What is promised, against whom"].startswith("federated-dp: ")
    assert "timing and other side channels" in answers["What nobody looked at"]


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_a_tolerance_is_a_number(report: Comparison, tolerance: float) -> None:
    with pytest.raises(ConfigError, match="tolerance"):
        report.stated(tolerance=tolerance)


def test_the_plain_reading_is_the_formula() -> None:
    said = " ".join(plain_reading(1.0, 1e-5, "record"))
    assert "at most 2.72 %" in said  # e x 1 % + 1e-5
    assert "a factor of 2.72" in said
    assert "73.11 % certainty" in said  # 1 / (1 + e^-1)
    assert "weak bound" not in said
    assert "weak bound" in " ".join(plain_reading(8.0, 1e-5, "client"))
    assert "at most 100 %" in " ".join(plain_reading(900.0, 1e-5, "record"))


def test_page_one_says_what_nobody_stated_and_what_somebody_did(report: Comparison) -> None:
    answers = dict(page_one(report))
    assert "not stated" in answers["On whose data"]
    assert "rehearsal" in answers["Rehearsal or sites"]
    assert answers["Who signed"].startswith("Nobody")
    stated = report.stated(Context(purpose="Triage", region="Three towns", releases=("Counts by ward",)))
    assert "Three towns" in dict(page_one(stated))["On whose data"]
    assert "Counts by ward" in releases(stated)
    html = comparison_page(stated)
    assert "Triage" in html
    assert "Block to sign" in html


def test_what_all_of_it_costs_keeps_names_as_they_are_and_counts_one_as_one(report: Comparison) -> None:
    plain = tuple(msgspec.structs.replace(arm, name="Cloud of Ours") if not arm.claim else arm for arm in report.arms)
    one = Composed(unit="record", runs=1, delta=1e-5, single=2.0, owner="party-1", epsilon=2.0)
    said = dict(page_one(msgspec.structs.replace(report, arms=plain, composed=(one,), baseline="Cloud of Ours")))
    assert said["What all of it costs"].startswith("The private training that is shown, for each record: ε = 2.00")
    assert said["What all of it costs"].endswith("; with those without any bound the whole has none.")
    assert "Cloud of Ours" in said["Against whom not"]


def test_page_one_says_the_promise_in_words_and_whom_it_does_not_hold_off(report: Comparison) -> None:
    said = dict(page_one(holding(report)))
    arm = next(arm for arm in report.arms if arm.claim)
    assert arm.claim is not None
    assert "from even odds to" in said["In plain words"]
    assert ("weak" in said["In plain words"]) == (
        "weak" in plain_reading(arm.claim.quoted, arm.claim.delta, "record")[-1]
    )
    assert "several records" in said["In plain words"]
    assert "owns the machine" in said["Against whom not"]
    for plain in (arm.name for arm in report.arms if not arm.claim):
        assert plain in said["Against whom not"]
    assert "[report.context]" in said["Before you sign"]
    stated = dict(page_one(holding(report).stated(Context(purpose="Triage"))))
    assert "[report.context]" not in stated["Before you sign"]
    bare = tuple(msgspec.structs.replace(arm, claim=None, audit=None) for arm in report.arms)
    without = dict(page_one(msgspec.structs.replace(report, arms=bare, composed=())))
    assert not {"In plain words", "Against whom not"} & set(without)


@pytest.mark.parametrize(("metric", "fits"), [("accuracy", False), ("deviance", True), ("test error", True)])
def test_where_less_is_better_less_is_no_loss(report: Comparison, metric: str, fits: bool) -> None:
    """The private federation's figure is below the cloud's by more than the tolerance."""
    found = recommended(msgspec.structs.replace(holding(report), metric=metric).stated(tolerance=0.05))
    assert (found.arm is not None) == fits


def test_trust_says_who_sees_updates(report: Comparison) -> None:
    rows: dict[str, Any] = {name: rest for name, *rest in trust_rows(report)}
    assert rows["cloud"][1].startswith("trusted")
    assert rows["federated"][1] == "sees every update"
    assert "sums alone" in rows["federated-masked"][1]
    assert "own noise" in rows["federated-dp"][0]


def test_a_hazard_is_held_only_if_something_was_looked_at(report: Comparison, evidence: Any) -> None:
    found = {each.name: each.status for each in hazards(report)}
    assert found["Implementation of the mechanism"] == "not assessed"
    assert found["Accounting"] == "not held"  # no ledger is there
    assert found["Access control"] == "not assessed"
    assert found["Releases without noise"] == "not held"
    assert found["Bias"] == "not assessed"

    assert {found[name] for name in ("Floating point", "Randomness", "Interpretation")} == {"not assessed"}

    def probed(violated: bool) -> set[str]:
        probe = evidence.probe(violated=violated)
        arms = tuple(
            msgspec.structs.replace(arm, audit=msgspec.structs.replace(arm.audit, probe=probe)) if arm.claim else arm
            for arm in report.arms
        )
        now = {each.name: each.status for each in hazards(msgspec.structs.replace(report, arms=arms))}
        return {now["Implementation of the mechanism"], now["Randomness"]}

    assert probed(False) == {"held"}
    assert probed(True) == {"not held"}


def test_details_are_folded_unless_all_is_asked_for(report: Comparison) -> None:
    short, full = comparison_page(report), comparison_page(report, full=True)
    assert short.count('<details class="detail" id=') == full.count('<details class="detail" open id=') >= 6
    assert ".detail:not([open]) { display: none; }" in short
    for place in ("promised", "plain", "evidence", "trust", "hazards", "glossary", "details"):
        assert f'href="#{place}"' in short
        assert f'id="{place}"' in short


def test_nothing_says_complies(report: Comparison) -> None:
    assert "complies" not in comparison_page(report, full=True).lower()
