"""One failure costs what failed and no more: arms, seeds, attacks, audits and files of a comparison."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from choral.audits import Comparison
from choral.cli.command_line import main
from choral.jobs.training import load_module

TASK = """
import os
from choral.trainers import Task
from choral.trainers.data.sets.digits import load as digits

with open({calls!r}, "a") as calls:
    calls.write("run\\n")

def load(split, training, seed):
    with open({calls!r}, "a") as calls:
        calls.write(f"load {{seed}}\\n")
    task = digits(split, training, seed)
    def evaluate(model):
        {fault}
        return task.evaluate(model)
    return Task(build=task.build, fit=task.fit, evaluate=evaluate, parties=task.parties)
"""
SMALL = """
task = "{task}"
seeds = 2
device = "cpu"
[split]
parties = 3
alpha = 2.0
[training]
rounds = 1
batch_size = 64
hidden = 0
[privacy]
epsilon = 8
[arms.cloud]
centralized = true
"""
BAD = '[arms.bad]\nsecure_sum = "plain"\nbatch_size = 32\n'
GOOD = '[arms.good]\nsecure_sum = "plain"\n'
RAISES = 'if training.batch_size == 32: raise KeyError("patient 17")'


class Job:
    """A folder with a task file, a TOML file and what they left."""

    def __init__(self, folder: Path, fault: str, arms: str) -> None:
        self.folder, self.out = folder, folder / "out"
        (folder / "task.py").write_text(TASK.format(calls=str(folder / "calls"), fault=fault))
        self.write(SMALL.format(task=folder / "task.py") + arms)

    def write(self, text: str) -> None:
        self.text = text
        (self.folder / "job.toml").write_text(text)

    def compare(self, *flags: str) -> int:
        words = ["compare", str(self.folder / "job.toml"), "--out", str(self.out)]
        return main([*words, *(() if "--workers" in flags else ("--workers", "1")), *flags])

    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "report.json").read_text())

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().split("\n")[:-1]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path, RAISES, BAD + GOOD)


def test_an_arm_that_fails_is_a_row_with_its_reason_and_the_others_are_reported(job: Job, capsys: Any) -> None:
    assert job.compare() == 2
    printed, error = capsys.readouterr()
    assert next(line.split() for line in printed.splitlines() if "failed" in line) == ["bad", "failed"]
    assert "task.py, line" in error
    assert "in evaluate: KeyError: 'patient 17'" in error
    assert "Traceback" not in error
    report = job.report()
    assert [arm["name"] for arm in report["arms"]] == ["cloud", "good"]
    (row,) = report["failed"]
    assert row["arm"] == "bad"
    assert row["runs"] == ["seed 0", "seed 1"]
    assert row["left"] == 0
    assert "KeyError in the user's own code (task.py, line" in row["reason"]
    page = (job.out / "report.html").read_text()
    assert "bad failed" in page
    for text in (page, json.dumps(report)):
        assert "patient 17" not in text, "an error's own text may hold data values"
        assert str(job.folder) not in json.dumps(report["failed"])
    assert "| bad | failed |" in markdown_of(job)


def markdown_of(job: Job) -> str:
    path = job.out / "report.md"
    Comparison.load(job.out / "report.json").save(path)
    return path.read_text()


def test_a_failed_arm_is_tried_again_and_what_is_done_stays(job: Job, capsys: Any) -> None:
    assert job.compare("--quiet") == 2
    done = {path: path.stat().st_mtime_ns for path in job.out.glob("arms/[cg]*/*/model.safetensors")}
    assert len(done) == 4
    (job.folder / "task.py").write_text(TASK.format(calls=str(job.folder / "calls"), fault="pass"))
    assert job.compare("--quiet", "--resume") == 0
    assert [arm["name"] for arm in job.report()["arms"]] == ["cloud", "bad", "good"]
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_resume_without_an_arm_with_another_and_with_a_changed_one(job: Job, capsys: Any) -> None:
    assert job.compare("--quiet") == 2
    kept = (job.out / "arms/good/seed-0/model.safetensors").stat().st_mtime_ns
    job.write(job.text.replace(BAD, ""))
    assert job.compare("--quiet", "--resume") == 0
    assert [arm["name"] for arm in job.report()["arms"]] == ["cloud", "good"]
    changed = BAD.replace("32", "16")
    job.write(job.text + changed + '[arms.masked]\nsecure_sum = "masked"\n')
    assert job.compare("--quiet", "--resume") == 0
    assert [arm["name"] for arm in job.report()["arms"]] == ["cloud", "good", "bad", "masked"]
    assert (job.out / "arms/good/seed-0/model.safetensors").stat().st_mtime_ns == kept
    assert (job.out / "arms/bad~1").is_dir(), "runs of an arm that is trained anew are set aside, not lost"
    assert json.loads((job.out / "arms/bad/seed-0/run.json").read_text())["config"]["training"]["batch_size"] == 16


def test_a_refused_resume_names_the_keys_that_changed_and_no_more(job: Job, capsys: Any) -> None:
    many = "".join(f'[arms."arm {n}"]\nsecure_sum = "plain"\n' for n in range(40))
    job.write(job.text + many)
    assert job.compare("--quiet", "--split.parties", "1") == 2  # refused before anything is written
    job.write(job.text.replace(many, "").replace(BAD, ""))
    assert job.compare("--quiet") == 0
    capsys.readouterr()
    job.write(job.text + many)
    flags = ("--quiet", "--resume", "--training.rounds", "5", "--split.alpha", "1")
    assert job.compare(*flags) == 2
    error = capsys.readouterr().err
    assert "split.alpha was 2.0, now it is 1.0; training.rounds was 1, now it is 5\n" in error
    assert len(error) < 300
    run = str(job.out / "arms/good/seed-0")
    words = ["train", str(job.folder / "job.toml"), "--arm", "good", "--out", run, "--resume", "--quiet"]
    assert main([*words, "--training.rounds", "5", "--training.batch-size", "16"]) == 2
    error = capsys.readouterr().err
    assert "training.batch_size was 64, now it is 16" in error
    assert len(error) < 300


def test_one_seed_that_fails_leaves_the_row_of_the_others(tmp_path: Path, capsys: Any) -> None:
    job = Job(tmp_path, "if seed == 1 and training.batch_size == 32: raise ValueError", BAD)
    assert job.compare() == 2
    report = job.report()
    assert {arm["name"]: arm["seeds"] for arm in report["arms"]} == {"cloud": [0, 1], "bad": [0]}
    assert [(row["runs"], row["left"]) for row in report["failed"]] == [(["seed 1"], 1)]
    assert "FAILED  bad (seed 1)" in capsys.readouterr().out


def test_if_every_arm_fails_the_reason_is_said_once(tmp_path: Path, capsys: Any) -> None:
    job = Job(tmp_path, "raise ZeroDivisionError", GOOD)
    assert job.compare() == 2
    error = capsys.readouterr().err
    assert error.startswith("choral: none of 2 arms could be trained: ")
    assert "ZeroDivisionError" in error
    assert len(error.splitlines()) == 2
    assert not (job.out / "report.json").exists()


def test_weights_that_diverge_fail_their_arm_alone(tmp_path: Path, capsys: Any) -> None:
    job = Job(tmp_path, "pass", GOOD + "learning_rate = 1e39\n")
    assert job.compare("--quiet") == 2
    assert [arm["name"] for arm in job.report()["arms"]] == ["cloud"]
    assert "good, seed 0" in capsys.readouterr().err


def test_a_process_that_dies_takes_its_own_run_along_and_no_other(tmp_path: Path, capsys: Any) -> None:
    job = Job(tmp_path, "os._exit(9) if training.batch_size == 32 else None", BAD + GOOD)
    job.write(job.text.replace("seeds = 2", "seeds = 1"))
    assert job.compare("--workers", "2", "--quiet") == 2
    assert "bad, seed 0 failed: a worker process died" in capsys.readouterr().err
    assert [arm["name"] for arm in job.report()["arms"]] == ["cloud", "good"]


def test_a_task_file_may_have_dataclasses_with_annotations_as_text(tmp_path: Path) -> None:
    path = tmp_path / "statistics.py"  # and be called as a module of Python is
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "@dataclass\nclass Plan:\n    rounds: int = 3\n    kind: ClassVar[str] = 'x'\n"
    )
    for name in ("statistics.py", "own_plan.py"):
        found = path.rename(tmp_path / name)
        assert load_module(found, "a task").Plan().rounds == 3
        path = found
    assert "own_plan" not in sys.modules
    assert sys.modules["statistics"] is statistics


def test_a_task_file_is_run_and_load_is_called_once(tmp_path: Path, capsys: Any) -> None:
    job = Job(tmp_path, "pass", GOOD)
    assert job.compare("--quiet") == 0
    assert job.calls() == ["run", "load 0", "load 1"]
    (job.folder / "calls").unlink()
    words = ["train", str(job.folder / "job.toml"), "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*words, "--privacy.epsilon", "None"]) == 0
    assert job.calls() == ["run", "load 0"]


def test_a_damaged_run_transcript_ledger_or_attack_spoils_its_own_arm_only(tmp_path: Path, capsys: Any) -> None:
    arms = GOOD + GOOD.replace("good", "other") + "[arms.private]\nprivate = true\n[audit]\ncanaries = 20\n"
    job = Job(tmp_path, "pass", arms)
    job.write(job.text.replace("seeds = 2", 'seeds = 1\ntranscript = "digests"'))
    assert job.compare("--quiet") == 0
    whole = tmp_path / "whole"
    shutil.copytree(job.out, whole)

    def verdicts(code: int) -> dict[str, str]:
        assert job.compare("--resume") == code
        return {arm["name"]: arm["audit"]["verdict"] for arm in job.report()["arms"]}

    def mend() -> None:
        shutil.rmtree(job.out)
        shutil.copytree(whole, job.out)

    held = dict.fromkeys(("cloud", "good", "other", "private"), "holds")
    transcript = job.out / "arms/good/seed-0/transcript/index.jsonl"
    transcript.write_bytes(transcript.read_bytes().replace(b'"size":', b'"size":1', 1))
    assert verdicts(1) == held | {"good": "violated"}
    assert str(tmp_path) not in json.dumps([arm["audit"] for arm in job.report()["arms"]])

    mend()
    attack = job.out / "evidence/good-20-canaries.json"
    attack.write_bytes(attack.read_bytes()[:-9])
    assert verdicts(1) == held | {"good": "unverified"}
    assert "good-20-canaries.json is damaged" in " ".join(capsys.readouterr().out.split())

    mend()
    ledger = next((job.out / "arms/private").glob("*/ledger/*.jsonl"))
    ledger.write_bytes(b"\xff\xfe not a ledger")
    assert verdicts(1) == held | {"private": "violated"}

    mend()
    (job.out / "arms/good/seed-0/run.json").write_bytes(b'{"version": 1,')
    assert verdicts(2) == {name: "holds" for name in held if name != "good"}
    assert [row["arm"] for row in job.report()["failed"]] == ["good"]
    assert str(tmp_path) not in json.dumps(job.report()["failed"])


def test_an_attack_that_failed_is_made_again_and_one_that_was_made_is_not(tmp_path: Path, capsys: Any) -> None:
    job = Job(tmp_path, "pass", "[audit]\ncanaries = 20\n")
    job.write(job.text.replace("seeds = 2", "seeds = 1"))
    assert job.compare("--quiet") == 0
    attack = job.out / "evidence/cloud-20-canaries.json"
    made = attack.read_bytes()
    assert job.compare("--quiet", "--resume") == 0
    assert attack.read_bytes() == made
    attack.write_text('{"failed": "KeyError in the user\'s own code."}')
    assert job.compare("--quiet", "--resume") == 0
    assert json.loads(attack.read_text())["result"]["scores"] == 20


def test_what_cannot_be_written_or_drawn_is_said_after_the_table(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    job.write(job.text.replace(BAD, ""))
    (job.out / "report.html.tmp").mkdir(parents=True)  # in the way, as a full disk is
    assert job.compare() == 2
    printed, error = capsys.readouterr()
    assert "vs cloud" in printed
    assert "report: " not in printed
    *progress, last = error.splitlines()
    assert last == f"choral: the report is not complete: {job.out / 'report.html.tmp'}: Is a directory"
    assert all(": round 1 of 1, " in line for line in progress)
    assert (job.out / "report.json").is_file()
    (job.out / "report.html.tmp").rmdir()
    with monkeypatch.context() as broken:
        broken.delattr("choral.audits.report.charts.figures.rounds_figure")
        assert job.compare("--resume") == 2
    printed, error = capsys.readouterr()
    assert "vs cloud" in printed
    assert "the report is not complete: stopped by AttributeError" in error
    assert job.compare("--resume") == 0


def test_a_verdict_is_printed_although_its_report_cannot_be_written(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = job.folder / "run"
    words = ["train", str(job.folder / "job.toml"), "--out", str(run), "--quiet", "--training.batch-size", "64"]
    assert main(words) == 0
    (job.folder / "file").write_text("")
    assert main(["audit", str(run), "--out", str(job.folder / "file" / "below")]) == 2
    printed, error = capsys.readouterr()
    assert "The claim holds" in printed or "ok  " in printed
    assert error.startswith("choral: ")
