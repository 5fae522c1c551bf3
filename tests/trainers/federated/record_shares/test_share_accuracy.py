"""What noise in shares is for: digits among ten parties, beside the trusted cloud's noise and each party's own."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from choral.jobs.training import load_module

EXAMPLE = Path(__file__).resolve().parents[4] / "examples" / "noise_in_shares.py"


@pytest.mark.slow
def test_shares_are_near_the_cloud_and_above_each_partys_own_noise() -> None:
    """Epsilon 4, three seeds, h = 8, tuned alike on other data: 3 points of slack, where runs scatter by about 1.5.

    Noise is the operating system's. Measured: shares within a point of the cloud, each party's own noise 8 below it.
    """
    trained = load_module(EXAMPLE, "the example").trained
    scores = {
        arm: mean(100 * trained(arm, 4.0, seed).metrics["accuracy"] for seed in range(3))
        for arm in ("cloud", "shares", "own")
    }
    assert scores["shares"] >= scores["cloud"] - 3.0
    assert scores["shares"] >= scores["own"] + 2.0
