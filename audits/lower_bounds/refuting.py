"""What would have contradicted a claim: the fewest right answers, and how well scores would have had to tell.

A ceiling says that a test could have failed. This says how far from failing it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from scipy.optimize import brentq
from scipy.special import nctdtr, ndtr, ndtri

from choral.audits.findings.evidence import Refuting
from choral.audits.lower_bounds.trade_off import LARGEST_MU, epsilon_of_mu

Refutes = Callable[[int, int, int, float], bool]
"""Whether so many (canaries, guesses, right, beta) contradict the claim; once it does, more right ones do."""


def by_guesses(tests: Sequence[tuple[int, int, float]], refutes: Refutes) -> Refuting | None:
    """The least area under the curve, over tests (canaries, guesses, beta), with its count; None if no count does.

    The area is that of two normal groups of one variance, half in half out, whose extremes hold that share of right
    guesses: of other scores of this area more, or fewer, may be right.
    """
    found = []
    for canaries, guesses, beta in tests:
        if refutes(canaries, guesses, guesses, beta):
            right = _least(guesses, lambda v, m=canaries, r=guesses, b=beta: refutes(m, r, v, b))  # type: ignore[misc]
            found.append((_area(guesses / canaries, right / guesses), guesses, right))
    if not found:
        return None
    auc, guesses, right = min(found)
    return Refuting(counts={"guesses": guesses, "right": right}, auc=auc)


def by_trials(members: int, refutes: Callable[[int], bool]) -> Refuting | None:
    """The fewest true positives of so many members, at as many false positives as there were; None if none do."""
    if not refutes(members):
        return None
    return Refuting(counts={"true_positives": _least(members, refutes)}, auc=None)


def by_separation(first: int, second: int, claimed: float, delta: float, confidence: float) -> Refuting | None:
    """Of normal scores of two groups of these sizes: the area at which their lower bound passes the claim."""
    if epsilon_of_mu(LARGEST_MU, delta) <= claimed:
        return None
    mu = float(brentq(lambda mu: epsilon_of_mu(mu, delta) - claimed, 1e-9, LARGEST_MU))
    root, free = math.sqrt(first * second / (first + second)), first + second - 2
    shown = float(brentq(lambda t: float(nctdtr(free, mu * root, t)) - confidence, mu * root, mu * root + 60.0 + mu))
    return Refuting(counts={}, auc=float(ndtr(shown / root / math.sqrt(2.0))))


def _least(most: int, refutes: Callable[[int], bool]) -> int:
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if refutes(middle) else (middle, high)
    return high


def _area(guessed: float, right: float) -> float:
    """Of N(0, 1) and N(mu, 1), half each, whose highest and lowest `guessed / 2` are guessed right so often."""
    if right <= 0.5:
        return 0.5
    if right >= 1.0:
        return 1.0

    def share(mu: float) -> float:
        """Of the highest part, how many are of the upper group; by symmetry as many of the lowest are of the lower."""
        threshold = float(brentq(lambda t: 0.5 * (ndtr(mu - t) + ndtr(-t)) - guessed / 2.0, -40.0, 80.0))
        return float(ndtr(mu - threshold)) / guessed

    largest = 2.0 * float(-ndtri(1e-12))
    if share(largest) <= right:
        return 1.0
    return float(ndtr(float(brentq(lambda mu: share(mu) - right, 0.0, largest)) / math.sqrt(2.0)))
