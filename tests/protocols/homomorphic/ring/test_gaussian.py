"""The sampler of keys and errors: its probabilities, its precision, and what the argument of the split sum needs."""

from __future__ import annotations

import hashlib
import math
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
import pytest
from mpmath import mp
from scipy.stats import binom, chi2

from choral.protocols.crypto.mask_stream import expand
from choral.protocols.errors import SpecError
from choral.protocols.homomorphic.ring import gaussian
from choral.protocols.homomorphic.ring.choose_kernels import kernels
from choral.protocols.homomorphic.ring.gaussian import SIGMA, TAIL, THRESHOLDS, density, sample
from choral.protocols.homomorphic.ring.kernels_numba import NumbaKernels
from choral.protocols.homomorphic.ring.kernels_torch import TorchKernels

FALSE_ALARM = 1e-9
"""Of every statistical test here; the seeds are fixed, so each passes always or never."""
COUNT = 1 << 25


def seed(name: str) -> bytes:
    return hashlib.sha256(b"gaussian test " + name.encode()).digest()


def exact(sigma: Any, centre: Any, reach: int = 400) -> dict[int, Any]:
    """D(sigma, centre) on the integers, in the current precision of mpmath."""
    weights = {x: mp.exp(-((x - centre) ** 2) / (2 * sigma**2)) for x in range(-reach, reach + 1)}
    total = mp.fsum(weights.values())
    return {x: weight / total for x, weight in weights.items()}


def distance(one: dict[int, Any], other: dict[int, Any]) -> Any:
    return mp.fsum(abs(one.get(x, 0) - other.get(x, 0)) for x in one.keys() | other.keys()) / 2


def test_the_probabilities_are_within_2_to_minus_120_of_the_distribution() -> None:
    with mpmath.workdps(80):
        wanted = exact(mp.mpf(str(SIGMA)), 0)
        drawn = {x: mp.mpf(count) / 2**128 for x, count in density().items()}
        assert sum(density().values()) == 1 << 128
        assert all(density()[x] == density()[-x] for x in range(TAIL + 1))
        assert 0 < distance(drawn, wanted) < mp.mpf(2) ** -120
        beyond = mp.fsum(p for x, p in wanted.items() if abs(x) > TAIL)
        assert beyond < mp.mpf(2) ** -127 <= beyond + wanted[TAIL] * 2


def test_another_width_is_far_away() -> None:
    """The distance of the tables of 6.39 and 6.4 is 2^-9: the test above would see it."""
    with mpmath.workdps(50):
        assert distance(exact(mp.mpf("6.39"), 0), exact(mp.mpf("6.4"), 0)) > mp.mpf(2) ** -11


def test_the_table_decreases_and_its_high_words_differ_until_they_are_zero() -> None:
    """Two equal high words above zero would be counted once instead of twice."""
    assert all(one > other > 0 for one, other in pairwise(THRESHOLDS))
    assert THRESHOLDS[0] < 1 << 127
    high = [threshold >> 64 for threshold in THRESHOLDS]
    positive = [word for word in high if word]
    assert len(set(positive)) == len(positive) < TAIL <= 127
    assert gaussian._KERNEL.tolist() == [*positive, 0]
    assert 2.0**-58 < len(gaussian._KERNEL) / 2**63 < 2.0**-56.5  # how often a second word decides


def counts(name: str) -> Any:
    """Of COUNT samples, from -TAIL to TAIL, drawn piece by piece."""
    found = np.zeros(2 * TAIL + 1, np.int64)
    for start in range(0, COUNT, 1 << 21):
        piece = sample(seed(name), 1 << 21, offset=start)
        found += np.bincount(piece.astype(np.int16) + TAIL, minlength=found.size)
    return found


def statistic(counted: Any, probabilities: Any) -> tuple[float, float]:
    """Pearson's, the tails pooled so that each cell is expected 10 times or more; and its bound at FALSE_ALARM."""
    expected = counted.sum() * probabilities
    rare = expected < 10
    cells = np.append(expected[~rare], expected[rare].sum())
    seen = np.append(counted[~rare], counted[rare].sum())
    return float(((seen - cells) ** 2 / cells).sum()), float(chi2.isf(FALSE_ALARM, cells.size - 1))


def floats(sigma: Any, centre: Any = 0) -> Any:
    found = exact(mp.mpf(sigma), centre, 100)
    return np.array([float(found[x]) for x in range(-TAIL, TAIL + 1)])


def test_samples_have_the_distribution() -> None:
    counted = counts("chi-square")
    found, bound = statistic(counted, floats(6.4))
    assert found < bound
    assert statistic(counted, floats(6.2))[0] > 100 * bound
    assert statistic(counted, floats(6.42))[0] > bound
    mean = float(counted @ np.arange(-TAIL, TAIL + 1)) / COUNT
    assert abs(mean) < 6.1 * 6.4 / COUNT**0.5  # 1e-9
    assert sample(seed("chi-square"), 1).dtype == np.int8


def test_the_test_finds_other_samplers() -> None:
    """A centred binomial of the same variance, and a sign that favours minus: counts of as many samples of those."""
    rng = np.random.default_rng(4)
    wanted = floats(6.4)
    bound = statistic(np.rint(wanted * COUNT), wanted)[1]
    places = np.arange(-TAIL, TAIL + 1)
    other = binom.pmf(places + 82, 164, 0.5)  # variance 41; 6.4^2 is 40.96
    assert statistic(rng.multinomial(COUNT, other / other.sum()), wanted)[0] > bound
    tilted = wanted * (1 - 0.004 * np.sign(places))
    assert statistic(rng.multinomial(COUNT, tilted / tilted.sum()), wanted)[0] > bound
    assert statistic(rng.multinomial(COUNT, wanted / wanted.sum()), wanted)[0] < bound


def test_neighbours_in_the_stream_are_independent() -> None:
    """Correlations at lags 1 to 64, each within 7 standard errors: false alarm 64 * 2.6e-12."""
    samples = sample(seed("lags"), 1 << 18).astype(np.float64) / 6.4
    for lag in range(1, 65):
        assert abs(float(np.mean(samples[lag:] * samples[:-lag]))) < 7 / (1 << 9)


@pytest.mark.parametrize("offset", [1, 7, 255, 256, 257, 100_003, (1 << 31) + 5])
def test_any_piece_of_the_vector_can_be_had(offset: int) -> None:
    whole = sample(seed("pieces"), 1000, offset=offset)
    assert np.array_equal(whole[311:], sample(seed("pieces"), 689, offset=offset + 311))
    assert np.array_equal(whole[5:6], sample(seed("pieces"), 1, offset=offset + 5))
    assert not np.array_equal(whole, sample(seed("pieces"), 1000, offset=offset + 1))


def test_the_samples_are_the_inversion_of_the_stream() -> None:
    """Against the definition, one at a time in whole numbers."""
    words = expand(seed("inversion"), 3000, np.uint64)
    expected = []
    for word in words.tolist():
        magnitude = sum((word >> 1) < threshold >> 64 for threshold in THRESHOLDS)
        expected.append(-magnitude if word & 1 else magnitude)
    assert sample(seed("inversion"), 3000).tolist() == expected  # no tie among 3000, but with probability 2^-45


def _words(monkeypatch: pytest.MonkeyPatch, high: list[int], low: int) -> None:
    """Let the stream of the samples be ``high``, and the second stream be ``low`` everywhere."""

    def stream(name: bytes, length: int, dtype: Any, *, offset: int = 0) -> Any:
        if name == seed("ties"):
            return np.array(high, np.uint64)[offset : offset + length]
        return np.full(length, low, np.uint64)

    monkeypatch.setattr(gaussian, "expand", stream)


@pytest.mark.parametrize("k", [1, 2, 10, 40, TAIL - 30, TAIL - 1, TAIL])
def test_where_the_high_words_tie_the_low_words_decide(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """|x| >= k exactly when all 127 bits together are below the threshold of k."""
    threshold = THRESHOLDS[k - 1]
    high, low = threshold >> 64, threshold & (1 << 64) - 1
    words = [high << 1, high << 1 | 1, (high + 1) << 1]
    _words(monkeypatch, words, max(low - 1, 0))
    below = sample(seed("ties"), 3).tolist()
    _words(monkeypatch, words, low)
    at = sample(seed("ties"), 3).tolist()
    assert below[0] == k
    assert below[1] == -k
    assert at[0] < k
    assert at[0] == k - 1 or high == 0
    assert at[1] == -at[0]
    assert below[2] == at[2] <= k - 1  # no tie: the low word is not looked at


def test_the_second_stream_is_another_for_each_place_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stream(name: bytes, length: int, dtype: Any, *, offset: int = 0) -> Any:
        if length > 1:
            return np.zeros(length, np.uint64)  # zeros tie with the zero threshold
        asked.append((name, offset))
        return np.full(1, 1 << 63, np.uint64)

    monkeypatch.setattr(gaussian, "expand", stream)
    sample(seed("one"), 2, offset=5)
    sample(seed("other"), 2, offset=5)
    assert [offset for _, offset in asked] == [5, 6, 5, 6]
    assert len({name for name, _ in asked}) == 2
    assert not {name for name, _ in asked} & {seed("one"), seed("other")}


def test_all_kernels_count_alike() -> None:
    rng = np.random.default_rng(8)
    words = rng.integers(0, 1 << 64, 5000, dtype=np.uint64, endpoint=False)
    words[:200] = [int(t) << 1 | 1 for t in gaussian._KERNEL for _ in range(200)][:: len(gaussian._KERNEL)]
    words[-3:] = [0, (1 << 64) - 1, 1]
    for size in (5000, 1, 255, 257):
        counts, ties = NumbaKernels().magnitudes(words[:size], gaussian._KERNEL)
        others, other_ties = TorchKernels().magnitudes(words[:size], gaussian._KERNEL)
        assert np.array_equal(counts, others)
        assert np.array_equal(ties, other_ties)
        assert ties[0]
    assert type(kernels()) is NumbaKernels


def test_a_seed_of_another_length_is_refused() -> None:
    with pytest.raises(SpecError):
        sample(b"short", 3)


def halves(sigma: Any, centre: Any) -> dict[int, Any]:
    """The distribution of D(sigma, 0) + D(sigma, centre)."""
    one, other = exact(sigma, 0, 60), exact(sigma, centre, 60)
    total: dict[int, Any] = dict.fromkeys(range(-120, 121), mp.mpf(0))
    for x, p in one.items():
        for y, q in other.items():
            total[x + y] += p * q
    return total


@pytest.mark.parametrize("centre", ["0", "0.5", "0.25"])
def test_two_halves_add_up_to_the_conditional_distribution(centre: str) -> None:
    """Step (3) of the argument in split.py: D(sigma/2, 0) + D(sigma/2, c) is D(sigma / sqrt 2, c) to within 2^-140."""
    with mpmath.workdps(80):
        sigma, c = mp.mpf(str(SIGMA)), mp.mpf(centre)
        assert distance(halves(sigma / 2, c), exact(sigma / mp.sqrt(2), c, 120)) < mp.mpf(2) ** -140


def test_at_an_eighth_of_the_width_the_halves_do_not_add_up() -> None:
    """So that the test above can fail: it is a matter of width. (Around 1/2 it holds at any, by symmetry.)"""
    with mpmath.workdps(80):
        assert distance(halves(mp.mpf("0.4"), 0), exact(mp.mpf("0.4") * mp.sqrt(2), 0, 120)) > mp.mpf(2) ** -10


@pytest.mark.parametrize("total", [0, 1, -7, 40])
def test_given_the_sum_of_two_each_is_gaussian_around_its_half(total: int) -> None:
    """Step (2), exactly: exponents as fractions, so no precision is involved. The log density of s_i given s_i + s_j
    = T is, up to a constant, -(x^2 + (T - x)^2) / 2 sigma^2 = -(x - T/2)^2 / (2 sigma^2 / 2) - T^2 / 4 sigma^2."""
    variance = Fraction(Decimal(SIGMA)) ** 2
    constants = set()
    for x in range(-90, 91):
        joint = (Fraction(x) ** 2 + Fraction(total - x) ** 2) / (2 * variance)
        conditional = (x - Fraction(total, 2)) ** 2 / (2 * variance / 2)
        constants.add(joint - conditional)
    assert constants == {Fraction(total) ** 2 / (4 * variance)}


@pytest.mark.parametrize("total", [0, 1, 25])
def test_given_the_sum_samples_have_that_distribution(total: int) -> None:
    """The same for what the sampler really draws."""
    drawn = sample(seed("conditional"), 1 << 22).astype(np.int64)
    first, second = drawn[: 1 << 21], drawn[1 << 21 :]
    given = first[first + second == total]
    assert given.size > 1000
    wanted = floats(mp.mpf("6.4") / mp.sqrt(2), mp.mpf(total) / 2)
    found, bound = statistic(np.bincount(given + TAIL, minlength=2 * TAIL + 1), wanted)
    assert found < bound


@pytest.mark.parametrize("bits", [77, 96])
def test_a_sum_passes_its_bound_as_seldom_as_is_said(bits: int) -> None:
    """Exactly, by convolution in whole numbers, for 1, 2, 4 and 8; the bound is sub-Gaussian and holds for all."""
    single = np.array([density()[x] for x in range(-TAIL, TAIL + 1)], object)
    summed, parties = single, 1
    while parties <= 8:
        reach = (summed.size - 1) // 2
        limit = math.ceil(math.sqrt(2 * (bits + 1) * math.log(2)) * float(SIGMA) * math.sqrt(parties))
        beyond = Fraction(int(sum(summed[limit + 1 + reach :])) * 2, 1 << 128 * parties)
        assert beyond < Fraction(1, 1 << bits)
        summed, parties = np.convolve(summed, summed), 2 * parties
