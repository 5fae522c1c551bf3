"""How well scores tell members from non-members: the ROC curve, its area, and true positives at few false ones.

Scores are independent given who is a member; higher says "member". Accuracy and area average over easy and hard
records, so that an attack which is sure of a few is seen at the left end only: read the true-positive rate at 1 % and
0.1 % (Carlini et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri
from scipy.stats import rankdata

from choral.audits.findings.evidence import Interval, Roc, RocPoint, TprAtFpr
from choral.audits.lower_bounds.trials import rate_interval
from choral.errors import DataError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

LOW_RATES = (0.01, 0.001)
_DRAWN = 300
ASSUMPTIONS = (
    "Members and non-members differ in nothing but their membership: they come from one population.",
    "Scores are independent given the memberships (records of one model only nearly are).",
)


def checked_scores(scores: object, members: object) -> tuple[Floats, Bools]:
    """Both as arrays of shape (n,): float64 and bool.

    Raises: DataError for unequal lengths, another shape, values that are not finite, memberships that are not 0 or 1,
    scores
        that are all equal, or no member or no non-member.
    """
    values, flags = _array(scores, "scores"), _array(members, "members")
    if values.ndim != 1 or flags.ndim != 1:
        raise DataError(f"scores have shape {values.shape} and members {flags.shape}, expected one dimension each")
    if len(values) != len(flags):
        raise DataError(
            f"{len(values)} scores but {len(flags)} memberships, expected one of each per canary",
            hint="score every canary once, in the order of the memberships",
        )
    if not len(values):
        raise DataError("no scores were given")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(
            f"{len(bad)} of {len(values)} scores are not finite, the first at place {bad[0]}",
            hint="score what the model cannot score at the low end; do not leave it out",
        )
    odd = np.flatnonzero((flags != 0) & (flags != 1))
    if len(odd):
        raise DataError(f"{len(odd)} memberships are neither 0 nor 1, the first at place {odd[0]}")
    inside = flags == 1
    if inside.all() or not inside.any():
        raise DataError(
            f"all {len(flags)} scores are of {'members' if inside.all() else 'non-members'}, expected some of each"
        )
    if values.min() == values.max():
        raise DataError(
            f"all {len(values)} scores are equal, so that they tell nothing",
            hint="score by the loss, not by the predicted class",
        )
    return values, inside


def _array(values: object, name: str) -> Floats:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{name} are not numbers", hint="give a sequence or an array of numbers") from None


def roc(scores: object, members: object, *, level: float = 0.95, at: Sequence[float] = LOW_RATES) -> Roc:
    """The curve with its area and rates. scores, members: shape (n,). Raises: as :func:`checked_scores`."""
    values, inside = checked_scores(scores, members)
    false, true = curve(values, inside)
    return Roc(
        members=int(inside.sum()),
        non_members=int((~inside).sum()),
        auc=area(values, inside, level),
        at=tuple(_at(false, true, wanted, level) for wanted in at),
        points=_thinned(false, true),
        assumptions=ASSUMPTIONS,
    )


def curve(scores: Floats, members: Bools) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """False and true positives at every threshold, both from 0 upwards: tied scores are passed at once."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    true = np.cumsum(members[order])[last]
    return np.append(0, last + 1 - true), np.append(0, true)


def area(scores: Floats, members: Bools, level: float = 0.95) -> Interval:
    """The area under the curve, ties counted half, with DeLong's interval (DeLong et al. 1988; Sun and Xu 2014).

    At 0 or 1 that interval has no width; there, if A is the true area, min(m, n) disjoint pairs are all ordered
    with probability at most A^min(m, n), which bounds it.
    """
    inside, outside = scores[members], scores[~members]
    m, n = len(inside), len(outside)
    ranks = rankdata(np.concatenate([inside, outside]))
    of_members = (ranks[:m] - rankdata(inside)) / n
    of_others = 1.0 - (ranks[m:] - rankdata(outside)) / m
    value = float(of_members.mean())
    alpha = (1.0 - level) / 2.0
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (of_members, of_others) if len(part) > 1)
    half = float(-ndtri(alpha)) * math.sqrt(variance)
    low, high = max(value - half, 0.0), min(value + half, 1.0)
    if variance == 0.0 or min(m, n) == 1:
        reach = 1.0 - alpha ** (1.0 / min(m, n))
        low, high = max(min(low, value - reach), 0.0), min(max(high, value + reach), 1.0)
    return Interval(value=value, low=low, high=high, level=level)


def _at(false: npt.NDArray[np.int64], true: npt.NDArray[np.int64], wanted: float, level: float) -> TprAtFpr:
    outside, inside = int(false[-1]), int(true[-1])
    place = int(np.flatnonzero(false <= wanted * outside)[-1])
    return TprAtFpr(
        wanted=wanted,
        false_positive_rate=rate_interval(int(false[place]), outside, level),
        true_positive_rate=rate_interval(int(true[place]), inside, level),
        resolved=outside * wanted >= 1.0,
    )


def _thinned(false: npt.NDArray[np.int64], true: npt.NDArray[np.int64]) -> tuple[RocPoint, ...]:
    """Corners only, spaced evenly along a logarithmic axis of false positives where there are too many.

    The ends are kept, and the last corner without a false positive.
    """
    keep = np.arange(len(false))
    if len(keep) > _DRAWN:
        spaced = np.searchsorted(false, np.geomspace(1.0, false[-1], _DRAWN))
        keep = np.unique([0, int(np.flatnonzero(false == 0)[-1]), *spaced, len(false) - 1])
    return tuple(
        RocPoint(false_positive_rate=float(false[i] / false[-1]), true_positive_rate=float(true[i] / true[-1]))
        for i in keep
    )
