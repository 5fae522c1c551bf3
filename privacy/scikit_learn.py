"""A private classifier in the manner of scikit-learn: fit, predict, score, and what was spent."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.errors import ConfigError
from choral.privacy.dpsgd.engine import Privacy


class PrivateClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A linear model, or one hidden layer, trained with differential privacy for each record.

    Unit: the record. Public: the number of records and of features, and which classes there are. Neighbours and
    mechanism: those of :class:`Privacy`. Each ``fit`` is a release of its own, unless a ledger is named:
    cross-validation and grid search on private data spend once for every ``fit``.

    epsilon, delta, max_grad_norm: the promise. bounds: (least, greatest) value of a feature, or of each (two arrays),
        which must be known without the records; features are scaled to [-1, 1] by it and clipped. Without it they are
        taken as they are. hidden: width of the hidden layer, 0 for none. epochs, batch_size, learning_rate: of SGD.
    ledger: a file that remembers what this data has spent; None begins each ``fit`` at zero.
    random_state: of initial weights; never of noise and batches, so two fits differ.
    Attributes: classes_, coefficients in `model_`, n_features_in_, and `spent_`, what the last ``fit`` cost.
    Raises: ValueError as scikit-learn's estimators do; ConfigError; BudgetExceededError where the ledger is spent.
    """

    def __init__(
        self,
        epsilon: float = 3.0,
        delta: float = 1e-5,
        *,
        bounds: Any = None,
        hidden: int = 0,
        epochs: int = 20,
        batch_size: int = 64,
        learning_rate: float = 0.5,
        max_grad_norm: float = 1.0,
        ledger: Any = None,
        random_state: int | None = None,
    ) -> None:
        self.epsilon, self.delta, self.bounds, self.hidden = epsilon, delta, bounds, hidden
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.max_grad_norm, self.ledger, self.random_state = max_grad_norm, ledger, random_state

    def fit(self, X: Any, y: Any) -> PrivateClassifier:
        """Train. X: numbers, shape (n, features); y: classes, shape (n,)."""
        X, y = validate_data(self, X, y, dtype=np.float32)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"Classifier can't train when only one class is present: {len(self.classes_)} class.")
        if self.bounds is not None:
            low, high = (np.asarray(bound, dtype=np.float64) for bound in self.bounds)
            if not np.all(low < high):
                raise ConfigError("bounds: expected the least below the greatest value", hint="bounds=(0, 120)")
        dataset = TensorDataset(torch.from_numpy(self._scaled(X)), torch.from_numpy(labels.astype(np.int64)))
        seed = np.random.RandomState(self.random_state).randint(2**31) if self.random_state is not None else None
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.manual_seed(seed)
            model = self._network(X.shape[1])
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=self.learning_rate)
        loader: Any = DataLoader(dataset, batch_size=min(self.batch_size, len(dataset)), shuffle=True)
        privacy = Privacy(
            epsilon=self.epsilon,
            delta=self.delta,
            max_grad_norm=self.max_grad_norm,
            epochs=self.epochs,
            ledger=self.ledger,
        )
        wrapped, optimizer, loader = privacy.wrap(model, optimizer, loader)
        for _ in range(self.epochs):
            for batch, target in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(wrapped(batch), target).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        self.spent_ = privacy.spent()
        fresh = self._network(X.shape[1])
        fresh.load_state_dict(wrapped.state_dict())
        self.model_ = fresh.eval()
        return self

    def decision_function(self, X: Any) -> Any:
        """The last class's logit minus the first's for two classes, shape (n,); else logits, shape (n, classes)."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> Any:
        """Probabilities of the classes, shape (n, classes)."""
        return torch.softmax(torch.from_numpy(self._logits(X)), dim=1).numpy()

    def predict(self, X: Any) -> Any:
        """The likeliest class of each record."""
        logits = self._logits(X)
        return self.classes_[logits.argmax(axis=1)]

    def _logits(self, X: Any) -> Any:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float32, reset=False)
        with torch.no_grad():
            return self.model_(torch.from_numpy(self._scaled(X))).double().numpy()

    def _scaled(self, X: Any) -> Any:
        if self.bounds is None:
            return np.ascontiguousarray(X, dtype=np.float32)
        low, high = (np.asarray(bound, dtype=np.float64) for bound in self.bounds)
        scaled = ((X - (low + high) / 2) / ((high - low) / 2)).clip(-1, 1)
        return np.ascontiguousarray(scaled, dtype=np.float32)

    def _network(self, width: int) -> nn.Module:
        classes = len(self.classes_)
        if not self.hidden:
            return nn.Linear(width, classes)
        return nn.Sequential(nn.Linear(width, self.hidden), nn.Tanh(), nn.Linear(self.hidden, classes))
