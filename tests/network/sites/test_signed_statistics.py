"""The manifest of statistics: sites sign it, and verify.py and the audit hold the coordinator's folder against it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from site_federation import Direct, Federation, private_sites, write_directory
from site_statistics import ASKED as EVERYTHING
from site_statistics import PRIVATE, SHARED, computed, hub_key, settings_of, signed_by_all, with_files

from choral.cli.command_line import main
from choral.jobs.settings import ServeSettings
from choral.network.errors import PeerLostError, SiteError
from choral.network.host.evidence import signed
from choral.network.host.messages import SignRun, read_request
from choral.trainers.run_folder.evidence.manifest import Manifest
from choral.trainers.run_folder.evidence.receipts import read
from choral.trainers.run_folder.evidence.signed_lines import EvidenceError, body_of, sign

ASKED = {"0": EVERYTHING["0"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Three sites with a promise, and in `out` the statistics that they answered."""
    federation = with_files(private_sites(tmp_path_factory.mktemp("statistics"), "record"), strict=True)
    settings = settings_of(federation, privacy=PRIVATE, secure_sum=SHARED, statistics=ASKED)
    (federation.path / "out").mkdir()
    computed(federation, settings, out=federation.path / "out")
    write_directory(federation)
    return federation


def manifest(federation: Federation) -> Manifest:
    found = Manifest.read(federation.path / "out")
    assert found is not None
    return found


def receipts(federation: Federation) -> list[Path]:
    return [next((federation.path / name / "receipts").glob("*.jsonl")) for name in federation.names]


def test_every_site_signs_the_statistics_that_it_took_part_in(
    made: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out = manifest(made), made.path / "out"
    assert found.signed == ("", "north", "south", "east")
    said = found.said
    assert (said["kind"], said["completed"], said["gone"], said["rehearsal"]) == ("statistics", 1, [], False)
    assert sorted(said["files"]) == ["statistics.html", "statistics.json"]
    assert (said["claims"]["algorithm"], said["claims"]["promise"]["epsilon"]) == ("statistics", 4.0)
    for name, path in zip(made.names, receipts(made), strict=True):
        lines = list(read(path))
        assert said["parties"][name] == {"keys": [made.keys[name].hex()], "receipts": 2, "head": lines[-1][1]}
        assert [line.event for line in made.site(name).log.read().entries][-1] == "signed"
    pins = ["--keys", str(made.path / "directory.toml")]
    assert main(["verify", str(out), *pins]) == 0
    assert "1 rounds, signed by 4; gone: none" in capsys.readouterr().out
    files = [str(out / name) for name in ("manifest.json", "statistics.json")]
    assert main(["verify", *files, *map(str, receipts(made)), *pins]) == 0
    said_of = capsys.readouterr().out
    assert said_of.count("took part in statistics, as 2 other survivors signed; epsilon 4 at delta 0.001 promised") == 3
    assert main(["audit", str(out), "--out", str(made.path / "audited")]) == 0
    assert "Statistics of 3 parties" in capsys.readouterr().out
    report = json.loads((made.path / "audited" / "report.json").read_bytes())
    assert [check["verdict"] for check in report["checks"]] == ["holds"] * 3
    assert (report["manifest"]["signed"], report["manifest"]["sha256"]) == (4, found.sha256)


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a mean": (lambda s: s["estimates"]["0"]["mean"].update(value=0.5), "statistics.json is another"),
    "an error": (lambda s: s["estimates"]["0"]["mean"].update(noise=0.0), "statistics.json is another"),
    "the claim": (lambda s: s.update(claim="nothing leaks"), "statistics.json is another"),
    "a survivor": (lambda s: s["survivors"].append("west"), "of other sites than those of the manifest"),
    "a promise of less": (
        lambda s: s.update(claim=s["claim"].replace("epsilon 4 at", "epsilon 0.4 at")),
        "the claim is not that of the sites: epsilon 4 at delta 0.001.",
    ),
    "another delta": (
        lambda s: s.update(claim=s["claim"].replace("delta 0.001", "delta 0.00001")),
        "the claim is not that of the sites",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_the_statistics_is_found(
    name: str, made: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, found = EDITS[name]
    shutil.copytree(made.path / "out", folder := tmp_path / "out")
    statistics = json.loads((folder / "statistics.json").read_bytes())
    change(statistics)
    (folder / "statistics.json").write_text(json.dumps(statistics))
    assert main(["verify", str(folder)]) == 1
    assert "statistics.json is not the file that the manifest names" in capsys.readouterr().out
    assert main(["audit", str(folder), "--json", "--out", str(tmp_path / "audited")]) == 1
    assert found in capsys.readouterr().out
    if "another" in found:
        return
    signed_by_all(made, folder, lambda said: None)  # the sites had signed it unseen: their promise is still another
    assert main(["verify", str(folder)]) == 0
    capsys.readouterr()
    assert main(["audit", str(folder), "--json", "--out", str(tmp_path / "audited")]) == 1
    assert found in capsys.readouterr().out


def test_a_page_that_was_edited_or_taken_away_is_found(
    made: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made.path / "out", folder := tmp_path / "out")
    page = folder / "statistics.html"
    for change, said in ((lambda: page.write_text("all is well"), "is another"), (page.unlink, "is missing")):
        change()
        assert main(["verify", str(folder)]) == 1
        assert main(["audit", str(folder), "--json", "--out", str(tmp_path / "audited")]) == 1
        assert f"statistics.html {said}" in capsys.readouterr().out


def test_a_site_signs_one_result_of_its_statistics(made: Federation) -> None:
    said, site = manifest(made).said, made.site("north")
    for change, why in (
        ({"files": {**said["files"], "statistics.json": "7" * 64}}, "another result of .* was signed at"),
        ({"kind": "federated"}, "its kind is 'federated', expected 'statistics'"),
        ({"claims": {**said["claims"], "promise": None}}, "its claims is"),
    ):
        with pytest.raises((SiteError, EvidenceError), match=why):
            signed(site, SignRun(said["run"], body_of({**said, **change})))


def test_the_coordinator_alone_cannot_write_another(
    made: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made.path / "out", folder := tmp_path / "out")
    raw = json.loads((folder / "manifest.json").read_bytes())
    raw["manifest"]["files"]["statistics.json"] = "0" * 64
    body = body_of(raw["manifest"])
    raw["signatures"][""] = sign("manifest", body, hub_key(made))
    forged = b'{"manifest":' + body + b',"signatures":' + body_of(raw["signatures"]) + b"}\n"
    (folder / "manifest.json").write_bytes(forged)
    assert main(["verify", str(folder)]) == 1
    assert main(["audit", str(folder), "--json", "--out", str(tmp_path / "audited")]) == 1
    assert "the signature of north is not on these words" in capsys.readouterr().out


def test_statistics_without_their_manifest_are_unverified(
    made: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made.path / "out", folder := tmp_path / "out")
    (folder / "manifest.json").unlink()
    assert main(["audit", str(folder), "--json", "--out", str(tmp_path / "audited")]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "unverified"
    assert main(["audit", str(folder), "--probe"]) == 2
    assert "--probe is of a training" in capsys.readouterr().err


def test_who_is_gone_before_it_signs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    federation = with_files(Federation(tmp_path))
    carrier = Direct(federation)

    def away(name: str, raw: bytes) -> None:
        if name == "south" and isinstance(read_request(raw, limit=1 << 30), SignRun):
            raise PeerLostError("was away for 0.5 s", peer=name)

    carrier.before = away
    (tmp_path / "out").mkdir()
    serve = ServeSettings(wait=0.2, step=5, training=30, away=0.1)
    computed(federation, settings_of(federation, statistics=ASKED, serve=serve), carrier, tmp_path / "out")
    found = Manifest.read(tmp_path / "out")
    assert found is not None
    assert (found.signed, found.said["gone"]) == (("", "north", "east"), ["south"])
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "signed by 3; gone: south" in capsys.readouterr().out
    assert main(["audit", str(tmp_path / "out"), "--json", "--out", str(tmp_path / "audited")]) == 0
