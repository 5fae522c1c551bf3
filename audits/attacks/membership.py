"""Membership inference: scores that say "this record was in the training set", from losses and from shadow models.

All scores are higher for likelier members. The attacks with shadow models take the target model's statistic on n
records, shape (n,), the shadows' on the same records, shape (k, n), and which shadow trained on which record, bool,
shape (k, n). Each shadow's members are drawn by coins that know nothing of the target's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import digamma, log_ndtr, logsumexp, polygamma, softmax
from scipy.stats import t as student

from choral.audits.lower_bounds.roc import Bools, Floats
from choral.errors import ConfigError, DataError

_LEAST = 2  # shadows on each side of a record
_FLOOR = 1e-30
_MOST_FREEDOM = 1e6  # of a prior: beyond, all records have one variance


def loss_threshold(logits: Any, labels: Any) -> Floats:
    """Minus the cross-entropy (Yeom et al. 2018), shape (..., n). logits: (..., n, classes); labels: (n,)."""
    values, truth = _checked(logits, labels)
    return np.asarray(_of_class(values, truth) - logsumexp(values, axis=-1))


def confidences(logits: Any, labels: Any) -> Floats:
    """The probability of the true class, shape (..., n)."""
    values, truth = _checked(logits, labels)
    return _of_class(softmax(values, axis=-1), truth)


def logit_gap(logits: Any, labels: Any) -> Floats:
    """LiRA's statistic phi = ln p_y - ln sum_{y' != y} p_y', shape (..., n), computed from logits without loss of
    digits.

    Reference: Carlini et al., "Membership inference attacks from first principles", 2022, section IV-B.
    """
    values, truth = _checked(logits, labels)
    others = values.copy()
    np.put_along_axis(others, _index(others, truth), -np.inf, axis=-1)
    return np.asarray(_of_class(values, truth) - logsumexp(others, axis=-1))


def lira_online(target: Floats, shadows: Floats, members: Bools, *, fixed_variance: bool = False) -> Floats:
    """ln N(phi; mu_in, s_in^2) - ln N(phi; mu_out, s_out^2), with means and variances of each record's own shadows.

    fixed_variance: one variance for all records on each side, for few shadows (below 64). In the authors' code the
    out-side takes its deviation from the in-scores; here it takes its own.
    Reference: Carlini et al. 2022, algorithm 1. Raises: DataError for fewer than two shadows on a side of a record.
    """
    mean_in, mean_out, spread_in, spread_out = _moments(target, shadows, members, fixed_variance)
    inside = -(((target - mean_in) / spread_in) ** 2) / 2.0 - np.log(spread_in)
    outside = -(((target - mean_out) / spread_out) ** 2) / 2.0 - np.log(spread_out)
    return np.asarray(inside - outside)


def lira_offline(target: Floats, shadows: Floats, members: Bools, *, fixed_variance: bool = False) -> Floats:
    """-ln Phi(-z), z = (phi - mu_out) / s_out, from the shadows without the record alone.

    The published score is Phi(z) = 1 - Phi(-z) (Carlini et al. 2022, section VI-B). This one grows with it, so it
    orders records alike, and does not saturate at 1 for members.
    """
    _, mean_out, _, spread_out = _moments(target, shadows, members, fixed_variance, offline=True)
    z = (target - mean_out) / spread_out
    return np.asarray(-log_ndtr(-z))


def bavaria(target: Floats, shadows: Floats, members: Bools, *, offline: bool = False) -> Floats:
    """LiRA's likelihood ratio for few shadows: each record's mean and variance on a side have a prior, made of all
    records', and are integrated out, so that the ratio is of two Student densities.

    Model, of each side: x ~ N(mu, s^2), mu given s^2 ~ N(m, s^2 / k), s^2 ~ inverse gamma (v / 2, v w / 2). m, k, v and
    w are fitted to all records by moments (k: of their means; v, w: of the logarithms of their variances, as in Smyth
    2004), so there is nothing to tune. One shadow on a side is enough of most records, and a record without any has its
    prior. offline: from the side without the record alone, minus the logarithm of the upper tail.
    Reference: Brännvall, "Exponential-family membership inference" (BaVarIA-t), 2026, for the conjugate prior and the
    Student predictive; how the prior is fitted is ours. Raises: DataError where no record has two shadows on a side.
    """
    _check_shadows(target, shadows, members)
    outside = _predictive(shadows, ~members)
    if offline:
        return np.asarray(-student.logsf(target, *outside))
    return np.asarray(student.logpdf(target, *_predictive(shadows, members)) - student.logpdf(target, *outside))


def _predictive(values: Floats, chosen: Bools) -> tuple[Floats, Floats, Floats]:
    """Degrees of freedom, location and scale of the next value's Student density, each of shape (n,)."""
    counts = chosen.sum(axis=0)
    several = counts >= _LEAST
    if not several.any():
        raise DataError("no record has two shadow models on a side, expected some", hint="train more shadow models")
    means = np.where(chosen, values, 0.0).sum(axis=0) / np.maximum(counts, 1)
    squares = np.where(chosen, (values - means) ** 2, 0.0).sum(axis=0)
    freedom, usual = _prior_of_variances(squares[several] / (counts[several] - 1), counts[several] - 1)
    known = counts > 0
    centre = float(means[known].mean())
    between = float(means[known].var()) - usual * float((1.0 / counts[known]).mean())
    weight = usual / max(between, 1e-6 * usual)  # how many shadows the prior of a mean counts for
    whole = weight + counts
    located = (weight * centre + counts * means) / whole
    total = freedom * usual + squares + weight * counts / whole * (means - centre) ** 2
    left = freedom + counts
    return left, located, np.sqrt(total * (whole + 1.0) / (left * whole)) + _FLOOR


def _prior_of_variances(found: Floats, freedom: Floats) -> tuple[float, float]:
    """(v, w): the variances are w times chi-squares of their freedom over inverse chi-squares of v. Smyth 2004,
    section 6.2: the mean and the variance of their logarithms."""
    logs = np.log(np.maximum(found, 1e-12 * float(found.mean()) + _FLOOR))
    logs = logs - digamma(freedom / 2.0) + np.log(freedom / 2.0)
    apart = float(logs.var(ddof=1)) - float(polygamma(1, freedom / 2.0).mean()) if len(logs) > 1 else 0.0
    if apart <= float(polygamma(1, _MOST_FREEDOM / 2.0)):
        return _MOST_FREEDOM, math.exp(float(logs.mean()))
    half = float(brentq(lambda x: float(polygamma(1, x)) - apart, 1e-6, _MOST_FREEDOM))
    return 2.0 * half, math.exp(float(logs.mean()) + float(digamma(half)) - math.log(half))


def rmia(
    target: Floats,
    shadows: Floats,
    members: Bools,
    population: Floats,
    shadow_population: Floats,
    *,
    gamma: float = 1.0,
    offline: float | None = None,
) -> Floats:
    """The share of population records z with (p(x) / E p(x)) / (p(z) / E p(z)) > gamma, shape (n,).

    target, shadows: probabilities of the true class, shapes (n,) and (k, n). population: the target's on z records that
    were in no training, shape (z,); shadow_population: the shadows', shape (k, z). The mean over shadows, E p(x), takes
    those with and without x alike (online), or, with offline = a in [0, 1], is estimated from those without: ((1 + a)
    p_out + 1 - a) / 2.
    Reference: Zarifzadeh, Liu, Shokri, "Low-cost high-power membership inference attacks", 2024, equations 2 and 11.
    """
    if not gamma > 0.0 or (offline is not None and not 0.0 <= offline <= 1.0):
        raise ConfigError(f"gamma is {gamma} and offline {offline}, expected gamma > 0 and 0 <= offline <= 1")
    _check_shadows(target, shadows, members)
    if population.ndim != 1 or not len(population) or shadow_population.shape != (len(shadows), len(population)):
        raise DataError(
            f"population has shape {population.shape} and its shadows {shadow_population.shape}, expected (z,) and"
            f" ({len(shadows)}, z)"
        )
    _refuse_non_probabilities(target, shadows, population, shadow_population)
    out = _mean(shadows, ~members)
    if offline is None:
        reference = (_mean(shadows, members) + out) / 2.0
    else:
        reference = ((1.0 + offline) * out + 1.0 - offline) / 2.0
    # z was in no training, of a shadow either: its own mean over shadows is p_out(z).
    base = shadow_population.mean(axis=0)
    if offline is not None:
        base = ((1.0 + offline) * base + 1.0 - offline) / 2.0
    ratio = target / np.maximum(reference, _FLOOR)
    ratios = np.sort(gamma * population / np.maximum(base, _FLOOR))
    return np.asarray(np.searchsorted(ratios, ratio, side="left") / len(ratios))


def _moments(
    target: Floats, shadows: Floats, members: Bools, fixed: bool, *, offline: bool = False
) -> tuple[Floats, Floats, Floats, Floats]:
    _check_shadows(target, shadows, members)
    mean_out, spread_out = _mean(shadows, ~members), _spread(shadows, ~members, fixed)
    if offline:
        return mean_out, mean_out, spread_out, spread_out
    return _mean(shadows, members), mean_out, _spread(shadows, members, fixed), spread_out


def _mean(values: Floats, chosen: Bools) -> Floats:
    counts = chosen.sum(axis=0)
    if counts.min() < _LEAST:
        raise DataError(
            f"record {int(counts.argmin())} has {int(counts.min())} shadow models on one side, expected {_LEAST}",
            hint="train more shadow models; 16 leave one record in 4000 short of two",
        )
    return np.asarray(np.where(chosen, values, 0.0).sum(axis=0) / counts)


def _spread(values: Floats, chosen: Bools, fixed: bool) -> Floats:
    """Standard deviation per record, or one for all; never 0."""
    squares = np.where(chosen, (values - _mean(values, chosen)) ** 2, 0.0)
    counts = chosen.sum(axis=0)
    variance = np.full(values.shape[1], squares.sum() / counts.sum()) if fixed else squares.sum(axis=0) / counts
    return np.asarray(np.sqrt(variance) + _FLOOR)


def _check_shadows(target: Floats, shadows: Floats, members: Bools) -> None:
    if target.ndim != 1 or shadows.ndim != 2 or shadows.shape[1] != len(target) or members.shape != shadows.shape:
        raise DataError(
            f"target has shape {target.shape}, shadows {shadows.shape} and members {members.shape},"
            " expected (n,), (k, n) and (k, n)"
        )
    if members.dtype != np.bool_:
        raise DataError(f"members are {members.dtype}, expected bool")
    if not (np.isfinite(target).all() and np.isfinite(shadows).all()):
        raise DataError("some statistic is not finite", hint="compute logit_gap from logits, not from probabilities")


def _refuse_non_probabilities(*values: Floats) -> None:
    for value in values:
        if not ((value >= 0.0) & (value <= 1.0)).all():
            raise DataError("RMIA takes probabilities in [0, 1]", hint="use confidences(logits, labels)")


def _checked(logits: Any, labels: Any) -> tuple[Floats, npt.NDArray[np.int64]]:
    values, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if values.ndim < 2 or truth.shape != values.shape[-2:-1] or values.shape[-1] < 2:
        raise DataError(
            f"logits have shape {values.shape} and labels {truth.shape}, expected (..., n, classes) and (n,)"
        )
    if not np.isfinite(values).all():
        raise DataError("some logit is not finite", hint="the model diverged")
    if not np.issubdtype(truth.dtype, np.integer) or truth.min() < 0 or truth.max() >= values.shape[-1]:
        raise DataError(f"labels are {truth.dtype}, expected integers from 0 to {values.shape[-1] - 1}")
    return values, truth.astype(np.int64)


def _index(values: Floats, truth: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.broadcast_to(truth[:, None], (*values.shape[:-1], 1))


def _of_class(values: Floats, truth: npt.NDArray[np.int64]) -> Floats:
    return np.asarray(np.take_along_axis(values, _index(values, truth), axis=-1)[..., 0])
