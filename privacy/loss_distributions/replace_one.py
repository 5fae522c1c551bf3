"""Replace one record: what one step of the Poisson-sampled Gaussian tells at most, for any two records.

A record is in the batch with probability q, and adds a vector of norm at most 1 (clipping norms); its replacement the
same with another vector. With noise s, the dominating pair is that of two opposite vectors of norm 1,

    P = (1 - q) N(0, s^2) + q N(1, s^2)   against   Q = (1 - q) N(0, s^2) + q N(-1, s^2).

*Proof.* Let the two vectors be v and w. For t > 0 the hockey-stick divergence H(t) is the supremum over tests f of
(1 - q)(1 - t) E_0 f + q E_v f - q t E_w f. Among tests with E_0 f = b, by the lemma of Neyman and Pearson, E_v f is at
most Phi(Phi^-1(b) + |v| / s) and E_w f at least Phi(Phi^-1(b) - |w| / s). In one dimension, for v = 1 and w = -1, a
half-line attains both at once; so no other v and w have a larger H(t), at any t. Dominating pairs compose adaptively
(Zhu, Dong, Wang 2022, theorem 10). The pair is its own mirror image, so there is one direction only.

Being absent is 0, which lies between v and w: the cost is above that of *zero out*, and in general not twice it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr, ndtr

Floats = npt.NDArray[np.float64]

_ROUNDOFF = 2.0**-53  # relative, of one operation in double precision
_REACH = 10.0  # standard deviations of noise that a step's support covers: all but 1e-23, which counts as infinite
_MOST_POINTS = 1 << 20  # of a quadrature; where it takes more, a bound in closed form stands in


@dataclass(frozen=True)
class ReplacedGaussian:
    """The dominating pair; see :mod:`choral.privacy.loss_distributions.dominating_pairs` for what a pair is."""

    rate: float
    noise: float

    def losses(self) -> tuple[float, float]:
        """Return the range of privacy losses outside of which there is no mass that matters; above it, all counts."""
        ends = np.array([-_REACH * self.noise, 1.0 + _REACH * self.noise])
        low, high = self._log_density(ends) - self._log_density(-ends)
        return float(low), float(high)

    def _log_density(self, x: Floats) -> Floats:
        """Return log P(x) / N(0, s^2)(x); Q's is that of -x."""
        stay = math.log1p(-self.rate) if self.rate < 1.0 else -math.inf
        return np.asarray(np.logaddexp(stay, math.log(self.rate) + (x - 0.5) / self.noise**2))

    def divergence(self, eps: Floats) -> tuple[Floats, Floats]:
        """Return H(e^eps) for each eps, and a bound on the rounding error of each.

        The loss log P(x) - log Q(x) grows with x and is odd. It is eps >= 0 where u = e^(x / s^2) solves, with
        t = e^eps and c = q e^(-1 / 2 s^2), the quadratic c u^2 - (1 - q)(t - 1) u - t c = 0; there
            H(t) = q Phi((1 - x) / s) - (1 - q)(t - 1) Phi(-x / s) - q t Phi((-1 - x) / s),
            H(1 / t) = 1 - 1 / t + H(t) / t.
        All but the first term is computed by its logarithm, whose error is relative to its size.
        """
        rate, noise, size = self.rate, self.noise, np.abs(eps)
        log_c = math.log(rate) - 0.5 / noise**2
        with np.errstate(divide="ignore", under="ignore"):
            grown = np.where(size > 30.0, size, np.log(np.expm1(np.minimum(size, 30.0))))  # log(t - 1)
            stay = (math.log1p(-rate) if rate < 1.0 else -math.inf) + grown
            half = stay - math.log(2.0)
            x = noise**2 * (np.logaddexp(half, 0.5 * np.logaddexp(2.0 * half, size + 2.0 * log_c)) - log_c)
            near = rate * ndtr((1.0 - x) / noise)
            far = np.exp(stay + log_ndtr(-x / noise)) + rate * np.exp(size + log_ndtr((-1.0 - x) / noise))
            less = np.exp(-size)
        value = np.maximum(near - far, 0.0)
        squares = np.minimum(((np.abs(x) + 1.0) / noise) ** 2, 1600.0)
        error = (16.0 + 4.0 * squares + 4.0 * size) * (near + far) * _ROUNDOFF
        below = eps < 0.0
        value = np.where(below, -np.expm1(-size) + less * value, value)
        return value, np.minimum(error + 4.0 * _ROUNDOFF * value, 1.0)


@lru_cache(maxsize=512)
def renyi(rate: float, noise: float, orders: tuple[float, ...]) -> Floats:
    """Return the Renyi divergences of the pair at `orders` > 1, shape (orders,); both directions are alike.

    By quadrature: the trapezoidal rule on an analytic function, right to a relative 1e-9, which is added.
    """
    return np.array([_renyi(rate, noise, order) for order in orders])


def _renyi(rate: float, noise: float, order: float) -> float:
    """With r = log P / Q, which is odd, E_P e^((order - 1) r) - 1 is the integral over x > 0 of

        P (e^((order - 1) r) - 1) (1 - e^(-order r)),

    of which nothing cancels, however little a step tells.
    """
    whole = 2.0 * order / noise**2  # every record taken; sampling tells no more, for divergences are quasi-convex
    step = min(noise, noise**2 / math.sqrt(order)) / 6.0  # the integrand bends no faster
    high = 2.0 * order + 14.0 * noise
    if rate == 1.0 or high / step > _MOST_POINTS:
        return whole
    x = np.arange(step, high, step)  # it is 0 at 0
    pair = ReplacedGaussian(rate, noise)
    density = pair._log_density(x)
    loss = np.maximum(density - pair._log_density(-x), 1e-300)
    power = (order - 1.0) * loss
    logs = density - 0.5 * (x / noise) ** 2 + power + np.log(-np.expm1(-power)) + np.log(-np.expm1(-order * loss))
    most = float(logs.max())
    log_total = most + math.log(float(np.exp(logs - most).sum()) * step / (noise * math.sqrt(2.0 * math.pi)))
    log_moment = max(log_total, 0.0) + math.log1p(math.exp(-abs(log_total)))
    return min(log_moment / (order - 1.0) * (1.0 + 1e-9), whole)
