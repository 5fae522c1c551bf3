"""Samplers against exact probabilities. False-alarm rates: 1e-7 for each statistical test."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from Crypto.Cipher import AES
from scipy import stats

from choral.errors import ConfigError
from choral.privacy.noise.gaussian import STRETCH, gaussian, grid_gaussian, noise_grid, os_stream, poisson_sample

ALARM = 1e-7


def test_stream_never_repeats_and_ignores_seeds() -> None:
    def seeded() -> bytes:
        torch.manual_seed(0)
        np.random.seed(0)
        return os_stream(32)

    assert seeded() != seeded()
    assert len(os_stream(0)) == 0
    assert len(os_stream(1_000_003)) == 1_000_003


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 255, 4096, 1_000_003])
def test_the_stream_is_aes_in_counter_mode_under_a_key_of_the_system(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """By the library's own counter mode; 1,000,003 bytes take counters of three bytes."""
    asked: list[int] = []

    def key(size: int) -> bytes:
        asked.append(size)
        return bytes(range(size))

    monkeypatch.setattr(os, "urandom", key)
    assert os_stream(count) == AES.new(bytes(range(32)), AES.MODE_CTR, nonce=b"").encrypt(bytes(count))
    assert asked == [32]


def test_stream_is_uniform() -> None:
    counts = np.bincount(np.frombuffer(os_stream(1 << 20), np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > ALARM


def test_gaussian_follows_the_normal_distribution() -> None:
    x = gaussian(2_000_001, os_stream)
    assert stats.kstest(x, "norm").pvalue > ALARM
    edges = stats.norm.ppf(np.linspace(0, 1, 201))
    assert stats.chisquare(np.histogram(x, edges)[0]).pvalue > ALARM
    far = int((np.abs(x) > 4).sum())
    assert stats.binomtest(far, len(x), 2 * stats.norm.sf(4)).pvalue > ALARM
    assert abs((x[:-1] * x[1:]).mean()) < stats.norm.isf(ALARM / 2) / math.sqrt(len(x))


def test_the_two_halves_of_box_and_muller_are_independent() -> None:
    x = gaussian(1 << 15, os_stream)  # one chunk: cosines, then sines of the same angles
    a, b = x[: 1 << 14], x[1 << 14 :]
    for f in (lambda v: v, np.square):
        assert stats.pearsonr(f(a), f(b)).pvalue > ALARM
    assert stats.kstest((a + b) / math.sqrt(2), "norm").pvalue > ALARM


@pytest.mark.parametrize("count", [0, 1, 2, 7, (1 << 15) - 1, 1 << 15, (1 << 15) + 1])
def test_gaussian_of_any_length(count: int) -> None:
    x = gaussian(count, os_stream)
    assert x.shape == (count,)
    assert np.isfinite(x).all()


def test_gaussian_survives_extreme_words() -> None:
    for byte in (b"\x00", b"\xff"):
        x = gaussian(4, lambda n, byte=byte: byte * n)
        assert np.isfinite(x).all()
        assert np.abs(x).max() < 13.4


def words_source(radii: np.ndarray, angles: np.ndarray, seed: int) -> Callable[[int], bytes]:
    """The first words as given, and after them others by a fixed seed."""
    generator = np.random.default_rng(seed)
    first = [np.concatenate([radii, angles]).astype("<u8").tobytes()]

    def source(count: int) -> bytes:
        if first:
            assert count == len(first[0])
            return first.pop()
        return generator.bytes(count)

    return source


def test_the_tail_has_the_right_law_beyond_what_64_bits_resolve() -> None:
    """With the top 32 bits of radii zero, r^2 / 2 - 32 log 2 is exponential, however small the rest of the word is."""
    half = 1 << 14
    generator = np.random.default_rng(3)
    angles = generator.integers(0, 2**64, half, dtype=np.uint64)
    for bits in (32, 8, 0):  # of the word that are not zero: the rest of the law is in the bits that are drawn after
        radii = generator.integers(0, 2**bits, half, dtype=np.uint64)
        x = gaussian(2 * half, words_source(radii, angles, seed=bits))
        squares = (x[:half] ** 2 + x[half:] ** 2) / 2 - (64 - bits) * math.log(2)
        assert len(np.unique(np.round(squares, 12))) > 0.999 * half
        assert stats.kstest(squares, "expon").pvalue > ALARM
    assert np.sqrt(2 * (squares.max() + 64 * math.log(2))) > 10.0  # in units of the deviation


def test_radii_near_the_centre_take_no_more_bits() -> None:
    half = 4
    radii = np.array([2**32, 2**33, 2**63, 2**64 - 1], dtype=np.uint64)

    def none(count: int) -> bytes:
        raise AssertionError(count)

    first = words_source(radii, np.zeros(half, np.uint64), seed=0)
    calls = iter([first, none])
    x = gaussian(2 * half, lambda count: next(calls)(count))
    assert x[:half] == pytest.approx(np.sqrt(-2 * np.log((radii.astype(float) + 0.5) * 2.0**-64)), rel=1e-12)


def test_gaussians_are_those_of_box_and_muller_for_the_words_drawn() -> None:
    """Cosines first, then sines; the uniform of a radius is the middle of its cell, of 2^-64, or 2^-128 near zero."""
    radii = [2**63, 2**32, 2**64 - 1, 2**32 - 1, 0]
    angles = [2**62, 3 << 61, (1 << 11) - 1, 2**64 - 1, 2**63]
    more = [2**63, 5]  # for the two radii whose upper half is zero
    words = iter([np.array(radii + angles, "<u8").tobytes(), np.array(more, "<u8").tobytes()])
    x = gaussian(10, lambda count: next(words))
    cells = [Fraction(2 * word + 1, 2**65) for word in radii[:3]]
    cells += [Fraction(2 * ((word << 64) + low) + 1, 2**129) for word, low in zip(radii[3:], more, strict=True)]
    length = [math.sqrt(-2 * (math.log(cell.numerator) - math.log(cell.denominator))) for cell in cells]
    turn = [2 * math.pi * ((word >> 11) / 2**53) for word in angles]
    expected = [r * math.cos(a) for r, a in zip(length, turn, strict=True)]
    expected += [r * math.sin(a) for r, a in zip(length, turn, strict=True)]
    assert x == pytest.approx(expected, rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("rate", [Fraction(1, 3), Fraction(100, 101), Fraction(1, 1000)])
def test_poisson_sample_has_the_exact_rate(rate: Fraction) -> None:
    size, draws = 1000, 500
    counts = np.zeros(size, dtype=int)
    sizes = []
    for _ in range(draws):
        chosen = poisson_sample(size, rate, os_stream)
        assert (np.diff(chosen) > 0).all()
        counts[chosen] += 1
        sizes.append(len(chosen))
    assert stats.binomtest(int(counts.sum()), size * draws, float(rate)).pvalue > ALARM
    # Independent records: batch sizes are binomial, not fixed; each record is as likely as any other.
    expected = size * float(rate) * (1 - float(rate))
    spread = (draws - 1) * np.var(sizes, ddof=1) / expected
    assert ALARM < stats.chi2.cdf(spread, draws - 1) < 1 - ALARM
    spread = ((counts - draws * float(rate)) ** 2).sum() / (draws * float(rate) * (1 - float(rate)))
    assert ALARM < stats.chi2.cdf(spread, size - 1) < 1 - ALARM


def test_poisson_sample_compares_further_words_when_the_first_ties() -> None:
    """1/3 = 0.(01)...; a word equal to floor(2^32 / 3) decides nothing, the next one does."""
    tie = (2**32 // 3).to_bytes(4, "little")
    for second, taken in ((b"\x00\x00\x00\x00", 1), (b"\xff\xff\xff\xff", 0)):
        words = iter([tie, second])
        assert len(poisson_sample(1, Fraction(1, 3), lambda _, words=words: next(words))) == taken


def test_poisson_sample_at_the_ends() -> None:
    assert poisson_sample(5, Fraction(1), os_stream).tolist() == [0, 1, 2, 3, 4]
    assert poisson_sample(5, Fraction(0), os_stream).tolist() == []
    assert poisson_sample(0, Fraction(1, 2), os_stream).tolist() == []
    for size, rate in ((5, Fraction(3, 2)), (5, Fraction(-1, 2)), (-1, Fraction(1, 2)), (-1, Fraction(1))):
        with pytest.raises(ConfigError):
            poisson_sample(size, rate, os_stream)


@pytest.mark.parametrize("size", [1, 10, 1000, 10**6, 10**8])
@pytest.mark.parametrize("sensitivity", [1e-6, 0.03, 1.0, 17.0])
def test_grid_is_a_power_of_two_and_stretches_no_more_than_it_says(size: int, sensitivity: float) -> None:
    grid = noise_grid(sensitivity, size)
    assert math.frexp(grid)[0] == 0.5
    assert STRETCH / 2 < grid * math.sqrt(size) / sensitivity <= STRETCH


def test_the_grid_of_no_coordinates_is_that_of_one() -> None:
    assert noise_grid(1.0, 0) == noise_grid(1.0, 1) == STRETCH


def test_grid_gaussian_lies_on_the_grid_with_the_variance_it_says() -> None:
    size, noise, clip = 200_000, 1.3, 0.7
    grid = noise_grid(clip, size)
    x = grid_gaussian(size, noise, clip, grid, os_stream)
    assert np.array_equal(x / grid, np.rint(x / grid))
    scale = noise * (clip + grid * math.sqrt(size))
    assert stats.kstest(x, "norm", args=(0, scale)).pvalue > ALARM
    ratio = (size - 1) * x.var(ddof=1) / scale**2
    assert ALARM < stats.chi2.cdf(ratio, size - 1) < 1 - ALARM


def test_grid_gaussian_of_some_coordinates_pays_for_the_rounding_of_all() -> None:
    x = grid_gaussian(20_000, 2.0, 1.0, 0.25, os_stream, 400)
    scale = 2.0 * (1.0 + 0.25 * 20)
    ratio = (len(x) - 1) * x.var(ddof=1) / (scale**2 + 0.25**2 / 12)
    assert ALARM < stats.chi2.cdf(ratio, len(x) - 1) < 1 - ALARM


def test_release_has_the_same_support_whatever_the_value() -> None:
    """The attack on float noise (Mironov 2012): which values can be reached tells the value. Here all can."""
    grid = 0.25
    releases = []
    for value in (0.1, 1.1):
        noise = grid_gaussian(20_000, 1.0, 1.0, grid, os_stream)
        releases.append(set(np.round(value / grid) * grid + noise))
    central = np.arange(-1.5, 2.75, grid)
    assert all(set(central) <= release for release in releases)
    assert all(v % grid == 0 for release in releases for v in release)
