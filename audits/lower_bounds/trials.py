"""Two-sided membership tests: lower bounds on epsilon from independent trials of in and out.

Each trial is a training of its own, with the canary (a positive) or without it, and one guess. The four counts are
binomial, so exact intervals of the two error rates give a bound on epsilon. Scores of many records of *one* model are
no such trials: for those see :mod:`choral.audits.lower_bounds.one_run`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import msgspec
import numpy as np
from scipy.special import betainc, betaincinv, ndtri

from choral.audits.findings.evidence import Interval
from choral.audits.lower_bounds.one_run import check_levels, largest_rejected
from choral.audits.lower_bounds.trade_off import epsilon_of_mu
from choral.errors import DataError

_NODES = 128


class Counts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Guesses on independent trials, at a threshold that does not depend on these trials.

    Raises: DataError for a negative count, or no trial with or none without the canary.
    """

    true_positives: int
    false_negatives: int
    false_positives: int
    true_negatives: int

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise DataError(f"{name} is {value!r}, expected an integer >= 0")
        if not (self.members and self.non_members):
            raise DataError(
                f"{self.members} trials with and {self.non_members} without the canary, expected at least one of each"
            )

    @property
    def members(self) -> int:
        return self.true_positives + self.false_negatives

    @property
    def non_members(self) -> int:
        return self.false_positives + self.true_negatives


def rate_interval(count: int, trials: int, level: float = 0.95) -> Interval:
    """A binomial proportion with its two-sided Clopper-Pearson interval (1934): each side errs at (1 - level) / 2."""
    alpha = (1.0 - level) / 2.0
    return Interval(
        value=count / trials,
        low=1.0 - upper_rate(trials - count, trials, alpha),
        high=upper_rate(count, trials, alpha),
        level=level,
    )


def upper_rate(count: int, trials: int, alpha: float) -> float:
    """The Clopper-Pearson upper limit at one-sided error probability ``alpha``."""
    return 1.0 if count >= trials else float(betaincinv(count + 1.0, float(trials - count), 1.0 - alpha))


def clopper_pearson(counts: Counts, *, delta: float, beta: float = 0.05) -> float:
    """max { ln((1 - FNR - delta) / FPR), ln((1 - FPR - delta) / FNR), 0 } at upper limits of the two rates.

    Each limit errs at beta / 2, so the bound errs at ``beta``. Reference: Kairouz, Oh, Viswanath 2015, theorem 2.1 (the
    region); Jagielski, Ullman, Oprea 2020 (its use with exact intervals).
    """
    check_levels(delta, beta)
    fnr, fpr = _limits(counts, beta)
    return max(0.0, *(math.log((1.0 - a - delta) / b) for a, b in ((fnr, fpr), (fpr, fnr)) if 1.0 - a > delta))


def gaussian(counts: Counts, *, delta: float, beta: float = 0.05) -> float:
    """The same limits read within the Gaussian family: mu >= Phi^-1(1 - FPR) - Phi^-1(FNR), then epsilon at delta.

    A strong assumption: one pair of rates is taken to fix the whole trade-off curve. Reference: Nasr et al. 2023
    ("Tight auditing of differentially private machine learning"), section 4.
    """
    check_levels(delta, beta)
    fnr, fpr = _limits(counts, beta)
    if fnr + fpr >= 1.0:
        return 0.0
    return epsilon_of_mu(float(-ndtri(fpr) - ndtri(fnr)), delta)


def joint_beta(counts: Counts, *, delta: float, beta: float = 0.05) -> float:
    """The epsilon below which the posterior of (FPR, FNR) leaves mass ``beta``: credible, not frequentist.

    Without any leak it is still a little above 0, since epsilon = 0 is a line, of no mass; and where both directions
    are tight it overshoots about twice as often as ``beta`` says. Never a verdict by itself.

    Jeffreys priors: FNR ~ Beta(.5 + FN, .5 + TP), FPR ~ Beta(.5 + FP, .5 + TN), independent. The smallest epsilon whose
    region
        x + e^epsilon y >= 1 - delta,  e^epsilon x + y >= 1 - delta,  and the same for (1 - x, 1 - y)
    holds mass beta. Reference: Zanella-Beguelin et al., "Bayesian estimation of differential privacy", 2023, section 4.
    """
    check_levels(delta, beta)
    return largest_rejected(lambda epsilon: region_mass(counts, epsilon, delta) < beta)


def region_mass(counts: Counts, epsilon: float, delta: float) -> float:
    """Posterior probability of the (epsilon, delta) region, by quadrature over FPR of the exact mass of FNR."""
    a, b = 0.5 + counts.false_positives, 0.5 + counts.true_negatives
    # The mass has kinks where two borders of the region cross: quadrature runs between them, in FPR's quantiles.
    power = math.exp(-epsilon)
    corner = (1.0 - delta) / (1.0 + math.exp(epsilon))
    kinks = sorted(
        {0.0, corner, (1.0 - delta) * power, delta, 1.0 - delta, 1.0 - (1.0 - delta) * power, 1.0 - corner, 1.0}
    )
    edges = betainc(a, b, np.clip(kinks, 0.0, 1.0))
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    total = 0.0
    for low, high in pairwise(edges):
        if high - low > 1e-15:
            x = betaincinv(a, b, low + (high - low) * (nodes + 1.0) / 2.0)
            total += (high - low) / 2.0 * float(weights @ _mass_between(counts, x, epsilon, delta))
    return total


def _mass_between(counts: Counts, x: np.ndarray, epsilon: float, delta: float) -> np.ndarray:
    """P[FNR within the region | FPR = x]."""

    def border(t: np.ndarray) -> np.ndarray:
        return np.maximum((1.0 - delta - t) * math.exp(-epsilon), 1.0 - delta - math.exp(epsilon) * t)

    low, high = np.clip(border(x), 0.0, 1.0), np.clip(1.0 - border(1.0 - x), 0.0, 1.0)
    a, b = 0.5 + counts.false_negatives, 0.5 + counts.true_positives
    return np.asarray(np.maximum(betainc(a, b, high) - betainc(a, b, low), 0.0))


def ceiling(
    members: int, non_members: int, *, delta: float, beta: float = 0.05, method: str = "clopper-pearson"
) -> float:
    """The bound of this method if every guess were right."""
    perfect = Counts(true_positives=members, false_negatives=0, false_positives=0, true_negatives=non_members)
    compute = {"clopper-pearson": clopper_pearson, "gaussian": gaussian, "joint-beta": joint_beta}[method]
    return compute(perfect, delta=delta, beta=beta)


def _limits(counts: Counts, beta: float) -> tuple[float, float]:
    return (
        upper_rate(counts.false_negatives, counts.members, beta / 2.0),
        upper_rate(counts.false_positives, counts.non_members, beta / 2.0),
    )
