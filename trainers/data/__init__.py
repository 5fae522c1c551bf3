"""Data sets by name, and one's own data as a federation: CSV, Parquet, data frames, LEAF files, generators."""

from __future__ import annotations

from choral.trainers.data.columns import Codebook
from choral.trainers.data.leaf import read_leaf
from choral.trainers.data.sets.tasks import TASKS
from choral.trainers.data.tables import DataTable
from choral.trainers.data.tabular import federation_from_csv, federation_from_dataset, federation_from_frame

__all__ = [
    "TASKS",
    "Codebook",
    "DataTable",
    "federation_from_csv",
    "federation_from_dataset",
    "federation_from_frame",
    "read_leaf",
]
