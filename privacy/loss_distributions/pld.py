"""Privacy loss distributions: epsilon of many steps from above and from below, whatever their number.

dp-accounting computes the same in Python loops, a second or so for each number. Training asks after every pass
and calibration many times over, so the inner loops are written out here; dp-accounting is the oracle of the
tests and of every calibration. What a step may tell comes as dominating pairs
(:mod:`choral.privacy.loss_distributions.dominating_pairs`).

**One step.** From the divergences H at multiples of a grid g, raised by their rounding errors, connecting the dots
(Doroshenko et al. 2022, algorithm 1) gives a distribution on the grid that dominates the true one: with
r_i = H(e^((i+1) g)) - H(e^(i g)), the mass at i g is

    p_i = (r_i - e^g r_{i-1}) / (e^g - 1) = (r_i - r_{i-1}) / (e^g - 1) - r_{i-1},                                 (1)

and what H leaves at the end of the grid is at infinity. Rounding that makes a p_i negative is cut off, which adds mass.

**Many steps.** Losses add, so distributions convolve, by FFT. Raising a spectrum to the power T multiplies its rounding
by T; so each distribution is tilted first (Esscher 1932; for privacy losses, Alghamdi et al. 2023): p~ = p e^(th l) /
M(th), M(th) = E e^(th L). Convolution commutes with that, and by taking it back,

    delta(eps) = sum over l > eps of p~^(*T)(l) e^(T log M - th l) (1 - e^(eps - l)).                              (2)

Where th is the order of the best Renyi bound, the mass of p~^(*T) lies about the answer, so rounding is relative to
delta and no longer to 1. A window holds all but _TAIL of it, by Chernoff's bound,

    P~(L > b) <= exp(T (K(th + t) - K(th)) - t b),   K = log M,   t > 0,                                           (3)

and likewise below. Above the window, e^(T K(th) - th b) times that counts as an infinite loss. What the FFT wraps
around only adds mass.

**Rounding.** A computed FFT of n numbers is off by at most 8 u log2 n times the sum of their sizes in any entry (u =
2^-53; Higham 2002, section 24.1, per butterfly). What is transformed is p~ less a mass of 1 at its mode, whose sizes
add up to 2 m, m = 1 - p~(mode). With a spectrum f' of that, the part's is 1 + f' up to a shift, and its power

    (1 + f')^T = exp(T (log1p(2 re f' + |f'|^2) / 2 + i atan2(im f', 1 + re f'))),                                 (4)

is off by at most T c (|1 + f'| + c)^(T-1), c = 2 m (8 u log2 n + 16 u). The inverse transform averages this over
frequencies and adds 8 u log2 n times the mean of the power's size. That bound is added to every entry of p~^(*T).
Exponents of tilts are off by u times their size, which a factor 1 + rho pays for,

    rho = 8 u (sum of T (2 + E~|th L| + |K|) + th max |l|).                                                        (5)

**From below.** Connecting the dots moves a loss l in (i g, (i+1) g) up or down to an end, by e, at random, so that
e^-l is kept in the mean: E[e | l] is in [0, g^2 / 8 * g / (1 - e^-g)], |e| <= g, and Var e <= g^2 S with S = sum of
min(p_i, p_{i+1}) where g is small. So the true sum is above the moved one less

    a = T * mean + min(g sqrt(T x / 2),  g (x / 3 + sqrt(x^2 / 9 + 2 x T S (1 + g)))),                             (6)

but for probability e^-x (Hoeffding 1963, theorem 2; Bernstein), and epsilon(delta) >= moved epsilon(delta + e^-x) - a.
Rounding of H and mass cut off at positive losses are at most D in any divergence of a step, so T D in that of T: it is
added to delta. Mass A that was added at losses of 0 or less counts for no more than a factor e^(T A), since fewer steps
diverge less.

Memory. No array has more than MOST_POINTS numbers: where a grid would need more, a coarser one is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft

from choral.privacy.loss_distributions.dominating_pairs import ROUNDOFF, DominatingPair, Floats, sampled_gaussian
from choral.privacy.loss_distributions.replace_one import ReplacedGaussian

SMALLEST_DELTA = 1e-10
MOST_POINTS = 1 << 20  # of one step's grid, of the sum's window; and of all steps' grids together, a few times that
_KEPT_POINTS = 1 << 22
_TAIL = 1e-12  # of the tilted sum, to either side of the window
_MISSED = 1e-4  # of delta, given up for the lower bound
_FINE = 5e-4  # grids below take long enough to look at a coarser one first
_sum_of = partial(np.einsum, "i,i->")  # of products, without BLAS, whose threads cost more than they save here


class EpsilonBounds(NamedTuple):
    """Epsilon lies in [lower, upper]; `grid` is the one that it took, at least the one that was asked for."""

    lower: float
    upper: float
    grid: float


@dataclass(frozen=True, eq=False)
class _Loss:
    """One step's privacy loss: mass probs[i] at (lowest + i) * grid, and the rest, `infinity`, at infinity.

    error: the most by which rounding raised a divergence, but for `added` mass at no loss or less. shared: S of (6).
    """

    lowest: int
    probs: Floats
    infinity: float
    grid: float
    error: float
    added: float
    shared: float
    known: dict[float, float] = field(default_factory=dict)

    def losses(self) -> Floats:
        return (self.lowest + np.arange(len(self.probs), dtype=np.float64)) * self.grid

    def rough(self) -> tuple[Floats, Floats]:
        """Losses and mass on a few thousand points, exact about the mode: for what need not be exact."""
        size, mode = len(self.probs), int(self.probs.argmax())
        near = np.arange(max(mode - 1024, 0), min(mode + 1024, size))
        starts = np.union1d(np.arange(0, size, size // 4096 + 1), near)
        mass = np.add.reduceat(self.probs, starts)
        kept = mass > 0.0
        return np.add.reduceat(self.probs * self.losses(), starts)[kept] / mass[kept], mass[kept]

    def log_moment(self, order: float) -> float:
        """Return K(order) = log E exp(order * loss) over the finite part."""
        if order not in self.known:
            self.known[order] = _log_moment(self.losses(), self.probs, order)
        return self.known[order]


def _log_moment(losses: Floats, probs: Floats, order: float) -> float:
    with np.errstate(divide="ignore"):
        exponents = np.log(probs)
    exponents += losses * order
    most = float(exponents.max())
    return most + math.log(float(np.exp(exponents - most).sum()))


_kept: dict[tuple[DominatingPair, float], _Loss] = {}


def epsilon(steps: Sequence[tuple[float, float, int]], delta: float, grid: float, replace: bool = False) -> float:
    """Return an upper bound on epsilon at `delta` of all `steps`: triples (sample rate, noise multiplier, number).

    `grid`: of the privacy loss; a finer one that divides it is tighter. replace: a record, which else is zeroed out.
    """
    return bounds(steps, delta, grid, replace).upper


def bounds(
    steps: Sequence[tuple[float, float, int]], delta: float, grid: float, replace: bool = False
) -> EpsilonBounds:
    """Return a lower and an upper bound on epsilon at `delta` of all `steps`, as in :func:`epsilon`."""
    pairs = [(_pairs(rate, noise, replace), count) for rate, noise, count in steps]
    directions = range(len(pairs[0][0]))
    return worst([[(ways[way], count) for ways, count in pairs] for way in directions], delta, grid)


def _pairs(rate: float, noise: float, replace: bool) -> tuple[DominatingPair, ...]:
    """One for each direction of the relation; replacing is alike in both."""
    return (ReplacedGaussian(rate, noise),) if replace else sampled_gaussian(rate, noise)


def extent(steps: Sequence[tuple[float, float, int]], replace: bool = False) -> tuple[float, float]:
    """Return the widest range of one step's losses, and the standard deviation of their sum, roughly."""
    widest = variance = 0.0
    for rate, noise, count in steps:
        pair = _pairs(rate, noise, replace)[0]
        low, high = pair.losses()
        loss = _discretised(pair, (high - low) / 4096.0)
        losses = loss.losses()
        variance += count * float(loss.probs @ (losses - float(loss.probs @ losses)) ** 2)
        widest = max(widest, high - low)
    return widest, math.sqrt(variance)


def worst(directions: Sequence[Sequence[tuple[DominatingPair, int]]], delta: float, grid: float) -> EpsilonBounds:
    """Return the bounds for the worst of several directions, each of dominating pairs and counts: exactly those of all,
    although a fine grid is not tried for one that a coarser grid bounds below another's lower bound.
    """
    found: list[EpsilonBounds] = []
    rough = [composed(parts, delta, 10.0 * grid).upper if grid < _FINE else math.inf for parts in directions]
    for upper, parts in sorted(zip(rough, directions, strict=True), key=lambda pair: -pair[0]):
        if not found or upper > found[0].lower:
            found.append(composed(parts, delta, grid))
    return EpsilonBounds(
        max(each.lower for each in found), max(each.upper for each in found), max(each.grid for each in found)
    )


def composed(parts: Sequence[tuple[DominatingPair, int]], delta: float, grid: float) -> EpsilonBounds:
    """Return bounds on the epsilon at `delta` of all `parts`: pairs that dominate a step, and how many such steps."""
    room = min(MOST_POINTS, 4 * MOST_POINTS // len(parts))  # of one step
    widest = max(high - low for low, high in (pair.losses() for pair, _ in parts))
    lower, upper = 0.0, math.inf
    while True:
        grid *= _doublings(widest / grid + 4.0, room)
        losses = [(_discretised(pair, grid), count) for pair, count in parts]
        coarser, share = 1.0, 1.0
        while share > 1e-3:
            tried = _Sum(losses, delta, share)
            coarser = _doublings(tried.high - tried.low + 1.0, MOST_POINTS)
            if coarser > 1.0:
                break
            found = tried.solve()
            lower, upper, share = max(lower, found[0]), min(upper, found[1]), share / 2.0
            if upper > max(tried.low * grid, 0.0) or not upper:
                break  # else the answer lies below the window: tilt less
        if coarser == 1.0:
            return EpsilonBounds(min(lower, upper), upper, grid)
        grid *= coarser


def _doublings(points: float, room: int) -> float:
    """The power of two by which the grid must grow for so many points to fit."""
    return 2.0 ** max(math.ceil(math.log2(points / room)), 0)


def _discretised(pair: DominatingPair, grid: float) -> _Loss:
    if (pair, grid) not in _kept:
        made = _connect(pair, grid)
        while _kept and sum(len(loss.probs) for loss in _kept.values()) + len(made.probs) > _KEPT_POINTS:
            del _kept[next(iter(_kept))]
        _kept[pair, grid] = made
    return _kept[pair, grid]


def _connect(pair: DominatingPair, grid: float) -> _Loss:
    """Equation (1), from divergences that are raised by their rounding."""
    low, high = pair.losses()
    first, last = math.floor(low / grid), math.ceil(high / grid) + 1
    value, error = pair.divergence(np.arange(first, last + 1, dtype=np.float64) * grid)
    value = np.clip(value + error, 0.0, 1.0)
    value = np.maximum.accumulate(value[::-1])[::-1]  # divergences fall with eps: raise what rounding left too low
    rise = np.diff(value)
    probs = np.empty_like(value)
    probs[0] = (1.0 - value[0]) + rise[0] / math.expm1(grid)
    probs[1:-1] = np.diff(rise) / math.expm1(grid) - rise[:-1]
    probs[-1] = rise[-1] / math.expm1(-grid)
    cut, zero = -np.minimum(probs, 0.0), max(1 - first, 0)
    np.maximum(probs, 0.0, out=probs)
    shared = float(np.minimum(probs[1:], probs[:-1]).sum())
    raised = 2.0 * float(error.max()) + float(cut[zero:].sum())
    return _Loss(first, probs, float(value[-1]), grid, raised, float(cut[:zero].sum()), shared)


class _Sum:
    """The tilted sum of many steps' losses: its window, and what it says of epsilon. share: of the best order."""

    def __init__(self, parts: Sequence[tuple[_Loss, int]], delta: float, share: float) -> None:
        self.parts, self.delta, self.grid = parts, delta, parts[0][0].grid
        self.count = sum(count for _, count in parts)
        self.infinity = -math.expm1(math.fsum(count * math.log1p(-loss.infinity) for loss, count in parts))
        self.tilted: list[Floats] = []
        self.tilt = 0.0
        self.low, self.high, self.log_moment = 0, 0, 0.0
        if self.infinity < delta:
            self.tilt = share * self._best_order(math.log(delta - self.infinity))
            self.log_moment = self._moment(self.tilt)
            self._place()

    def _moment(self, order: float) -> float:
        return math.fsum(count * loss.log_moment(order) for loss, count in self.parts)

    def _best_order(self, log_delta: float) -> float:
        """The order of about the least Renyi bound on epsilon (Canonne, Kamath, Steinke 2020, proposition 12).

        Any order would do for (2); this one keeps its terms within floating point.
        """
        rough = [(loss.rough(), count) for loss, count in self.parts]

        def bound(power: float) -> float:
            order = 2.0**power
            moment = math.fsum(count * _log_moment(*few, order) for few, count in rough)
            return float((moment - log_delta - math.log1p(order)) / order - math.log1p(1.0 / order))

        # Quasi-convex in the order, but flat at its ends: look everywhere, then closer.
        best = min((float(place) for place in range(-24, 32, 2)), key=bound)
        for step in (1.0, 0.5):
            best = min((best - step, best, best + step), key=bound)
        return float(2.0**best)

    def _place(self) -> None:
        """Tilt the parts, and lay the window: equation (3), for the best of a few t to either side."""
        mean = variance = absolute = 0.0
        for loss, count in self.parts:
            losses = loss.losses()
            with np.errstate(divide="ignore", under="ignore"):
                probs = np.exp(np.log(loss.probs) + losses * self.tilt - loss.log_moment(self.tilt))
            self.tilted.append(probs)
            centre = _sum_of(probs, losses)
            mean += count * centre
            variance += count * _sum_of(probs, (losses - centre) ** 2)
            size = abs(self.tilt) * _sum_of(probs, np.abs(losses)) + abs(loss.log_moment(self.tilt))
            absolute += count * (2.0 + size)
        self.size_of_exponents = absolute
        scale = math.sqrt(-2.0 * math.log(_TAIL) / max(variance, self.grid**2))
        reach = [self._reach(sign, scale) for sign in (-1.0, 1.0)]
        self.low = math.floor(-reach[0] / self.grid)
        self.high = max(math.ceil(reach[1] / self.grid), self.low)

    def _reach(self, sign: float, scale: float) -> float:
        """Return a b that sign * (tilted sum) passes with probability _TAIL at most: equation (3), t near the best."""

        def bound(t: float) -> float:
            return (self._moment(self.tilt + sign * t) - self.log_moment - math.log(_TAIL)) / t

        best, t = bound(scale), scale
        for step in (0.5, 2.0):  # quasi-convex in t
            for _ in range(8):
                beside = bound(t * step)
                if beside >= best:
                    break
                best, t = beside, t * step
        return best

    def solve(self) -> tuple[float, float]:
        """Return the lower and the upper bound."""
        if self.infinity >= self.delta:
            return 0.0, math.inf
        probs, error = self._convolved()
        losses = (self.low + np.arange(len(probs), dtype=np.float64)) * self.grid
        start = int(np.searchsorted(losses, 0.0, side="right"))  # only positive losses count
        losses, probs = losses[start:][::-1], probs[start:][::-1]
        exponents = self.log_moment - self.tilt * losses  # what takes the tilt back, equation (2)
        largest = max(abs(self.low), abs(self.high)) * self.grid
        rho = 8.0 * ROUNDOFF * (self.size_of_exponents + self.tilt * largest)  # equation (5)
        weights = np.exp(np.minimum(exponents, 700.0))  # where they are capped, delta is passed long before
        beyond = self.infinity + _TAIL * math.exp(min(self.log_moment - self.tilt * self.high * self.grid, 700.0))
        upper = _solve(losses, (np.maximum(probs, 0.0) + error) * weights * (1.0 + rho), beyond, self.delta)
        # Below the window, and below 0, there are losses that are not among these: epsilon is no less.
        upper = max(self.low * self.grid, 0.0, -math.inf if upper is None else upper)
        return min(self._lower(losses, probs - error, weights, rho), upper), upper

    def _convolved(self) -> tuple[Floats, float]:
        """Return the tilted sum over the window, and a bound on the rounding error of each entry: equation (4)."""
        size = int(next_fast_len(self.high - self.low + 1, real=True))
        butterflies = 8.0 * ROUNDOFF * math.log2(max(size, 2))
        logs, phases = np.zeros(size // 2 + 1), np.zeros(size // 2 + 1)
        raised, relative = np.zeros(size // 2 + 1), np.zeros(size // 2 + 1)
        origin = 0
        for (loss, count), probs in zip(self.parts, self.tilted, strict=True):
            wrapped = np.zeros(-(-len(probs) // size) * size)
            wrapped[: len(probs)] = probs
            mode = int(probs.argmax())
            wrapped[mode] = 0.0
            rest = float(wrapped.sum())  # 1 - the mass of the mode, without cancellation
            wrapped[mode] = -rest
            spectrum = rfft(
                np.roll(wrapped.reshape(-1, size).sum(0), -mode)
            )  # of the part, moved so that its mode is at 0, less 1
            real, imaginary = spectrum.real, spectrum.imag
            with np.errstate(divide="ignore"):
                log = 0.5 * np.log1p(np.maximum(real * (2.0 + real) + imaginary * imaginary, -1.0))
            off = 2.0 * rest * (butterflies + 16.0 * ROUNDOFF)
            absolute = np.exp(log) + off
            logs += count * log
            phases += count * np.arctan2(imaginary, 1.0 + real)
            raised += count * np.log(absolute)
            relative += count * off / absolute
            origin += (loss.lowest + mode) * count
        power = np.exp(logs)
        each = np.exp(raised) * (relative + 1000.0 * ROUNDOFF) + butterflies * power
        error = (2.0 * float(each.sum()) - float(each[0])) / size  # the other half of frequencies is alike
        # Entry k stands for the loss (origin + k) * grid modulo the window; bring the window's lowest to the front.
        probs = np.roll(irfft(power * np.exp(1j * phases), size), (origin - self.low) % size)
        return probs, error

    def _lower(self, losses: Floats, probs: Floats, weights: Floats, rho: float) -> float:
        """The lower bound, equation (6); 0 where it says nothing."""
        away = -math.log(_MISSED * self.delta)
        errors = math.fsum(count * loss.error for loss, count in self.parts)
        shared = math.fsum(count * loss.shared for loss, count in self.parts)
        delta = self.delta * (1.0 + 2.0 * _MISSED) + errors
        added = math.fsum(count * loss.added for loss, count in self.parts)
        kept = np.maximum(probs, 0.0) * weights * max(1.0 - rho, 0.0) * math.exp(-added)
        found = _solve(losses, kept, 0.0, delta, down=True)
        # What was wrapped around is no true mass: at most 2 _TAIL of the tilted sum, and it may not count for more.
        if found is None or 2.0 * _TAIL * math.exp(min(self.log_moment - self.tilt * found, 700.0)) > _MISSED * delta:
            return 0.0
        bias = self.grid * self.grid / 8.0 * self.grid / -math.expm1(-self.grid)
        hoeffding = self.grid * math.sqrt(self.count * away / 2.0)
        bernstein = self.grid * (away / 3.0 + math.sqrt(away**2 / 9.0 + 2.0 * away * shared * (1.0 + self.grid)))
        if self.grid > 0.5:
            bernstein = math.inf
        return max(found - self.count * bias - min(hoeffding, bernstein), 0.0)


def _solve(losses: Floats, mass: Floats, infinity: float, delta: float, *, down: bool = False) -> float | None:
    """Return the epsilon at which infinity + sum (1 - e^(epsilon - loss))+ * mass = delta; None if it is less at all.

    losses: falling; where the answer lies below them all, as if nothing else were there. down: round down, not up.
    """
    above = infinity + np.cumsum(mass)
    likely = np.flatnonzero(above > delta)
    if infinity >= delta or not len(likely):
        return math.inf if infinity >= delta else None
    # delta(epsilon) <= P(loss > epsilon), so the answer is no larger than this; relative to it, nothing that counts
    # overflows, and capping what does makes `discounted` smaller and the answer larger.
    shift = float(losses[likely[0]])
    relative = losses - shift
    discounted = np.cumsum(mass * np.exp(np.minimum(-relative, 600.0)))
    over = np.flatnonzero(above - np.exp(np.minimum(relative, 0.0)) * discounted > delta)
    last = int(over[0]) - 1 if len(over) else len(losses) - 1  # of the losses above the answer; >= likely[0]
    left = float(above[last]) - delta
    answer = shift + math.log(left / float(discounted[last]))
    # A sum of n positive numbers is off by n u at most, relative to itself.
    slack = 2.0 * ROUNDOFF * (len(losses) * (1.0 + float(above[last]) / left) + abs(shift) + abs(answer))
    return answer - slack if down else answer + slack
