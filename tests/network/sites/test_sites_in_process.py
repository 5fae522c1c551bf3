"""Every algorithm, sum and promise over the real host of a site and the real coordinator, joined by function calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from site_federation import (
    ALGORITHMS,
    SIZES,
    Direct,
    Federation,
    algorithm,
    offer_for,
    private_sites,
    records_of,
    rehearsed,
    same_weights,
    served,
    toml_of,
    write_directory,
)

from choral.audits import audit
from choral.cli.command_line import main
from choral.errors import ConfigError
from choral.jobs.settings import Evaluation, PrivacySettings, ServeSettings, SitesSettings, SumSettings
from choral.network import Offer
from choral.privacy import Ledger
from choral.protocols.errors import TooFewSurvivorsError
from choral.trainers import Participation, Run
from choral.trainers.task.settings import Training


@pytest.fixture(scope="module")
def open_sites(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Sites that take jobs without privacy."""
    return Federation(tmp_path_factory.mktemp("open"))


@pytest.mark.parametrize("kind", ["masked", "homomorphic"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_weights_are_those_of_federate_bit_by_bit(name: str, kind: Any, open_sites: Federation) -> None:
    settings = open_sites.settings(
        algorithm=algorithm(name, **ALGORITHMS[name]),
        secure_sum=SumSettings(kind=kind),
        training=Training(rounds=2, batch_size=8, learning_rate=0.1),
    )
    run, said = served(Direct(open_sites), settings)
    assert [entry.survivors for entry in run.history] == [0, 3, 3]
    assert same_weights(run, rehearsed(open_sites, settings))
    assert said == [f"{site} took the job ({place} of 3)" for place, site in enumerate(SIZES, 1)]


@pytest.mark.parametrize(
    ("unit", "name", "privacy"),
    [
        ("record", "fedavg", {"noise": "local"}),
        ("record", "fedsgd", {"noise": "distributed"}),
        pytest.param(
            "record", "fedsgd", {"noise": "distributed", "mechanism": "banded", "bands": 3}, marks=pytest.mark.slow
        ),
        ("record", "gd", {"noise": "distributed"}),
        ("client", "fedavg", {"noise": "distributed", "colluders": 0, "min_survivors": 2}),
        ("client", "dane", {"noise": "local"}),
        ("client", "fedavg", {"noise": "central"}),
    ],
)
def test_each_site_pays_from_its_own_ledger_before_it_sends(
    unit: Any, name: str, privacy: dict[str, Any], tmp_path: Path
) -> None:
    federation = private_sites(tmp_path, unit)
    delta = 1e-3 if unit == "record" else 0.2
    in_shares = name in ("fedsgd", "gd")
    terms = {"min_survivors": 3, "corrupt": 1, "dropouts": 0} if in_shares else {"min_survivors": 2}
    for site in federation.names:
        edits = [("minimum_cohort = 2", "minimum_cohort = 3"), ("corrupt = 0", "corrupt = 1")] if in_shares else []
        federation.configure(site, ("delta = 1e-3", f"delta = {delta}"), *edits)
    settings = federation.settings(
        algorithm=algorithm(name, **ALGORITHMS[name]),
        privacy=PrivacySettings(epsilon=4.0, delta=delta, unit=unit, **privacy),
        secure_sum=SumSettings(kind="masked", **terms),
        training=Training(rounds=2, batch_size=8, learning_rate=0.1),
    )
    run, _ = served(Direct(federation), settings, out=tmp_path / "run")
    assert [entry.survivors for entry in run.history] == [0, 3, 3]
    for site in federation.names:
        ledger = Ledger(tmp_path / site / "ledgers" / "points.jsonl", holder=site)
        assert len(ledger.events if unit == "record" else ledger.releases) >= 2
        assert 0 < ledger.epsilon(delta) <= 4.0
    found = audit(Run.load(tmp_path / "run"))  # which has no ledger of theirs to verify it by
    verdicts = {budget.holder: budget.verdict for budget in found.budgets}
    assert verdicts == ({"clients": "holds"} if unit == "client" else dict.fromkeys(federation.names, "unverified"))
    assert found.verdict == ("holds" if unit == "client" else "unverified")
    padded = "no answer waits for a fixed time; every site, by its own program, pads each step to"
    banded = "mechanism" in privacy
    assert any(padded in caveat for caveat in found.caveats) == (in_shares and not banded)
    assert any("by a matrix of 3 bands" in caveat for caveat in found.caveats) == banded


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_sums_of_the_sites_own_evaluations_are_a_declared_release(name: str, tmp_path: Path) -> None:
    """The mean over all held-out records, as if they were in one place; and training is as it is without."""
    federation = Federation(tmp_path)
    settings = federation.settings(algorithm=algorithm(name), metrics=("accuracy", "loss"))
    settings = replace(settings, sites=replace(settings.sites, metrics="in the clear, no epsilon"))
    with pytest.raises(TooFewSurvivorsError, match="0 of 3 sites took the job"):
        served(Direct(federation), settings)  # which their site.toml does not allow
    for site in federation.names:
        federation.configure(site, ("[maxima]", 'metrics = "in the clear, no epsilon"\n[maxima]'))
    run, _ = served(Direct(federation), settings, out=tmp_path / "run")
    assert same_weights(run, rehearsed(federation, settings))
    release = run.info.releases[-1]
    assert release["channel"] == "site metrics"
    assert release["source"] == "data"
    assert "in the clear, no epsilon" in release["what"]
    held = [records_of(site)[: len(records_of(site)) // 2] for site in federation.names]
    points, labels = (torch.from_numpy(part) for part in (np.concatenate(held)[:, :6], np.concatenate(held)[:, 6]))
    outputs = points @ run.state["0.weight"][0] + run.state["0.bias"]
    right = float(((outputs > 0) == (labels > 0)).float().mean())
    assert run.metrics["accuracy at the sites"] == pytest.approx(right, abs=1e-6)
    loss = float(torch.nn.functional.binary_cross_entropy_with_logits(outputs, labels))
    assert run.metrics["loss at the sites"] == pytest.approx(loss, abs=1e-5)
    found = audit(Run.load(tmp_path / "run"))
    assert found.verdict == "holds"
    said = " ".join(found.caveats)
    assert "no privacy promise covers it: accuracy, loss of each party's held-out records" in said
    assert "records they have was agreed on beforehand, and not counted here" in said


def test_the_offer_can_be_written_ahead(open_sites: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    settings = open_sites.settings()
    job, path = open_sites.path / "ahead.toml", open_sites.path / "ahead.offer"
    job.write_text(toml_of(settings))
    words = ["serve", str(job), "--directory", str(write_directory(open_sites))]
    words += ["--serve.identity", str(open_sites.path / "hub" / "hub.crt")]
    assert main([*words, "--offer", str(path)]) == 0
    named = replace(settings, serve=replace(settings.serve, job="ahead"))
    assert Offer.read(path.read_bytes()).digest == offer_for(open_sites, named).digest
    assert "next, at each site: choral site review" in capsys.readouterr().out
    assert main(words) == 2
    assert "give --out DIR, or --offer FILE" in capsys.readouterr().err
    assert main([*words[:4], "--out", str(open_sites.path / "no-run")]) == 2
    assert "serve.identity is not set" in capsys.readouterr().err


def test_a_run_goes_on_with_other_waits_and_not_with_other_numbers(open_sites: Federation, tmp_path: Path) -> None:
    settings = open_sites.settings(training=Training(rounds=1, batch_size=8, learning_rate=0.1))
    served(Direct(open_sites), settings, out=tmp_path / "run")
    longer = replace(settings, training=replace(settings.training, rounds=2))
    patient = replace(longer, serve=replace(settings.serve, wait=1.0, port=9000))
    run, _ = served(Direct(open_sites), patient, out=tmp_path / "run", resume=True)
    assert [entry.survivors for entry in run.history] == [0, 3, 3]
    assert same_weights(run, rehearsed(open_sites, longer))
    more = replace(longer, sites=replace(settings.sites, records=1000, largest=900))
    with pytest.raises(ConfigError, match="cannot resume"):
        served(Direct(open_sites), more, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sites": SitesSettings()}, "sites.records and sites.largest are not set"),
        ({"sites": SitesSettings(records=2, largest=40)}, "3 parties of at most 40 records with 2 in total cannot be"),
        ({"participation": Participation(cohort=2)}, "all of them are asked in every round"),
        ({"participation": Participation(deadline=3.0)}, "participation.deadline rehearses what happens by itself"),
        ({"transcript": "rehearsal"}, "which a server of parties elsewhere never sees"),
        ({"evaluation": Evaluation(per_party=True)}, "needs each party's records"),
        ({"serve": ServeSettings(quorum=1)}, "serve.quorum is 1, expected at least 2"),
        ({"serve": ServeSettings(training=0.0)}, "serve.training is 0.0, expected seconds above 0"),
    ],
)
def test_what_cannot_be_with_sites_is_refused_before_anybody_is_asked(
    changed: dict[str, Any], words: str, open_sites: Federation, tmp_path: Path
) -> None:
    carrier = Direct(open_sites, approving=False)
    with pytest.raises(ConfigError, match=words):
        served(carrier, open_sites.settings(**changed), out=tmp_path / "run")
    assert carrier.asked == {}
