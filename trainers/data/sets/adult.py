"""Adult (UCI 2, Kohavi and Becker 1996): who earns over 50,000 dollars, from the 1994 US census.

32,561 people to train on, 16,281 to test. The natural key is the occupation (15, the unknown one included).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from choral.errors import DataError
from choral.trainers.data.sets.sources import Source, read
from choral.trainers.data.tables import DataTable, table_task
from choral.trainers.task.settings import Split, Training
from choral.trainers.task.task import Task

_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult"
TRAIN = Source(
    folder="adult",
    name="adult.data",
    url=f"{_URL}/adult.data",
    size=3974305,
    sha256="5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
)
TEST = Source(
    folder="adult",
    name="adult.test",
    url=f"{_URL}/adult.test",
    size=2003153,
    sha256="a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
)

# Of the fourteen columns: numbers with a public centre and width, and words by the codebook (adult.names). The
# sampling weight (2) and education in words (3), which repeats 4, are left out.
_NUMBERS = {0: (38.0, 14.0), 4: (10.0, 2.5)}
_AMOUNTS = {10: 5.0, 11: 5.0}  # capital gain and loss, mostly 0: log(1 + x) over this
_HOURS = (12, 40.0, 12.0)
_WORDS = {
    1: "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov Without-pay Never-worked ?",
    5: "Married-civ-spouse Divorced Never-married Separated Widowed Married-spouse-absent Married-AF-spouse",
    6: "Tech-support Craft-repair Other-service Sales Exec-managerial Prof-specialty Handlers-cleaners"
    " Machine-op-inspct Adm-clerical Farming-fishing Transport-moving Priv-house-serv Protective-serv Armed-Forces ?",
    7: "Wife Own-child Husband Not-in-family Other-relative Unmarried",
    8: "White Asian-Pac-Islander Amer-Indian-Eskimo Other Black",
    9: "Female Male",
}
_COUNTRY, _OCCUPATION, _LABEL = 13, 6, 14


def read_adult(data_dir: str | Path | None = None) -> tuple[DataTable, DataTable]:
    """Train and test table; features float32, shape (n, 50): 5 numbers, 44 flags, and whether from the US.

    Raises: what sources.read does; DataError for a word that the codebook lacks.
    """
    return _table(read(TRAIN, data_dir)), _table(read(TEST, data_dir))


def load(split: Split, training: Training, seed: int, data_dir: str | Path | None = None) -> Task:
    """People by occupation (``split.kind = "key"``) or split otherwise; the test people are given."""
    train, test = read_adult(data_dir)
    return table_task(train, test, classes=2, split=split, training=training, seed=seed)


def _table(content: bytes) -> DataTable:
    lines = content.decode("ascii").splitlines()
    rows = np.array([line.rstrip(".").split(", ") for line in lines if line.count(",") == 14])
    columns = [(rows[:, at].astype(float) - centre) / width for at, (centre, width) in _NUMBERS.items()]
    columns += [np.log1p(rows[:, at].astype(float)) / width for at, width in _AMOUNTS.items()]
    at, centre, width = _HOURS
    columns.append((rows[:, at].astype(float) - centre) / width)
    for at, words in _WORDS.items():
        flags = rows[:, at, None] == np.array(words.split())
        if not flags.any(axis=1).all():
            raise DataError(f"column {at} of the census has a word that is not in its codebook", hint="see adult.names")
        columns += list(flags.T.astype(float))
    columns.append((rows[:, _COUNTRY] == "United-States").astype(float))
    keys = np.char.replace(rows[:, _OCCUPATION], "?", "unknown")
    features = torch.from_numpy(np.stack(columns, axis=1)).float()
    return DataTable(features=features, labels=torch.from_numpy(rows[:, _LABEL] == ">50K").long(), keys=keys)
