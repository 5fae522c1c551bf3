"""The one command for machines with a GPU, rehearsed without: a part that fails costs the others nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def run(*options: str, data: Path) -> tuple[int, dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Its exit status, the last line of each part, and all lines."""
    command = [sys.executable, str(PROGRAM), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, check=False, env={**os.environ, "CHORAL_DATA": str(data)}
    )
    lines = [json.loads(row) for row in done.stdout.splitlines()]
    return done.returncode, {line["part"]: line for line in lines if "ended" in line}, lines


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path):
    status, ends, lines = run("--device", "cpu", "--small", "--only", "federation", "machine", data=tmp_path)
    assert status == 1
    assert ends["federation"]["ended"] == "failed"
    assert "fashion-mnist" in ends["federation"]["trouble"]
    assert (ends["machine"]["ended"], ends["machine"]["trouble"]) == ("well", None)
    assert next(line for line in lines if line["part"] == "machine")["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once():
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


@pytest.mark.slow
def test_the_rehearsal_runs_every_part(data):
    status, ends, lines = run("--device", "cpu", "--small", data=data)
    assert status == 0, ends
    assert {"machine", "tests", "masks", "federation", "cohort", "shadows", "step", "split"} == set(ends)
    assert all(any(line["part"] == part and "ended" not in line for line in lines) for part in ends)
