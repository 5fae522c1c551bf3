"""The theorem on rounded shares against exact laws: no statistics here, only sums that are known to 1e-15."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import norm

from choral.errors import ConfigError
from choral.privacy.noise.share_rounding import theta, theta_bound, widening

Floats = npt.NDArray[np.float64]


def brute_force(honest: int, r: float, reach: int) -> float:
    """Equation (1), term by term."""
    total = 0.0
    for k in product(range(-reach, reach + 1), repeat=honest - 1):
        if any(k):
            total += math.exp(-2 * math.pi**2 * r * r * (sum(i * i for i in k) - sum(k) ** 2 / honest))
    return total


@pytest.mark.parametrize(("honest", "reach"), [(2, 12), (3, 10), (4, 8)])
@pytest.mark.parametrize("r", [0.25, 0.5, 0.7, 1.0, 1.3, 2.0])
def test_theta_is_the_sum_over_all_integers(honest: int, reach: int, r: float) -> None:
    assert theta(honest, r) == pytest.approx(brute_force(honest, r, reach), rel=1e-11)


def test_one_honest_party_has_no_fraction_left_to_hide() -> None:
    assert theta(1, 0.1) == theta_bound(1, 1.0) == widening(1, 1.0, 10**12) == 0.0


@pytest.mark.parametrize("r", [1.0, 1.1, 1.5, 2.0, 2.5])
def test_the_closed_form_is_above_theta_for_every_number_of_parties_up_to_its_own(r: float) -> None:
    counts = [2, 3, 4, 5, 8, 20, 100, 1000]
    exact = [theta(h, r) for h in counts]
    for place, h in enumerate(counts):
        assert theta_bound(h, r) >= max(exact[: place + 1])
    assert exact[0] > exact[2]  # more parties may have a smaller theta: the bound must be for the most there may be


def test_theta_falls_and_rises_with_the_number_of_parties() -> None:
    assert theta(2, 1.0) == pytest.approx(1.034e-4, rel=1e-3)
    assert theta(4, 1.0) == pytest.approx(2.992e-6, rel=1e-3)
    assert theta_bound(10**6, 8.0) < 1e-268  # of any grid that shares are rounded to


def test_the_leading_terms_are_those_of_the_shortest_vectors() -> None:
    assert theta(2, 1.5) == pytest.approx(2 * math.exp(-(math.pi**2) * 1.5**2), rel=1e-6)
    for h in (3, 10, 100):
        lead = 2 * h * math.exp(-2 * math.pi**2 * 1.5**2 * (h - 1) / h)
        assert theta(h, 1.5) == pytest.approx(lead, rel=1e-3)


@pytest.mark.parametrize(("honest", "least"), [(2, 2.245), (1000, 2.382)])
def test_least_deviation_for_ten_million_coordinates_and_a_hundred_thousand_steps(honest: int, least: float) -> None:
    assert widening(honest, least, 10**12) <= 1e-9 < widening(honest, least - 0.001, 10**12)


def test_what_the_theorem_does_not_cover_is_refused_or_infinite() -> None:
    assert widening(10**5, 1.0, 1) == math.inf
    assert widening(8700, 1.0, 1) == math.inf  # theta_bound is between 1 and 2
    assert 1.0 < theta_bound(8700, 1.0) < 2.0
    for honest, r in ((0, 2.0), (True, 2.0), (2, 0.9), (2, math.nan), (2, math.inf)):
        with pytest.raises(ConfigError):
            theta_bound(honest, r)
    with pytest.raises(ConfigError):
        theta(2, 0.01)


def rounded(at: int, r: float, shift: int, *, ties_to_even: bool = False) -> Floats:
    """The law of a share whose value is `at` steps of the fine grid, in coarse steps from -200 to 200."""
    s = math.ldexp(r, shift)
    noise = np.arange(-math.ceil(12 * s), math.ceil(12 * s) + 1)
    mass = norm.sf((np.abs(noise) - 0.5) / s) - norm.sf((np.abs(noise) + 0.5) / s)
    w = noise + at
    steps = np.rint(w / 2**shift).astype(np.int64) if ties_to_even else (w + (1 << (shift - 1))) >> shift
    return np.asarray(np.bincount(steps + 200, mass, minlength=401))


def variation(r: float, shift: int, splits: list[int], *, ties_to_even: bool) -> float:
    """Between the sum's law for values (0, 0) and (a, -a): the same total, split otherwise."""
    zero = rounded(0, r, shift, ties_to_even=ties_to_even)
    whole = np.convolve(zero, zero)
    worst = 0.0
    for a in splits:
        one, other = (rounded(at, r, shift, ties_to_even=ties_to_even) for at in (a, -a))
        worst = max(worst, 0.5 * float(np.abs(whole - np.convolve(one, other)).sum()))
    return worst


@pytest.mark.parametrize("r", [2.0, 4.0, 8.0])
def test_two_splits_of_one_total_have_the_same_law(r: float) -> None:
    assert variation(r, 3, [1, 2, 3, 4, 5, 8, 11], ties_to_even=False) < 3e-16 + theta(2, r)


def test_rounding_ties_to_even_tells_the_split() -> None:
    """What numpy's rint would do: not equivariant, and so the sum would know more than the total."""
    splits = [256, 512, 768, 1024]
    assert variation(2.0, 10, splits, ties_to_even=True) == pytest.approx(7.1e-8, rel=1e-3)
    assert variation(2.0, 10, splits, ties_to_even=False) < 3e-16
    assert variation(2.0, 1, [1, 2], ties_to_even=True) == pytest.approx(3.21e-5, rel=1e-3)


def share(x: float, r: float) -> Floats:
    """The law of a share of value x coarse steps, the fine grid infinitely fine."""
    k = np.arange(-40, 41)
    return np.asarray(norm.cdf((k + 0.5 - x) / r) - norm.cdf((k - 0.5 - x) / r))


def opened(first: float, rest: float, honest: int, r: float) -> Floats:
    law = share(first, r)
    for _ in range(honest - 1):
        law = np.convolve(law, share(rest, r))
    return law


def delta_over_promise(honest: int, r: float, first: float, rest: float) -> float:
    """delta at epsilon 4 of the opened sum over that of the Gaussian mechanism of mu = 1, for one record of norm C.

    The total noise is one sensitivity; r sqrt(h) is that sensitivity in steps.
    """
    promised = norm.cdf(-3.5) - math.exp(4) * norm.cdf(-4.5)
    one, other = (opened(first + r * math.sqrt(honest) * in_, rest, honest, r) for in_ in (1, 0))
    found = max(np.maximum(p - math.exp(4) * q, 0.0).sum() for p, q in ((one, other), (other, one)))
    return float(found / promised)


@pytest.mark.parametrize(
    ("honest", "first", "rest", "times"), [(2, 0.025, 0.55, 41.66), (8, 0.5, 0.35, 497.2)], ids=["two", "eight"]
)
def test_shares_of_a_quarter_step_break_the_promise(honest: int, first: float, rest: float, times: float) -> None:
    """And those of two steps and more keep it: rounding then adds to the noise."""
    assert delta_over_promise(honest, 0.25, first, rest) == pytest.approx(times, rel=1e-3)
    for r in (2.0, 4.0):
        for x, o in ((first, rest), (0.0, 0.0), (0.5, 0.0), (0.3, 0.5)):
            assert delta_over_promise(honest, r, x, o) < 1.0


def test_shares_of_half_a_step_break_it_for_two_parties_and_not_for_eight() -> None:
    assert delta_over_promise(2, 0.5, 0.65, 0.5) == pytest.approx(1.243, abs=2e-3)
    assert delta_over_promise(8, 0.5, 0.425, 0.2) == pytest.approx(0.172, abs=2e-3)
