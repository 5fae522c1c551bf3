"""Mistakes that a new user can make, and what is said: what was wrong, what was expected, what to do. One list."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import pytest
from small_jobs import SETTINGS

from choral.cli.command_line import main
from choral.failures import failure_of

HEAD = "hospital,age,sex,died"
ROWS = [["abc"[n % 3], str(20 + n), "fm"[n % 2], "yes" if n % 5 < 2 else "no"] for n in range(60)]


def table(rows: list[list[str]], head: str = HEAD, encoding: str = "utf-8") -> bytes:
    return "\n".join([head, *map(",".join, rows), ""]).encode(encoding)


FILES = {
    "visits.csv": table(ROWS),
    "lacking.csv": table([[*row[:3], row[3] if n % 9 else ""] for n, row in enumerate(ROWS)]),
    "one_class.csv": table([[*row[:3], "yes"] for row in ROWS]),
    "one_party.csv": table([["a", *row[1:]] for row in ROWS]),
    "no_party.csv": table([["" if n == 5 else row[0], *row[1:]] for n, row in enumerate(ROWS)]),
    "twice.csv": table([[*row, row[1]] for row in ROWS], HEAD + ",age"),
    "latin.csv": table([["hôpital", *row[1:]] for row in ROWS], encoding="latin-1"),
    "empty.csv": b"",
    "header.csv": HEAD.encode(),
    "semicolons.csv": table(ROWS).replace(b",", b";"),
    "ragged.csv": table([*ROWS[:9], [*ROWS[9], "more"]]),
    "visits.parquet": b"no parquet",
    "visits.xlsx": b"PK\3\4",
    "small.toml": SETTINGS.encode(),
    "open.toml": (SETTINGS + "[privacy\nepsilon = 3\n").encode(),
    "twice.toml": (SETTINGS + "rounds = 2\n").encode(),
    "key.toml": SETTINGS.replace("rounds", "round").encode(),
    "table.toml": SETTINGS.replace("[training]", "[trainig]").encode(),
    "full/of things": b"",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)
    assert main(["train", str(path / "small.toml"), "--out", str(path / "done"), "--quiet"]) == 0
    data = ["--data", str(path / "visits.csv"), "--key", "hospital", "--label", "died", "--public"]
    assert main(["init", *data, "--out", str(path / "job.toml")]) == 0
    job = (path / "job.toml").read_text()
    edits = {
        "label_too.toml": ("features = [", 'features = ["died", '),
        "no_column.toml": ("features = [", 'features = ["weight", '),
        "no_file.toml": ("visits.csv", "visit.csv"),
        "misspelt.toml": ("label = ", "lable = "),
        "no_word.toml": ('["f", "m"]', '["f"]'),
        "no_class.toml": ('["no", "yes"]', '["no", "maybe"]'),
    }
    for name, (old, new) in edits.items():
        assert old in job
        (path / name).write_text(job.replace(old, new, 1))
    return path


def init(file: str, *more: str, key: str = "hospital", label: str = "died") -> list[str]:
    return ["init", "--data", file, "--key", key, "--label", label, "--out", "new.toml", *more]


def train(*more: str) -> list[str]:
    return ["train", "small.toml", "--out", "new", *more]


def compare(file: str) -> list[str]:
    return ["compare", file, "--out", "new", "--seeds", "1", "--workers", "1", "--training.rounds", "1"]


SCORES = ["--design", "coins", "--epsilon", "3", "--delta", "1e-5"]
BUDGET = ["budget", "--epsilon", "3", "--delta", "1e-5"]

MISTAKES: dict[str, tuple[list[str], str, str]] = {
    # A table of one's own
    "no such table": (init("visit.csv"), "cannot read visit.csv: No such file", "a path is looked for from"),
    "a folder for a table": (init("full"), "cannot read full: Is a directory", "expected a CSV or Parquet file"),
    "an empty table": (init("empty.csv"), "empty.csv is empty", "the first line names the columns"),
    "a header alone": (init("header.csv"), "has a header and no rows", "the first line names the columns"),
    "not UTF-8": (init("latin.csv"), "latin.csv is not valid CSV in UTF-8", "save it as UTF-8"),
    "a spreadsheet": (init("visits.xlsx"), "visits.xlsx is neither CSV nor Parquet", "save it as CSV"),
    "Parquet by name alone": (init("visits.parquet"), "visits.parquet is not a Parquet file", "or save it as CSV"),
    "another delimiter": (init("semicolons.csv"), "has no column 'hospital'", "--delimiter ';'"),
    "a delimiter of two": (init("visits.csv", "--delimiter", ";;"), "expected one character as delimiter", 'or ";"'),
    "a field too many": (init("ragged.csv"), "line 11: 5 fields, the header has 4", "in quotation marks"),
    "a column twice": (init("twice.csv"), "two columns named 'age'", "a name of its own"),
    "a key that is not there": (init("visits.csv", key="hospitl"), "no column 'hospitl'", "did you mean 'hospital'?"),
    "a label that is not there": (init("visits.csv", label="dead"), "no column 'dead'", "did you mean 'died'?"),
    "a label with missing values": (init("lacking.csv"), "some rows have no 'died'", "leave them out"),
    "a label of one class": (init("one_class.csv"), "'died' is the same in every row", "nothing to learn"),
    "the key as label": (init("visits.csv", label="hospital"), "'hospital' is named twice", "plays one part"),
    "one party": (init("one_party.csv"), "all rows are of one party by hospital", "--key - to deal rows out"),
    "a row of nobody": (init("no_party.csv"), "line 7: the key column 'hospital' is empty", "needs a party"),
    "epsilon 0": (init("visits.csv", "--epsilon", "0"), "epsilon is 0.0, expected a finite number > 0", "from 1 to 8"),
    "a kind of label": (init("visits.csv", "--kind", "klass"), "--kind is 'klass', expected one of", "mean class?"),
    # Its settings
    "the label among the features": (compare("label_too.toml"), "'died' is named twice", "out of the features"),
    "a feature that is not there": (compare("no_column.toml"), "no column 'weight'", "its columns: hospital, age"),
    "a table that was moved": (compare("no_file.toml"), "visit.csv: No such file", "looked for from"),
    "a misspelt key of data": (compare("misspelt.toml"), "unknown key data.lable", "did you mean data.label?"),
    "a word that is not listed": (compare("no_word.toml"), "column 'sex': not a category", "list it"),
    "a class that is not listed": (compare("no_class.toml"), "column 'died': not a class", "list it"),
    # Settings
    "no such settings": (compare("jobb.toml"), "no such file: jobb.toml", "is one to start from"),
    "a folder for settings": (compare("full"), "cannot read full: Is a directory", "expected a TOML file"),
    "a table for settings": (compare("visits.csv"), "visits.csv is not valid TOML", "choral init --data visits.csv"),
    "a syntax error": (compare("open.toml"), "open.toml is not valid TOML: Expected ']'", "to compare with"),
    "a key twice": (compare("twice.toml"), "not valid TOML: Cannot overwrite a value", "a key stands twice"),
    "a misspelt key": (compare("key.toml"), "unknown key training.round", "did you mean training.rounds?"),
    "a misspelt section": (compare("table.toml"), "unknown key trainig", "did you mean training?"),
    "nothing to compare": (compare("small.toml"), "no [arms.NAME] in the settings", "see examples/digits.toml"),
    "settings of a job for statistics": (["stats", "small.toml"], "unknown key device", "known keys here: title"),
    # Flags
    "no settings": (["compare", "--out", "new"], "CONFIG is not given", "TOML file with the settings"),
    "no folder": (["train", "small.toml"], "--out is not given", "must be new or empty"),
    "an unknown command": (["trian", "small.toml"], "unknown command 'trian'", "did you mean train?"),
    "an unknown arm": (train("--arm", "clud"), "no arm 'clud'", "arms in small.toml"),
    "a word for a number": (train("--privacy.epsilon", "three"), "'three', expected a number", "--help-all"),
    "epsilon infinite": (train("--privacy.epsilon", "inf"), "epsilon is inf, expected a finite number", "from 1 to 8"),
    "delta too large": (
        train("--privacy.epsilon", "3", "--privacy.delta", "0.1"),
        "not below 1/n",
        "well below 1 over",
    ),
    "negative rounds": (train("--training.rounds", "-3"), "expected training.rounds >= 1, got -3", "from 1"),
    "no learning rate": (train("--training.learning-rate", "nan"), "learning_rate > 0, got nan", "e.g. 0.1"),
    "a batch of nothing": (train("--training.batch-size", "0"), "batch_size >= 1, got 0", "from 1"),
    "a federation of one": (train("--split.parties", "1"), "at least 2 parties, got 1", "--centralized"),
    "a rate above 1": ([*BUDGET, "--sample-rate", "64", "--steps", "3"], "0 < sample_rate <= 1", "64 / 6400"),
    "two unknowns": (BUDGET, "expected all but exactly one of epsilon", "Leave out --noise-multiplier"),
    # Folders and files
    "a folder with other files": (["train", "small.toml", "--out", "full"], "already holds other", "another --out"),
    "a folder with a run": (["train", "small.toml", "--out", "done"], "already holds another run", "--resume"),
    "a file for a folder": (["train", "small.toml", "--out", "visits.csv"], "visits.csv is a file", "name a folder"),
    "a folder inside a file": (["train", "small.toml", "--out", "visits.csv/x"], "Not a directory", "another place"),
    "a run with other settings": (
        ["train", "small.toml", "--out", "done", "--resume", "--training.learning-rate", "0.7"],
        "cannot resume: training.learning_rate was 0.5, now it is 0.7",
        "use the same settings, or a new --out",
    ),
    "no run": (["audit", "full"], "full is not a run folder: no run.json", "the folder given to --out"),
    "no report": (["report", "full"], "no report at full", "choral compare and choral audit make one"),
    "no ledger": (["ledger", "show", "gone"], "no ledger at gone", "NAME.jsonl"),
    "another file for a ledger": (["ledger", "show", "visits.csv"], "visits.csv, line 1: not a line", "Restore"),
    "no receipts": (["verify", "gone.json"], "cannot read gone.json: No such file", "name receipts"),
    "no scores": (["audit", "--scores", "gone.csv", *SCORES], "no file of scores at gone.csv", "score,member"),
    "another file for scores": (["audit", "--scores", "visits.csv", *SCORES], "visits.csv begins with", "score,member"),
    "an export of no run": (["export", "full", "--out", "model.pt2"], "full is not a run folder", "--out"),
    # Sites
    "a path for a name": (["site", "init", "../north"], "expected a name of 1 to 63 letters", "a name is no path"),
    "no site": (["site", "show", "--site", "full"], "full has no site.toml", "choral site init NAME"),
    "no directory of sites": (
        ["serve", "small.toml", "--directory", "gone.toml", "--out", "new"],
        "no such file: gone.toml",
        "choral site init hub",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_was_wrong_and_what_to_do(
    mistake: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, what, hint = MISTAKES[mistake]
    monkeypatch.chdir(folder)
    assert main(words) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 2, said.err
    assert lines[0].startswith("choral: ")
    assert what in lines[0]
    assert lines[1].startswith("  hint: ")
    assert hint in lines[1]
    assert said.out == ""
    assert not (folder / "new").exists()
    assert not (folder / "new.toml").exists()


def test_dates_are_left_out_and_said_so(tmp_path: Path, capsys: Any) -> None:
    rows = [[*row, f"2024-01-{n % 28 + 1:02}"] for n, row in enumerate(ROWS)]
    (tmp_path / "visits.csv").write_bytes(table(rows, HEAD + ",seen"))
    words = ["--key", "hospital", "--label", "died", "--public", "--out", str(tmp_path / "job.toml")]
    assert main(["init", "--data", str(tmp_path / "visits.csv"), *words]) == 0
    assert "left out: seen (dates: put a number in their place" in capsys.readouterr().out
    assert 'features = ["age", "sex"]' in (tmp_path / "job.toml").read_text()


def test_parquet_without_pyarrow(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(init("visits.parquet")) == 2
    said = capsys.readouterr().err
    assert "Parquet files are read by pyarrow, which is not installed" in said
    assert 'pip install "choral[frames]"' in said


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.ENOSPC, "make room on that disk"), (errno.EACCES, "a place of your own"), (errno.EROFS, "another place")],
)
def test_what_the_system_refuses_comes_with_a_way_on(number: int, hint: str) -> None:
    said = failure_of(OSError(number, "refused", "runs/model")).lines(debug=False)
    assert said.startswith("choral: runs/model: refused\n  hint: ")
    assert hint in said
