"""From one's own file to a report, without Python: `choral init`, then `choral compare`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from choral.cli.command_line import main

QUICK = ["--seeds", "1", "--training.rounds", "2", "--workers", "1"]


@pytest.fixture
def visits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(1)
    lines = ["hospital,age,sex,note,died,cost"]
    for number in range(180):
        age = random.integers(18, 97)
        died = "yes" if random.random() < age / 120 else "no"
        written = "" if number % 20 == 0 else str(age)
        lines.append(f"{'abc'[number % 3]},{written},{'fm'[number % 2]},note {number},{died},{500 + 20 * age}")
    path = Path("visits.csv")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_from_the_file_to_the_report(visits: Path, capsys: Any) -> None:
    assert main(["init", "--data", str(visits), "--key", "hospital", "--label", "died"]) == 0
    said = capsys.readouterr().out
    assert "180 rows, 3 parties by hospital, died as a class" in said
    assert "note (more than 50 different words)" in said
    text = Path("job.toml").read_text()
    data = tomllib.loads(text)["data"]
    assert data["classes"] == ["no", "yes"]
    assert data["features"] == ["age", "sex", "cost"]
    assert data["bounds"]["age"][0] <= 18 < 96 <= data["bounds"]["age"][1]
    assert (data["missing"], data["categories"]) == ({"age": [""]}, {"sex": ["f", "m"]})

    assert main(["compare", "job.toml", "--out", "refused", *QUICK]) == 2
    refused = capsys.readouterr().err
    assert "read off the records" in refused
    assert 'bounds_from = "public"' in refused
    assert not Path("refused").exists()
    Path("job.toml").write_text(text.replace('bounds_from = "records"', 'bounds_from = "public"'))
    assert main(["compare", "job.toml", "--out", "run", *QUICK]) == 0
    report = json.loads(Path("run/report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["cloud", "federated", "federated-dp"]
    assert "always the most frequent class" in {line["name"] for line in report["references"]}


def test_a_number_is_reported_in_its_own_unit(visits: Path) -> None:
    flags = ["--key", "hospital", "--label", "cost", "--kind", "number", "--public", "--out", "cost.toml"]
    assert main(["init", "--data", str(visits), *flags]) == 0
    assert main(["compare", "cost.toml", "--out", "run", "--quiet", *QUICK]) == 0
    report = json.loads(Path("run/report.json").read_text())
    assert report["metric"] == "mean absolute error"
    errors = {arm["name"]: arm["metric"]["mean"] for arm in report["arms"]}
    level = next(line["level"] for line in report["references"] if line["metric"] == "mean absolute error")
    assert 0 < errors["cloud"] < level  # which is some 400
    assert 300 < level < 500
    assert all(arm["audit"]["verdict"] == "holds" for arm in report["arms"])


def test_a_task_file_to_go_on_from(visits: Path) -> None:
    assert main(["init", "--data", str(visits), "--key", "hospital", "--label", "died", "--task"]) == 0
    assert "[data]" not in Path("job.toml").read_text()
    assert main(["train", "job.toml", "--arm", "federated", "--out", "run", "--quiet", "--training.rounds", "2"]) == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--data is not given"),
        (["--data", "visits.csv", "--label", "died"], "--key is not given"),
        (["--data", "visits.csv", "--key", "hospital"], "--label is not given"),
        (["--data", "none.csv", "--key", "a", "--label", "b"], "cannot read none.csv"),
        (["--data", "visits.csv", "--key", "ward", "--label", "died"], "no column 'ward'"),
        (["--data", "visits.csv", "--key", "hospital", "--label", "note"], "more than 20 values"),
        (["--data", "visits.csv", "--key", "hospital", "--label", "age"], "some rows have no 'age'"),
        (["--data", "visits.csv", "--key", "hospital", "--label", "died", "--kind", "number"], "is no number"),
    ],
)
def test_refused_without_a_trace(visits: Path, capsys: Any, flags: list[str], says: str) -> None:
    assert main(["init", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "hint: " in error
    assert not Path("job.toml").exists()


def test_nothing_is_written_over(visits: Path, capsys: Any) -> None:
    Path("job.toml").write_text("mine")
    assert main(["init", "--data", str(visits), "--key", "hospital", "--label", "died"]) == 2
    assert "job.toml is there already" in capsys.readouterr().err
    assert Path("job.toml").read_text() == "mine"


def test_sites_have_tables_of_their_own(visits: Path, capsys: Any) -> None:
    assert main(["init", "--data", str(visits), "--key", "hospital", "--label", "died", "--public"]) == 0
    assert main(["poc", "job.toml", "--out", "poc"]) == 2
    assert "no coordinator chooses" in capsys.readouterr().err
