"""The benchmark that is put together from the trainers' inner parts still runs and prints what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_simulation_measures_every_engine() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "simulation.py")]
    done = subprocess.run(
        [*command, "--only", "cnn", "--repeats", "1", "--scale", "0.1"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["engine"].split(",")[0] for line in lines] == [
        "bare loop",
        "resident",
        "direct",
        "cohort",
        "a whole round of federate",
    ]
    assert lines[0]["ratio_to_bare"] == 1.0
    assert all(line["ratio_to_bare"] > 0 for line in lines)


def test_parties_measures_each_number() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "parties.py")]
    done = subprocess.run(
        [*command, "--parties", "20", "1000000", "--cohort", "5", "--rounds", "3"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["parties"] for line in lines] == [20, 1_000_000]
    assert lines[0]["ratio_seconds_per_round"] == 1.0
    assert lines[1]["peak_rss_mib"] - lines[0]["peak_rss_mib"] < 40  # a million names alone are 70
