"""A public stand-in for the digits: Fashion-MNIST at 8 x 8 pixels, as many records, ten classes; for tuning on.

`load` makes a task like `choral.trainers.data.sets.digits`, split and trained alike, of the first 1,438 training
pictures of Fashion-MNIST, each averaged to 8 x 8; 5,000 of its test pictures score it, so that a choice by the score is
one between settings and not between draws. No record of the digits is read.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from choral.trainers.data.sets.fashion import read_fashion
from choral.trainers.data.tables import DataTable, table_task
from choral.trainers.task.settings import Split, Training
from choral.trainers.task.task import Task

RECORDS, TEST = 1438, 5000  # to train on, as many as of the digits; to score with
DATA = Path(os.environ["CHORAL_DATA"]) if "CHORAL_DATA" in os.environ else None


def load(split: Split, training: Training, seed: int) -> Task:
    """`seed` decides the split, the initial weights and the data order; which records there are, it does not."""
    train, test = tables()
    return table_task(train, test, classes=10, split=split, training=training, seed=seed)


@cache
def tables() -> tuple[DataTable, DataTable]:
    """To train on and to test with; features of shape (n, 64), in 0..1."""
    train, test = read_fashion(DATA)
    return _first(train, RECORDS), _first(test, TEST)


def _first(table: DataTable, size: int) -> DataTable:
    pixels = torch.nn.functional.adaptive_avg_pool2d(table.features[:size], 8)
    return DataTable(features=pixels.flatten(1), labels=table.labels[:size])
