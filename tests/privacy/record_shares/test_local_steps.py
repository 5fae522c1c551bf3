"""Why a party may not take several steps between two sums: its own noise moves its model, and the records answer.

Ten honest parties, 256 records, one parameter, sigma = 2, C = 1, two steps. All gradients are linear in the model
where anybody ever is, and clipped to C. False-alarm rate of the statistical test: 1e-7, with a fixed seed.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

Floats = npt.NDArray[np.float64]
PARTIES, SIGMA, STEPS = 10, 2.0, 2
SHARE = SIGMA / math.sqrt(PARTIES)
# Slopes and constants of the records' gradients, party by party. The one record that counts has gradient C, always.
OTHERS = np.full(15, 1 / 15)  # nine parties whose gradients take back the noise of the first step
OWN = np.concatenate([[0.0], np.full(120, -9 / 120)])  # and one whose gradients enlarge it


def clipped_gradient(w: Floats, slopes: Floats, constants: Floats) -> Floats:
    """The sum of the records' clipped gradients at each w, shape of w."""
    return np.asarray(np.clip(w[:, None] * slopes + constants, -1.0, 1.0).sum(1))


def local_update(slopes: Floats, constants: Floats, noise: Floats) -> Floats:
    """What a party sends after two steps of its own: the sum of its two noisy gradients. noise: shape (2, draws)."""
    first = clipped_gradient(np.zeros(noise.shape[1]), slopes, constants) + noise[0]
    return first + clipped_gradient(-first, slopes, constants) + noise[1]


def opened_sum(present: bool, noise: Floats) -> Floats:
    """noise: shape (parties, 2, draws)."""
    total = local_update(OWN, np.concatenate([[float(present)], np.zeros(120)]), noise[0])
    for each in noise[1:]:
        total = total + local_update(OTHERS, np.zeros(15), each)
    return total


def mu_of_opened_sum() -> float:
    """Distance of the two means over the deviation, by the response to each single noise."""
    silent = np.zeros((PARTIES, STEPS, 1))
    shift = float((opened_sum(True, silent) - opened_sum(False, silent))[0])
    variance = 0.0
    for party in range(PARTIES):
        for step in range(STEPS):
            unit = silent.copy()
            unit[party, step] = 1.0
            variance += float((opened_sum(False, unit) - opened_sum(False, silent))[0]) ** 2 * SHARE**2
    return shift / math.sqrt(variance)


def test_two_local_steps_break_the_promise_of_two_sums() -> None:
    promised = math.sqrt(STEPS) / SIGMA  # of two sums of noise sigma C each, that differ by C
    assert len(OWN) + (PARTIES - 1) * len(OTHERS) == 256
    assert promised == pytest.approx(0.7071, abs=1e-4)
    assert mu_of_opened_sum() == pytest.approx(11 / (2 * math.sqrt(11)), rel=1e-9)  # 1.658
    assert mu_of_opened_sum() > 2.3 * promised


def test_what_is_opened_is_gaussian_with_that_mean_and_deviation() -> None:
    """No gradient is ever clipped here: the sum is Gaussian, and mu says all there is to say."""
    draws = 50_000
    noise = np.random.default_rng(5).normal(0.0, SHARE, (PARTIES, STEPS, draws))
    deviation = SHARE * math.sqrt(
        9 * 1 + 10**2 + 1
    )  # 1 of nine parties, whose first noise is gone; 10 and 1 of the tenth
    for present, mean in ((True, 11.0), (False, 0.0)):
        opened = opened_sum(present, noise)
        assert stats.kstest(opened, stats.norm(mean, deviation).cdf).pvalue > 1e-7


def test_one_sum_a_step_keeps_it() -> None:
    """The same records and parties, where each step is of the opened sum: its noise is all parties', and public."""
    public = np.array([0.7])  # whatever was opened before
    for w in (np.zeros(1), -public):
        there = clipped_gradient(w, OWN, np.concatenate([[1.0], np.zeros(120)]))
        gone = clipped_gradient(w, OWN, np.zeros(121))
        assert abs(float((there - gone)[0])) <= 1.0
