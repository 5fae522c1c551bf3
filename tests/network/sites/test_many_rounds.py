"""Twenty rounds of digits with ten sites, each with its part of the data, to the weights of `federate` bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from site_federation import Direct, Federation, same_weights, served

from choral.jobs.settings import Arm, Settings, SitesSettings, SumSettings
from choral.jobs.training import compute_of, federation_of, load_task
from choral.trainers import federate

NAMES = tuple(f"site-{number:02d}" for number in range(1, 11))


class DigitSites(Federation):
    """Sites whose data is a part of the digits, as site.toml says."""

    def configure(self, name: str, *edits: tuple[str, str]) -> None:
        super().configure(name, *edits)
        task = load_task(Settings(task="digits"), 0)
        place = NAMES.index(name)
        records = len(list(task.parties.values())[place])
        text = (self.path / name / "site.toml").read_text()
        before, _, _ = text.partition("[data.points]")
        text = f'{before}[data.digits]\npart = "party {place + 1} of 10"\nrecords = {records}\n{self.promise}\n'
        (self.path / name / "site.toml").write_text(f'{text}[tasks.digits]\ndata = "digits"\n')


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", "homomorphic"])
def test_twenty_rounds_of_ten_sites_end_at_the_weights_of_federate(kind: Any, tmp_path: Path) -> None:
    sites = DigitSites(tmp_path, NAMES)
    task = load_task(Settings(task="digits"), 0)
    sizes = [len(part) for part in task.parties.values()]
    settings = Settings(
        task="digits",
        secure_sum=SumSettings(kind=kind),
        sites=SitesSettings(records=sum(sizes), largest=max(sizes)),
    )
    run, _ = served(Direct(sites), settings)
    parties = dict(zip(NAMES, task.parties.values(), strict=True))
    here = federate(parties=parties, compute=compute_of(settings, 0), **federation_of(settings, Arm(), task, None))
    assert [entry.survivors for entry in run.history] == [0] + [10] * 20
    assert same_weights(run, here)
    assert run.metrics == here.metrics
    assert run.metrics["accuracy"] > 0.9
