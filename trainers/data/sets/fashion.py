"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, MIT): 60,000 and 10,000 pictures of clothes, 28 x 28, 10 classes."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import nn

from choral.errors import DataError
from choral.trainers.data.sets.sources import Source, read
from choral.trainers.data.tables import DataTable, table_classification
from choral.trainers.task.settings import Split, Training
from choral.trainers.task.task import Task

_URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"
_FILES = {
    "train-images-idx3-ubyte": (47040016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train-labels-idx1-ubyte": (60008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte": (7840016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte": (10008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}
SOURCES = {
    name: Source(folder="fashion-mnist", name=name, url=f"{_URL}/{name}.gz", size=size, sha256=digest)
    for name, (size, digest) in _FILES.items()
}


def read_fashion(data_dir: str | Path | None = None) -> tuple[DataTable, DataTable]:
    """Train and test table; features float32 in 0..1, shape (n, 1, 28, 28). Raises: what sources.read does."""
    tables = []
    for part in ("train", "t10k"):
        images = idx(read(SOURCES[f"{part}-images-idx3-ubyte"], data_dir))
        labels = idx(read(SOURCES[f"{part}-labels-idx1-ubyte"], data_dir))
        tables.append(DataTable(features=images.unsqueeze(1).float() / 255, labels=labels.long()))
    return tables[0], tables[1]


def load(split: Split, training: Training, seed: int, data_dir: str | Path | None = None) -> Task:
    """The 60,000 pictures split among parties, the 10,000 to test on.

    ``training.hidden`` 0 trains a linear model; else a small CNN whose last hidden layer has that width.
    """
    train, test = read_fashion(data_dir)

    def make() -> nn.Module:
        if not training.hidden:
            return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, training.hidden),
            nn.ReLU(),
            nn.Linear(training.hidden, 10),
        )

    return table_classification(make, train, test, split=split, training=training, seed=seed)


def idx(content: bytes) -> torch.Tensor:
    """An IDX file of unsigned bytes (magic 0, 0, 8, dimensions; big-endian sizes), as uint8 of its shape.

    Raises: DataError if it is another kind, truncated or too long.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError("not an IDX file of unsigned bytes", hint="the first bytes should be 0, 0, 8")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise DataError("the IDX file ends within its header", hint="fetch it again")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    count = 1
    for size in shape:
        count *= size
    if len(content) - header != count:
        raise DataError(f"an IDX file of shape {shape} holds {len(content) - header} bytes", hint="fetch it again")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)
