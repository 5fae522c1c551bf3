"""A site's folder with three others pinned, and the offer that it would agree to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from choral.network import Offer, SiteFolder, make_identity
from choral.network.site.approvals import approve
from choral.network.site.terms import sum_record
from choral.privacy import ClientPrivacy, Privacy
from choral.protocols import Masked
from choral.trainers import Encoding, FedAvg
from choral.trainers.algorithms.interface import Algorithm, FederationInfo
from choral.trainers.federated.terms.task_code import version_here
from choral.trainers.federated.terms.training_terms import TrainingTerms
from choral.trainers.run_folder.describe import settings_of

NAMES = ("north", "south", "east", "west")
CODE = "def site(data, training, seed):\n    ...\n"
NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
SETTINGS = """
name = "north"
[coordinators.hub]
address = "localhost:8443"
[sum]
minimum_cohort = 3
minimum_threshold = 2
value_bits = 28
maximum_weight = 256
[job]
algorithms = ["fedavg", "fedprox", "fsvrg", "fedsgd"]
[maxima]
rounds = 20
parameters = 7
jobs_a_day = 3
bytes_a_day = 1000
[data.visits]
path = "visits.csv"
records = 200
[data.visits.promise]
epsilon = 3.0
delta = 1e-5
max_grad_norm = 1.0
[tasks."visits.py"]
data = "visits"
"""


def terms(**changed: Any) -> TrainingTerms:
    """What is asked for; changed: fields, and those of `federation` and `encoding` by name."""
    algorithm: Algorithm = changed.pop("algorithm", FedAvg())
    privacy: Privacy | ClientPrivacy | None = changed.pop("privacy", Privacy(1.0, 1e-5))
    encoding = Encoding(**changed.pop("encoding", {}))
    federation = {
        "parties": len(NAMES), "length": 7, "examples": 800, "largest": 256, "value_bound": encoding.value_bound,
        "weight": 800,
    } | changed.pop("federation", {})  # fmt: skip
    given: dict[str, Any] = {"shapes": {"w": (1, 6), "b": (1,)}, "rounds": 20, "code": version_here()} | changed
    return TrainingTerms(
        algorithm=algorithm,
        federation=FederationInfo(**federation),
        encoding=encoding,
        privacy=settings_of(privacy, federation["parties"]),
        **given,
    )


def offer(*, record: Mapping[str, Any] | None = None, **changed: Any) -> Offer:
    """The offer, with fields changed; record: keys of its terms' record."""
    made: TrainingTerms = changed.pop("terms", None) or terms()
    fields: dict[str, Any] = {
        "job": "visits-2026",
        "coordinator": "hub",
        "task": "visits.py",
        "code": hashlib.sha256(CODE.encode()).hexdigest(),
        "settings": {"training": {"batch_size": 20, "rounds": 20}},
        "terms": {**made.record(), **(record or {})},
        "secure_sum": sum_record(changed.pop("summing", Masked(corrupt=1, min_survivors=3))),
        "parties": NAMES,
    }
    return Offer(**{**fields, **changed})


@dataclass
class Sites:
    """north, opened; the others' certificates are in its directory."""

    path: Path
    north: SiteFolder

    def settings(self, *edits: tuple[str, str]) -> SiteFolder:
        """north again, its site.toml with these texts in the place of others."""
        text = (self.path / "site.toml").read_text()
        for old, new in edits:
            assert old in text
            text = text.replace(old, new)
        (self.path / "site.toml").write_text(text)
        self.north = SiteFolder.open(self.path)
        return self.north

    def approve(self, given: Offer, until: date = date(2026, 12, 31)) -> None:
        self.north.offers.keep(given)
        approve(self.north, given, until, by="officer", now=NOW)


def make_sites(tmp_path: Path) -> Sites:
    path = tmp_path / "north"
    folder = SiteFolder.init(path, "north")
    pinned = folder.pinned
    for name in ("south", "east", "west", "hub"):
        made = make_identity(tmp_path / name, name)
        pinned = pinned.with_(made.certificate, coordinator=name == "hub")
    pinned.write(path / "directory.toml")
    for name, text in (("visits.csv", "age\n"), ("tasks/visits.py", CODE), ("site.toml", SETTINGS)):
        (path / name).touch(0o600)
        (path / name).write_text(text)
    return Sites(path, SiteFolder.open(path))
