"""What sites sign at the end of a run: its manifest, after each has held it against its own receipts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from site_federation import Direct, Federation, private_sites, served, write_directory
from site_rounds import InRound, a_job
from site_statistics import hub_key, signed_by_all

from choral.audits import audit
from choral.cli.command_line import main
from choral.jobs.settings import PrivacySettings, SitesSettings
from choral.network.errors import PeerLostError, SiteError
from choral.network.host.evidence import signed
from choral.network.host.messages import EndJob, SignRun, read_request
from choral.trainers import Participation, Run
from choral.trainers.run_folder.evidence.manifest import Manifest
from choral.trainers.run_folder.evidence.receipts import read
from choral.trainers.run_folder.evidence.signed_lines import EvidenceError, body_of, sign


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Three sites, and the run that they made, with a promise to records, in `run`."""
    made = private_sites(tmp_path_factory.mktemp("private"), "record")
    settings = made.settings(privacy=PrivacySettings(epsilon=4.0, delta=1e-3))
    served(Direct(made), settings, out=made.path / "run")
    write_directory(made)
    return made


def receipts_of(federation: Federation, name: str) -> Path:
    return next((federation.path / name / "receipts").glob("*.jsonl"))


def manifest_in(folder: Path) -> Manifest:
    found = Manifest.read(folder)
    assert found is not None
    return found


def test_every_site_signs_what_its_own_records_bear_out(private: Federation) -> None:
    found = manifest_in(private.path / "run")
    assert found.signed == ("", "north", "south", "east")
    said = found.said
    assert (said["gone"], said["rehearsal"], said["ledgers"]) == ([], False, {})
    assert said["coordinator"] == private.hub.certificate.public_key.hex()
    for name in private.names:
        lines = list(read(receipts_of(private, name)))
        assert said["parties"][name] == {"keys": [private.keys[name].hex()], "receipts": 4, "head": lines[-1][1]}
        last = lines[-1][0]
        assert (last["round"], last["came"], last["run"]) == (3, said["model"], said["run"])
        assert last["ledger"]["events"] == [2, 3]  # which the head holds, though the manifest does not tell it
        assert [line.event for line in private.site(name).log.read().entries][-1] == "signed"


def test_a_served_run_is_verified_from_end_to_end(private: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    """The coordinator's folder; the receipts of the sites; both together; each under keys that one has pinned."""
    run, directory = private.path / "run", private.path / "directory.toml"
    receipts = [str(receipts_of(private, name)) for name in private.names]
    assert main(["verify", str(run), "--keys", str(directory)]) == 0
    said = capsys.readouterr().out
    assert "by a key not pinned: run" in said
    assert "3 rounds, signed by 4; gone: none" in said
    files = [str(run / "manifest.json"), str(run / "model.safetensors"), *receipts]
    assert main(["verify", *files, "--keys", str(directory)]) == 0
    said = capsys.readouterr().out
    found = re.findall(r"took part in fedavg, as [12] other survivors signed; epsilon 4 at delta 0.001 promised", said)
    assert len(found) == 9
    assert "rehearsal:" not in said
    site = private.path / "north" / "directory.toml"  # has the coordinator, and not the site itself
    others = [str(receipts_of(private, name)) for name in ("south", "east")]
    assert main(["verify", str(run / "manifest.json"), *others, "--keys", str(site)]) == 1
    said = capsys.readouterr().out
    assert "manifest.json, by hub: run" in said
    assert "the key of north" in said
    assert {check.verdict for check in audit(Run.load(run)).checks if "signed" in check.name} == {"holds"}
    assert any("a manifest that 4 signed" in check.finding for check in audit(Run.load(run)).checks)


@pytest.mark.parametrize("name", ["model.safetensors", "history.jsonl", "run.json"])
def test_a_file_that_the_coordinator_changes_afterwards_is_found(
    name: str, private: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has its own key, and signs the manifest anew: the sites' signatures are not on that."""
    run = private.path / "run"
    said: dict[str, Any] = json.loads((run / "manifest.json").read_bytes())
    manifest, signatures = said["manifest"], said["signatures"]
    manifest["files"][name] = "0" * 64
    body = body_of(manifest)
    signatures[""] = sign("manifest", body, hub_key(private))
    forged = tmp_path / "manifest.json"
    forged.write_bytes(b'{"manifest":' + body + b',"signatures":' + body_of(signatures) + b"}\n")
    assert main(["verify", str(forged)]) == 1
    assert "the signature of north is not on these words" in capsys.readouterr().out


def violated(folder: Path) -> str:
    checks = audit(Run.load(folder)).checks
    return " ".join(check.finding for check in checks if check.verdict == "violated")


def test_files_that_were_false_before_they_were_signed_are_found_where_sites_know_better(
    private: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another model than the sites were told of, a smaller promise, a site that is left out."""
    folder = tmp_path / "model"
    shutil.copytree(private.path / "run", folder)
    signed_by_all(private, folder, lambda said: None)
    assert violated(folder) == ""
    weights = load_file(folder / "model.safetensors")
    doubled = {name: 2 * each for name, each in weights.items()}
    save_file(doubled, folder / "model.safetensors", metadata={"round": "3"})
    signed_by_all(private, folder, lambda said: None)
    assert main(["verify", str(folder)]) == 1
    assert "model.safetensors is not the model that came of the last round" in capsys.readouterr().out
    assert "the model is not the one that the sites signed" in violated(folder)

    folder = tmp_path / "promise"
    shutil.copytree(private.path / "run", folder)
    path = folder / "run.json"
    assert '"epsilon":4.0' in path.read_text().replace(" ", "")
    path.write_text(re.sub(r'("epsilon": ?)4\.0', r"\g<1>1.0", path.read_text()))
    signed_by_all(private, folder, lambda said: None)
    assert "the promise of run.json is not the one that the sites signed" in violated(folder)

    folder = tmp_path / "left-out"
    shutil.copytree(private.path / "run", folder)
    signed_by_all(private, folder, lambda said: said["parties"].pop("east"))
    assert "the manifest does not speak of east" in violated(folder)


Changed = Callable[[dict[str, Any]], object]
LIES: dict[str, tuple[Changed, str]] = {
    "model": (lambda said: said.update(model="1" * 64), "its model is"),
    "fewer rounds": (lambda said: said.update(completed=2), "of 2 rounds, and there is a receipt of round 3"),
    "more rounds": (lambda said: said.update(completed=4, model="1" * 64), "of 4 rounds, and 3 were agreed on"),
    "no number": (lambda said: said.update(completed=True), "of True rounds"),
    "terms": (lambda said: said.update(terms="2" * 64), "its terms is"),
    "promise": (lambda said: said["claims"]["promise"].update(epsilon=1.0), "its claims is"),
    "layout": (lambda said: said["claims"]["layout"].reverse(), "its claims is"),
    "rehearsal": (lambda said: said.update(rehearsal=True), "its rehearsal is True"),
    "an 0 for false": (lambda said: said.update(rehearsal=0), "its rehearsal is 0"),
    "another run": (lambda said: said.update(run="3" * 64), "its run is"),
    "another kind": (lambda said: said.update(kind="centralized"), "its kind is"),
    "written by another": (lambda said: said.update(coordinator="4" * 64), "its coordinator is"),
    "called gone": (lambda said: said["gone"].append("north"), "it calls north gone"),
    "its ledger": (lambda said: said["ledgers"].update(north={}), "speaks of its ledger"),
    "another version": (lambda said: said["code"].update(version="0"), "another version of Choral"),
    "another format": (lambda said: said.update(version=2), "its version is 2"),
    "no form": (lambda said: said.update(parties=[]), "its parties cannot be read"),
    "fewer receipts": (lambda said: said["parties"]["north"].update(receipts=3), "something else of the receipts"),
    "other receipts": (lambda said: said["parties"]["north"].update(head="5" * 64), "something else of the receipts"),
    "another key": (lambda said: said["parties"]["north"].update(keys=["6" * 64]), "something else of the receipts"),
    "not named": (lambda said: said["parties"].pop("north"), "of other sites than the job"),
    "another not named": (lambda said: said["parties"].pop("south"), "of other sites than the job"),
    "one more": (lambda said: said["gone"].append("west"), "of other sites than the job"),
    "another result": (lambda said: said["metrics"].update(accuracy=1.0), "another result of .* was signed at"),
    "other files": (lambda said: said["files"].update({"run.json": "7" * 64}), "another result of .* was signed at"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_site_does_not_sign(name: str, private: Federation) -> None:
    change, why = LIES[name]
    said = json.loads(body_of(manifest_in(private.path / "run").said))
    job = said["run"]
    change(said)
    site = private.site("north")
    with pytest.raises((SiteError, EvidenceError), match=why):
        signed(site, SignRun(job, body_of(said)))
    assert len(signed(site, SignRun(job, body_of(manifest_in(private.path / "run").said))).signature) == 128


def test_it_signs_for_no_other_coordinator_and_no_job_that_it_does_not_know(private: Federation) -> None:
    said = manifest_in(private.path / "run").said
    with pytest.raises(SiteError, match="was not agreed to with 'other'"):
        signed(replace(private.site("north"), coordinator="other"), SignRun(said["run"], body_of(said)))
    with pytest.raises(SiteError, match="was not agreed to"):
        signed(private.site("north"), SignRun("8" * 64, body_of({**said, "run": "8" * 64})))


@pytest.fixture(scope="module")
def open_sites(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("open"))


def test_who_is_gone_before_it_signs_is_named_and_the_others_sign_that(open_sites: Federation, tmp_path: Path) -> None:
    carrier = Direct(open_sites)

    def away(name: str, raw: bytes) -> None:
        if name == "south" and isinstance(read_request(raw, limit=1 << 30), SignRun):
            raise PeerLostError("was away for 0.5 s", peer=name)

    carrier.before = away
    _, told = served(carrier, a_job(open_sites, "unsigned"), out=tmp_path / "run")
    found = manifest_in(tmp_path / "run")
    assert (found.signed, found.said["gone"]) == (("", "north", "east"), ["south"])
    assert "south has not signed the run's manifest; who runs it knows why" in told


@pytest.mark.parametrize("where", [EndJob, SignRun])
def test_a_coordinator_that_dies_before_the_manifest_has_it_signed_when_it_goes_on(
    where: type, open_sites: Federation, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def dead(name: str, raw: bytes) -> None:
        if name == "south" and isinstance(read_request(raw, limit=1 << 30), where):
            raise Killed

    carrier = Direct(open_sites)
    carrier.before = dead
    settings = a_job(open_sites, f"late-{where.__name__}")
    with pytest.raises(Killed):
        served(carrier, settings, out=tmp_path / "run")
    assert Manifest.read(tmp_path / "run") is None
    carrier.before = None
    carrier.start("east")
    served(carrier, settings, out=tmp_path / "run", resume=True)
    assert manifest_in(tmp_path / "run").signed == ("", "north", "south", "east")
    assert main(["verify", str(tmp_path / "run")]) == 0


def test_who_was_away_for_a_round_does_not_say_which_model_came_of_the_one_before(
    open_sites: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its process lives, and is told of round 3 next: the weights that it is given there came of round 2."""
    carrier = Direct(open_sites)
    start = InRound(carrier, "north", 2, 0, lambda: carrier.stop("south"))
    end = InRound(carrier, "east", 2, 3, carrier.gone.clear)

    def both(name: str, raw: bytes) -> None:
        start.before(name, raw)
        end.before(name, raw)

    carrier.before = both
    settings = a_job(open_sites, "away", participation=Participation(patience=1))
    run, _ = served(carrier, settings, out=tmp_path / "run")
    assert [entry.survivors for entry in run.history] == [0, 3, 2, 3, 3]
    job = manifest_in(tmp_path / "run").said["run"]
    files = [open_sites.path / name / "receipts" / f"{job}.jsonl" for name in open_sites.names]
    north, south = ({said["round"]: said["came"] for said, _ in read(path) if "round" in said} for path in files[:2])
    assert south == {1: None, 3: north[3], 4: north[4]}
    assert main(["verify", str(tmp_path / "run" / "manifest.json"), *map(str, files)]) == 0, capsys.readouterr().out


def test_with_evaluations_of_the_sites_and_several_sums_a_round(
    open_sites: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from site_federation import algorithm

    for name in open_sites.names:
        open_sites.configure(name, ("[maxima]", 'metrics = "in the clear, no epsilon"\n[maxima]'))
    sites = SitesSettings(
        records=sum(open_sites.records.values()),
        largest=max(open_sites.records.values()),
        metrics="in the clear, no epsilon",
    )
    settings = a_job(open_sites, "dane", algorithm=algorithm("dane", mu=0.1), sites=sites)
    served(Direct(open_sites), replace(settings, metrics=("accuracy", "loss")), out=tmp_path / "run")
    found = manifest_in(tmp_path / "run")
    assert found.said["gone"] == []
    files = [open_sites.path / name / "receipts" / f"{found.said['run']}.jsonl" for name in open_sites.names]
    assert {len(said["sums"]) for said, _ in read(files[0]) if said["kind"] == "round"} == {3}
    assert main(["verify", str(tmp_path / "run" / "manifest.json"), *map(str, files)]) == 0, capsys.readouterr().out
