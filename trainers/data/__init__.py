"""Data sets by name, and one's own data as a federation: CSV with a key column, LEAF files, generators."""

from __future__ import annotations

from choral.trainers.data.leaf import read_leaf
from choral.trainers.data.sets.tasks import TASKS
from choral.trainers.data.tables import DataTable
from choral.trainers.data.tabular import federation_from_csv, federation_from_dataset

__all__ = ["TASKS", "DataTable", "federation_from_csv", "federation_from_dataset", "read_leaf"]
