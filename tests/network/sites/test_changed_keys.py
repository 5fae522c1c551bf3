"""A site's key and the coordinator's are changed by the commands of the runbook, between two jobs of real processes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from site_federation import PROMISE
from site_processes import ENVIRONMENT, PATIENT, Processes, until

from choral.cli.command_line import main
from choral.jobs.settings import PrivacySettings
from choral.network import SiteFolder
from choral.trainers import Run

TYPING = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"}
RUNBOOK = Path(__file__).resolve().parents[3] / "docs" / "deployment.md"


def typed(block: str, path: Path, pin: str) -> None:
    """What the runbook has two readers type, with this folder in the place of theirs."""
    lines = [re.sub(r"^\w+\$ +", "", line) for line in block.splitlines() if "$ " in line]
    assert lines
    text = "\n".join(lines).replace("/var/lib/choral", str(path)).replace("ea72 0683 ...", pin)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=path, env=TYPING, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def pin_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["site", "show", "--pin", "--site", str(folder)]) == 0
    return capsys.readouterr().out.strip()


def served(processes: Processes, name: str) -> list[str]:
    """The words of a job under the coordinator's new key."""
    settings = processes.settings(privacy=PrivacySettings(epsilon={"first": 3.0, "second": 6.0}[name], delta=1e-3))
    hub = processes.path / "hub-2"
    words = processes.job(name, settings)
    words[words.index("--directory") + 1] = str(hub / "directory.toml")
    words[words.index("--serve.identity") + 1] = str(hub / "hub.crt")
    return words


@pytest.mark.slow
def test_old_keys_are_refused_old_receipts_verified_and_the_ledger_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = Processes(tmp_path / "sites", running=False)
    path, federation = processes.path, processes.federation
    federation.promise = PROMISE.replace("UNIT", "record")
    assert main(["site", "init", "hub", "--folder", str(path / "hub-2")]) == 0  # the coordinator's key is changed first
    pin = pin_of(path / "hub-2", capsys)
    for name in federation.names:
        federation.configure(name)
        site = ["--site", str(path / name)]
        assert main(["site", "directory", "rotate", str(path / "hub-2" / "hub.crt"), "--pin", pin, *site]) == 0
        own = pin_of(path / name, capsys)
        certificate, hub = str(path / name / f"{name}.crt"), ["--site", str(path / "hub-2")]
        assert main(["site", "directory", "add", certificate, "--pin", own, *hub]) == 0
    words = served(processes, "first")
    try:
        for name in federation.names:
            processes.start(name)
        assert main(words) == 0
        old_keys = shutil.copy(path / "hub-2" / "directory.toml", tmp_path / "old-keys.toml")
        ledger = (path / "north" / "ledgers" / "points.jsonl").read_bytes()

        processes.kill("north")
        block = RUNBOOK.read_text().partition("## Changing keys")[2].partition("```text\n")[2].partition("```")[0]
        init, rest = block.split("\n", 1)
        typed(init, path, "")
        shutil.copy(path / "north" / "points.npy", path / "north-2" / "points.npy")
        (path / "north-2" / "points.npy").chmod(0o600)
        typed(rest, path, pin_of(path / "north-2", capsys))

        folder = SiteFolder.open(path / "north-2", coordinator="hub")
        assert folder.signing.public != federation.keys["north"]
        del federation.keys["north"]
        federation.keys["north"] = folder.signing.public  # the directory has it last now, and so has the offer
        path.joinpath("north").rename(path / "north-old")
        path.joinpath("north-2").rename(path / "north")
        words = served(processes, "second")
        processes.start("north-old")  # with the old key, and all else that the site had
        with ThreadPoolExecutor(1) as pool:
            serving = pool.submit(main, words)
            until(lambda: "hung up before it greeted" in processes.log("north-old"), "the old key at the door")
            processes.start("north")
            assert serving.result(2 * PATIENT) == 0
        assert " connected to hub" not in processes.log("north-old").replace("not connected", "")
    finally:
        processes.close()
    assert [entry.survivors for entry in Run.load(path / "run-second").history] == [0, 3, 3, 3]
    after = (path / "north" / "ledgers" / "points.jsonl").read_bytes()
    assert after.startswith(ledger)
    assert len(after) > len(ledger) > 0
    assert not list((path / "north-old" / "ledgers").iterdir())
    for run, receipts, keys in (
        ("run-first", "north-old", old_keys),
        ("run-second", "north", path / "hub-2" / "directory.toml"),
    ):
        files = [path / run / "manifest.json", *(path / receipts / "receipts").iterdir()]
        assert main(["verify", *map(str, files), "--keys", str(keys)]) == 0
    assert main(["verify", str(path / "run-second"), "--keys", str(old_keys)]) == 1
    assert main(["site", "log", "--site", str(path / "north-old")]) == 0
