"""Statistics that sites are asked for in tests, and what a coordinator can sign that has its sites' keys, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from site_federation import Direct, Federation, approved_at, records_of

from choral.jobs.settings import PrivacySettings, ServeSettings, SitesSettings, SumSettings
from choral.jobs.sites.statistics import serve_statistics, statistics_offer
from choral.jobs.statistics import StatisticSettings, StatisticsSettings
from choral.protocols.crypto.identity import Identity
from choral.trainers.run_folder.evidence.signed_lines import body_of, sign

NAMES = ("north", "south", "east")
ASKED = {
    "0": StatisticSettings(kind="mean", low=-4, high=4),
    "label": StatisticSettings(kind="categories", values=(0, 1)),
    "both": StatisticSettings(kind="covariance", columns={"1": (-4, 4), "0": (-5, 5)}),
    "1": StatisticSettings(kind="quantiles", shares=(0.5,), low=-4, high=4, bins=64),
}
RARE = {"rare": StatisticSettings(kind="categories", values=("x", "y"))}


def with_files(federation: Federation, *, strict: bool = False) -> Federation:
    """Each site's records as a CSV file, with a column that one site alone has a word in."""
    stricter = [("minimum_cohort = 2", "minimum_cohort = 3"), ("corrupt = 0", "corrupt = 1")] if strict else []
    for name in federation.names:
        federation.configure(
            name,
            *stricter,
            ('path = "points.npy"', 'path = "points.csv"'),
            ('[tasks."linear.py"]', "[tasks.statistics]"),
            ('"cocoa"\n', '"cocoa", "statistics"\n'),
        )
        write_table(federation.path / name / "points.csv", name)
    return federation


def write_table(path: Path, name: str) -> None:
    table = records_of(name)
    lines = ["0,1,2,3,4,5,label,rare"]
    for at, row in enumerate(table.tolist()):
        word = "x" if name == "north" and at == 0 else "y"
        lines.append(",".join([*(f"{value:.9g}" for value in row[:6]), f"{row[6]:.0f}", word]))
    path.touch(0o600)
    path.write_text("\n".join(lines) + "\n")


def settings_of(federation: Federation, **changed: Any) -> StatisticsSettings:
    given: dict[str, Any] = {
        "statistics": ASKED,
        "secure_sum": SumSettings(kind="masked", corrupt=0, min_survivors=2),
        "sites": SitesSettings(records=sum(federation.records.values()), largest=max(federation.records.values())),
        "serve": ServeSettings(wait=0.2, step=5, training=30, away=0.5),
    }
    return StatisticsSettings(**{**given, **changed})


PRIVATE = PrivacySettings(epsilon=4.0, delta=1e-3)
SHARED = SumSettings(kind="masked", corrupt=1, min_survivors=3)


def computed(
    federation: Federation, settings: StatisticsSettings, carrier: Direct | None = None, out: Path | None = None
) -> Any:
    offer = statistics_offer(settings, federation.names, coordinator="hub")
    for name in federation.names:
        approved_at(federation, name, offer)
    carrier = carrier or Direct(federation)
    hub = federation.hub
    return serve_statistics(settings, carrier, federation.keys, coordinator=hub, say=lambda _: None, out=out)


def signed_by_all(federation: Federation, folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """What a coordinator comes to that lies before it asks for signatures: sites cannot see its files."""
    said = json.loads((folder / "manifest.json").read_bytes())["manifest"]
    for name in said["files"]:
        said["files"][name] = sha256((folder / name).read_bytes()).hexdigest()
    change(said)
    body = body_of(said)
    keys = {"": hub_key(federation)} | {name: federation.site(name).signing for name in said["parties"]}
    signatures = {name: sign("manifest", body, key) for name, key in keys.items()}
    (folder / "manifest.json").write_bytes(b'{"manifest":' + body + b',"signatures":' + body_of(signatures) + b"}\n")


def hub_key(federation: Federation) -> Identity:
    from Crypto.PublicKey import ECC

    return Identity(ECC.import_key(federation.hub.key_path.read_bytes()).seed)
