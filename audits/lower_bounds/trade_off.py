"""The one-run audit against a whole family of trade-off functions: tighter, and on a stronger assumption.

Assumption: training is mu-Gaussian-private for some mu, so that distinguishing any two neighbours is no easier than
telling N(0, 1) from N(mu, 1). DP-SGD with many steps is close to that; a trainer with a bug need not be. The largest mu
that is refuted is converted to the epsilon that N(0, 1) against N(mu, 1) costs at delta.

Reference: Mahloujifar, Melis, Chaudhuri, "Auditing f-differential privacy in one run", 2024, algorithm 3 (membership).
"""

from __future__ import annotations

import math

from scipy.special import log_ndtr, ndtr, ndtri

from choral.audits.lower_bounds.one_run import LARGEST_EPSILON, check_counts, check_levels, largest_rejected
from choral.errors import ConfigError

LARGEST_MU = 32.0


def refuted(mu: float, canaries: int, guesses: int, right: int, beta: float) -> bool:
    """Whether so many right guesses, or more, have probability below ``beta`` if training is mu-Gaussian-private.

    Follows the recursion from the top: r and h bound the (normalised) chances of exactly i right guesses, weighted
    by the right and by the wrong ones, going down from ``right``; what is left over must fit under one.
    """
    if right == 0:
        return False
    in_part, out_part = beta * right / canaries, beta * (guesses - right) / canaries
    for i in range(right - 1, -1, -1):
        raised = max(out_part, float(ndtr(ndtri(in_part) - mu))) if in_part < 1.0 else 1.0
        in_part += i / (guesses - i) * (raised - out_part)
        out_part = raised
        if in_part + out_part > guesses / canaries:
            return True
    return False


def lower_bound_mu(canaries: int, guesses: int, right: int, *, beta: float = 0.05) -> float:
    """The largest mu that is refuted at error probability ``beta``; 0.0 if none is.

    Raises: DataError, ConfigError as :func:`choral.audits.lower_bounds.one_run.lower_bound`.
    """
    check_counts(canaries, guesses, right)
    check_levels(0.0, beta)
    return largest_rejected(lambda mu: refuted(mu, canaries, guesses, right, beta), LARGEST_MU)


def lower_bound(canaries: int, guesses: int, right: int, *, delta: float, beta: float = 0.05) -> float:
    """The bound as an epsilon at ``delta``, within the Gaussian family; 0.0 if nothing is refuted."""
    check_levels(delta, beta)
    return epsilon_of_mu(lower_bound_mu(canaries, guesses, right, beta=beta), delta)


def epsilon_of_mu(mu: float, delta: float) -> float:
    """The smallest epsilon >= 0 with Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu) <= delta.

    Reference: Balle and Wang, "Improving the Gaussian mechanism for differential privacy", 2018, theorem 8.
    Raises: ConfigError for delta = 0, at which no epsilon is finite, or mu < 0.
    """
    if not (0.0 < delta < 1.0 and mu >= 0.0):
        raise ConfigError(
            f"delta is {delta} and mu {mu}, expected 0 < delta < 1 and mu >= 0",
            hint="a Gaussian mechanism has no finite epsilon at delta = 0",
        )
    if mu == 0.0:
        return 0.0

    def above(epsilon: float) -> bool:
        subtracted = math.exp(epsilon + float(log_ndtr(-mu / 2.0 - epsilon / mu)))
        return float(ndtr(mu / 2.0 - epsilon / mu)) - subtracted > delta

    return largest_rejected(above, 32.0 * LARGEST_EPSILON)


def mu_of_epsilon(epsilon: float, delta: float) -> float:
    """The largest mu, up to `LARGEST_MU`, that costs at most this epsilon at delta. Raises: ConfigError (delta)."""
    low, high = 0.0, LARGEST_MU
    if epsilon_of_mu(high, delta) <= epsilon:
        return high
    while high - low > 1e-9:
        middle = (low + high) / 2.0
        low, high = (middle, high) if epsilon_of_mu(middle, delta) <= epsilon else (low, middle)
    return low
