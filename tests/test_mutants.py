"""The tool behind `make mutants`: it changes what it says, finds the nearest tests, and tells killed from survived."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
import mutants
module = Path("protocols/integers.py").resolve()
every = list(mutants.mutants_of(module))
print(json.dumps({
    "sources": [m.source() for m in every[:40]],
    "original": module.read_text(),
    "drawn": [[m.described()["where"] for m in mutants.drawn(5, 1, ["privacy"])] for _ in range(2)],
    "nearest": mutants.nearest_tests(module)[0],
}))
"""
RUN = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import mutants
path = Path("protocols/graph.py").resolve()
killing = next(m for m in mutants.mutants_of(path) if m.described()["before"].startswith("raise "))
harmless = mutants.Mutant(path, 1, 0, 0, " " * 0)
test = ["tests/protocols/test_graph.py"]
print([mutants.outcome(mutants.start(m, test), 60.0) for m in (None, harmless, killing)])
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
    assert found["nearest"].endswith("tests/protocols/test_integers.py")


def test_a_dropped_refusal_is_killed_and_no_change_survives() -> None:
    assert _printed(RUN).strip().splitlines()[-1] == "['survived', 'survived', 'killed']"
