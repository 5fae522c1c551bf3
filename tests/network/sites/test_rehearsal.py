"""`choral poc` and the ten steps of examples/hospitals: what a user types, as real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from readme_steps import run_steps, steps_of

from choral.cli.sites.poc import _report
from choral.jobs.rehearsal import RehearsedSites, make_rehearsal
from choral.jobs.settings import Settings, SumSettings, read_settings
from choral.network import SiteFolder
from choral.toml_files import toml_of
from choral.trainers import Run

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "hospitals"
NAMES = ("east", "north", "south")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example, with its data."""
    path = tmp_path_factory.mktemp("example") / "hospitals"
    shutil.copytree(EXAMPLE, path)
    subprocess.run([sys.executable, "make_data.py"], cwd=path, check=True, capture_output=True)
    return path


def poc(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "choral", "poc", *words],
        cwd=folder,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def children(process: subprocess.Popen[str]) -> dict[str, int]:
    """Process numbers of `choral join NAME` and of `choral serve`, as "serve"."""
    found = {}
    for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        words = Path(f"/proc/{number}/cmdline").read_text().split("\0")
        command = words[words.index("choral") + 1 :]
        found["serve" if command[0] == "serve" else Path(command[1]).name] = int(number)
    return found


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def said_until(process: subprocess.Popen[str], text: str) -> str:
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"{text!r} was not said:\n{said}")


def test_one_command_goes_from_a_job_file_to_the_report(hospitals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = poc(hospitals, "job.toml", "--data", "data", "--out", "out", "--training.rounds", "2")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "made keys, folders and approvals of east, north, south in out" in said
    assert "north took the job" in said
    assert "round 2: accuracy" in said
    assert re.search(r"south, by its own ledger: 2\.\d+ spent of epsilon 3", said)
    assert "one user, who holds every key" in said
    assert "lost a site" not in said
    out = hospitals / "out"
    assert (out / "run" / "report.html").is_file()
    run = Run.load(out / "run")
    assert run.finished
    assert run.info.sites == NAMES
    assert [entry.survivors for entry in run.history] == [0, 3, 3]
    for name in NAMES:
        events = [line.event for line in SiteFolder.open(out / name).log.read().entries]
        scales, training = ["approved", "agreed", "trained"], ["approved", "agreed", "trained", "trained", "signed"]
        assert events == ["begun", *scales, *training]
    assert read_settings(out / "job.toml", Settings).sites.records == 450
    verified = subprocess.run(
        [sys.executable, "-m", "choral", "verify", str(out / "run")], capture_output=True, text=True, check=False
    )
    assert verified.returncode == 0, verified.stdout
    assert "2 rounds, signed by 4; gone: none" in verified.stdout
    assert "A rehearsal: one machine played all parties, and one operator made their keys." in verified.stdout
    assert verified.stdout.count("took part in") == 6  # the sites' receipts are beside the manifest
    assert "a rehearsal, whose keys one operator made" in (out / "run" / "report.json").read_text()
    assert _report(RehearsedSites(path=out, names=NAMES), quiet=True, as_json=True) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["report"] == json.loads((out / "run" / "report.json").read_text())
    assert all(2.0 < site["epsilon"] <= site["promised"] == 3.0 for site in figures["sites"].values())
    assert set(figures["sites"]) == set(NAMES)


@pytest.mark.slow
def test_ctrl_c_and_the_death_of_a_site_end_all_processes_and_resume_goes_on(hospitals: Path) -> None:
    words = ("job.toml", "--data", "data", "--out", "again", "--training.rounds", "60")
    process = poc(hospitals, *words)
    said_until(process, "round 2:")
    there = children(process)
    assert set(there) == {*NAMES, "serve"}
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "--resume goes on from them" in rest
    assert not any(alive(number) for number in there.values())

    process = poc(hospitals, *words, "--resume")
    said_until(process, "round ")
    there = children(process)
    os.kill(there["south"], signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "the process of south ended by SIGKILL" in rest
    assert "connected to hub" in rest  # the end of its log
    assert not any(alive(number) for number in there.values())

    process = poc(hospitals, *words, "--resume")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "round 60: accuracy" in said
    failed = [entry.round for entry in Run.load(hospitals / "again" / "run").history if entry.failed]
    assert len(failed) <= 2  # those in which it was stopped


@pytest.mark.slow
def test_the_ten_steps_of_the_readme_lead_to_the_report(hospitals: Path, tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    shutil.copytree(EXAMPLE, folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    for name in ("job.toml", "site.toml"):
        text = (folder / name).read_text()
        assert "8443" in text
        (folder / name).write_text(text.replace("8443", port))
    lines = steps_of(EXAMPLE / "README.md")
    assert len(lines) > 25
    said = run_steps(lines[1:], folder, ENVIRONMENT, seconds=3000)
    assert "to do" not in said.partition("hub/hub.crt")[2]
    assert "10 rounds with 3 sites" in said
    assert (folder / "run" / "report.html").is_file()
    assert "spent of epsilon 3" in said
    assert "agreed: digest" in said


def test_what_cannot_be_rehearsed_is_refused_and_leaves_nothing_behind(hospitals: Path, tmp_path: Path) -> None:
    from choral.errors import ConfigError

    job = read_settings(hospitals / "job.toml", Settings)
    code = {"task": str(hospitals / "visits.py")}
    out = tmp_path / "out"

    def make(settings: Settings, *, sites: int | None = None, data: Path | None = hospitals / "data") -> None:
        make_rehearsal(settings, out, job="x", sites=sites, data=data)

    plain = Settings(**{**vars(job), **code, "secure_sum": SumSettings(kind="plain")})
    with pytest.raises(ConfigError, match="would see each update"):
        make(plain)
    with pytest.raises(ConfigError, match="where is the data of each site"):
        make(Settings(**{**vars(job), **code}), data=None)
    with pytest.raises(ConfigError, match="data of 3 sites"):
        make(Settings(**{**vars(job), **code}), sites=4)
    with pytest.raises(ConfigError, match="would refuse this job: the data has"):
        make(Settings(**{**vars(job), **code, "sites": type(job.sites)(records=300, largest=100)}))
    with pytest.raises(ConfigError, match="comes with its data"):
        make(Settings())
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ConfigError, match="not empty"):
        make(Settings(**{**vars(job), **code}))
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_table_is_written_as_toml_and_read_back() -> None:
    import tomllib

    table = {
        "text": 'a "quote", \\ and \u2028 and \x7f and 𝛿',
        "numbers": [1, 2.5, 1e-300],
        "none": None,
        "yes": True,
        "a table": {"with.dot": {"x": 1}, "y": -1.0},
    }
    read = tomllib.loads(toml_of(table))
    assert read == {key: value for key, value in table.items() if value is not None}
