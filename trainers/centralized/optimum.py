"""The least value of a ridge-regularised logistic regression over all records, to compare federated algorithms with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import expit

from choral.errors import ConfigError
from choral.trainers.task.task import TaskError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Objective:
    """f(w) = 1/n sum_i (log(1 + exp(x_i w)) - y_i x_i w) + ridge/2 |w|^2.

    rows: CSR or dense, float64, shape (n, d); labels: 0. or 1., shape (n,). Raises: ConfigError unless ridge > 0.
    """

    rows: sparse.csr_array | Array
    labels: Array
    ridge: float

    def __post_init__(self) -> None:
        if not 0 < self.ridge < np.inf:
            raise ConfigError(f"expected a finite ridge > 0, got {self.ridge}", hint="1/n is usual")

    def value(self, weights: Array) -> float:
        margins = self.rows @ weights
        losses = np.logaddexp(0.0, margins) - self.labels * margins
        return float(losses.mean() + self.ridge / 2 * (weights @ weights))

    def slope(self, weights: Array) -> Array:
        slope: Array = self.rows.T @ (expit(self.rows @ weights) - self.labels) / len(self.labels)
        return slope + self.ridge * weights

    def curved(self, weights: Array, along: Array) -> Array:
        """The Hessian at ``weights`` times ``along``."""
        chances = expit(self.rows @ weights)
        curved: Array = self.rows.T @ (chances * (1 - chances) * (self.rows @ along)) / len(self.labels)
        return curved + self.ridge * along

    def least(self, tolerance: float = 1e-8) -> tuple[Array, float]:
        """(w*, f(w*)) with |grad f(w*)| < tolerance, by a trust-region Newton method (Gould et al. 1999).

        f is ridge-strongly convex, so f(w*) is within tolerance^2 / (2 ridge) of the least value.
        Raises: TaskError if the gradient does not become as small as that.
        """
        found = minimize(
            self.value,
            np.zeros(self.rows.shape[1]),
            method="trust-ncg",
            jac=self.slope,
            hessp=self.curved,
            options={"gtol": tolerance / 2, "maxiter": 1000},
        )
        norm = float(np.linalg.norm(self.slope(found.x)))
        if not norm < tolerance:
            raise TaskError(f"no optimum found: the gradient's norm is {norm:.2g}, wanted below {tolerance:g}")
        return found.x, float(found.fun)
