"""A lower bound on epsilon from how far apart the scores of canaries that are in and out lie, in one white-box run.

Law. Every canary has a coordinate of its own in gradient space: each released update holds noise there, plus one
clipping norm if the canary is in and was drawn. Its score is the sum of log likelihood ratios of that coordinate over
all steps (:func:`likelihood_scores`). The two groups are then independent samples; taken as normal of one variance, the
t statistic has a noncentral t distribution with mu sqrt(a b / (a + b)), and its exact lower confidence bound on the
separation mu gives epsilon by the trade-off of two Gaussians that lie mu apart. Drawing at random makes the variance
of the first group larger, and the estimate smaller. A mechanism whose noise is not Gaussian is outside of it: that is
printed, and the bound never decides by itself.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import nctdtr

from choral.audits.findings.evidence import Bound
from choral.audits.lower_bounds.refuting import by_separation
from choral.audits.lower_bounds.trade_off import LARGEST_MU, epsilon_of_mu
from choral.errors import ConfigError

LAW = (
    "The scores of canaries that are in, and of those that are out, are normal and independent, of one variance or more"
    " in the first group. True of Gaussian noise that is added to a coordinate of its own; not of every fault."
)


def separation(scores: npt.ArrayLike, members: npt.ArrayLike, confidence: float = 0.95) -> float:
    """Return the lower confidence bound on mu, 0 if there is none above.

    Raises: ConfigError (fewer than ten in a group, or scores that do not vary).
    """
    values, inside = np.asarray(scores, dtype=np.float64), np.asarray(members, dtype=np.bool_)
    first, second = values[inside], values[~inside]
    a, b = len(first), len(second)
    if min(a, b) < 10 or not np.isfinite(values).all():
        raise ConfigError(f"{a} scores of canaries that are in and {b} of others, expected ten finite ones of each")
    free = a + b - 2
    variance = float(((first - first.mean()) ** 2).sum() + ((second - second.mean()) ** 2).sum()) / free
    if variance <= 0.0:
        raise ConfigError("the scores do not vary", hint="of a release with noise they do")
    root = math.sqrt(a * b / (a + b))
    t = float(first.mean() - second.mean()) / math.sqrt(variance) * root
    if not float(nctdtr(free, 0.0, t)) > confidence:
        return 0.0
    return float(brentq(lambda mu: float(nctdtr(free, mu * root, t)) - confidence, 0.0, t / root + 1.0))


def white_box_bound(
    scores: npt.ArrayLike,
    members: npt.ArrayLike,
    *,
    delta: float,
    confidence: float = 0.95,
    claimed: float | None = None,
) -> Bound:
    """The bound as evidence, to stand beside the one that decides. Raises: ConfigError."""
    inside = np.asarray(members, dtype=np.bool_)
    mu = separation(scores, members, confidence)
    return Bound(
        method="white-box separation",
        epsilon=epsilon_of_mu(mu, delta),
        delta=delta,
        confidence=confidence,
        kind="confidence",
        ceiling=epsilon_of_mu(LARGEST_MU, delta),
        counts={"canaries": len(inside), "in": int(inside.sum())},
        thresholds="none: all scores count",
        tried=1,
        assumptions=(LAW,),
        reference="noncentral t; Dong, Roth, Su 2022, corollary 2.13",
        refuting=None
        if claimed is None
        else by_separation(int(inside.sum()), int((~inside).sum()), claimed, delta, confidence),
    )


def likelihood_scores(released: npt.ArrayLike, *, rate: float, noise: float) -> npt.NDArray[np.float64]:
    """Each canary's score: the sum over steps of the log likelihood ratio of its coordinate, shape (canaries,).

    released: shape (steps, canaries), in clipping norms: noise of deviation `noise`, plus 1 with probability `rate` for
    a canary that is in. By Neyman and Pearson no other score tells the two apart better; as a sum over many steps it is
    near normal. Raises: ConfigError (shape, rate, noise).
    """
    x = np.asarray(released, dtype=np.float64)
    if x.ndim != 2 or not 0.0 < rate <= 1.0 or not noise > 0.0:
        raise ConfigError(
            f"released has shape {x.shape}, rate is {rate} and noise {noise}; expected (steps, canaries), a rate in"
            " (0, 1] and noise > 0"
        )
    return np.asarray(np.log1p(rate * np.expm1((x - 0.5) / noise**2)).sum(axis=0))
