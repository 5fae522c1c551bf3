"""The tool behind `make mutants`: it changes what it says, finds the nearest tests, and tells killed from survived."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
import mutants
module = Path("protocols/crypto/modular_integers.py").resolve()
every = list(mutants.mutants_of(module))
print(json.dumps({
    "sources": [m.source() for m in every[:40]],
    "original": module.read_text(),
    "drawn": [[m.described()["where"] for m in mutants.drawn(5, 1, ["privacy"])] for _ in range(2)],
    "nearest": mutants.nearest_tests(module)[0],
}))
"""
LISTED = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
import mutants
paths = {line.split(" | ")[0] for line in mutants.EQUIVALENT.read_text().splitlines()}
print(json.dumps([m.listed() for path in sorted(paths) for m in mutants.mutants_of(Path(path).resolve())]))
"""
LITTLE = """
LIMIT = 3


def within(value: int) -> bool:
    return value < LIMIT


def rounded(value: int) -> int:
    while value > 10:
        value = value - 1
    return value + 0


def unused(value: int) -> bool:
    return value > 7


def loaded_again(value: int) -> int:
    return value * 2
"""
TEST = """
import importlib.util
from choral.privacy import little
from choral.privacy.little import rounded, within

def test_within():
    assert within(2)
    assert not within(3)

def test_rounded():
    assert rounded(12) == 10

def test_loaded_again():
    spec = importlib.util.spec_from_file_location("another", little.__file__)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert another.loaded_again(3) == 6
"""


def _printed(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_each_mutant_is_one_change_that_still_parses() -> None:
    found = json.loads(_printed(CODE))
    assert len(set(found["sources"])) == len(found["sources"]) == 40
    for source in found["sources"]:
        assert source != found["original"]
        ast.parse(source)
    assert found["drawn"][0] == found["drawn"][1]
    assert found["nearest"].endswith("tests/protocols/crypto/test_integers.py")


@pytest.fixture
def little(tmp_path: Path) -> Path:
    """A project of one module, its tests and the tool."""
    for name in ("privacy", "tests/privacy", "choral"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "choral" / "__init__.py").touch()
    (tmp_path / "choral" / "privacy").symlink_to("../privacy")
    (tmp_path / "privacy" / "__init__.py").touch()
    (tmp_path / "privacy" / "little.py").write_text(LITTLE)
    (tmp_path / "tests" / "privacy" / "test_little.py").write_text(TEST)
    (tmp_path / "tests" / "mutants_equivalent.txt").write_text(
        "privacy/little.py | return value + 0 | + -> - | nothing is added\n"
    )
    shutil.copy(ROOT / "tests" / "mutants.py", tmp_path / "tests")
    return tmp_path


def test_what_no_test_misses_is_told_from_what_is_killed(little: Path) -> None:
    told = subprocess.run(
        [sys.executable, "tests/mutants.py", "privacy", "--seconds", "1"],
        cwd=little,
        env={**os.environ, "PYTHONPATH": str(little), "TMPDIR": str(little)},
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    found = {(one["line"], one["before"], one["after"]): one["result"] for one in lines[:-1]}
    assert found == {
        ("LIMIT = 3", "3", "4"): "killed",
        ("return value < LIMIT", "<", "<="): "killed",
        ("while value > 10:", ">", ">="): "killed",
        ("while value > 10:", "10", "11"): "killed",
        ("while value > 10:", "value > 10", "(not (value > 10))"): "killed",
        ("value = value - 1", "-", "+"): "timeout",
        ("value = value - 1", "1", "2"): "survived",
        ("return value + 0", "+", "-"): "equivalent",
        ("return value + 0", "0", "1"): "killed",
        ("return value * 2", "*", "/"): "killed",
        ("return value * 2", "2", "3"): "killed",
        ("return value > 7", ">", ">="): "not run",
        ("return value > 7", "7", "8"): "not run",
    }
    assert lines[-1] == {"seed": 20261128, "killed": 8, "survived": 1, "timeout": 1, "not run": 2, "equivalent": 1}
    assert told.returncode == 1


def test_the_list_of_equivalent_mutants_names_mutants_that_exist() -> None:
    every = set(json.loads(_printed(LISTED)))
    lines = (ROOT / "tests" / "mutants_equivalent.txt").read_text().splitlines()
    assert [line for line in lines if not any(line.startswith(one) and line != one for one in every)] == []
