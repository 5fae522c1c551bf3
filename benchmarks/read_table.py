"""Processor time of reading a wide CSV file as a federation, over `csv.reader` and `float`: 300 x 2,002 values."""

from __future__ import annotations

import csv
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from choral.trainers.data import federation_from_csv

ROWS, COLUMNS, TRIES = 300, 2000, 7


def main() -> None:
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wide.csv"
        header = ",".join(["key", "label", *(f"f{number}" for number in range(COLUMNS))])
        lines = [
            ",".join([f"h{row % 3}", str(row % 2), *(f"{value:.6f}" for value in random.normal(size=COLUMNS))])
            for row in range(ROWS)
        ]
        path.write_text("\n".join([header, *lines]) + "\n")
        times = [(_seconds(plain, path), _seconds(choral, path)) for _ in range(TRIES)]
    parsing, ours = (min(each) for each in zip(*times, strict=True))
    print(json.dumps({"plain parsing, s": parsing, "federation_from_csv, s": ours, "ratio": ours / parsing}, indent=1))


def plain(path: Path) -> Any:
    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    return torch.tensor([[float(value) for value in row[1:]] for row in rows])


def choral(path: Path) -> Any:
    return federation_from_csv(path, "key", "label")


def _seconds(read: Callable[[Path], Any], path: Path) -> float:
    started = time.process_time()
    read(path)
    return time.process_time() - started


if __name__ == "__main__":
    main()
