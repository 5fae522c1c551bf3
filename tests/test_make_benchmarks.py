"""The one command for all benchmarks: parts that fail are named, and the table says what the lines said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "benchmarks" / "all.py"
sys.path.insert(0, str(PROGRAM.parent))
all_parts: Any = __import__("all")


SMALLEST = {  # of those that `make benchmarks` leaves out
    "audit_overhead": "--canaries 100 --epochs 1 --repeats 1",
    "canaries": "--canaries 20 --draws 20",
    "check_memory": "--model small --steps 1",
    "data_parallel": "--repeats 1 --rounds 2 --only digits",
    "distributed_dp": "accuracy --seeds 1 --rounds 1 --parties 100",
    "exposure": "--lines 2 --passes 1 --characters 800",
    "homomorphic_shared": "--repeats 1 --blocks 2",
    "joint_statistics": "--parties 20 --records 800 --columns 3 --bins 10 --seeds 1",
    "network": "--rounds 2 --length 100",
    "on_device": "--repeats 1",
    "poisoning": "--seeds 1 --rounds 1 --rules mean --attacks none",
    "primitives": "--repeats 1 --length 1000",
    "round_overhead": "--rounds 3",
    "single_contributors": "--cohorts 20 --authors 40 --rounds 1",
    "standardise": "--seeds 1 --ways bounds",
    "transport": "--repeats 1 --sizes 1",
}


def line(part: str, **facts: Any) -> dict[str, Any]:
    return {"part": part, "commit": "abc1234", "load": 0.25, "versions": {"torch": "2.0"}, **facts}


def test_the_table_has_a_row_for_each_figure_and_names_what_failed():
    lines = [
        line("sum of ten", masked_sum_of_ten={"length": 2410, "least": 11.0, "median": 11.5}),
        line("sum of ten", ended="well", trouble=None),
        line("secure sum", who="choral", parties=5, length=10, cpu=0.5, bytes_up_per_party=100.0),
        line("secure sum", who="flower", cpu=2.0, bytes_up_per_party=250.0),
        line("secure sum", ended="well", trouble=None),
        line("step", ended="failed", trouble="Traceback\nValueError: no such model"),
    ]
    told = all_parts.table(lines)
    assert "| masked sum of ten parties, d = 2,410, ms | 11.5 | - | 12 | - | abc1234 | 0.25 |" in told
    who = "masked sum, 5 parties x 10 values, s of processor time"
    assert f"| {who} | 0.5 | 2 (Flower's SecAgg+) | - | 4 | abc1234 | 0.25 |" in told
    assert "| 100 | 250 (Flower's SecAgg+) | - | 2.5 |" in told
    assert "- **step** failed: ValueError: no such model" in told
    assert "- **rounds** was not run." in told
    assert "- **secure sum**" not in told
    assert "With torch 2.0." in told


def test_only_what_is_between_the_markers_is_drawn_again():
    page = f"# Figures\n\n{all_parts.BEGIN}\nold\n{all_parts.END}\n\nafter\n"
    drawn = all_parts.render([], page)
    assert drawn.startswith(f"# Figures\n\n{all_parts.BEGIN}\n| figure |")
    assert drawn.endswith(f"{all_parts.END}\n\nafter\n")
    assert "old" not in drawn
    with pytest.raises(SystemExit):
        all_parts.render([], "no markers")
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert all_parts.render([], page).count(all_parts.BEGIN) == 1


def test_a_part_that_fails_or_hangs_or_says_nothing_costs_the_others_nothing(tmp_path, monkeypatch):
    programs = {
        "fails": "print('{\"what\": 1}')\nraise ValueError('no such model')",
        "hangs": "print('{\"what\": 2}', flush=True)\nimport time\ntime.sleep(60)",
        "silent": "print('nothing')",
        "well": "import json, sys\nprint(json.dumps({'what': sys.argv[1:]}))",
    }
    parts = {}
    for name, text in programs.items():
        (tmp_path / f"{name}.py").write_text(text)
        command = (str(tmp_path / f"{name}.py"), "--size", "9")
        limit = 2 if name == "hangs" else 60
        parts[name] = all_parts.Part(command, ("--size", "1"), limit, lambda lines: iter(()))
    parts["absent"] = all_parts.Part(
        ("x.py",), (), 3, lambda lines: iter(()), python=str(ROOT / ".venv-none" / "python")
    )
    monkeypatch.setattr(all_parts, "PARTS", parts)
    out = tmp_path / "build" / "lines.jsonl"
    assert all_parts.in_turn(list(parts), True, out) == 4
    lines = [json.loads(row) for row in out.read_text().splitlines()]
    ends = {found["part"]: found["trouble"] for found in lines if "ended" in found}
    assert "no such model" in ends["fails"]
    assert ends["hangs"] == "stopped at its limit of 2 s"
    assert ends["silent"] == "it printed no figure"
    assert "there is no .venv-none" in ends["absent"]
    assert ends["well"] is None
    said = {found["part"]: found["what"] for found in lines if "what" in found}
    assert said == {"fails": 1, "hangs": 2, "well": ["--size", "9", "--size", "1"]}
    assert all(found["commit"] and "load" in found for found in lines)
    assert all_parts.in_turn(["well"], False, out) == 0  # the others' lines stay
    lines = [json.loads(row) for row in out.read_text().splitlines()]
    assert {found["part"] for found in lines} == set(parts)
    assert [found["what"] for found in lines if found["part"] == "well" and "what" in found] == [["--size", "9"]]


@pytest.mark.slow
def test_the_rehearsal_runs_every_part(tmp_path):
    command = [sys.executable, str(PROGRAM), "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    ends = {found["part"]: found for found in map(json.loads, done.stdout.splitlines())}
    assert set(ends) == set(all_parts.PARTS)
    for name, found in ends.items():
        there = Path(all_parts.PARTS[name].python).exists()
        assert found["ended"] == ("well" if there else "failed"), found
    told = (tmp_path / "benchmarks-small.md").read_text()
    assert "masked sum of ten parties" in told
    assert "split key's bytes over the masked sum's" in told


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_the_others_run_at_their_smallest(name, data):
    command = [sys.executable, str(PROGRAM.with_name(f"{name}.py")), *SMALLEST[name].split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
