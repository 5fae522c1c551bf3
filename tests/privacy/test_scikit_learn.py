"""The private classifier: learns, spends, and is an estimator of scikit-learn's."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.utils.estimator_checks import check_estimator

from choral.errors import ConfigError
from choral.privacy.errors import BudgetExceededError
from choral.privacy.scikit_learn import PrivateClassifier

# Noise and batches are drawn anew for each fit, whatever the seed, so what compares two fits may find a difference.
EXPECTED = dict.fromkeys(
    (
        "check_fit_idempotent",
        "check_classifier_data_not_an_array",
        "check_supervised_y_2d",
        "check_pipeline_consistency",
    ),
    "two fits differ: noise is drawn anew, and no seed reaches it",
) | dict.fromkeys(("check_classifiers_train", "check_classifiers_classes"), "asks for accuracy on few records")


@pytest.fixture(scope="module")
def blobs() -> Any:
    return make_blobs(600, centers=[[-3, 0], [3, 0]], random_state=0)


def test_it_learns_and_says_what_it_cost(blobs: Any) -> None:
    X, y = blobs
    names = np.array(["ill", "well"])[y]
    fitted = PrivateClassifier(epsilon=3, bounds=(-6, 6), epochs=5, random_state=0).fit(X[:500], names[:500])
    assert fitted.score(X[500:], names[500:]) > 0.95
    assert 2.5 < fitted.spent_.epsilon <= 3
    assert fitted.predict_proba(X).sum(axis=1) == pytest.approx(np.ones(600))
    assert (fitted.decision_function(X) > 0).tolist() == (fitted.predict(X) == "well").tolist()
    again = clone(fitted).fit(X[:500], names[:500])
    first, second = (each.model_.weight for each in (fitted, again))
    assert not torch.equal(first, second)  # the seed reaches no noise


def test_a_ledger_remembers(blobs: Any, tmp_path: Any) -> None:
    X, y = blobs
    classifier = PrivateClassifier(epsilon=1, bounds=(-6, 6), epochs=1, ledger=str(tmp_path / "ledger.jsonl"))
    classifier.fit(X, y)
    with pytest.raises(BudgetExceededError):
        clone(classifier).fit(X, y)


def test_bounds_that_cannot_be(blobs: Any) -> None:
    with pytest.raises(ConfigError, match="bounds"):
        PrivateClassifier(bounds=(1, 1)).fit(*blobs)


@pytest.mark.slow
def test_it_passes_scikit_learns_checks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(PrivateClassifier(epochs=1), expected_failed_checks=EXPECTED)
