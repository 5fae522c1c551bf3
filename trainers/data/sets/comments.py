"""Which posts on Facebook pages get a comment in the hours that follow: a page is a party.

Singh, Sandhu, Kumar 2015 (UCI 363), in the copy of github.com/wdehrich/facebook-comment-volume-prediction (MIT):
40,949 posts of 641 pages to train on, 10,044 of 979 pages to test. A page is known by its first four columns
(likes, check-ins, returns, category). The label is whether the last column is above 0.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from choral.trainers.data.sets.sources import Source, read
from choral.trainers.data.tables import DataTable, table_task
from choral.trainers.task.settings import Split, Training
from choral.trainers.task.task import Task

_COPY = "https://raw.githubusercontent.com/wdehrich/facebook-comment-volume-prediction"
TRAIN = Source(
    folder="facebook-comments",
    name="Features_Variant_1_without_derived.csv",
    url=f"{_COPY}/2ff3e6a6a0361bfafa6af0e13233727ac056df95/Dataset/Dataset/Training_transformed/"
    "Features_Variant_1_without%20derived.csv",
    size=2966406,
    sha256="6da0fe2d080389dfb075c6fd22fa76553617ae2a6bcac0f0444a6b094c462cdb",
)
TEST = Source(
    folder="facebook-comments",
    name="Features_TestSet.csv",
    url=f"{_COPY}/a0f2c7c395749c488793d3327058bc7e94c8b8b1/data/Features_TestSet.csv",
    size=3103665,
    sha256="2a44ae9376204719ecd66cc2486481b214848428108b73407ef4e750a3ed9204",
)

# The test file has 54 columns: 25 that are derived from the page's past, and a constant flag, are not in the other.
_SHARED = [*range(4), *range(29, 37), 38, *range(39, 54)]
_PAGE, _COUNTS, _DAYS = slice(0, 3), slice(4, 13), slice(13, 27)
_CATEGORIES = 107

# Centre and width of sign(c) log(1 + |c|) of each count c. Public constants, of this public data set: in a federation
# whose data is not public they would themselves be a release.
_CENTRES = np.array([2.5, 1.5, 1.25, 2.5, -0.2, 3.3, 4.1, 2.8, 3.2])
_WIDTHS = np.array([1.8, 1.6, 1.6, 1.8, 2.6, 0.9, 1.8, 1.9, 0.2])
_PAGE_CENTRES = np.array([12.2, 2.2, 8.4])
_PAGE_WIDTHS = np.array([2.3, 3.5, 3.1])


def read_comments(data_dir: str | Path | None = None, *, page_columns: bool = False) -> tuple[DataTable, DataTable]:
    """Train and test table; features float32, shape (n, 23) or with ``page_columns`` (n, 133).

    The 23: nine counts as logarithms, centred and scaled by public constants, 14 weekday flags (all 0 on some rows).
    The 110 more: three counts of the page likewise, and its category, one of 107, as flags. Page columns come from the
    page's history and are also what a party is known by.

    Raises: what :func:`choral.trainers.data.sets.sources.read` does.
    """
    train = np.loadtxt(io.BytesIO(read(TRAIN, data_dir)), delimiter=",", skiprows=1)
    test = np.loadtxt(io.BytesIO(read(TEST, data_dir)), delimiter=",")[:, _SHARED]
    pages = {tuple(page): number for number, page in enumerate(np.unique(train[:, :4], axis=0))}
    for page in np.unique(test[:, :4], axis=0):
        pages.setdefault(tuple(page), len(pages))
    return _table(train, pages, page_columns), _table(test, pages, page_columns)


def load(split: Split, training: Training, seed: int, data_dir: str | Path | None = None) -> Task:
    """Posts by page (``split.kind = "key"``) or split otherwise; without the page columns. The test posts are given."""
    train, test = read_comments(data_dir)
    return table_task(train, test, classes=2, split=split, training=training, seed=seed)


def _table(rows: np.ndarray[Any, Any], pages: dict[tuple[float, ...], int], page_columns: bool) -> DataTable:
    parts = [(_log(rows[:, _COUNTS]) - _CENTRES) / _WIDTHS, rows[:, _DAYS]]
    if page_columns:
        category = np.eye(_CATEGORIES)[rows[:, 3].astype(int) - 1]
        parts += [(_log(rows[:, _PAGE]) - _PAGE_CENTRES) / _PAGE_WIDTHS, category]
    keys = np.array([f"page-{pages[tuple(row)]:04d}" for row in rows[:, :4]])
    features = torch.from_numpy(np.concatenate(parts, axis=1)).float()
    return DataTable(features=features, labels=torch.from_numpy(rows[:, -1] > 0).long(), keys=keys)


def _log(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    logarithms: np.ndarray[Any, Any] = np.sign(counts) * np.log1p(np.abs(counts))
    return logarithms
