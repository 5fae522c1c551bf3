"""Where tests find known answers, which travel with the repository, and real data, which do not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

# Before torch and numpy are imported, and for the processes that tests start: workers of pytest share the cores, and
# threads of a pool that wait for one another spin. A test of small matrices took twenty times its own time so.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The examples of properties are the same each time: what fails here failed there. `make test-all` looks for new ones.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("searching")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Known answers made by others. They are part of the repository: a missing file is an error, never a skip."""
    return ROOT / "tests" / "vectors"


@pytest.fixture(scope="session")
def data() -> Path:
    """``CHORAL_DATA`` names the folder; ``shared/data`` beside the repository is the default."""
    folder = Path(os.environ.get("CHORAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder} (set CHORAL_DATA)")
    return folder


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], ModuleType]:
    """A module of numba's once more, its functions left as the Python that they are written in (NUMBA_DISABLE_JIT).

    So errors that compiled code passes over in silence, an index beyond the end above all, are raised, and what
    measures coverage sees the lines. Slow: for small sizes.
    """

    def load(module: ModuleType) -> ModuleType:
        import numba

        spec = importlib.util.spec_from_file_location(f"{module.__name__}_uncompiled", str(module.__file__))
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        with monkeypatch.context() as patch:
            patch.setattr(numba.config, "DISABLE_JIT", 1)
            spec.loader.exec_module(loaded)
        return loaded

    return load
