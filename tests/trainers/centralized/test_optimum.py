from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from choral.errors import ConfigError
from choral.trainers import TaskError
from choral.trainers.centralized.optimum import Objective


@pytest.fixture
def problem():
    random = np.random.default_rng(2)
    rows = random.normal(size=(300, 12)) * (random.random((300, 12)) < 0.5)
    labels = (random.random(300) < 1 / (1 + np.exp(-rows @ random.normal(size=12)))).astype(float)
    return Objective(sparse.csr_array(rows), labels, 1 / 300)


def test_against_scikit_learn(problem):
    """Its C is 1 / (n ridge), without an intercept."""
    model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=1000).fit(problem.rows, problem.labels)
    weights, least = problem.least()
    assert weights == pytest.approx(model.coef_[0], abs=1e-5)
    assert np.linalg.norm(problem.slope(weights)) < 1e-8
    assert least <= problem.value(model.coef_[0]) + 1e-14
    assert least < problem.value(weights + 1e-3)


def test_derivatives_by_differences(problem):
    random = np.random.default_rng(3)
    weights, along = random.normal(size=(2, 12))
    step = 1e-5
    ahead, behind = weights + step * along, weights - step * along
    assert (problem.value(ahead) - problem.value(behind)) / (2 * step) == pytest.approx(problem.slope(weights) @ along)
    differences = (problem.slope(ahead) - problem.slope(behind)) / (2 * step)
    assert differences == pytest.approx(problem.curved(weights, along), rel=1e-6, abs=1e-9)


def test_refuses(problem):
    for ridge in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ConfigError):
            Objective(problem.rows, problem.labels, ridge)
    with pytest.raises(TaskError, match="no optimum"):
        problem.least(tolerance=1e-30)
