"""The embedded task: scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels, 10 classes)."""

from __future__ import annotations

import torch

from choral.errors import ConfigError
from choral.trainers.data.tables import DataTable, held_out, table_task
from choral.trainers.task.settings import Split, Training
from choral.trainers.task.task import Task


def load(split: Split, training: Training, seed: int) -> Task:
    """Digits among ``split.parties`` parties, Dirichlet by label unless set otherwise; a two-layer network and SGD.

    ``seed`` decides the held-out records, the split, the initial weights and the data order.
    """
    train, test = held_out(_digits(), split.test_fraction, seed)
    return table_task(train, test, classes=10, split=split, training=training, seed=seed)


def _digits() -> DataTable:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ConfigError(
            "the digits come with scikit-learn, which is not installed", hint='pip install "choral[cli]"'
        ) from None

    pixels, labels = load_digits(return_X_y=True)
    return DataTable(features=torch.from_numpy(pixels).float() / 16, labels=torch.from_numpy(labels).long())
