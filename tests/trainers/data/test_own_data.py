from __future__ import annotations

import json

import pytest
import torch

from choral import federate
from choral.errors import ConfigError, DataError
from choral.trainers.data import federation_from_csv, read_leaf

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
        parties = federation_from_csv(path, "hospital", "pressure", features=["age"], delimiter=";")
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
