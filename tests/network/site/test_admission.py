"""Every weaker term alone is refused, and what is refused says nothing to a coordinator."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import pytest
from site_folders import CODE, NAMES, NOW, Sites, offer, terms

from choral import __version__
from choral.network import Offer, OfferRefusedError, SiteError, SiteFolder
from choral.network.site.approvals import revoke
from choral.network.site.budget import ledger_facts
from choral.network.site.folder import MOST_REFUSALS
from choral.network.site.objections import objections, policy_of
from choral.privacy import AdaptiveClip, ClientPrivacy, Ledger, Privacy, SharesPlan, SharesTerms, plan_shares
from choral.privacy.accounting.events import PlannedEvents, PoissonSampledGaussian, ReleasePlan
from choral.protocols import Homomorphic, Masked, Plain
from choral.protocols.errors import PolicyError
from choral.protocols.masking.ahead.floor import check_floor
from choral.protocols.masking.ahead.messages import AheadSetup
from choral.trainers import FSVRG, FedProx, FedSGD, Scaffold


def test_a_fair_offer_is_agreed_to_and_brings_what_the_site_chose(sites: Sites) -> None:
    given = offer()
    assert objections(sites.north, given) == []
    sites.approve(given)
    agreed = sites.north.agree(given, now=NOW)
    assert agreed.terms.digest == terms().digest
    assert (agreed.privacy, agreed.policy.corrupt) == (Privacy(1.0, 1e-5), 1)
    assert agreed.policy.directory == {**sites.north.parties, "north": sites.north.signing.public}
    assert agreed.ledger is not None
    assert agreed.ledger.path == sites.path / "ledgers" / "visits.jsonl"
    assert (agreed.path, agreed.code) == (sites.path / "visits.csv", sites.path / "tasks/visits.py")
    assert sites.north.log.read().entries[-1].event == "agreed"


FAIR: dict[str, Any] = {
    "the same": {},
    "a stronger promise": {"terms": terms(privacy=Privacy(0.5, 1e-5, max_grad_norm=0.1))},
    "a whole number where a fraction may be": {"terms": terms(algorithm=FedProx(mu=1))},
    "fewer rounds": {"terms": terms(rounds=1)},
    "a larger smallest sum": {"summing": Masked(corrupt=1, min_survivors=4, dropouts=0)},
    "more corrupt sites": {"summing": Masked(corrupt=2, min_survivors=4, dropouts=0)},
    "a split key": {"summing": Homomorphic(corrupt=1, min_survivors=3)},
    "a finer bound": {"terms": terms(encoding={"value_bound": 8.0})},
}


@pytest.mark.parametrize("what", FAIR)
def test_what_is_as_strong_or_stronger_is_fair(sites: Sites, what: str) -> None:
    assert objections(sites.north, offer(**FAIR[what])) == []


def private(**changed: Any) -> dict[str, Any]:
    return {"terms": terms(privacy=Privacy(**{"epsilon": 1.0, "delta": 1e-5, **changed}))}


def in_shares() -> tuple[FedSGD, Privacy, SharesPlan]:
    privacy = Privacy(1.0, 1e-5, noise="distributed")
    constants = SharesTerms(
        records=800, batch_size=40, steps=40, parties=4, min_survivors=3, length=7, most_records=256
    )
    return FedSGD(batch_size=40, steps_per_round=2), privacy, plan_shares(privacy, constants)


STEPS, SHARED, PLAN = in_shares()
PLANLESS = "its terms have a plan of noise in shares and no promise of it, or the other way round"
RELEASES = [{"channel": "update", "what": "the update", "source": "fit", "once": False}]
WEAKER: dict[str, tuple[dict[str, Any], str]] = {
    "epsilon": (private(epsilon=3.01), "epsilon 3.01, at most 3"),
    "delta": (private(delta=2e-5), "delta 2e-05, and the data's is 1e-05 in every job"),
    "another delta": (private(delta=1e-6), "delta 1e-06, and the data's is 1e-05 in every job"),
    "no privacy": ({"terms": terms(privacy=None)}, "it promises no privacy, and the data may be used with a promise"),
    "unit": ({"terms": terms(privacy=ClientPrivacy(1.0, 1e-5))}, "its privacy is of each client, and the data's of"),
    "neighbours": (private(neighbours="replace one record"), "neighbours 'replace one record', and the data's are"),
    "clip": (private(max_grad_norm=1.5), "a clipping norm of 1.5, at most 1"),
    "noise": (
        {"terms": terms(algorithm=STEPS, privacy=SHARED, shares=PLAN)},
        "distributed noise, which is not",
    ),
    "colluders": ({"summing": Masked(corrupt=0, min_survivors=3)}, "number of corrupt parties of at least 1"),
    "min_survivors": (
        {"summing": Masked(corrupt=0, min_survivors=2, dropouts=2, server="semi-honest")},
        "smallest sum of at least 3, the setup says 2",
    ),
    "server": (
        {"summing": Masked(corrupt=1, min_survivors=3, server="semi-honest")},
        "the setup protects against a semi-honest server only",
    ),
    "kind of sum": ({"summing": Plain()}, "the secure sum is plain, which is not among masked, homomorphic"),
    "shared key": (
        {"summing": Homomorphic(key="shared", min_survivors=3)},
        "a shared key withstands no malicious coordinator",
    ),
    "cohort": (
        {"summing": Masked(corrupt=1, min_survivors=3, cohort="random")},
        "it takes the coordinator's word that it draws rosters at random",
    ),
    "value bound": ({"terms": terms(encoding={"value_bound": 16.5})}, "coordinates up to 16.5, at most 16"),
    "value bits": ({"terms": terms(encoding={"value_bits": 29})}, "29 bits of a coordinate, at most 28"),
    "weight cap": ({"terms": terms(federation={"largest": 512})}, "a site may count for 512 records, at most 256"),
    "records": ({"terms": terms(federation={"largest": 128})}, "the data has 200 records, more than the 128"),
    "rounds": ({"terms": terms(rounds=21)}, "21 rounds, at most 20"),
    "model size": (
        {"terms": terms(shapes={"w": (1, 6), "b": (2,)}, federation={"length": 8})},
        "a model of 8 parameters, at most 7",
    ),
    "shapes": ({"terms": terms(shapes={"w": (1, 5), "b": (1,)})}, "its terms are of 7 parameters, and the shapes say"),
    "two bounds": (
        {"terms": terms(federation={"value_bound": 8.0})},
        "its terms have two bounds of an update's coordinate",
    ),
    "algorithm": (
        {"terms": terms(algorithm=Scaffold())},
        "the algorithm scaffold is not among fedavg,",
    ),
    "releases of data": ({"terms": terms(algorithm=FSVRG(step=0.1))}, "this site allows what is of fit, derived"),
    "releases": ({"record": {"releases": RELEASES}}, "its terms say other releases than they are here"),
    "a setting that it has not": ({"record": {"algorithm": {"kind": "fedavg", "mu": 1}}}, "its algorithm cannot be"),
    "metrics": (
        {"metrics": "in the clear, no epsilon", "terms": terms(metrics=("accuracy",))},
        "metrics 'in the clear, no epsilon' would become known",
    ),
    "metrics that it does not speak of": (
        {"terms": terms(metrics=("accuracy",))},
        "sums of the sites' own evaluations",
    ),
    "code": ({"code": "0" * 64}, "its training code 'visits.py' has another SHA-256 than the file that is installed"),
    "version": (
        {"terms": terms(code="choral 0.0.1")},
        f"the coordinator runs 'choral 0.0.1', and choral {__version__} runs",
    ),
    "task": ({"task": "other.py"}, "no training code 'other.py' is installed here"),
    "embedded code": (
        {"code": f"choral {__version__}"},
        "Choral has no task 'visits.py'",
    ),
    "strangers": (
        {"parties": ("north", "south", "east", "stranger")},
        "its parties have 'stranger', who is not pinned here",
    ),
    "without this site": (
        {"parties": ("south", "east", "west"), "terms": terms(federation={"parties": 3})},
        "its parties do not have 'north', this site",
    ),
    "number of parties": ({"parties": NAMES[:3]}, "its terms are of 4 parties, and it names 3"),
    "coordinator": ({"coordinator": "other"}, "it says it is of 'other', and this site is connected to 'hub'"),
    "unknown key of the terms": ({"record": {"more": 1}}, "its terms have the keys"),
    "unknown key of the sum": ({"secure_sum": {"kind": "masked", "threshold": 1}}, "its secure sum cannot be read"),
    "no such sum": ({"secure_sum": {"kind": "fast"}}, "its secure sum is of no known kind"),
}


@pytest.mark.parametrize("what", WEAKER)
def test_each_weaker_term_alone_is_refused(sites: Sites, what: str) -> None:
    """Approved as it is: what a person has overlooked is refused all the same."""
    changed, reason = WEAKER[what]
    given = offer(**changed)
    sites.north.offers.keep(given)
    sites.north.log.append(
        "approved",
        {"digest": given.digest, "job": "", "task": "", "code": "", "until": "2026-12-31", "by": ""},
        NOW,
    )
    with pytest.raises(OfferRefusedError) as refused:
        sites.north.agree(given, now=NOW)
    assert len(refused.value.reasons) == 1, refused.value.reasons
    assert reason in refused.value.reasons[0]
    line = sites.north.log.read().entries[-1]
    assert (line.event, line.facts["digest"], line.facts["reasons"]) == ("refused", given.digest, str(refused.value))


def test_a_threshold_below_the_site_s_own_is_refused(sites: Sites) -> None:
    north = sites.settings(("minimum_threshold = 2", "minimum_threshold = 4"))
    assert objections(north, offer()) == ["this party accepts a threshold of at least 4, the setup says 3"]


def test_a_shared_key_is_for_sites_that_expect_no_liar_and_large_sums(sites: Sites) -> None:
    north = sites.settings(("[sum]", "[sum]\ncorrupt = 0\nserver = 'semi-honest'"))
    assert objections(north, offer(summing=Homomorphic(key="shared"))) == []
    weak = offer(summing=Homomorphic(key="shared", min_survivors=2))
    assert objections(north, weak) == ["a smallest sum of 2, at least 3"]


def test_noise_in_shares_must_withstand_as_many_colluders(sites: Sites) -> None:
    changed = "max_grad_norm = 1.0\nunit = 'client'\nnoise = ['distributed']\ncolluders = 2"
    north = sites.settings(("max_grad_norm = 1.0", changed))
    weak = offer(terms=terms(privacy=ClientPrivacy(1.0, 1e-5, colluders=1)))
    assert objections(north, weak) == ["noise in shares against 1 colluders, at least 2"]
    assert objections(north, offer(terms=terms(privacy=ClientPrivacy(1.0, 1e-5, colluders=2)))) == []
    moving = ClientPrivacy(1.0, 1e-5, colluders=2, clip=AdaptiveClip(start=0.1, quantile=0.5))
    assert objections(north, offer(terms=terms(privacy=moving))) == ["a clipping norm of inf, at most 1"]


def test_a_plan_of_noise_in_shares_is_priced_at_the_site(sites: Sites) -> None:
    """The coordinator's plan says how much noise; what that costs is computed here, on the ledger as it is."""
    edited = ("max_grad_norm = 1.0", "max_grad_norm = 1.0\nnoise = ['distributed']")
    north = sites.settings(edited)
    steps, privacy, plan = STEPS, SHARED, PLAN
    fair = offer(terms=terms(algorithm=steps, privacy=privacy, shares=plan))
    assert objections(north, fair) == []
    weak = replace(plan, noise_multiplier=plan.noise_multiplier / 2)
    (found,) = objections(north, offer(terms=terms(algorithm=steps, privacy=privacy, shares=weak)))
    assert found.startswith("these releases would come to epsilon")
    for none in (terms(algorithm=steps, privacy=privacy), terms(algorithm=steps, shares=plan)):
        assert PLANLESS in objections(north, offer(terms=none))


def test_a_fraction_of_corrupt_sites_is_of_all_that_are_pinned(sites: Sites) -> None:
    """An offer of few parties may have all the corrupt ones among them."""
    north = sites.settings(("[sum]", "[sum]\ncorrupt = 0.26"))
    few = offer(parties=NAMES[:3], terms=terms(federation={"parties": 3}))
    assert policy_of(north, few).corrupt == 2  # of 4 pinned, not of 3 asked


def test_nothing_runs_that_nobody_approved(sites: Sites) -> None:
    with pytest.raises(OfferRefusedError, match="nobody approved it"):
        sites.north.agree(offer(), now=NOW)
    assert sites.north.offers.find("visits-2026") == offer()  # kept for the review


def test_an_offer_that_was_edited_after_its_approval_is_another(sites: Sites) -> None:
    sites.approve(offer())
    edited = offer(terms=terms(rounds=19))
    with pytest.raises(OfferRefusedError, match=f"'visits-2026' was approved as {offer().digest[:16]}, and this is an"):
        sites.north.agree(edited, now=NOW)


def test_an_approval_holds_to_the_end_of_its_last_day_and_no_longer(sites: Sites) -> None:
    sites.approve(offer(), until=date(2026, 11, 30))
    sites.north.agree(offer(), now=NOW.replace(day=30, hour=23, minute=59))
    with pytest.raises(OfferRefusedError, match="its approval expired on 2026-11-30"):
        sites.north.agree(offer(), now=NOW + timedelta(days=2))


def test_a_clock_that_was_put_back_brings_no_approval_back_to_life(sites: Sites) -> None:
    """However often it is tried: a refusal is no line that makes it true. A person who approves anew looks at it."""
    sites.approve(offer(), until=date(2026, 11, 30))
    sites.north.note("round")  # it is later than that
    sites.north.log.append("round", {}, NOW + timedelta(days=30))
    for _ in range(3):
        with pytest.raises(OfferRefusedError, match=r"it is 2026-11-29 12:00 UTC here, and there are lines"):
            sites.north.agree(offer(), now=NOW)
    sites.approve(offer(job="other"))
    with pytest.raises(OfferRefusedError, match="set the clock"):
        sites.north.agree(offer(), now=NOW)
    sites.approve(offer())
    sites.north.agree(offer(), now=NOW - timedelta(minutes=4))


def test_a_revoked_approval_does_not_hold_and_a_new_one_does(sites: Sites) -> None:
    sites.approve(offer())
    revoke(sites.north, offer().digest, by="officer", now=NOW)
    with pytest.raises(OfferRefusedError, match="its approval was revoked"):
        sites.north.agree(offer(), now=NOW)
    sites.approve(offer())
    sites.north.agree(offer(), now=NOW)


def test_an_approval_that_is_revoked_meanwhile_does_not_hold(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first look and the line that says agreed, another process revokes."""
    sites.approve(offer())
    other = SiteFolder.open(sites.path)

    def slow(folder: SiteFolder, given: Offer, *, budget: bool = True) -> list[str]:
        if budget:
            revoke(other, given.digest, by="officer", now=NOW)
        return []

    monkeypatch.setattr("choral.network.site.admission.objections", slow)
    with pytest.raises(OfferRefusedError, match="its approval was revoked"):
        sites.north.agree(offer(), now=NOW)
    assert [line.event for line in sites.north.log.read().entries] == ["begun", "approved", "revoked", "refused"]


def test_nobody_has_budgets_computed_without_an_approval(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, and a coordinator can make up offers without end."""
    monkeypatch.setattr("choral.network.site.objections.budget_objection", lambda *_: pytest.fail("computed"))
    with pytest.raises(OfferRefusedError) as refused:
        sites.north.agree(offer(terms=terms(rounds=21)), now=NOW)
    assert refused.value.reasons == ("nobody approved it", "21 rounds, at most 20")
    assert objections(sites.north, offer(terms=terms(rounds=21))) == ["21 rounds, at most 20"]


def test_what_is_agreed_is_not_noted_by_others(sites: Sites) -> None:
    for event in ("begun", "approved", "revoked", "agreed", "refused"):
        with pytest.raises(SiteError, match="not noted"):
            sites.north.note(event)


def test_a_day_has_an_end_to_its_lines(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step that a coordinator asks for may make one."""
    monkeypatch.setattr("choral.network.site.files.log.MOST_LINES", 3)
    for _ in range(3):
        sites.north.log.append("out", {}, NOW + timedelta(days=400))
    with pytest.raises(SiteError, match="has 3 lines of 2028-01-03, and takes no more"):
        sites.north.log.append("out", {}, NOW + timedelta(days=400))
    sites.north.log.append("out", {}, NOW + timedelta(days=401))


@pytest.mark.parametrize("what", ["removed", "cut"])
def test_a_ledger_that_was_put_back_is_found(sites: Sites, what: str) -> None:
    """Its file alone cannot show that its end is missing; the site's log remembers how far it had come."""
    sites.approve(offer())
    agreed = sites.north.agree(offer(), now=NOW)
    assert agreed.ledger is not None
    agreed.ledger.bind("north", 1e-5)
    event = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=30.0, steps=10)
    plan = ReleasePlan(epsilon=1.0, parts=(PlannedEvents(event=event, times=4),))
    agreed.ledger.append(event, after=0, plan=plan)
    before = agreed.ledger.path.read_bytes() if agreed.ledger.path else b""
    agreed.ledger.append(event, after=1)
    assert agreed.books()["ledger_events"] == 2
    sites.north.note("trained", **agreed.books())
    assert objections(sites.north, offer()) == []
    path = sites.path / "ledgers/visits.jsonl"
    path.unlink() if what == "removed" else path.write_bytes(before)
    (found,) = objections(sites.north, offer())
    assert f"holds {0 if what == 'removed' else 1} events, expected at least 2" in found


def test_a_ledger_that_was_made_anew_is_found(sites: Sites) -> None:
    path = sites.path / "ledgers/visits.jsonl"
    for noise in (30.0, 40.0):
        path.unlink(missing_ok=True)
        ledger = Ledger(path, holder="north")
        ledger.bind("north", 1e-5)
        ledger.append(PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=noise, steps=10), after=0)
        if noise == 30.0:
            sites.north.note("trained", **ledger_facts("visits", ledger))
    assert objections(sites.north, offer()) == ["the ledger of 'visits' is not the one that the site's log tells of"]


def test_what_is_changed_while_a_site_runs_counts_from_the_next_offer_on(sites: Sites) -> None:
    running = sites.north
    sites.approve(offer())
    running.agree(offer(), now=NOW)
    sites.settings(("rounds = 20", "rounds = 19"))
    with pytest.raises(OfferRefusedError, match="20 rounds, at most 19"):
        running.agree(offer(), now=NOW)
    sites.settings(("rounds = 19", "rounds = 20"))
    sites.north.pin(sites.north.pinned.without("south"), "unpinned")
    with pytest.raises(OfferRefusedError, match="its parties have 'south', who is not pinned here"):
        running.agree(offer(), now=NOW)
    assert running.refreshed().signing is running.signing


def test_code_that_changed_since_it_was_approved_does_not_run(sites: Sites) -> None:
    sites.approve(offer())
    (sites.path / "tasks/visits.py").write_text(CODE + "# more\n")
    with pytest.raises(OfferRefusedError, match="has another SHA-256 than the file that is installed here"):
        sites.north.agree(offer(), now=NOW)


def test_a_budget_that_is_spent_refuses_whoever_asks(sites: Sites) -> None:
    """Another job, another coordinator: one ledger. An offer whose epsilon leaves room above what was spent is fair."""
    sites.approve(offer())
    ledger = sites.north.agree(offer(), now=NOW).ledger
    assert ledger is not None
    ledger.bind("north", 1e-5)
    ledger.append(PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=3.0, steps=300), after=0)
    spent = ledger.epsilon(1e-5)
    assert 1.0 < spent < 3.0
    (found,) = objections(sites.north, offer())
    assert found.startswith("the budget epsilon=1 at delta=1e-05 is spent")
    assert objections(sites.north, offer(terms=terms(privacy=Privacy(3.0, 1e-5)))) == []


def test_a_ledger_that_is_damaged_refuses(sites: Sites) -> None:
    path = sites.path / "ledgers/visits.jsonl"
    path.touch(0o600)
    path.write_text("{}\n")
    (found,) = objections(sites.north, offer())
    assert "not a line of a ledger" in found


def test_jobs_and_bytes_of_a_day_have_an_end(sites: Sites) -> None:
    jobs = [offer(job=f"job{place}") for place in range(4)]
    for job in jobs:
        sites.approve(job)
    for job in (*jobs[:3], *jobs[:3]):  # one that was begun goes on after a restart
        sites.north.agree(job, now=NOW)
    with pytest.raises(OfferRefusedError, match="3 other jobs were agreed to today already"):
        sites.north.agree(jobs[3], now=NOW)
    sites.north.agree(jobs[3], now=NOW + timedelta(days=1))
    sites.north.count(600, now=NOW)
    with pytest.raises(OfferRefusedError, match="more than 1000 bytes on 2026-11-29"):
        sites.settings().count(401, now=NOW)  # another process
    sites.north.count(400, now=NOW)
    for _ in range(2):
        with pytest.raises(OfferRefusedError):
            sites.north.count(1, now=NOW)
    refused = [line.facts for line in sites.north.log.read().entries if line.event == "refused"]
    assert refused[1:] == [{"coordinator": "hub", "reasons": "more than 1000 bytes on 2026-11-29"}]  # once a day
    sites.north.count(1000, now=NOW + timedelta(days=1))


def test_a_flood_of_offers_fills_neither_folder_nor_log(sites: Sites) -> None:
    for place in range(MOST_REFUSALS + 20):
        with pytest.raises(OfferRefusedError):
            sites.north.agree(offer(job=f"job{place}"), now=NOW)
    for _ in range(2):
        with pytest.raises(OfferRefusedError):
            sites.north.agree(offer(job="job1"), now=NOW)
    assert len(list((sites.path / "jobs").iterdir())) == 200
    refused = [line.facts["digest"] for line in sites.north.log.read().entries if line.event == "refused"]
    assert len(refused) == len(set(refused)) == MOST_REFUSALS


def test_a_full_disk_at_the_log_is_no_agreement(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    sites.approve(offer())
    before = (sites.path / "log.jsonl").read_bytes()

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(Exception, match=r"cannot be used: No space left on device"):
        sites.north.agree(offer(), now=NOW)
    monkeypatch.undo()
    assert (sites.path / "log.jsonl").read_bytes() == before
    sites.north.agree(offer(), now=NOW)


def test_data_without_a_promise_takes_jobs_without_one(sites: Sites) -> None:
    text = (sites.path / "site.toml").read_text()
    begins, ends = text.index("[data.visits.promise]"), text.index("[tasks")
    north = sites.settings((text[begins:ends], "without_privacy = true\n"))
    without = offer(terms=terms(privacy=None))
    assert objections(north, without) == []
    sites.approve(without)
    agreed = north.agree(without, now=NOW)
    assert agreed.privacy is None
    assert agreed.ledger is None


def test_a_task_of_choral_trains_on_its_own_part(sites: Sites) -> None:
    digits = offer(task="digits", code=f"choral {__version__}")
    (found,) = objections(sites.north, digits)
    assert found == "no training code 'digits' is installed here"
    north = sites.settings(('path = "visits.csv"', 'part = "party 3 of 10"'), ('[tasks."visits.py"]', "[tasks.digits]"))
    assert objections(north, digits) == []
    sites.approve(digits)
    agreed = north.agree(digits, now=NOW)
    assert (agreed.path, agreed.code, agreed.data.part) == (None, None, "party 3 of 10")
    (found,) = objections(north, offer(task="digits", code="choral 9.9"))
    assert found == f"its training code is of choral 9.9, and choral {__version__} runs here"


def test_code_in_a_file_reads_a_path_and_a_task_of_choral_its_part(sites: Sites) -> None:
    """Neither is given the other's data, whatever site.toml says."""
    digits = offer(task="digits", code=f"choral {__version__}")
    (found,) = objections(sites.settings(('[tasks."visits.py"]', "[tasks.digits]")), digits)
    assert found == "the data of a task of Choral is a part of its own, and 'digits' has a path here"
    north = sites.settings(("[tasks.digits]", '[tasks."visits.py"]'), ('path = "visits.csv"', 'part = "party 1 of 2"'))
    assert objections(north, offer()) == [
        "training code in a file reads a path, and the data of 'visits.py' has none here"
    ]


def test_code_that_is_not_there_is_not_run(sites: Sites) -> None:
    (sites.path / "tasks/visits.py").unlink()
    assert objections(sites.north, offer()) == ["no training code 'visits.py' is installed here"]


def test_the_policy_of_one_sum_is_what_the_site_computed_itself(sites: Sites) -> None:
    sites.approve(offer())
    agreed = sites.north.agree(offer(), now=NOW)
    spec = replace(agreed.terms.codec("update", NAMES).spec, directory=4, terms=agreed.terms.digest)
    policy = agreed.policy_for(spec)
    setup = Masked(corrupt=1, min_survivors=3).setup(spec, session=bytes(16))
    policy.check(setup, "north")
    for changed in ({"length": 9}, {"bound": spec.bound + 1}, {"encoding": "other"}, {"terms": bytes(32)}):
        with pytest.raises(Exception, match=r"this party|the setup"):
            policy.check(Masked(corrupt=1, min_survivors=3).setup(replace(spec, **changed), session=bytes(16)), "north")


APPROVED: dict[str, tuple[Any, Any]] = {
    "a smaller sum": (Masked(corrupt=1, min_survivors=4, dropouts=0), Masked(corrupt=1, min_survivors=3)),
    "fewer corrupt sites": (Masked(corrupt=2, min_survivors=4, dropouts=0), Masked(corrupt=1, min_survivors=4)),
    "a coordinator that does not lie": (
        Masked(corrupt=1, min_survivors=3),
        Masked(corrupt=1, min_survivors=3, server="semi-honest"),
    ),
    "two trips of fewer": (
        Masked(corrupt=0, min_survivors=4, dropouts=0, trips=2),
        Masked(corrupt=0, min_survivors=3, dropouts=0, trips=2),
    ),
}


@pytest.mark.parametrize("what", APPROVED)
def test_no_session_is_weaker_than_what_was_approved(sites: Sites, what: str) -> None:
    """A coordinator proposes the setup of each session when the job runs; this site's own settings take either."""
    path = sites.path / "site.toml"
    path.write_text(path.read_text().replace("[sum]", '[sum]\ncorrupt = 0\nserver = "semi-honest"'))
    given = offer(summing=APPROVED[what][0])
    sites.approve(given)
    agreed = sites.north.agree(given, now=NOW)
    spec = replace(agreed.terms.codec("update", NAMES).spec, directory=4, terms=agreed.terms.digest)
    policy, (approved, weaker) = agreed.policy_for(spec), APPROVED[what]
    for summing in (approved, weaker):
        setup = summing.setup(spec, session=bytes(16))
        with pytest.raises(PolicyError) if summing is weaker else nullcontext():
            policy.check(setup, "north")
            if isinstance(setup, AheadSetup):
                check_floor(setup, policy)


def test_the_folder_moves_with_all_that_it_holds(sites: Sites) -> None:
    sites.approve(offer())
    moved = sites.path.with_name("moved")
    shutil.copytree(sites.path, moved)
    type(sites.north).open(moved).agree(offer(), now=NOW)
