"""The benchmark of engines, processes and peers still runs, ends what it started, and prints what it says."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="processor time of other processes is read in /proc")

COUNTS = """
import sys, time
sys.path.insert(0, sys.argv[1])
import bare
while True:
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    time.sleep(0.1)
    bare.turn(version="1")
"""


def test_simulation_measures_engines_processes_and_peers() -> None:
    command = [sys.executable, str(BENCHMARKS / "simulation.py"), "--only", "cnn", "--repeats", "1", "--scale", "0.1"]
    done = subprocess.run(
        [*command, "--processes", "2", "--peer-python", sys.executable],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = {line["engine"]: line for line in map(json.loads, done.stdout.splitlines())}
    peers = {name: lines.pop(name) for name in ("pfl", "flwr")}
    assert list(lines) == [
        "bare loop",
        "resident, the user's own loop",
        "resident, the user's own loop, bf16",
        "direct",
        "cohort",
        "federate, plain sum",
        "federate, 2 processes",
    ]
    assert lines["bare loop"]["ratio_to_bare"] == 1.0
    assert all(line["ratio_to_bare"] > 0 and line["wall_ratio_to_bare"] > 0 for line in lines.values())
    both = lines["federate, 2 processes"]
    assert both["busiest_process_ratio_to_one"] > 0
    assert both["wall_ratio_to_one"] > 0
    for peer in peers.values():  # this project depends on none of them: said, not left out
        assert "ratio_to_bare" in peer or peer["absent"].startswith("not installed for")


def test_a_driven_process_is_measured_and_ended(tmp_path: Path) -> None:
    from driven import Driven, seconds_of_tree

    program = tmp_path / "counts.py"
    program.write_text(COUNTS)
    with Driven([sys.executable, str(program), str(BENCHMARKS)]) as process:
        assert process.first() == {"version": "1"}
        spent = process.once()
        number = process._process.pid
        assert sum(spent.cpu) == pytest.approx(0.2, abs=0.1)
        assert spent.wall > 0.29
    time.sleep(0.1)
    assert not Path(f"/proc/{number}").exists()
    assert sum(seconds_of_tree(number).values()) == 0


def test_a_peer_that_fails_is_quoted(tmp_path: Path) -> None:
    from driven import Driven

    program = tmp_path / "fails.py"
    program.write_text("print('turned away')\nraise ValueError('no such model')\n")
    with Driven([sys.executable, str(program)]) as process, pytest.raises(RuntimeError, match="no such model"):
        process.first()
