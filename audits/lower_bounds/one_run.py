"""A lower bound on epsilon from a single training, by guessing which canaries were in it.

Each of m canaries enters by its own fair coin; an exact half-and-half split is another experiment and breaks the proof.
The auditor makes r guesses, abstains on the rest, and v are right. If training is (epsilon, delta)-private in the unit
of one canary, with q = e^epsilon / (1 + e^epsilon) and B ~ Binomial(r, q), then

    P[v or more are right]  <=  p(epsilon) = P[B >= v] + 2 m delta max_{1 <= i <= v} P[v - i <= B <= v - 1] / i.

The reported bound is the largest epsilon with p(epsilon) <= beta. r must not depend on how the coins fell.

Reference: Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run", 2023, theorem 5.2 (add or remove).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import bdtrc, expit, gammaln

from choral.errors import ConfigError, DataError

LARGEST_EPSILON = 64.0  # e^-64 is below the resolution of any count
_PRECISION = 1e-9
_MOST_CANARIES = 10**7


def p_value(epsilon: float, canaries: int, guesses: int, right: int, delta: float) -> float:
    """The chance of so many right guesses, or more, under (epsilon, delta)-privacy; an upper bound, at most 1."""
    if right == 0:
        return 1.0
    q = float(expit(epsilon))
    tail = float(bdtrc(right - 1, guesses, q))
    if delta == 0.0:
        return min(tail, 1.0)
    below = np.arange(right - 1, -1, -1, dtype=np.float64)  # v - 1, v - 2, ..., 0
    log_choose = gammaln(guesses + 1.0) - gammaln(below + 1.0) - gammaln(guesses - below + 1.0)
    log_q, log_other = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    mass = np.exp(log_choose + below * log_q + (guesses - below) * log_other)
    worst = float((np.cumsum(mass) / np.arange(1, right + 1)).max())
    return min(tail + 2.0 * canaries * delta * worst, 1.0)


def lower_bound(canaries: int, guesses: int, right: int, *, delta: float, beta: float = 0.05) -> float:
    """The largest epsilon that is refuted at error probability ``beta``; 0.0 if not even 0 is.

    Raises: DataError for counts that are not 0 <= right <= guesses <= canaries, guesses >= 1; ConfigError for delta
        outside [0, 1) or beta outside (0, 1).
    """
    check_counts(canaries, guesses, right)
    check_levels(delta, beta)
    return largest_rejected(lambda epsilon: p_value(epsilon, canaries, guesses, right, delta) <= beta)


def ceiling(canaries: int, guesses: int, *, delta: float, beta: float = 0.05) -> float:
    """The bound if every guess were right: no claim at or above it can be refuted with so many guesses."""
    return lower_bound(canaries, guesses, guesses, delta=delta, beta=beta)


def canaries_needed(epsilon: float, *, guessed: float, delta: float, beta: float = 0.05) -> int:
    """The fewest canaries whose ceiling is above ``epsilon`` when a share ``guessed`` of them, in (0, 1], is guessed.

    With delta > 0 more canaries do not help for ever: the term 2 m delta grows with m.

    Raises: ConfigError when no number of canaries reaches that ceiling at this delta, or a setting is out of range.
    """
    check_levels(delta, beta)
    if not (0.0 < epsilon < LARGEST_EPSILON and 0.0 < guessed <= 1.0):
        raise ConfigError(
            f"epsilon is {epsilon} and guessed {guessed}, expected 0 < epsilon < {LARGEST_EPSILON:g} and a share"
            " in (0, 1]"
        )

    def refuted(canaries: int) -> bool:
        guesses = guesses_of(canaries, guessed)
        return p_value(epsilon, canaries, guesses, guesses, delta) < beta

    # Without delta r guesses refute epsilon if q^r < beta: the fewest that could do with it.
    low = max(math.floor(math.log(beta) / -math.log1p(math.exp(-epsilon)) / guessed) - 2, 0)
    high = max(low, 1)
    while not refuted(high):
        low, high = high, max(high + 1, int(high * 1.25))
        if high > _MOST_CANARIES or 2 * high * delta > 4.0:
            raise ConfigError(
                f"no number of canaries can refute epsilon = {epsilon:g} at delta = {delta:g} with one run and a share"
                f" {guessed:g} guessed",
                hint="audit at a smaller delta, or train many times and use design='runs'",
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return high


def guesses_of(canaries: int, share: float) -> int:
    """An even number of guesses, half of them "in" and half "out", nearest to the share; at least 2, or 1 of 1."""
    return min(max(2 * round(share * canaries / 2.0), 2), canaries)


def largest_rejected(rejected: Callable[[float], bool], largest: float = LARGEST_EPSILON) -> float:
    """By bisection, rounded down: the end of the rejected stretch that begins at 0."""
    if not rejected(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while rejected(high):
        low, high = high, 2.0 * high
        if low >= largest:
            return largest
    while high - low > _PRECISION * max(1.0, high):
        middle = (low + high) / 2.0
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def check_counts(canaries: int, guesses: int, right: int) -> None:
    for name, value in (("canaries", canaries), ("guesses", guesses), ("right", right)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise DataError(f"{name} is {value!r}, expected an integer")
    if not (0 <= right <= guesses <= canaries and guesses >= 1):
        raise DataError(
            f"{right} right of {guesses} guesses on {canaries} canaries, expected 0 <= right <= guesses <= canaries"
            " and at least one guess"
        )


def check_levels(delta: float, beta: float) -> None:
    if not 0.0 <= delta < 1.0:
        raise ConfigError(f"delta is {delta}, expected 0 <= delta < 1", hint="use the delta of the claim")
    if not 0.0 < beta < 1.0:
        raise ConfigError(f"the error probability is {beta}, expected 0 < beta < 1", hint="0.05 is usual")
