"""Shares as they are made. False-alarm rates: 1e-7 for each statistical test; sources have fixed seeds."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from choral.errors import ConfigError
from choral.privacy.noise import record_noise_shares as shares
from choral.privacy.noise.gaussian import os_stream
from choral.privacy.noise.record_noise_shares import REACH, ShareGrid, noisy_share, share_grid

ALARM = 1e-7
Source = Callable[[int], bytes]


def seeded(seed: int) -> Source:
    return np.random.default_rng(seed).bytes


@pytest.mark.parametrize("share", [1e-6, 0.031, 0.4, 0.5, 1.0, 1.06, 8.0, 16.0, 1e3])
@pytest.mark.parametrize("length", [1, 10, 2410, 10**7])
def test_a_share_is_eight_to_sixteen_coarse_steps_and_the_fine_grid_costs_a_thousandth(
    share: float, length: int
) -> None:
    grid = share_grid(share, length)
    assert 8.0 <= grid.deviation(share) < 16.0
    assert grid.shift >= 1
    assert math.ldexp(math.sqrt(length), -grid.fine) <= 2.0**-10
    assert grid.stretch(length, 1) <= 2.0**-10 + 2.0**-51
    assert grid.stretch(length, 1000) - grid.stretch(length, 1) == pytest.approx(1e6 * 2.0**-52, rel=1e-4)


def test_a_share_of_eight_steps_exactly_takes_no_finer_grid() -> None:
    assert share_grid(8.0, 1).coarse == 0
    assert share_grid(math.nextafter(8.0, 0), 1).coarse == 1
    assert share_grid(math.nextafter(16.0, 0), 1).coarse == 0


def test_grids_out_of_range_are_refused() -> None:
    for share, length in ((0.0, 1), (math.nan, 1), (2.0**31, 1), (1.0, 0), (1.0, 1 << 41), (1.0, True)):
        with pytest.raises(ConfigError):
            share_grid(share, length)
    for coarse, fine in ((3, 3), (3, 2), (61, 62), (True, 5), (3, 4.0)):
        with pytest.raises(ConfigError):
            ShareGrid(coarse=coarse, fine=fine)  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", [1, 2, 9])
def test_rounding_is_equivariant_at_ties_too(shift: int) -> None:
    """One coarse step more in the value is one more in the result, for each coordinate and the same noise."""
    grid = ShareGrid(coarse=2, fine=2 + shift)
    value = np.arange(-3000, 3000) * 2.0**-grid.fine
    first = noisy_share(value, 1.0, 3.0, grid, 4000, seeded(1))
    for steps in (1, 2, -3):
        moved = noisy_share(value + steps * 2.0**-grid.coarse, 1.0, 3.0, grid, 4000, seeded(1))
        assert np.array_equal(moved, first + steps)


def test_value_and_noise_meet_as_integers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise on the fine grid does not depend on the value: results differ by the value's integers alone."""
    grid = ShareGrid(coarse=0, fine=20)
    monkeypatch.setattr(shares, "gaussian", lambda count, source: np.full(count, 0.3))
    noise = math.floor(0.3 * 2**20 * 9.0 + 0.5)
    for value in (0.0, 0.1, -0.7, 3.9, 1e-9):
        expected = (round(value * 2**20) + noise + (1 << 19)) >> 20
        assert noisy_share(np.array([value]), 1.0, 9.0, grid, 10, os_stream) == [expected]


def exact_law(values: list[float], r: float, low: int, high: int) -> npt.NDArray[np.float64]:
    """The law of the sum of shares of these values, in coarse steps, at low, ..., high; the ends hold the tails."""
    reach = math.ceil(10 * r) + 20
    k = np.arange(-reach, reach + 1)
    law = np.ones(1)
    for x in values:
        law = np.convolve(law, stats.norm.cdf((k + 0.5 - x) / r) - stats.norm.cdf((k - 0.5 - x) / r))
    sums = np.arange(-reach * len(values), reach * len(values) + 1)
    kept = law[(sums >= low) & (sums <= high)]
    kept[0] += law[sums < low].sum()
    kept[-1] += law[sums > high].sum()
    return np.asarray(kept)


@pytest.mark.parametrize("coarse", [1, 2, 3], ids=["r=2", "r=4", "r=8"])
def test_opened_sums_have_the_convolution_of_the_shares_exact_laws(coarse: int) -> None:
    """And not those of 2 % less noise, nor of a continuous Gaussian: the lattice shows."""
    count, r, grid = 200_000, 2.0**coarse, ShareGrid(coarse=coarse, fine=coarse + 12)
    values = [0.3, -1.1, 0.45, 0.0]
    total = sum(
        noisy_share(np.full(count, x), 1.0, 1.0, grid, 2, seeded(100 * coarse + i)) for i, x in enumerate(values)
    )
    assert isinstance(total, np.ndarray)
    spread = math.ceil(4.0 * r)
    edges = np.clip(total, -spread, spread) + spread
    counts = np.bincount(edges, minlength=2 * spread + 1)
    in_steps = [math.ldexp(x, coarse) for x in values]
    law = exact_law(in_steps, r, -spread, spread)
    assert stats.chisquare(counts, law / law.sum() * count).pvalue > ALARM
    smaller = exact_law(in_steps, 0.98 * r, -spread, spread)
    assert stats.chisquare(counts, smaller / smaller.sum() * count).pvalue < ALARM
    if coarse < 3:
        continuous = stats.norm(sum(in_steps), 2.0 * r).cdf
        assert stats.kstest(total, continuous).pvalue < ALARM
        between = np.random.default_rng(coarse).uniform(-0.5, 0.5, count)
        assert (
            stats.kstest(total + between, stats.norm(sum(in_steps), math.sqrt(4 * r * r + 4 / 12)).cdf).pvalue > ALARM
        )


def test_a_share_has_the_deviation_it_says_whatever_the_clipping_norm() -> None:
    for clip, share in ((1.0, 1.06), (0.03, 0.4), (17.0, 5.0)):
        grid = share_grid(share, 100_000)
        x = noisy_share(np.zeros(100_000), clip, share, grid, 5, seeded(4)) * 2.0**-grid.coarse
        spread = 99_999 * x.var(ddof=1) / (share**2 + 4.0**-grid.coarse / 12)
        assert ALARM < stats.chi2.cdf(spread, 99_999) < 1 - ALARM
        value = np.linspace(-4, 4, 9) * clip
        noise = noisy_share(np.zeros(9), clip, share, grid, 5, seeded(5))
        assert np.array_equal(
            noisy_share(value, clip, share, grid, 5, seeded(5)) - noise,
            np.rint(np.linspace(-4, 4, 9) * 2.0**grid.coarse),
        )


def test_no_value_raises_or_passes_the_bound() -> None:
    grid, rows, share = share_grid(1.06, 6), 40, 1.06
    wild = np.array([np.nan, np.inf, -np.inf, 1e300, -1e300, 0.0])
    for source in (seeded(6), lambda n: b"\x00" * n, lambda n: b"\xff" * n):
        x = noisy_share(wild, 1.0, share, grid, rows, source)
        assert x.dtype == np.int64
        assert np.abs(x).max() <= grid.bound(share, rows)
    quiet = noisy_share(wild, 1.0, share, grid, rows, seeded(7)) - noisy_share(
        np.zeros(6), 1.0, share, grid, rows, seeded(7)
    )
    assert quiet.tolist() == [0, 0, 0, rows << grid.coarse, -(rows << grid.coarse), 0]
    assert grid.bound(share, rows) <= rows * 2**grid.coarse + REACH * 16 + 2


def test_shares_are_never_the_same_twice_and_no_seed_reaches_them() -> None:
    grid = share_grid(1.0, 64)
    np.random.seed(0)
    first = noisy_share(np.zeros(64), 1.0, 1.0, grid, 1, os_stream)
    np.random.seed(0)
    assert not np.array_equal(first, noisy_share(np.zeros(64), 1.0, 1.0, grid, 1, os_stream))
