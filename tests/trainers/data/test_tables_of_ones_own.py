"""Tables of one's own: the same tensors from CSV, Parquet and data frames, by what is said of the columns alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars
import pyarrow
import pyarrow.parquet
import pytest
import torch

from choral.errors import ConfigError, DataError
from choral.trainers.data import Codebook, federation_from_csv, federation_from_frame
from choral.trainers.data.own_table import METRICS, TableModel, own_task
from choral.trainers.task.settings import DataSettings, ModelSettings, Split, Training

VISITS = """region,hospital,age,sex,weight,died,cost
n,a,61,f,70.5,no,100
n,b,,m,80,yes,300
s,a,150,f,NA,no,200
s,a,30,x,65,yes,-50
"""
BOOK = Codebook(
    classes=["no", "yes"],
    categories={"sex": ["f", "m", "*"]},
    bounds={"age": (0, 120)},
    missing={"age": [""], "weight": ["NA"]},
)
FEATURES = ["age", "weight", "sex"]
# age scaled and clipped, weight as it is, both flags, then f, m and any other.
EXPECTED = [
    [61 / 60 - 1, 70.5, 0, 0, 1, 0, 0],
    [0, 80, 1, 0, 0, 1, 0],
    [1, 0, 0, 1, 1, 0, 0],
    [-0.5, 65, 0, 0, 0, 0, 1],
]


@pytest.fixture
def visits(tmp_path: Path) -> Path:
    path = tmp_path / "visits.csv"
    path.write_text(VISITS)
    return path


def whole(parties: dict[str, Any]) -> tuple[list[list[float]], list[float]]:
    features, labels = zip(*(party.tensors for party in parties.values()), strict=True)
    return torch.cat(features).tolist(), torch.cat(labels).tolist()


def frames() -> dict[str, Any]:
    table = pandas.read_csv(io.StringIO(VISITS))
    return {"pandas": table, "polars": polars.from_pandas(table), "pyarrow": pyarrow.Table.from_pandas(table)}


class TestEncoding:
    def test_by_the_codebook(self, visits: Path) -> None:
        parties = federation_from_csv(visits, ["region", "hospital"], "died", features=FEATURES, codebook=BOOK)
        assert list(parties) == ["n / a", "n / b", "s / a"]
        features, labels = whole(parties)
        assert np.allclose(features, EXPECTED)
        assert labels == [0, 1, 0, 1]

    @pytest.mark.parametrize("kind", ["pandas", "polars", "pyarrow"])
    def test_data_frames_are_the_same(self, kind: str) -> None:
        parties = federation_from_frame(
            frames()[kind], ["region", "hospital"], "died", features=FEATURES, codebook=BOOK
        )
        assert np.allclose(whole(parties)[0], EXPECTED)
        assert whole(parties)[1] == [0, 1, 0, 1]

    def test_parquet_is_the_same(self, tmp_path: Path) -> None:
        pyarrow.parquet.write_table(frames()["pyarrow"], tmp_path / "visits.parquet")
        parties = federation_from_csv(
            tmp_path / "visits.parquet", ["region", "hospital"], "died", features=FEATURES, codebook=BOOK
        )
        assert np.allclose(whole(parties)[0], EXPECTED)

    def test_a_whole_number_may_be_a_number(self, visits: Path) -> None:
        found = federation_from_csv(visits, "hospital", "cost", kind="number", features=["sex"], codebook=_sex())
        assert torch.cat([party.tensors[1] for party in found.values()]).dtype == torch.float32

    def test_many_pieces(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("choral.trainers.data.table_files._PIECE", 2)
        (tmp_path / "long.csv").write_text("k,x,y\n" + "".join(f"{n % 2},{n},{n % 2}\n" for n in range(7)))
        parties = federation_from_csv(tmp_path / "long.csv", "k", "y")
        assert parties["1"].tensors[0].flatten().tolist() == [1, 3, 5]
        (tmp_path / "long.csv").write_text("k,x,y\n" + "".join(f"{n % 2},{n},{n % 2}\n" for n in range(6)) + "0,z,0\n")
        with pytest.raises(DataError, match="line 8, column 'x': not a number"):
            federation_from_csv(tmp_path / "long.csv", "k", "y")


def _sex() -> Codebook:
    return Codebook(categories={"sex": ["f", "m", "x"]})


@pytest.mark.parametrize(
    ("change", "says", "hint"),
    [
        ({}, "line 2, column 'sex': not a number", "categories"),
        ({"codebook": Codebook(categories={"sex": ["f", "m"]})}, "line 5, column 'sex': not a category", '"\\*"'),
        ({"features": ["age"]}, "line 3, column 'age': empty", "missing"),
        ({"features": ["weight"]}, "line 4, column 'weight': not a number", ""),
        (
            {"label": "died", "features": ["cost"], "codebook": Codebook(classes=["no"])},
            "line 3, column 'died': not a class",
            "list it",
        ),
        ({"label": "cost", "features": ["sex"], "codebook": _sex(), "kind": "count"}, "line 5.*a count is", "number"),
        ({"label": "cost", "kind": "factor"}, "kind is 'factor', expected class, number or count", ""),
        ({"codebook": Codebook(bounds={"age2": (0, 1)})}, "bounds names 'age2', which is no feature", "sex"),
    ],
)
def test_rows_that_do_not_fit_are_named(visits: Path, change: dict[str, Any], says: str, hint: str) -> None:
    given: dict[str, Any] = {"key": "hospital", "label": "cost", "kind": "number", "features": ["sex"], **change}
    if "kind" not in change and given["label"] == "died":
        given["kind"] = "class"
    with pytest.raises((DataError, ConfigError), match=says) as caught:
        federation_from_csv(visits, **given)
    assert not hint or hint.strip("\\") in caught.value.hint.replace('"*"', '"\\*"')


@pytest.mark.parametrize(
    "book",
    [
        {"bounds": {"age": (5, 5)}},
        {"bounds": {"age": (0, float("inf"))}},
        {"categories": {"sex": ["f", "f"]}},
        {"categories": {"sex": ["*", "f"]}},
        {"categories": {"sex": ["f"]}, "bounds": {"sex": (0, 1)}},
    ],
)
def test_a_codebook_that_cannot_be(book: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Codebook(**book)


def test_no_data_frame() -> None:
    with pytest.raises(ConfigError, match="expected a data frame, got list"):
        federation_from_frame([1, 2], "a", "b")


def table(tmp_path: Path, **more: Any) -> DataSettings:
    """600 rows of two hospitals: cost = 300 + 100 x + 50 z + noise of 10; events are Poisson of exp(x + z)."""
    random = np.random.default_rng(5)
    x, z = random.uniform(-1, 1, (2, 600))
    cost = 300 + 100 * x + 50 * z + random.normal(0, 10, 600)
    rows = zip(x, z, cost, random.poisson(np.exp(x + z)), strict=True)
    lines = [f"{'ab'[n % 2]},{row[0]:.6f},{row[1]:.6f},{row[2]:.3f},{row[3]}" for n, row in enumerate(rows)]
    path = tmp_path / "made.csv"
    path.write_text("site,x,z,cost,events\n" + "\n".join(lines) + "\n")
    return DataSettings(path=path, key="site", features=("x", "z"), **more)


def trained(task: Any, passes: int) -> dict[str, float]:
    torch.manual_seed(0)
    dataset = torch.utils.data.ConcatDataset(list(task.parties.values()))
    model, optimizer, loader = task.build(dataset)
    for _ in range(passes):
        task.fit(model, optimizer, loader)
    with torch.no_grad():
        return task.evaluate(model)


class TestTask:
    def test_numbers_are_predicted_as_well_as_least_squares(self, tmp_path: Path) -> None:
        data = table(tmp_path, label="cost", kind="number", bounds={"cost": (100, 500)})
        task = own_task(data, ModelSettings(kind="linear"), Split(), Training(learning_rate=0.1, batch_size=32), 3)
        found = trained(task, 20)
        assert tuple(found) == METRICS["number"]
        pairs = [dataset.tensors for dataset in task.parties.values()]
        held = torch.cat([task.held_out[name].tensors[0] for name in task.held_out]).double()
        truth = torch.cat([task.held_out[name].tensors[1] for name in task.held_out]).double()
        rows, labels = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
        ones = lambda part: torch.cat([part, torch.ones(len(part), 1).double()], dim=1)  # noqa: E731
        best = torch.linalg.lstsq(ones(rows), labels).solution
        oracle = float(((ones(held) @ best - truth) * 200).abs().mean())  # 200: half the width of the bounds
        assert found["mean absolute error"] == pytest.approx(oracle, rel=0.03)
        assert found["R2"] > 0.95
        assert task.references()["mean absolute error"]["always the mean"] > 4 * oracle

    def test_counts_come_near_their_means(self, tmp_path: Path) -> None:
        data = table(tmp_path, label="events", kind="count")
        task = own_task(data, ModelSettings(kind="linear"), Split(), Training(learning_rate=0.05, batch_size=32), 3)
        found, level = trained(task, 20), task.references()["mean Poisson deviance"]["always the mean"]
        assert found["mean Poisson deviance"] < 1.3 < level  # of a true model it is about 1.1

    def test_a_table_model_reads_words(self) -> None:
        model = TableModel(1, (3, 2), hidden=4, outputs=2, embedding=8)
        rows = torch.tensor([[0.5, 0, 0], [0.5, 2, 0]])
        assert not torch.equal(*model(rows))
        assert [embed.weight.shape for embed in model.words] == [(3, 2), (2, 1)]

    @pytest.mark.parametrize(
        ("data", "model", "split", "says"),
        [
            ({"label": ""}, {}, {}, "data.label is not set"),
            ({}, {}, {"kind": "iid"}, "data.key says whose each row is"),
            ({"key": ()}, {}, {}, "goes by class"),
            ({"key": ()}, {}, {"kind": "key"}, "no data.key to split by"),
            ({}, {"kind": "table"}, {}, "names no column"),
        ],
    )
    def test_what_does_not_go_together(
        self, tmp_path: Path, data: dict[str, Any], model: dict[str, Any], split: dict[str, Any], says: str
    ) -> None:
        given = {"label": "cost", "kind": "number", **data}
        settings = table(tmp_path, **{name: value for name, value in given.items() if name != "key"})
        if "key" in given:
            settings = DataSettings(**{**vars(settings), "key": given["key"]})
        with pytest.raises(ConfigError, match=says):
            own_task(settings, ModelSettings(**model), Split(**split), Training(), 0)
