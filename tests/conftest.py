"""Where tests find known answers and real data that do not travel with the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _shared(kind: str) -> Path:
    """``CHORAL_DATA`` and ``CHORAL_VECTORS`` name the folders; ``shared/`` beside the repository is the default."""
    folder = Path(os.environ.get(f"CHORAL_{kind.upper()}", ROOT.parent / "shared" / kind))
    if not folder.is_dir():
        pytest.skip(f"no {kind} at {folder} (set CHORAL_{kind.upper()})")
    return folder


@pytest.fixture(scope="session")
def vectors() -> Path:
    return _shared("vectors")


@pytest.fixture(scope="session")
def data() -> Path:
    return _shared("data")
