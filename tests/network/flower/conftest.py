"""Flower's modules for the tests of this folder: as recorded where Flower is not installed, else its own."""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import recorded_flwr
from flower_federation import FLOWER

if FLOWER:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies, about one another
        import flwr.app
        import flwr.serverapp.strategy  # noqa: F401


@pytest.fixture(autouse=True)
def _flower(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flower's modules, for one test."""
    if not FLOWER:
        for name, module in recorded_flwr.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "choral.jobs.engines.flower_strategy", raising=False)
    else:
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    yield
    if not FLOWER:
        sys.modules.pop("choral.jobs.engines.flower_strategy", None)
        vars(sys.modules["choral.network.flower"]).pop("Secure", None)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short path."""
    path = Path(tempfile.mkdtemp(prefix="flower-"))
    yield path
    shutil.rmtree(path)
