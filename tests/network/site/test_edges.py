"""What stands at the edge of a limit, and terms that no coordinator of this version writes."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
from site_folders import NOW, Sites, offer, terms

from choral import __version__
from choral.network import Offer, OfferError, OfferRefusedError, SiteError
from choral.network.site.approvals import MOST_KEPT
from choral.network.site.objections import objections
from choral.network.site.offer import LARGEST_OFFER, alike
from choral.network.site.review import review
from choral.network.site.terms import sum_record, terms_of
from choral.privacy import Ledger, Privacy, SharesTerms, plan_shares
from choral.privacy.accounting.events import PlannedEvents, PoissonSampledGaussian, ReleasePlan
from choral.trainers import FedSGD


@dataclasses.dataclass(frozen=True)
class OwnSum:
    name: str = "own"


def test_a_sum_of_the_user_s_own_cannot_be_offered() -> None:
    with pytest.raises(OfferError, match="a OwnSum cannot be offered"):
        sum_record(OwnSum())  # type: ignore[arg-type]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no rounds": ({"rounds": 0}, "no number of rounds"),
    "rounds that are a word": ({"rounds": True}, "no number of rounds"),
    "code that is no text": ({"code": 1}, "do not say what code is run"),
    "no such algorithm": ({"algorithm": {"kind": "fast"}}, "no algorithm that is known here"),
    "a promise with more": (
        {"privacy": {"epsilon": 1.0, "delta": 1e-5, "max_grad_norm": 1.0, "epochs": 1, "more": 1}},
        "a promise that sites cannot hold",
    ),
    "no shapes": ({"shapes": []}, "no shapes of parameters"),
    "a shape twice": ({"shapes": [["w", [7]], ["w", [7]]]}, "no shapes of parameters"),
    "a shape of nothing": ({"shapes": [["w", [0]]]}, "no shapes of parameters"),
    "no metrics": ({"metrics": []}, "no list of 1 to"),
    "metrics as text": ({"metrics": "accuracy"}, "no list of 1 to"),
    "a metric twice": ({"metrics": ["accuracy", "accuracy"]}, "no list of 1 to"),
    "a metric without a name": ({"metrics": [""]}, "a name of an evaluation that is none"),
    "a metric that is a number": ({"metrics": [1]}, "a name of an evaluation that is none"),
    "nobody": ({"federation": {**terms().record()["federation"], "parties": 0}}, "out of range"),
    "more than floats count": ({"federation": {**terms().record()["federation"], "examples": 1 << 53}}, "out of range"),
}


@pytest.mark.parametrize("what", WRONG)
def test_terms_that_nobody_writes_are_named(what: str) -> None:
    changed, message = WRONG[what]
    with pytest.raises(OfferError, match=message):
        terms_of({**terms().record(), **changed})


def test_what_is_alike_is_so_all_the_way_down() -> None:
    assert alike((1, {"a": (2,)}), [1, {"a": [2]}])
    assert alike({"a": 1, "b": 2}, {"b": 2, "a": 1})
    for given, read in (([1], [True]), ({"a": 1}, {"a": 1.0}), ([[0]], [[False]]), ({"a": 1}, {}), ([1], [1, 1])):
        assert not alike(given, read)


def test_an_offer_has_a_largest_size_when_made_and_when_read() -> None:
    with pytest.raises(OfferError, match=rf"an offer of \d+ bytes, expected at most {LARGEST_OFFER}"):
        offer(settings={"a": "x" * LARGEST_OFFER})
    with pytest.raises(OfferError, match=rf"an offer of more than {LARGEST_OFFER} bytes"):
        Offer.read(offer().message() + b" " * LARGEST_OFFER)
    with pytest.raises(OfferError, match="settings: expected a table, got a list"):
        offer(settings=[["a", 1]])


def test_an_offer_that_is_kept_may_come_again_however_many_are(sites: Sites) -> None:
    sites.north.offers.keep(offer())
    for place in range(MOST_KEPT - 1):
        (sites.path / "jobs" / f"{place}.json").touch(0o600)
    sites.north.offers.keep(offer())
    with pytest.raises(OfferRefusedError):
        sites.north.offers.keep(offer(job="more"))


def test_a_data_set_s_name_is_no_path(sites: Sites) -> None:
    """Its ledger is named after it."""
    edits = ("[data.visits]", '[data."../visits"]'), ("[data.visits.promise]", '[data."../visits".promise]')
    with pytest.raises(SiteError, match="expected a name of letters"):
        sites.settings(*edits, ('data = "visits"', 'data = "../visits"'))


def test_a_count_of_bytes_that_cannot_be_read_is_not_begun_anew_by_itself(sites: Sites) -> None:
    path = sites.path / "state/bytes-today"
    path.touch(0o600)
    sites.north.count(1, now=NOW)  # an empty one is what a power cut leaves of the first
    path.write_text("2026-11-29 many\n")
    with pytest.raises(SiteError, match="cannot be read"):
        sites.north.count(1, now=NOW)


def test_a_long_diff_says_that_it_is_cut(sites: Sites) -> None:
    (sites.path / "tasks/visits.py").write_text("x = 1\n" * 3000)
    found = review(sites.north, offer(), NOW)
    assert found.diff[-1] == "... and 1004 lines more: read the file itself"


def test_a_review_of_a_task_of_choral_says_so(sites: Sites) -> None:
    given = replace(offer(), task="digits", code=f"choral {__version__}")
    assert dict(review(sites.north, given, NOW).rows)["code"] == f"the task digits of choral {__version__}"


# -------------------------------------------------------------------------------------------------------------- budgets


def planned(sites: Sites, noise: float, times: int, made: int) -> Ledger:
    """A ledger with a plan for epsilon 1, of which so many passes were made, in batches as the offer's."""
    event = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=noise, steps=10)
    ledger = Ledger(sites.path / "ledgers/visits.jsonl", holder="north")
    ledger.bind("north", 1e-5)
    plan = ReleasePlan(epsilon=1.0, parts=(PlannedEvents(event=event, times=times),))
    for place in range(made):
        ledger.append(event, after=place, plan=None if place else plan)
    return ledger


def test_a_job_goes_on_with_its_plan_where_no_other_would_fit(sites: Sites) -> None:
    """After a restart in the middle: what is left of the plan is paid for by the plan."""
    ledger = planned(sites, noise=5.5, times=20, made=15)
    assert ledger.epsilon(1e-5) > 0.8
    assert objections(sites.north, offer()) == []
    other = offer(settings={"training": {"batch_size": 40}})  # another plan
    assert len(objections(sites.north, other)) == 1


def test_without_a_batch_size_a_budget_that_is_spent_is_seen(sites: Sites) -> None:
    planned(sites, noise=5.5, times=20, made=20)
    unknown = offer(settings={})
    (found,) = objections(sites.north, unknown)
    assert "is spent" in found
    assert objections(sites.north, offer(settings={}, terms=terms(privacy=Privacy(3.0, 1e-5)))) == []


def test_noise_in_shares_goes_on_with_its_own_plan_alone(sites: Sites) -> None:
    north = sites.settings(("max_grad_norm = 1.0", "max_grad_norm = 1.0\nnoise = ['distributed']"))
    privacy = Privacy(1.0, 1e-5, noise="distributed")
    constants = SharesTerms(
        records=800, batch_size=40, steps=40, parties=4, min_survivors=3, length=7, most_records=256
    )
    plan = plan_shares(privacy, constants)
    ledger = Ledger(sites.path / "ledgers/visits.jsonl", holder="north")
    ledger.bind("north", 1e-5)
    whole = ReleasePlan(epsilon=1.0, parts=(PlannedEvents(event=plan.event, times=40),))
    for place in range(20):
        ledger.append(plan.event, after=place, plan=None if place else whole)
    steps = FedSGD(batch_size=40, steps_per_round=2)
    assert objections(north, offer(terms=terms(algorithm=steps, privacy=privacy, shares=plan))) == []
    shown = review(sites.north, offer(terms=terms(algorithm=steps, privacy=privacy, shares=plan)), NOW).rows
    assert ("noise", "sized for 2 honest sites of 3 in a sum, the fewest") in shown
    assert any(f"computed on {constants.rows} rows, padded" in words for _, words in shown)
    other = replace(plan, noise_multiplier=plan.noise_multiplier * 1.01)
    assert len(objections(north, offer(terms=terms(algorithm=steps, privacy=privacy, shares=other)))) == 1
