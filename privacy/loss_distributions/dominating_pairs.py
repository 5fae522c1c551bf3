"""Dominating pairs: what one step tells at most, as a function that any composition may start from.

A pair (P, Q) dominates a mechanism in one direction of its neighbour relation if no neighbours have a larger
hockey-stick divergence H(e^eps) = sup over events E of P(E) - e^eps Q(E), at any eps (Zhu, Dong, Wang 2022, definition
7). Then its compositions dominate the mechanism's (their theorem 10). A relation has one pair for each direction; the
cost is the larger.

With records sampled at rate q and noise s (sensitivity 1), P = (1 - q) N(0, s^2) + q N(1, s^2) against N(0, s^2) is the
pair for *removing* a record, and the other way round for *adding* one (their theorem 11 and proposition 30). The loss
log P/Q at x is

    l(x) = log(1 - q + q e^((x - 1/2) / s^2)),                                                                     (1)

which grows with x, so the best event is a half-line up to the x where l(x) = eps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

Floats = npt.NDArray[np.float64]

ROUNDOFF = 2.0**-53  # relative, of one operation in double precision
_REACH = 10.0  # standard deviations of noise that a step's support covers: all but 1e-23, which counts as infinite


class DominatingPair(Protocol):
    """One direction of one step. Hashable: what is computed from it is kept."""

    def losses(self) -> tuple[float, float]:
        """Return the range of privacy losses outside of which there is no mass that matters; above it, all counts."""
        ...

    def divergence(self, eps: Floats) -> tuple[Floats, Floats]:
        """Return H(e^eps) for each eps, and a bound on the rounding error of each."""
        ...


@dataclass(frozen=True)
class SampledGaussian:
    """The Poisson-sampled Gaussian mechanism, for removing a record, or for adding one."""

    rate: float
    noise: float
    remove: bool

    def losses(self) -> tuple[float, float]:
        """See :meth:`DominatingPair.losses`."""
        low, high = self._loss(-_REACH * self.noise), self._loss(1.0 + _REACH * self.noise)
        return (low, high) if self.remove else (-high, -low)

    def _loss(self, x: float) -> float:  # equation (1)
        stay = math.log1p(-self.rate) if self.rate < 1.0 else -math.inf
        return float(np.logaddexp(stay, math.log(self.rate) + (x - 0.5) / self.noise**2))

    def divergence(self, eps: Floats) -> tuple[Floats, Floats]:
        """See :meth:`DominatingPair.divergence`.

        With a = +-eps (remove, add) and odds = e^a - 1 + q, l(x) = a at x = s^2 log(odds / q) + 1/2, and there
            remove: H = q Phi((1 - x) / s) - odds Phi(-x / s)                                                      (2)
            add:    H = e^eps (odds Phi(x / s) - q Phi((x - 1) / s))                                               (3)
        or, where odds <= 0 and l never comes so low, 1 - e^eps and 0. An error in x lowers H in second order only:
        x is where it is largest.
        Rounding: `ndtr` was within 3.3 (1 + z^2) units of mpmath's Phi(z) for z in [-30, 0], and within 3.3 above; a
        coefficient and a product add two units each, and the cancellation in odds is relative to |e^a - 1| + q.
        """
        rate, noise = self.rate, self.noise
        signed = eps if self.remove else -eps
        huge = np.abs(eps) > 700.0  # beyond floating point: drop the subtracted term, which keeps an upper bound
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            grown = np.expm1(np.minimum(signed, 700.0))
            odds = grown + rate
            crossing = (odds > 0.0) | (rate == 1.0)
            logs = signed if rate == 1.0 else np.log(np.where(crossing, odds, 1.0) / rate)
            x = noise**2 * np.where(huge & (signed > 0.0), signed - math.log(rate), logs) + 0.5
            sign = -1.0 if self.remove else 1.0
            near, far = ndtr(sign * (x - 1.0) / noise), ndtr(sign * x / noise)
            spread = (np.abs(grown) + rate) * far + rate * near
            if self.remove:
                crossed = rate * near - np.where(huge, 0.0, odds * far)
                value = np.where(crossing, crossed, -np.expm1(np.minimum(eps, 0.0)))
            else:
                power = np.exp(np.minimum(eps, 700.0))
                head = far if rate == 1.0 else power * odds * far  # e^eps e^-eps Phi, where every record is taken
                crossed = head - np.where(huge, 0.0, rate * power * near)
                value = np.where(crossing, crossed, 0.0)
                spread = np.where(huge, far, np.minimum(power, 1e300) * spread)
            below = np.maximum(-sign * (x - (sign < 0.0)) / noise, 0.0)  # how far the arguments are into the lower tail
            squares = np.minimum(below, 40.0) ** 2
            error = np.where(crossing, (8.0 + 4.0 * squares) * spread, 4.0 * np.abs(value)) * ROUNDOFF
        return np.asarray(value), np.asarray(np.minimum(error, 1.0))


def sampled_gaussian(rate: float, noise: float) -> tuple[SampledGaussian, SampledGaussian]:
    """Return the pairs of the Poisson-sampled Gaussian mechanism under *zero out*: for removing and for adding."""
    return SampledGaussian(rate, noise, remove=True), SampledGaussian(rate, noise, remove=False)
