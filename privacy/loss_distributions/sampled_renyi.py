"""The Renyi divergence of one Poisson-sampled Gaussian step, and what a curve of divergences is worth in epsilon.

The numbers are dp-accounting's, to the last bit: the same sums in the same order (Mironov, Talwar, Zhang 2019,
"Renyi differential privacy of the sampled Gaussian mechanism", section 3.3; the conversion of Canonne, Kamath, Steinke
2020, proposition 12). They are computed here because that package takes nearly as long to load as torch; tests compare
the two, and so does every calibration of a training by another accountant of its.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln, log_ndtr

_MOST_TERMS = 1000  # of the series of an order that is no whole number; one that has not converged by then is left out
_BLOCK = 64
Floats = npt.NDArray[np.float64]


def divergences(rate: float, noise: float, orders: Sequence[float]) -> Floats:
    """The larger of both directions' divergences at `orders` > 1, shape (orders,); infinite where no bound is known.

    rate: in (0, 1]. noise: > 0, over the sensitivity.
    """
    if rate == 1.0:
        return np.asarray([order / (2 * noise**2) for order in orders])
    return np.asarray([_log_moment(rate, noise, float(order)) / (order - 1) for order in orders])


def epsilon_of(orders: Sequence[float], curve: Sequence[float] | Floats, delta: float) -> float:
    """The least epsilon at `delta` in (0, 1) of divergences at `orders` > 1."""
    found = []
    for order, divergence in zip(orders, curve, strict=True):
        if divergence < 0.0 or delta**2 + math.expm1(-divergence) > 0:  # delta <= sqrt(1 - exp(-KL))
            found.append(0.0)
        elif order > 1.01:  # proposition 12, which is not stable near 1
            value = divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
            found.append(math.inf if math.isnan(value) else value)
        else:
            found.append(math.inf)
    return float(max(0.0, min(found)))


def gaussian_noise(epsilon: float, delta: float) -> float:
    """The noise multiplier with which one Gaussian release costs `epsilon` at `delta` (Balle and Wang 2018, theorem 8),
    to a relative 1e-12.
    """
    wanted = math.log(delta)
    low, high = 1.0, 1.0
    while _log_delta(low, epsilon) < wanted:
        low /= 10.0
    while _log_delta(high, epsilon) > wanted:
        high *= 10.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2.0
        if not low < middle < high:
            break
        low, high = (middle, high) if _log_delta(middle, epsilon) > wanted else (low, middle)
    return high


def _log_delta(noise: float, epsilon: float) -> float:
    place = epsilon * noise + 1 / (2 * noise)
    more, less = float(log_ndtr(1 / noise - place)), epsilon + float(log_ndtr(-place))
    return more + math.log(-math.expm1(less - more)) if less < more else -math.inf


def _log_moment(rate: float, noise: float, order: float) -> float:
    """log A: of a whole order a sum of `order` + 1 terms, their equation 30; of another the series of section 3.3."""
    if order.is_integer():
        places = np.arange(int(order) + 1)
        logs = _log_choose(order, places) + places * math.log(rate) + (order - places) * math.log1p(-rate)
        logs = logs + (places * places - places) / (2 * (noise**2))
        return _total(logs.tolist())
    return _series(rate, noise, order)


def _series(rate: float, noise: float, order: float) -> float:
    crossing = noise**2 * math.log(1 / rate - 1) + 0.5
    below = above = -math.inf
    last = -math.inf, -math.inf
    for first in range(0, _MOST_TERMS, _BLOCK):
        places = np.arange(first, min(first + _BLOCK, _MOST_TERMS))
        left = order - places
        choose = _log_choose(order, places)
        parts = []
        for powers, others, ends in (
            (places, left, (places - crossing) / (math.sqrt(2) * noise)),
            (left, places, (crossing - left) / (math.sqrt(2) * noise)),
        ):
            logs = choose + powers * math.log(rate) + others * math.log1p(-rate)
            tails = math.log(0.5) + (math.log(2) + log_ndtr(-ends * 2**0.5))
            parts.append((logs + (powers * powers - powers) / (2 * (noise**2)) + tails).tolist())
        for one, other in zip(*parts, strict=True):
            below, above = _plus(below, one), _plus(above, other)
            total = _plus(below, above)
            if one < last[0] and other < last[1] and max(one, other) < total - 30:
                return total
            last = one, other
    return math.inf


def _log_choose(order: float, places: npt.NDArray[np.int64]) -> Floats:
    found: Floats = gammaln(order + 1) - gammaln(places + 1) - gammaln(order - places + 1)
    return found


def _total(logs: Sequence[float]) -> float:
    total = -math.inf
    for each in logs:
        total = _plus(total, each)
    return total


def _plus(one: float, other: float) -> float:
    """log(exp(one) + exp(other))."""
    less, more = min(one, other), max(one, other)
    return more if less == -math.inf else math.log1p(math.exp(less - more)) + more
