"""Records with few features out of many, as compressed sparse rows: a dataset that torch can read, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch.utils.data import Dataset

from choral.errors import DataError


class SparseDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """rows: scipy CSR, shape (n, features), kept as float64; targets: integers, shape (n,).

    As a dataset it gives (dense row, float32, shape (features,); label). Raises: DataError for other shapes, values
    that are not finite, or labels that are not whole numbers.
    """

    def __init__(self, rows: Any, targets: Any) -> None:
        self.rows = sparse.csr_array(rows, dtype=np.float64)
        self.rows.sum_duplicates()
        self.targets = torch.as_tensor(targets)
        if self.targets.shape != (self.rows.shape[0],) or self.targets.is_floating_point():
            raise DataError(
                f"{self.rows.shape[0]} rows need as many whole labels, got {self.targets.dtype} of shape"
                f" {tuple(self.targets.shape)}"
            )
        if not np.isfinite(self.rows.data).all():
            raise DataError("a row has a value that is not finite", hint="leave out or fill in such values")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        dense = self.rows[[index]].toarray()[0]
        return torch.from_numpy(dense).float(), self.targets[index]

    @property
    def nbytes(self) -> int:
        """What the records take: eight bytes and a column number per entry, and a label per record."""
        return int(self.rows.data.nbytes + self.rows.indices.nbytes + self.targets.nbytes)
