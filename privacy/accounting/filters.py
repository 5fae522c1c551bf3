"""A privacy filter: what may still be released where the next release is chosen from what earlier ones showed.

Privacy loss distributions, and any bound that is the best of several orders, compose releases whose parameters (q,
sigma, T) were *fixed in advance*. Whoever trains, looks, and then chooses what to train next is *fully adaptive*, and
for him such a bound can be false (Whitehouse, Ramdas, Rogers, Wu 2022, "Fully adaptive composition in differential
privacy", arXiv 2209.15596). A filter is a rule that looks at the parameters used so far and admits the next release or
not, such that everything admitted is (epsilon, delta)-DP together, whoever chooses, and whenever he stops.

This one is the Renyi filter (Feldman and Zrnic 2021, "Individual privacy accounting via a Renyi filter", theorem 4.3;
Lecuyer 2021, "Practical privacy filters and odometers with Renyi differential privacy") over a *fixed mixture* of
orders, so that no order is chosen by what happens. For a promise (epsilon, delta) there are fixed orders alpha_j > 1
and weights w_j > 0 that add to 1. Let rho_j be the sum, over all releases on the ledger, of bounds on their Renyi
divergences of order alpha_j. They are admitted as long as, for all x > 0,

    1 - exp(-x)  <=  delta * sum_j w_j exp((alpha_j - 1) (epsilon + x - rho_j)).                              (*)

**Theorem.** If (*) holds at the end, whatever happened, then everything together is (epsilon, delta)-DP.

*Proof.* Let P and Q be the laws of all that the adversary sees under two neighbouring datasets, and L_t the logarithm
of dP/dQ of what he has seen up to release t. Given what was seen before, release t has fixed parameters, so
E_P[exp((alpha_j - 1)(L_t - L_{t-1})) | before] <= exp((alpha_j - 1)(rho_j,t - rho_j,t-1)): that is what a bound on the
divergence D_alpha(P || Q) means, and rho_j,t is known before release t is made. Hence the sum over j of w_j
exp((alpha_j - 1)(L_t - rho_j,t)), M_t, is a supermartingale under P that begins at 1, and E_P[M] <= 1 at the end
(Fatou's lemma where there is no last release). By (*) with x = L - epsilon, (1 - exp(epsilon - L))^+ <= delta M for
every outcome. Therefore P(S) - exp(epsilon) Q(S) <= E_P[(1 - exp(epsilon - L))^+] <= delta E_P[M] <= delta for every
event S. The same with P and Q exchanged, since the divergences are bounded in both directions. []

The sums rho_j only grow, so (*) at the end implies (*) at every moment before. With a single order, (*) is the
conversion of Canonne, Kamath and Steinke 2020, proposition 12. Orders and weights are functions of epsilon and delta
alone, below, and never of a run; whole numbers, so that sampled Gaussians are finite sums and Skellam has a bound.

**Failures** of sums of shares (:data:`choral.privacy.accounting.events.ShareEvent`) are of delta, not of a
divergence. Where the *first* event is of shares, which is settled before anything is released, (*) is held at
(1 - RESERVE) delta and the failures of all events may come to RESERVE delta: with (*) for what is released unless one
comes, P(S) - exp(epsilon) Q(S) <= (1 - RESERVE) delta + RESERVE delta. Where the first event is of something else,
nothing was set aside, and events of shares cost infinitely much here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from choral.privacy.accounting import client_level, record_level, renyi
from choral.privacy.accounting.events import (
    NEIGHBOURS,
    ClientRelease,
    Event,
    Priced,
    Search,
    ShareEvent,
    as_gaussians,
)

RESERVE = 1.0 / 16.0  # of delta, for the failures of sums of shares
_STEPS_AND_WEIGHTS = ((-2.0, 0.1), (-1.0, 0.2), (-0.5, 0.35), (0.0, 0.35))  # powers of two of the best order; weights
_LARGEST_ORDER = 4096
_LARGEST_EPSILON = 1e6
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PrivacyFilter:
    """The filter of one promise. orders: rising, > 1. weights: of the orders; they add to 1."""

    epsilon: float
    delta: float
    neighbours: str = NEIGHBOURS  # of records; clients have one relation

    @property
    def orders(self) -> tuple[int, ...]:
        """Fixed by epsilon and delta."""
        return _mixture(self.epsilon, self.delta)[0]

    @property
    def weights(self) -> tuple[float, ...]:
        """Fixed by epsilon and delta."""
        return _mixture(self.epsilon, self.delta)[1]

    def cost(self, events: Sequence[Event]) -> float:
        """Return the least epsilon for which (*) holds, with this promise's orders: `events` are admitted up to it.

        Rounded up by at most 1e-9 of it. Infinite where no order has a bound, or failures are more than was set aside.
        """
        rho = _divergences(tuple(events), self.orders, self.neighbours)
        if not events or not np.isfinite(rho).any():
            return math.inf if events else 0.0
        shares = [event for event in events if isinstance(event, ShareEvent)]
        failures = math.fsum(event.steps * event.failure for event in shares)
        if shares and not (isinstance(events[0], ShareEvent) and failures <= RESERVE * self.delta):
            return math.inf
        delta = self.delta * (1.0 - RESERVE) if shares else self.delta
        low, high = 0.0, 1.0
        while not self._holds(rho, high, delta):
            low, high = high, 2.0 * high
            if high > _LARGEST_EPSILON:
                return math.inf
        while high - low > 1e-9 * high:
            middle = (low + high) / 2.0
            low, high = (low, middle) if self._holds(rho, middle, delta) else (middle, high)
        return high

    def admits(self, events: Sequence[Event]) -> bool:
        """Whether all of `events` together, chosen one by one, keep the promise."""
        return self.cost(events) <= self.epsilon

    def _holds(self, rho: _Floats, epsilon: float, delta: float) -> bool:
        """Whether (*) holds at `epsilon` and `delta`.

        log(1 - exp(-x)) is concave and the logarithm of the sum convex, so that their difference has one maximum; where
        it is, 1 / (exp(x) - 1) equals a mean of the alpha_j - 1, which brackets x.
        """
        known = np.isfinite(rho)
        slopes = np.asarray(self.orders, np.float64)[known] - 1.0
        offsets = np.log(np.asarray(self.weights)[known]) + slopes * (epsilon - rho[known])  # of (*), without x
        low, high = math.log1p(1.0 / slopes.max()), math.log1p(1.0 / slopes.min())
        for _ in range(60):
            x = (low + high) / 2.0
            terms = offsets + slopes * x
            shares = np.exp(terms - terms.max())
            rises = 1.0 / math.expm1(x) - float(shares @ slopes / shares.sum())
            low, high = (x, high) if rises > 0.0 else (low, x)
        highest = math.log(-math.expm1(-x)) - float(terms.max()) - math.log(float(shares.sum()))  # left over right
        return highest <= math.log(delta) - 1e-12


@lru_cache(maxsize=256)
def _mixture(epsilon: float, delta: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Orders around the best one for a single Gaussian that costs `epsilon`, and their weights."""
    record_level.check_target(epsilon, delta)
    alpha = np.arange(2.0, _LARGEST_ORDER + 1.0)
    # (*) with one order (Canonne, Kamath, Steinke 2020, proposition 12), solved for the rho that there is room for
    room = epsilon - np.log1p(-1.0 / alpha) + (math.log(delta) + np.log(alpha)) / (alpha - 1.0)
    best = float(alpha[np.argmax(room / alpha)]) - 1.0
    found: dict[int, float] = {}
    for step, weight in _STEPS_AND_WEIGHTS:
        order = max(2, round(1.0 + best * 2.0**step))
        found[order] = found.get(order, 0.0) + weight
    orders = tuple(sorted(found))
    return orders, tuple(found[order] for order in orders)


def _divergences(events: tuple[Event, ...], orders: tuple[int, ...], neighbours: str) -> _Floats:
    """The sums of the Renyi divergences of `events` at `orders`, in both directions, shape (orders,)."""
    releases = client_level.settled(event for event in events if isinstance(event, ClientRelease))
    total = sum((event.steps * client_level.renyi(event, orders) for event in releases), np.zeros(len(orders)))
    records = [event for event in events if not isinstance(event, ClientRelease)]
    for event, times in _counted(as_gaussians(records, 1.0)[0]).items():
        total = total + times * _of_one(event, orders, neighbours)
    return np.asarray(total)


def _counted(events: Iterable[Priced]) -> dict[Priced, int]:
    counts: dict[Priced, int] = {}
    for event in events:
        counts[event] = counts.get(event, 0) + 1
    return counts


@lru_cache(maxsize=1024)
def _of_one(event: Priced, orders: tuple[int, ...], neighbours: str) -> _Floats:
    if not isinstance(event, Search):
        return renyi.renyi(event, orders, neighbours=neighbours)
    every = tuple(sorted({*renyi.RENYI_ORDERS, *map(float, orders)}))  # any order may stand in its theorem
    curve = sum((renyi.renyi(part, every, neighbours=neighbours) for part in event.tries), np.zeros(len(every)))
    bound = renyi.best_of(event, every, curve)
    return np.asarray([bound[every.index(float(order))] for order in orders])
