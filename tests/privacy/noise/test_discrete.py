"""Integer samplers against exact probabilities and against each other. False-alarm rate: 1e-7 for each test."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from scipy import stats

from choral.errors import ConfigError
from choral.privacy.noise import integer
from choral.privacy.noise.gaussian import os_stream
from choral.privacy.noise.integer_tables import LARGEST_DEVIATION, CumulativeTable, table

ALARM = 1e-7
COUNT = 40_000
SMALL = [Fraction(1, 3), Fraction(1), Fraction(7, 2), Fraction(83, 2)]


def gaussian_pmf(variance: Fraction, ks: np.ndarray) -> np.ndarray:
    reach = 20 * math.ceil(math.sqrt(variance)) + 10
    wide = np.arange(-reach, reach + 1)
    return np.exp(-(ks**2) / (2 * float(variance))) / np.exp(-(wide**2) / (2 * float(variance))).sum()


def skellam_pmf(variance: Fraction, ks: np.ndarray) -> np.ndarray:
    return np.asarray(stats.skellam.pmf(ks, float(variance) / 2, float(variance) / 2))


PMF: dict[str, Callable[[Fraction, np.ndarray], np.ndarray]] = {
    "discrete_gaussian": gaussian_pmf,
    "skellam": skellam_pmf,
}
EXACT: dict[str, Any] = {"discrete_gaussian": integer.discrete_gaussian, "skellam": integer.skellam}


def pvalue(draws: np.ndarray, pmf: Callable[[np.ndarray], np.ndarray], width: int = 1) -> float:
    """Chi-square over blocks of `width` values that are expected at least ten times, and the rest as one cell."""
    reach = width * (int(np.abs(draws).max()) // width + 2) + width // 2
    ks = np.arange(-reach, reach + width)
    ks = ks[: len(ks) // width * width]
    expected = pmf(ks).reshape(-1, width).sum(1) * len(draws)
    counts = np.bincount(draws + reach, minlength=len(ks)).reshape(-1, width).sum(1).astype(float)
    usual = expected >= 10
    seen, hoped = [*counts[usual]], [*expected[usual]]
    rest = len(draws) - sum(hoped)
    if rest >= 5:
        seen, hoped = [*seen, counts[~usual].sum()], [*hoped, rest]
    return float(stats.chisquare(seen, np.array(hoped) * sum(seen) / sum(hoped)).pvalue)


@pytest.mark.parametrize("law", EXACT)
@pytest.mark.parametrize("variance", SMALL, ids=str)
def test_the_exact_sampler_has_exact_probabilities(law: str, variance: Fraction) -> None:
    draws = EXACT[law](COUNT // 4, variance, os_stream)
    assert draws.dtype == np.int64
    assert pvalue(draws, lambda ks: PMF[law](variance, ks)) > ALARM


@pytest.mark.parametrize("law", EXACT)
@pytest.mark.parametrize("variance", [*SMALL, Fraction(10_000), Fraction(1 << 20)], ids=str)
def test_the_table_has_exact_probabilities(law: str, variance: Fraction) -> None:
    draws = CumulativeTable(law, variance).draw(20 * COUNT, os_stream)  # type: ignore[arg-type]
    assert pvalue(draws, lambda ks: PMF[law](variance, ks)) > ALARM
    block = math.ceil(math.sqrt(variance) / 5)
    assert pvalue(draws, lambda ks: PMF[law](variance, ks), block) > ALARM
    other = Fraction(103, 100) * variance
    assert pvalue(draws, lambda ks: PMF[law](other, ks), block) < ALARM, "three per cent more would not be noticed"


@pytest.mark.parametrize("law", EXACT)
def test_the_two_samplers_agree(law: str) -> None:
    variance = Fraction(83, 7)
    ours = CumulativeTable(law, variance).draw(COUNT, os_stream)  # type: ignore[arg-type]
    exact = EXACT[law](COUNT // 4, variance, os_stream)
    edges = np.arange(-12, 13)
    both = np.array([np.histogram(np.clip(draws, -12, 11), edges)[0] for draws in (ours, exact)])
    assert stats.chi2_contingency(both).pvalue > ALARM


@pytest.mark.parametrize("law", EXACT)
@pytest.mark.parametrize("variance", [Fraction(1, 3), Fraction(12), Fraction(83, 2) * 1000])
def test_the_tables_entries_are_the_cumulative_law(law: str, variance: Fraction) -> None:
    """Every boundary against float sums of the exact mass function, to their rounding."""
    made = CumulativeTable(law, variance)  # type: ignore[arg-type]
    ks = np.arange(-made.reach, made.reach)
    expected = np.cumsum(PMF[law](variance, ks)) if made.reach < 2000 else None
    if expected is None:
        wide = PMF["skellam"](variance, ks) if law == "skellam" else np.exp(-(ks**2) / (2 * float(variance)))
        expected = np.cumsum(wide / (wide.sum()))
    assert np.allclose(made._high / 2.0**64, expected, rtol=0, atol=1e-12)
    entries = list(made._cumulative())
    assert len(entries) == 2 * made.reach
    assert entries == sorted(entries)
    middle = entries[made.reach] + entries[made.reach - 1]  # P(X <= 0) + P(X <= -1) = 1, by symmetry
    assert abs(middle - (1 << 256)) <= 2


@pytest.mark.parametrize("law", EXACT)
@pytest.mark.parametrize("variance", [Fraction(1, 3), Fraction(83, 7), Fraction(900)], ids=str)
def test_the_tables_entries_are_right_to_two_hundred_bits(law: str, variance: Fraction) -> None:
    """Against 130 decimal digits by other ways: the exponential of each k, the power series of the Bessel function."""
    made = CumulativeTable(law, variance)  # type: ignore[arg-type]
    with localcontext() as context:
        context.prec = 130
        v = Decimal(variance.numerator) / Decimal(variance.denominator)

        def weight(k: int) -> Decimal:
            if law == "discrete_gaussian":
                return (-(k * k) / (2 * v)).exp()
            term = (v / 2) ** k / Decimal(math.factorial(k))  # I_k(v) = sum_m (v/2)^(2m + k) / (m! (m + k)!)
            total, m = term, 0
            while term > total * Decimal(10) ** -125:
                m += 1
                term *= (v / 2) ** 2 / (m * (m + k))
                total += term
            return total

        weights = [weight(k) for k in range(made.reach + 60)]
        whole = weights[0] + 2 * sum(weights[1:])
        total = sum(weights[made.reach + 1 :])
        entries = made._cumulative()
        worst = Decimal(0)
        for place, k in enumerate(range(-made.reach, made.reach)):
            total += weights[abs(k)]
            worst = max(worst, abs(total / whole - Decimal(entries[place]) / 2**256))
        assert worst < Decimal(2) ** -205


@pytest.mark.parametrize("law", EXACT)
def test_what_the_table_leaves_out_is_below_two_to_the_minus_200(law: str) -> None:
    for variance in (Fraction(1, 50), Fraction(1), Fraction(50), Fraction(4096)):
        made, v = table(law, variance), float(variance)  # type: ignore[arg-type]
        k = made.reach + 1
        if law == "skellam":
            log_tail = -(k * math.asinh(k / v) - math.sqrt(k * k + v * v) + v)  # Chernoff
        else:
            log_tail = -k * k / (2 * v)
        assert log_tail / math.log(2) < -200


def test_every_word_is_decided_as_the_long_way_does() -> None:
    """All cells, and words next to every boundary, against a search among the 256-bit entries."""
    made = CumulativeTable("discrete_gaussian", Fraction(5))
    entries = list(made._cumulative())

    def long_way(word: int, rest: int) -> int:
        uniform = word << 192 | rest
        return sum(entry <= uniform for entry in entries) - made.reach

    for entry in entries:
        word = entry >> 192
        for near in {max(word - 1, 0), word, min(word + 1, 2**64 - 1)}:
            for rest in (0, entry & (2**192 - 1), 2**192 - 1):
                # A draw takes its cell's bits, then the following 48, with 16 to spare, then 192.
                def source(count: int, word: int = near, rest: int = rest) -> bytes:
                    if count == 2:
                        return (word >> 48).to_bytes(2, "little")
                    return (
                        ((word & (2**48 - 1)) << 16).to_bytes(8, "little") if count == 8 else rest.to_bytes(24, "big")
                    )

                assert made.draw(1, source)[0] == long_way(near, rest)


def test_sums_of_skellam_are_skellam() -> None:
    draws = table("skellam", Fraction(3, 10)).draw(20 * COUNT, os_stream).reshape(20, -1).sum(0)
    assert pvalue(draws, lambda ks: skellam_pmf(Fraction(6), ks)) > ALARM


def test_poisson_has_exact_probabilities() -> None:
    for mean in (Fraction(0), Fraction(1, 7), Fraction(5, 2), Fraction(20)):
        draws = integer.poisson(10_000, mean, os_stream)
        if mean:
            ks = np.arange(0, 80)
            expected = stats.poisson.pmf(ks, float(mean)) * len(draws)
            good = expected > 10
            counts = np.bincount(draws, minlength=80)[:80]
            seen = np.array([*counts[good], counts[~good].sum()])
            hoped = np.array([*expected[good], len(draws) - expected[good].sum()])
            assert stats.chisquare(seen, hoped * seen.sum() / hoped.sum()).pvalue > ALARM
        else:
            assert not draws.any()


def test_bernoulli_is_exact_where_a_float_is_not() -> None:
    """A numerator and a denominator that differ beyond double precision: 32 bits at a time, ties go on."""
    numerator, denominator = 2**80 - 1, 2**80
    ones = iter([b"\xff" * 4, b"\xff" * 4, b"\xff" * 4])
    result = integer._bernoulli(np.array([numerator], object), np.array([denominator], object), lambda _: next(ones))
    assert not result[0]  # all ones: not below 1 - 2^-80
    words = iter([b"\xff" * 4, b"\xff" * 4, b"\x00\x00\xfe\xff"])
    assert integer._bernoulli(np.array([numerator], object), np.array([denominator], object), lambda _: next(words))[0]


@pytest.mark.parametrize("draw", [integer.discrete_gaussian, integer.skellam], ids=["gaussian", "skellam"])
def test_what_samplers_refuse(draw: Any) -> None:
    for bad in (0, Fraction(-1), Fraction(2) ** 61):
        with pytest.raises(ConfigError):
            draw(3, bad, os_stream)
    with pytest.raises(ConfigError, match="integer or a Fraction"):
        draw(3, 0.5, os_stream)
    with pytest.raises(ConfigError):
        draw(-1, Fraction(1), os_stream)
    assert len(draw(0, Fraction(1), os_stream)) == 0


def test_what_tables_refuse() -> None:
    for bad in (0.5, Fraction(1, 1000), Fraction(LARGEST_DEVIATION**2 + 1)):
        with pytest.raises(ConfigError):
            CumulativeTable("skellam", bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        CumulativeTable("skellam", Fraction(1)).draw(-1, os_stream)
