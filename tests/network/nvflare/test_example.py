"""examples/nvflare, as its README says, in NVFlare's simulator. Run by `make test-engines`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from readme_steps import run_steps, steps_of

from choral.trainers import Run

pytest.importorskip("nvflare", reason="run by `make test-engines`")
EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ex-"))
    yield path / "rehearsal"
    shutil.rmtree(path)


def test_the_steps_of_the_readme_lead_to_a_run_that_the_audit_reads(folder: Path) -> None:
    """After those of examples/hospitals, up to the approvals."""
    shutil.copytree(EXAMPLES / "hospitals", folder)
    shutil.copy(EXAMPLES / "nvflare" / "job.py", folder)
    before = steps_of(EXAMPLES / "hospitals" / "README.md")[1:]
    before = before[: before.index("approve north first.json; approve south first.json; approve east first.json") + 1]
    assert len(before) > 15
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    steps = steps_of(EXAMPLES / "nvflare" / "README.md")
    said = run_steps(before + steps, folder, environment, seconds=1500)
    run = Run.load(folder / "runs" / "tumours")
    assert run.finished
    assert [entry.survivors for entry in run.history] == [0] + [3] * 10
    assert (folder / "runs" / "tumours" / "report.html").is_file()
    assert "trained: digest" in said
