"""Every algorithm, sum and promise over the real host of a site and the real coordinator, joined by function calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from site_federation import (
    SIZES,
    Direct,
    Federation,
    algorithm,
    private_sites,
    rehearsed,
    same_weights,
    served,
)

from choral.jobs.settings import PrivacySettings, SumSettings
from choral.privacy import Ledger
from choral.trainers import Run
from choral.trainers.task.settings import Training

ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {"mu": 0.1},
    "scaffold": {},
    "fedadam": {},
    "fedyogi": {},
    "fednova": {},
    "fedsgd": {"batch_size": 20},
    "fsvrg": {},
    "dane": {"mu": 0.1},
    "gd": {},
    "cocoa": {"ridge": 0.1},
}


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
    in_shares = name == "fedsgd"
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
    assert Run.load(tmp_path / "run").info.privacy == run.info.privacy
