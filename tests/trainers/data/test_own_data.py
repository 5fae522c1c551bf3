from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from flat_arguments import federate
from torch.utils.data import Dataset, TensorDataset

from choral.errors import ConfigError, DataError
from choral.trainers.data import federation_from_csv, federation_from_dataset, read_leaf

VISITS = """hospital,age,pressure,died
north,61,1.5,0
south,70,-2,1

"east, upper",55,1e2,1
north,44,0,1
south,39,3,0
"""


@pytest.fixture
def csv_of(tmp_path):
    def write(content: str | bytes) -> str:
        path = tmp_path / "visits.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


class Records(Dataset):
    """Records that are not tensors in a row: a dict each, counted as they are read."""

    def __init__(self, size=5):
        self.size, self.read = size, 0

    def __len__(self):
        return self.size

    def __getitem__(self, number):
        self.read += 1
        return {"site": "ab"[number % 2], "value": number}


class TestDataset:
    def test_one_party_per_key(self):
        numbers = torch.arange(5)
        parties = federation_from_dataset(TensorDataset(numbers, -numbers), ["b", "a", "b", "c", "a"])
        assert {name: party.tensors[0].tolist() for name, party in parties.items()} == {
            "a": [1, 4],
            "b": [0, 2],
            "c": [3],
        }
        assert parties["a"].tensors[1].tolist() == [-1, -4]
        keys = np.array(["b", "a", "b", "c", "a"])
        assert list(federation_from_dataset(TensorDataset(numbers), keys, min_records=2)) == ["a", "b"]

    def test_a_key_that_is_a_function_reads_each_record_once(self):
        records = Records()
        parties = federation_from_dataset(records, lambda record: record["site"])
        assert records.read == 5
        assert [record["value"] for record in parties["a"]] == [0, 2, 4]
        assert [record["value"] for record in parties["b"]] == [1, 3]

    def test_it_trains(self, job):
        data = torch.utils.data.ConcatDataset(list(job()["parties"].values()))
        parties = federation_from_dataset(data, ["abc"[number % 3] for number in range(len(data))])
        assert federate(**job(parties=parties)).history[-1].round == 3

    @pytest.mark.parametrize(
        ("dataset", "key", "says"),
        [
            (iter([1, 2]), ["a", "b"], "no length"),
            (Records(), ["a"] * 4, "4 keys for 5 records"),
            (Records(), ["a"] * 4 + [" "], "record 4 is empty"),
            (Records(), ["a"] * 4 + [None], "record 4 is a NoneType"),
            (Records(), lambda record: record["value"], "record 0 is a int"),
            (Records(0), [], "none of 0 parties"),
        ],
    )
    def test_refused(self, dataset, key, says):
        with pytest.raises(DataError, match=says):
            federation_from_dataset(dataset, key)


def test_the_lines_of_the_guide_run(tmp_path, monkeypatch):
    """The Python block of docs/data.md, as it stands there."""
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    Path("visits.csv").write_text(VISITS)
    Path("femnist/data/train").mkdir(parents=True)
    user = {"x": [[0.5]], "y": [1]}
    Path("femnist/data/train/a.json").write_text(json.dumps({"users": ["u"], "user_data": {"u": user}}))
    visits = TensorDataset(torch.tensor([[61.0], [44.0], [47.0]]), torch.tensor([0, 1, 1]))
    names = {"pandas": pandas, "visits": visits, "hospitals": ["north", "south", "north"]}
    lines = [line for line in code.splitlines() if line.startswith("parties = ")]
    found = []
    for line in lines:
        exec("from choral.trainers.data import *\n" + line, names)  # noqa: S102
        found.append(list(names["parties"]))
    hospitals = ["east, upper", "north", "south"]
    assert found == [hospitals, hospitals, hospitals, ["north", "south"], ["age 40 on", "age 60 on"], ["u"]]


class TestCsv:
    def test_one_party_per_key(self, csv_of):
        parties = federation_from_csv(csv_of(VISITS), "hospital", "died")
        assert list(parties) == ["east, upper", "north", "south"]
        features, labels = parties["north"].tensors
        assert features.tolist() == [[61, 1.5], [44, 0]]
        assert labels.dtype == torch.int64
        assert labels.tolist() == [0, 1]
        assert list(federation_from_csv(csv_of(VISITS), "hospital", "died", min_records=2)) == ["north", "south"]

    def test_real_targets_other_delimiter_chosen_columns(self, csv_of):
        path = csv_of("\ufeff" + VISITS.replace(",", ";"))
        parties = federation_from_csv(path, "hospital", "pressure", kind="number", features=["age"], delimiter=";")
        features, targets = parties["south"].tensors
        assert (features.tolist(), targets.tolist(), targets.dtype) == ([[70], [39]], [-2, 3], torch.float32)

    def test_it_trains(self, csv_of, job):
        rows = "".join(f"{'abc'[i % 3]},{i % 7},{i % 5},{i % 2},{i % 4},{i % 3},{i % 2}\n" for i in range(60))
        parties = federation_from_csv(csv_of("site,a,b,c,d,e,y\n" + rows), "site", "y")
        assert federate(**job(parties=parties)).history[-1].round == 3

    @pytest.mark.parametrize(
        ("content", "kind", "says"),
        [
            ("", DataError, "is empty"),
            ("hospital,age,died\n", DataError, "no rows"),
            ("hospital,age\nnorth,61\n", ConfigError, "no column 'died'"),
            ("hospital,age,age,died\nnorth,1,2,0\n", ConfigError, "two columns"),
            ("hospital,died\nnorth,1\n", ConfigError, "no column besides"),
            ("hospital,age,died\nnorth,61\n", DataError, "line 2: 2 fields, the header has 3"),
            ("hospital,age,died\nnorth,61,0,9\n", DataError, "line 2: 4 fields"),
            ("hospital,age,died\nnorth,61,0\n ,61,0\n", DataError, "line 3: the key column 'hospital' is empty"),
            ("hospital,age,died\nnorth,secret,0\n", DataError, "line 2, column 'age': not a number"),
            ("hospital,age,died\nnorth,,0\n", DataError, "column 'age': empty"),
            ("hospital,age,died\nnorth,nan,0\n", DataError, "column 'age': not finite"),
            ("hospital,age,died\nnorth,61,inf\n", DataError, "column 'died': not finite"),
            ("hospital,age,died\nnorth,1e300,0\n", DataError, "range of float32"),
            ('hospital,age,died\nnorth,"61,0\n', DataError, "not valid CSV"),
            (b"hospital,age,died\nn\xff,61,0\n", DataError, "not valid CSV"),
        ],
    )
    def test_bad_files(self, csv_of, content, kind, says):
        with pytest.raises(kind, match=says) as caught:
            federation_from_csv(csv_of(content), "hospital", "died")
        assert "secret" not in str(caught.value)

    def test_bad_arguments(self, csv_of, tmp_path):
        path = csv_of(VISITS)
        for key, label, more in [
            ("died", "died", {}),
            ("hospital", "died", {"features": ["died"]}),
            ("hospital", "died", {"features": ["age", "age"]}),
            ("hospital", "died", {"features": []}),
            ("hospital", "died", {"delimiter": ""}),
            ("hospital", "died", {"min_records": 0}),
        ]:
            with pytest.raises(ConfigError):
                federation_from_csv(path, key, label, **more)
        with pytest.raises(DataError, match="cannot read"):
            federation_from_csv(tmp_path / "none.csv", "hospital", "died")


LEAF = {
    "users": ["ann", "bob", "none"],
    "num_samples": [2, 1, 0],
    "user_data": {
        "ann": {"x": [[0.5, 1], [2, 3]], "y": [1, 0]},
        "bob": {"x": [[4, 5]], "y": [2]},
        "none": {"x": [], "y": []},
    },
}


class TestLeaf:
    def write(self, folder, content, name="all.json"):
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return folder / name

    def test_numbers(self, tmp_path):
        parties = read_leaf(self.write(tmp_path, LEAF))
        assert list(parties) == ["ann", "bob"]
        assert parties["ann"].tensors[0].tolist() == [[0.5, 1], [2, 3]]
        assert parties["bob"].tensors[1].tolist() == [2]

    def test_texts_and_a_folder(self, tmp_path):
        self.write(tmp_path, LEAF, "a.json")
        self.write(tmp_path, {"users": ["eve"], "user_data": {"eve": {"x": ["ab", "b}"], "y": ["c", "\n"]}}}, "b.json")
        parties = read_leaf(tmp_path)
        assert list(parties) == ["ann", "bob", "eve"]
        # LEAF's own alphabet: "\n" is 0, "a" is 53, "}" is 79.
        assert parties["eve"].tensors[0].tolist() == [[53, 54], [54, 79]]
        assert parties["eve"].tensors[1].tolist() == [55, 0]

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ("no json", "not in LEAF's format"),
            ("{}", "not in LEAF's format"),
            ({"num_samples": [2, 1]}, "3 users and 2"),
            ({"num_samples": [3, 1, 0]}, "do not agree"),
            ({"users": ["ann", "ann", "bob"]}, "named twice"),
            ({"users": ["ann", "bob", "eve"]}, "no entry"),
            ({"users": [], "num_samples": []}, "no user with records"),
            (
                {"user_data": {**LEAF["user_data"], "bob": {"x": [["4", 5]], "y": [2]}}},
                "'bob': records must be numbers",
            ),
            ({"user_data": {**LEAF["user_data"], "bob": {"x": [[1e300, 5]], "y": [2]}}}, "finite"),
            ({"user_data": {**LEAF["user_data"], "bob": {"x": [[4, 5]], "y": [0.5]}}}, "whole"),
            ({"user_data": {**LEAF["user_data"], "ann": {"x": [[4, 5], [6]], "y": [0, 1]}}}, "one shape"),
            ({"user_data": {**LEAF["user_data"], "ann": {"x": ["ab", "c"], "y": ["a", "b"]}}}, "different lengths"),
            ({"user_data": {**LEAF["user_data"], "bob": {"x": ["a~"], "y": ["a"]}}}, "not in the alphabet"),
            ({"user_data": {**LEAF["user_data"], "bob": {"x": ["ab"], "y": ["ab"]}}}, "one character"),
        ],
    )
    def test_bad_files(self, tmp_path, change, says):
        path = self.write(tmp_path, change if isinstance(change, str) else LEAF | change)
        with pytest.raises(DataError, match=says):
            read_leaf(path)

    def test_missing(self, tmp_path):
        for path in (tmp_path, tmp_path / "none.json"):
            with pytest.raises(DataError):
                read_leaf(path)
