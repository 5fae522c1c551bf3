"""Looking at a model takes little more memory than a step: each run in a process of its own, by the kernel's peak."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "check_memory.py"


@pytest.mark.parametrize("model", ["small", pytest.param("resnet", marks=pytest.mark.slow)])
def test_the_peak_with_the_checks_is_at_most_1_3_of_that_without(model: str) -> None:
    """Three times that, when whole batches were looked at with gradients."""
    measured = runpy.run_path(str(BENCHMARK))["measured"]
    settled, checked = (measured(kind, model, 2)["MiB"] for kind in ("settled", "checked"))
    assert settled > 40  # much more than either leaves to chance
    assert checked <= 1.3 * settled
