"""Privacy loss distributions of the Poisson-sampled Gaussian mechanism, vectorised.

dp-accounting computes the same in Python loops, a second or so for each number. Training asks after every pass
and calibration many times over, so the inner loops are written out here; dp-accounting is the oracle of the
tests and of every calibration.

One step. With records sampled at rate q and noise s (sensitivity 1), the worst pair of neighbours is P =
(1 - q) N(0, s^2) + q N(1, s^2) against Q = N(0, s^2) (Zhu, Dong, Wang 2022): *remove* bounds P by Q, *add* Q by
P. From the hockey-stick divergences delta(eps) at multiples of a grid, connecting the dots (Doroshenko et al.
2022, algorithm 1) gives a distribution on the grid that dominates the true one.

Many steps. Losses add, so distributions convolve, by one FFT over a window that Chernoff's bound shows to hold
all but `tail` of the mass; what is outside counts as an infinite loss. Every result is an upper bound, up to
the rounding of FFTs, about 1e-13 in delta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import ndtr

from choral.privacy.replaced import ReplacedGaussian

Floats = npt.NDArray[np.float64]

SMALLEST_DELTA = 1e-10  # at 1e-12 the rounding of FFTs shows: a relative 3e-5 of epsilon
_REACH = 10.0  # standard deviations of noise that a step's support covers: all but 1e-23, which counts as infinite
_ORDERS = tuple(2.0**i for i in range(-6, 20))


@dataclass(frozen=True, eq=False)
class _Loss:
    """One step's privacy loss: mass probs[i] at (lowest + i) * grid, and the rest, `infinity`, at infinity."""

    lowest: int
    probs: Floats
    infinity: float
    grid: float
    known: dict[float, float] = field(default_factory=dict)

    def log_moment(self, order: float) -> float:
        """Return log E exp(order * loss) over the finite part."""
        if order not in self.known:
            exponents = (self.lowest + np.arange(len(self.probs))) * (self.grid * order)
            shift = float(exponents[-1 if order > 0.0 else 0])
            exponents -= shift
            mass = float(self.probs @ np.exp(exponents, out=exponents))
            self.known[order] = shift + math.log(max(mass, 1e-300))  # where it underflows, still an upper bound
        return self.known[order]


def epsilon(steps: Sequence[tuple[float, float, int]], delta: float, grid: float, replace: bool = False) -> float:
    """Return an upper bound on epsilon at `delta` of all `steps`: triples (sample rate, noise multiplier, number).

    replace: the neighbours differ by a record replaced, not by one zeroed out.

    `grid` is the discretisation of the privacy loss; a finer one that divides it gives a tighter bound.
    """
    if replace:
        return _epsilon([(_replaced(q, s, grid), count) for q, s, count in steps], delta, grid)
    return max(_epsilon([(one_step(q, s, grid)[way], count) for q, s, count in steps], delta, grid) for way in (0, 1))


@lru_cache(maxsize=128)
def one_step(rate: float, noise: float, grid: float) -> tuple[_Loss, _Loss]:
    """Return the losses of one step, for removing and for adding a record."""

    def loss(x: float) -> float:  # log P/Q at x
        return float(
            np.logaddexp(math.log1p(-rate) if rate < 1.0 else -math.inf, math.log(rate) + (x - 0.5) / noise**2)
        )

    low, high = loss(-_REACH * noise), loss(1.0 + _REACH * noise)
    return _connect(low, high, rate, noise, grid, remove=True), _connect(-high, -low, rate, noise, grid, remove=False)


@lru_cache(maxsize=128)
def _replaced(rate: float, noise: float, grid: float) -> _Loss:
    """Return the losses of one step for replacing a record; both directions are alike."""
    pair = ReplacedGaussian(rate, noise)
    low, high = pair.losses()
    first, last = math.floor(low / grid), math.ceil(high / grid) + 1
    delta, error = pair.divergence(np.arange(first, last + 1, dtype=np.float64) * grid)
    return _connected(first, delta + error, grid)


def _connect(low: float, high: float, rate: float, noise: float, grid: float, *, remove: bool) -> _Loss:
    first, last = math.floor(low / grid), math.ceil(high / grid) + 1
    return _connected(
        first, _hockey_stick(np.arange(first, last + 1, dtype=np.float64) * grid, rate, noise, remove=remove), grid
    )


def _connected(first: int, delta: Floats, grid: float) -> _Loss:
    delta = np.minimum.accumulate(np.clip(delta, 0.0, 1.0))
    rise = np.diff(delta)
    probs = np.empty_like(delta)
    probs[0] = (1.0 - delta[0]) + rise[0] / math.expm1(grid)
    probs[1:-1] = (rise[1:] - math.exp(grid) * rise[:-1]) / math.expm1(grid)
    probs[-1] = rise[-1] / math.expm1(-grid)
    return _Loss(first, np.maximum(probs, 0.0), float(delta[-1]), grid)


def _hockey_stick(eps: Floats, rate: float, noise: float, *, remove: bool) -> Floats:
    """Return sup over events E of P(E) - e^eps Q(E) (remove), or Q(E) - e^eps P(E) (add), for each eps."""
    # The best event is a half-line, up to the x where the loss equals eps, if it ever does: e^loss(x) = e^eps.
    signed = eps if remove else -eps
    huge = np.abs(eps) > 700.0  # beyond floating point: drop the subtracted term, which keeps an upper bound
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        odds = np.expm1(np.minimum(signed, 700.0)) + rate
        crossing = (odds > 0.0) | (rate == 1.0)
        logs = signed if rate == 1.0 else np.log(np.where(crossing, odds, 1.0) / rate)
        x = noise**2 * np.where(huge & (signed > 0.0), signed - math.log(rate), logs) + 0.5
        if remove:
            crossed = rate * ndtr((1.0 - x) / noise) - np.where(huge, 0.0, odds * ndtr(-x / noise))
            return np.where(crossing, crossed, -np.expm1(np.minimum(eps, 0.0)))
        power = np.exp(np.minimum(eps, 700.0))
        crossed = (1.0 + (rate - 1.0) * power) * ndtr(x / noise) - np.where(
            huge, 0.0, rate * power * ndtr((x - 1.0) / noise)
        )
        return np.where(crossing, crossed, 0.0)


def _epsilon(parts: Sequence[tuple[_Loss, int]], delta: float, grid: float) -> float:
    tail = 1e-6 * delta
    infinity = -math.expm1(sum(count * math.log1p(-part.infinity) for part, count in parts)) + 2.0 * tail
    low = math.floor(-_reach(parts, tail, -1.0) / grid)
    high = max(math.ceil(_reach(parts, tail, 1.0) / grid), low)
    size = int(next_fast_len(high - low + 1, real=True))
    spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
    origin = 0
    for part, count in parts:
        wrapped = np.zeros(-(-len(part.probs) // size) * size)
        wrapped[: len(part.probs)] = part.probs
        spectrum *= rfft(wrapped.reshape(-1, size).sum(0)) ** count
        origin += part.lowest * count
    # Entry k stands for the loss (origin + k) * grid modulo the window; bring the window's lowest loss to the front.
    probs = np.maximum(np.roll(irfft(spectrum, size), origin - low), 0.0)
    return _solve(low, probs, infinity, delta, grid)


def _reach(parts: Sequence[tuple[_Loss, int]], tail: float, sign: float) -> float:
    """Return a bound that sign * (total loss) exceeds with probability at most `tail` (Chernoff)."""
    best = math.inf
    for order in _ORDERS:
        bound = (sum(count * part.log_moment(sign * order) for part, count in parts) - math.log(tail)) / order
        if bound > best:  # quasi-convex in the order
            break
        best = bound
    return best


def _solve(low: int, probs: Floats, infinity: float, delta: float, grid: float) -> float:
    """Return the smallest epsilon >= 0 with infinity + sum (1 - e^(epsilon - loss))+ * prob <= delta."""
    if infinity > delta:
        return math.inf
    start = max(-low, 0)  # only positive losses count
    losses = ((low + start + np.arange(len(probs) - start)) * grid)[::-1]
    upper = infinity + np.cumsum(probs[start:][::-1])
    likely = np.flatnonzero(upper > delta)
    if not len(likely):
        return 0.0
    # delta(epsilon) <= P(loss > epsilon), so the answer is no larger than this; relative to it, nothing that counts
    # overflows, and capping what does makes `lower` smaller and the answer larger.
    shift = float(losses[likely[0]])
    relative = losses - shift
    lower = np.cumsum(probs[start:][::-1] * np.exp(np.minimum(-relative, 600.0)))
    over = np.flatnonzero(upper - np.exp(np.minimum(relative, 0.0)) * lower > delta)
    last = int(over[0]) - 1 if len(over) else len(losses) - 1  # of the losses above the answer; >= likely[0]
    return max(shift + float(math.log((upper[last] - delta) / lower[last])), 0.0)
