"""Strategies: the matrices C by which noise is correlated over steps, and what each pass under them costs.

The matrix mechanism for training (Denisov et al. 2022; Choquette-Choo et al. 2023, "Multi-epoch matrix
factorization"): the private steps are a function of C x + z, where row t of x is the clipped sum of step t and z is
independent Gaussian noise. Step t releases x_t plus row t of C^-1 z, so that noise of later steps takes back noise of
earlier ones, and the sums over steps, which are the model, get far less of it than from independent noise.

Participation: every pass visits the same batches in the same order, so a record that is in batch j contributes at
rows j, j + m, j + 2m, ... for m steps a pass: (k, b)-fixed-epoch participation, b = m. Its contributions have norm at
most 1 (in units of the clipping norm) and may depend on everything released before. Then the squared L2 sensitivity
of C x is, exactly, because C has no negative entry,

    max_j sum_{i, i'} (C^T C)[j + i m, j + i' m]                                                                   (1)

(Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization", equation 5, with equality where all entries of
C^T C are >= 0). For a Toeplitz C with the first column c the worst is j = 0, whose columns are cut off last, and (1) is
the squared norm of a sum of shifted columns, of which the rows of pass p are

    cost of pass p = sum_{t < m} (c_t + c_{t + m} + ... + c_{t + (p - 1) m})^2.                                    (2)

:meth:`costs` is (1) split by pass like this. A run that ends or dies after pass p has released those rows alone, and
pays for those alone.

The sum of the first t steps has noise of the variance, per unit variance of z,

    sum_{s < t} (d_0 + ... + d_s)^2,  d the first column of C^-1.                                                  (3)
"""

from __future__ import annotations

import math
from functools import lru_cache

import msgspec
import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.privacy.accounting.plain_numbers import as_float

Floats = npt.NDArray[np.float64]


class Banded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="banded"):
    """C lower triangular Toeplitz with the first column `coefficients`, then zeros: 1, c_1, ..., c_{b-1}, each >= 0.

    With at most m bands, columns m apart have no row in common, and each pass costs the squared norm of the
    coefficients (Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization", theorem 2).
    Source: McKenna 2024, "Scaling up the banded matrix factorization mechanism for differentially private ML". One
    band is independent noise, that is DP-SGD without sampling.
    """

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        _make_plain(self, "coefficients")
        if not self.coefficients or self.coefficients[0] != 1.0 or not _all_in(self.coefficients, 0.0, math.inf):
            raise ConfigError(f"coefficients are {self.coefficients}, expected 1 and then numbers >= 0")

    def column(self, count: int) -> Floats:
        """Return the first `count` entries of the first column of C, shape (count,)."""
        column = np.zeros(count)
        column[: len(self.coefficients)] = self.coefficients[:count]
        return column

    def inverse(self, count: int) -> Floats:
        """Return the first `count` entries of the first column of C^-1, shape (count,)."""
        return _series([1.0], self.coefficients, count)

    def costs(self, steps: int, passes: int) -> Floats:
        """Return what each of the first `passes` passes of `steps` adds to the squared sensitivity, shape (passes,)."""
        return _costs(self, steps, passes)

    def errors(self, steps: int, passes: int) -> Floats:
        """Return the variance, per unit variance of z, of each prefix sum's noise, shape (passes * steps,)."""
        return _errors(self, steps, passes)


class Buffered(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="buffered"):
    """C lower triangular Toeplitz with c_0 = 1, c_t = sum_i weights[i] * decays[i]^(t - 1): a buffer for each i.

    0 < decays[i] < 1, weights[i] >= 0. Source: the buffered linear Toeplitz (BLT) matrices of Dvijotham et al. 2024,
    "Efficient and near-optimal noise generation for streaming differential privacy", for several participations in
    McMahan, Xu, Zhang 2024, "A hassle-free algorithm for strong differential privacy in federated learning systems".
    Columns of different passes overlap, so later passes cost more than earlier ones.
    """

    decays: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        _make_plain(self, "decays", "weights")
        if not self.decays or len(self.decays) != len(self.weights) or not _all_in(self.weights, 0.0, math.inf):
            raise ConfigError(f"weights are {self.weights}, expected one number >= 0 for each decay {self.decays}")
        if not _all_in(self.decays, 0.0, 1.0) or max(self.decays) == 1.0 or min(self.decays) == 0.0:
            raise ConfigError(f"decays are {self.decays}, expected numbers in (0, 1)")

    def column(self, count: int) -> Floats:
        """Return the first `count` entries of the first column of C, shape (count,)."""
        column = np.zeros(count)
        column[0] = 1.0
        for decay, weight in zip(self.decays, self.weights, strict=True):
            column[1:] += weight * decay ** np.arange(count - 1)
        return column

    def inverse(self, count: int) -> Floats:
        """Return the first `count` entries of the first column of C^-1, shape (count,)."""
        # As a power series C is 1 + sum_i weights[i] x / (1 - decays[i] x), a fraction of two short polynomials.
        below = np.poly1d([1.0])
        for decay in self.decays:
            below *= np.poly1d([-decay, 1.0])
        above = below
        for decay, weight in zip(self.decays, self.weights, strict=True):
            above = above + np.poly1d([weight, 0.0]) * (below / np.poly1d([-decay, 1.0]))[0]
        return _series(below.coeffs[::-1], above.coeffs[::-1], count)

    def costs(self, steps: int, passes: int) -> Floats:
        """Return what each of the first `passes` passes of `steps` adds to the squared sensitivity, shape (passes,)."""
        return _costs(self, steps, passes)

    def errors(self, steps: int, passes: int) -> Floats:
        """Return the variance, per unit variance of z, of each prefix sum's noise, shape (passes * steps,)."""
        return _errors(self, steps, passes)


class Tree(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="tree"):
    """Binary-tree aggregation, begun anew at each pass: a row of C for each complete node of the pass's tree.

    Source: DP-FTRL with restarts (Kairouz et al. 2021, "Practical and private (deep) learning without sampling or
    shuffling"), node estimates from below by Honaker 2015. A record is under at most floor(log2 m) + 1 complete nodes
    of the tree over m steps, and trees of different passes share no noise, so each pass costs just that.
    """

    def costs(self, steps: int, passes: int) -> Floats:
        """Return what each of the first `passes` passes of `steps` adds to the squared sensitivity, shape (passes,)."""
        return np.full(passes, float(steps.bit_length()))

    def errors(self, steps: int, passes: int) -> Floats:
        """Return the variance, per unit variance of z, of each prefix sum's noise, shape (passes * steps,)."""
        variances = [estimate_variance(level) for level in range(steps.bit_length())]
        one = [sum(v for level, v in enumerate(variances) if t >> level & 1) for t in range(1, steps + 1)]
        return np.concatenate([number * one[-1] + np.array(one) for number in range(passes)])


Strategy = Banded | Buffered | Tree


def estimate_variance(level: int) -> float:
    """Return the variance of a tree node's estimate from below, per unit variance of its own noise.

    A node's own noisy sum (variance 1) and the sum of its two children's estimates, weighted by inverse variance.
    """
    variance = 1.0
    for _ in range(level):
        variance = 2.0 * variance / (1.0 + 2.0 * variance)
    return variance


def sensitivity(strategy: Strategy, steps: int, passes: int) -> float:
    """Return the L2 sensitivity of C x for `passes` passes of `steps`, in units of the clipping norm; exact."""
    return math.sqrt(float(strategy.costs(steps, passes).sum()))


def error(strategy: Strategy, steps: int, passes: int) -> float:
    """Return the root mean squared noise of the prefix sums, per noise multiplier and clipping norm.

    The noise multiplier is the standard deviation of z over the sensitivity: strategies compare at equal epsilon.
    """
    return math.sqrt(float(strategy.errors(steps, passes).mean())) * sensitivity(strategy, steps, passes)


@lru_cache(maxsize=64)
def _costs(strategy: Banded | Buffered, steps: int, passes: int) -> Floats:
    column = strategy.column(steps * passes)
    costs: Floats = np.square(np.cumsum(column.reshape(passes, steps), axis=0)).sum(axis=1)  # (2)
    costs.setflags(write=False)
    return costs


def _errors(strategy: Banded | Buffered, steps: int, passes: int) -> Floats:
    # The first column of A C^-1, whose first t entries are the weights of the noise in the sum of t steps.
    prefix = np.cumsum(strategy.inverse(steps * passes))
    return np.cumsum(prefix**2)  # (3)


def _series(above: npt.ArrayLike, below: npt.ArrayLike, count: int) -> Floats:
    """Return the first `count` coefficients of the power series of a fraction of two polynomials, lowest first."""
    from scipy.signal import lfilter  # here, since it takes long to load and accounting does without

    impulse = np.zeros(count)
    impulse[0] = 1.0
    series: Floats = lfilter(np.asarray(above, np.float64), np.asarray(below, np.float64), impulse)
    return series


def _all_in(values: tuple[float, ...], low: float, high: float) -> bool:
    return all(low <= value <= high and math.isfinite(value) for value in values)


def _make_plain(strategy: msgspec.Struct, *names: str) -> None:
    """Turn fields of a strategy that is just being made into tuples of Python's own floats. Raises: ConfigError."""
    for name in names:
        values = getattr(strategy, name)
        if not isinstance(values, tuple | list):
            raise ConfigError(f"{name} is a {type(values).__name__}, expected a tuple of numbers")
        msgspec.structs.force_setattr(strategy, name, tuple(as_float(name, value) for value in values))
