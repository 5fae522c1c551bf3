from __future__ import annotations

from pathlib import Path

import pytest
from site_folders import Sites, make_sites


@pytest.fixture
def sites(tmp_path: Path) -> Sites:
    return make_sites(tmp_path)
