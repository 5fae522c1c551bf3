"""Where tests find known answers, which travel with the repository, and real data, which do not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
