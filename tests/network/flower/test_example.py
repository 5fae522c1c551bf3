"""examples/flower, as its README says: in Flower's simulation, and with a SuperLink and three SuperNodes.

Run by `make test-engines`, where Flower is installed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from flower_federation import FLOWER, VISITS
from flower_nodes import BIN, free_port
from readme_steps import run_steps, steps_of

pytestmark = pytest.mark.skipif(not FLOWER, reason="Flower is not installed: run by `make test-engines`")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A copy of the example; what was started there and goes on is ended."""
    path = Path(tempfile.mkdtemp(prefix="ex-"))
    yield path / "rehearsal"
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"EXAMPLE={path}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
    shutil.rmtree(path, ignore_errors=True)


def test_the_steps_of_the_readme_lead_to_the_same_model_in_both(folder: Path) -> None:
    shutil.copytree(VISITS.parent, folder)
    ports = {f"{port}": f"{free_port()}" for port in (9092, 9094, 9095, 9096)}
    lines = steps_of(VISITS.parent / "README.md")
    assert len(lines) > 40
    for port, free in ports.items():
        lines = [line.replace(port, free) for line in lines]
    said = run_steps(lines[1:], folder, environment(folder.parent), seconds=1500)
    assert said.count("north took the job") >= 2  # of each job, and the whole log is shown at the end
    assert said.count("may run until") == 6  # two jobs, approved at three sites
    assert "trained: digest" in said  # the log of a site


def environment(path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "EXAMPLE": str(path),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": f"{free_port()}",
        "FLWR_LOCAL_CONTROL_API_PORT": f"{free_port()}",
    }
