"""Statistics with sites: the same numbers as in one process, their ledgers, what a site refuses, real processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_python
from site_federation import CODE, NO_PROMISE, PROMISE, Direct, Federation, approved_at, private_sites, records_of
from site_processes import ENVIRONMENT, Processes
from site_statistics import ASKED, NAMES, PRIVATE, RARE, SHARED, computed, settings_of, with_files

from choral import Masked, federated_statistics
from choral.audits import audit
from choral.errors import ConfigError
from choral.jobs.serving import offer_ahead, serve, standardise
from choral.jobs.settings import PrivacySettings, SitesSettings, SumSettings
from choral.jobs.sites.statistics import statistics_offer
from choral.jobs.standardising import kept
from choral.jobs.statistics import StatisticsSettings, statistic_of
from choral.network import Offer
from choral.network.errors import OfferError
from choral.network.site.budget import open_ledger, spent_of
from choral.network.site.objections import objections
from choral.network.site.review import review
from choral.network.site.terms import terms_of
from choral.privacy.accounting.events import PoissonSampledShares
from choral.protocols.errors import FaultyServerError, TooFewSurvivorsError
from choral.trainers import Covariance
from choral.trainers.algorithms.interface import Exchange
from choral.trainers.analytics.terms import StatisticsParty, StatisticsTerms
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.task.settings import DataSettings


def test_without_noise_sites_find_what_one_process_does(tmp_path: Path) -> None:
    federation = with_files(Federation(tmp_path, promise=NO_PROMISE))
    found = computed(federation, settings_of(federation))
    parties = {
        name: {**{str(at): np.float64(records_of(name)[:, at]) for at in range(2)}, "label": records_of(name)[:, 6]}
        for name in federation.names
    }
    parties = {  # as they stand in the files
        name: {key: np.array([float(f"{value:.9g}") for value in column]) for key, column in table.items()}
        for name, table in parties.items()
    }
    wanted = {name: statistic_of(name, each) for name, each in ASKED.items()}
    wanted["both"] = Covariance({"0": (-5, 5), "1": (-4, 4)})  # sites agree on no order but that of the names
    assert found.estimates == federated_statistics(parties, wanted, secure_sum=Masked(corrupt=0)).estimates
    assert "sum that withstands 0 corrupt sites" in found.claim
    assert "ehearsal" not in found.claim
    log = federation.site("north").log.read().entries
    assert [line.event for line in log if line.event == "trained"] == ["trained"]


def test_with_noise_each_sites_ledger_pays_once(tmp_path: Path) -> None:
    federation = with_files(private_sites(tmp_path, "record"), strict=True)
    settings = settings_of(federation, privacy=PRIVATE, secure_sum=SHARED, threshold=60.0)
    found = computed(federation, settings)
    shown = [each.value for label, each in found["label"].items() if label.startswith("count")]
    assert all(value is None or value >= 60.0 for value in shown)
    assert found.left_out == shown.count(None)
    assert (found.threshold, set(found.false_publication)) == (60.0, {"label"})
    exact = np.concatenate([records_of(name) for name in federation.names])
    mean = found["0"]["mean"]
    assert abs(mean.value - exact[:, 0].mean()) < 6 * mean.noise
    assert 0.05 < mean.noise < 2.0
    for name in federation.names:
        (event,) = open_ledger(federation.site(name), "points").events
        assert isinstance(event, PoissonSampledShares)
        assert (event.honest, event.parties, event.sample_rate) == (2, 3, 1.0)
        assert 3.9 < open_ledger(federation.site(name), "points").epsilon(1e-3) <= 4.0
        assert any("ledger_head" in line.facts for line in federation.site(name).log.read().entries)
    with pytest.raises(TooFewSurvivorsError):  # the same again: nothing is left of what it asks for
        computed(federation, replace(settings, title="again"))
    assert all(len(open_ledger(federation.site(name), "points").events) == 1 for name in federation.names)


def test_a_cell_of_one_site_is_left_out_by_the_sites(tmp_path: Path) -> None:
    federation = with_files(Federation(tmp_path, promise=NO_PROMISE))
    settings = settings_of(federation, statistics=RARE, contributors=2)
    found = computed(federation, settings)
    assert found["rare"]["count x"].value is None
    assert found.left_out == 2  # and one more, from which it could be computed
    assert "rests on the coordinator" in found.releases[0]
    with pytest.raises(ConfigError, match="threshold without noise"):  # before any site is asked
        computed(federation, settings_of(federation, statistics=RARE, threshold=5.0))
    without = computed(federation, settings_of(federation, statistics=RARE))
    assert without["rare"]["count x"].value == 1.0
    lost = Direct(federation)
    lost.stop("east")
    with pytest.raises(TooFewSurvivorsError):  # counted over all, or not at all
        computed(federation, replace(settings, title="other"), lost)


def test_counts_that_a_party_contradicts_are_refused() -> None:
    settings = StatisticsSettings(
        statistics=RARE,
        contributors=2,
        secure_sum=SumSettings(kind="masked", corrupt=0, min_survivors=3),
        sites=SitesSettings(records=30, largest=16),
    )
    terms = terms_of(statistics_offer(settings, NAMES, coordinator="hub").terms)
    assert isinstance(terms, StatisticsTerms)
    party = StatisticsParty("north", terms, np.array([0, 5, 0]), examples=5, drivers={}, shares=None)

    def told(counts: list[float], number: int = 1) -> Told:
        return Told.of(Exchange(channel="sums", weights=torch.tensor(counts)), 1, number)

    assert party._made(told([1, 3, 0])).tolist() == [0, 0, 0]
    assert party._made(told([2, 3, 0])).tolist() == [0, 5, 0]
    for lie in ([3, 3, 0], [0, 0, 0], [0, float("nan"), 0], [0, 4, 0]):
        with pytest.raises(FaultyServerError, match="counts"):
            party._made(told(lie))
    with pytest.raises(FaultyServerError, match="counts"):
        party._made(told([0, 3, 0], number=0))


def edited(offer: Offer, **changed: Any) -> Offer:
    raw = json.loads(offer.message())
    for key, value in changed.items():
        raw["terms"][key] = {**raw["terms"][key], **value} if isinstance(value, dict) else value
    return Offer.read(json.dumps(raw).encode())


def test_what_a_site_does_not_agree_to(tmp_path: Path) -> None:
    federation = with_files(private_sites(tmp_path, "record"), strict=True)
    folder = federation.site("north")
    good = statistics_offer(
        settings_of(federation, privacy=PRIVATE, secure_sum=SHARED), federation.names, coordinator="hub"
    )
    assert objections(folder, good) == []
    shown = dict(review(folder, good).rows)
    assert '"kind": "quantiles"' in shown["statistic"]
    assert "model" not in shown
    exact = statistics_offer(settings_of(federation), federation.names, coordinator="hub")
    assert any("a promise only" in reason for reason in objections(folder, exact))
    much = settings_of(federation, privacy=replace(PRIVATE, epsilon=9.0), secure_sum=SHARED)
    assert any(
        "at most 8" in r for r in objections(folder, statistics_offer(much, federation.names, coordinator="hub"))
    )
    federation.configure(
        "north", ('path = "points.npy"', 'path = "points.csv"'), ('[tasks."linear.py"]', "[tasks.statistics]")
    )
    assert any("algorithm statistics" in reason for reason in objections(federation.site("north"), good))
    for changed in (
        {"algorithm": {"statistics": {"0": {"kind": "maximum"}}}},
        {"algorithm": {"statistics": {"0": {"kind": "mean", "low": 1, "high": 0}}}},
        {"algorithm": {"statistics": {}}},
        {"algorithm": {"contributors": 2}},
        {"rounds": 2},
    ):
        with pytest.raises(OfferError, match=r"statistics|other (algorithm|releases)"):
            terms_of(edited(good, **changed).terms)


def test_what_a_coordinator_cannot_ask_for(tmp_path: Path) -> None:
    federation = with_files(Federation(tmp_path, promise=PROMISE.replace("UNIT", "record")))
    for changed, said in (
        ({"sites": SitesSettings()}, "agreed on"),
        ({"secure_sum": SumSettings(kind="plain")}, "plain sum"),
        ({"parties": {"north": Path("north.csv")}}, "rehearsals"),
        ({"privacy": PrivacySettings(epsilon=4.0, unit="client")}, "unit"),
        ({"privacy": PRIVATE, "secure_sum": SHARED, "contributors": 2}, "contributors with noise"),
        ({"privacy": PRIVATE}, "withstands 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            statistics_offer(settings_of(federation, **changed), federation.names, coordinator="hub")


def test_means_and_deviations_then_the_training_on_one_plan(tmp_path: Path) -> None:
    """Two offers, each approved; the second has the numbers, and a site trains by them on the plan of the first."""
    code = CODE.replace("evaluate_party=right)", "evaluate_party=right, bounds=[(-4, 4)] * 5 + [None])")
    federation = Federation(tmp_path, promise=PROMISE.replace("UNIT", "record"), code=code)
    for name in federation.names:
        federation.configure(
            name,
            ("minimum_cohort = 2", "minimum_cohort = 3"),
            ("corrupt = 0", "corrupt = 1"),
            ('"cocoa"\n', '"cocoa", "statistics"\n'),
        )
    settings = federation.settings(
        data=DataSettings(standardise="private"),
        privacy=PrivacySettings(epsilon=4.0, delta=1e-3),
        secure_sum=SHARED,
    )
    out, carrier, keys = tmp_path / "run", Direct(federation), federation.keys
    first = offer_ahead(settings, keys, coordinator="hub")
    assert first.settings["followed_by"]["rounds"] == 3
    shown = "\n".join(f"{what}: {words}" for what, words in review(federation.site("north"), first).rows)
    assert "to follow: a training of 3 rounds at most; both together: epsilon 4 at delta" in shown
    assert "may have come to 4, and" in shown  # which is what the ledger says once the sum is made, below
    for name in federation.names:
        approved_at(federation, name, first)
    standardise(settings, carrier, keys, coordinator=federation.hub, out=out, say=lambda _: None)
    for name in federation.names:
        ((plan, events),) = open_ledger(federation.site(name), "points").segments
        assert plan is not None
        assert ([part.times for part in plan.parts], len(events)) == ([1, 3], 1)
        assert plan.epsilon == 4.0
        assert 3.9 < spent_of(open_ledger(federation.site(name), "points")) <= 4.0
    by = kept(settings, out)
    assert by is not None
    assert by.means[5] == 0.0
    for name in federation.names:
        approved_at(federation, name, offer_ahead(settings, keys, coordinator="hub", by=by))
    run = serve(settings, carrier, keys, coordinator=federation.hub, out=out, say=lambda _: None)
    assert run.history[-1].round == 3
    assert run.state["means"].tolist() == pytest.approx(by.means)
    assert run.info.standardised == {"share": 0.2, "min_survivors": 3, "colluders": 1}
    for name in federation.names:
        ((plan, events),) = open_ledger(federation.site(name), "points").segments
        assert plan is not None
        assert events == (plan.parts[0].event, *[plan.parts[1].event] * 3)
        assert open_ledger(federation.site(name), "points").epsilon(1e-3) <= 4.0
    assert audit(run).verdict != "violated"


@pytest.mark.parametrize(
    ("follows", "said"),
    [
        ({"privacy": {"epsilon": 9.0}}, "epsilon 9, at most 8, of what is to follow"),
        ({"rounds": 1000}, "1000 rounds to follow, at most 100"),
        ({"rounds": 0}, "no number of rounds"),
        ({"more": 1}, "cannot be read"),
    ],
)
def test_what_is_to_follow_is_held_against_the_same_limits(tmp_path: Path, follows: Any, said: str) -> None:
    code = CODE.replace("evaluate_party=right)", "evaluate_party=right, bounds=[(-4, 4)] * 6)")
    federation = Federation(tmp_path, promise=PROMISE.replace("UNIT", "record"), code=code)
    data, privacy = DataSettings(standardise="private"), PrivacySettings(epsilon=4.0, delta=1e-3)
    settings = federation.settings(data=data, privacy=privacy, secure_sum=SHARED)
    raw = json.loads(offer_ahead(settings, federation.keys, coordinator="hub").message())
    followed = raw["settings"]["followed_by"]
    for key, value in follows.items():
        followed[key] = {**followed[key], **value} if isinstance(value, dict) else value
    assert any(said in reason for reason in objections(federation.site("north"), Offer.read(json.dumps(raw).encode())))


def test_a_command_and_three_processes(tmp_path: Path) -> None:
    processes = Processes(tmp_path, running=False)
    federation = with_files(processes.federation)
    settings = tmp_path / "stats.toml"
    settings.write_text(
        f"""
[secure_sum]
kind = "masked"
corrupt = 0
min_survivors = 3
[sites]
records = {sum(federation.records.values())}
largest = {max(federation.records.values())}
[serve]
identity = "{tmp_path}/hub/hub.crt"
host = "127.0.0.1"
port = {processes.port}
[statistics.0]
kind = "mean"
low = -4
high = 4
"""
    )
    words = ["-m", "choral", "stats", str(settings), "--directory", str(tmp_path / "directory.toml")]
    offer = tmp_path / "offer.json"
    warm_python.run([*words, "--offer", str(offer)], check=True, env=ENVIRONMENT, capture_output=True)
    try:
        for name in federation.names:
            approved_at(federation, name, Offer.read(offer.read_bytes()))
            processes.start(name)
        warm_python.run([*words, "--out", str(tmp_path / "out")], check=True, env=ENVIRONMENT, timeout=120)
    finally:
        processes.close()
    found = json.loads((tmp_path / "out" / "statistics.json").read_bytes())
    exact = np.concatenate([records_of(name) for name in federation.names])[:, 0]
    assert found["estimates"]["0"]["mean"]["value"] == pytest.approx(exact.mean(), abs=1e-5)
    assert found["survivors"] == list(federation.names)
