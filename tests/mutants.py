"""Change one line at a time and see whether the nearest tests notice: `make mutants`.

Draws mutants at random, by a fixed seed, from the modules that promises rest on, and runs for each the test files
nearest to its module. Prints one JSON line per mutant and a summary; a mutant that *survived* is a line that no test
misses. Exit code 0: none survived; 1: some did. Processes that tests start for themselves see the module unchanged.

A mutant runs in a fork of one process that has imported the libraries already; nothing is written to the working tree.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.util
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SEED, COUNT, SECONDS = 20261128, 300, 60.0
# What is accounted and promised, how sums are kept, what is audited; not drawings, adapters, tables of text.
TARGETS = ("privacy", "protocols", "audits")
LEFT_OUT = re.compile(r"__init__|lightning|huggingface|svg|html|figures|drawing|pictures|markdown|terminal|text|axes")
SWAPS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: (" in ", " not in "), ast.NotIn: (" not in ", " in "),
    ast.Is: (" is ", " is not "), ast.IsNot: (" is not ", " is "),
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "+"),
    ast.Mod: ("%", "*"), ast.Pow: ("**", "*"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
    ast.BitXor: ("^", "|"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
    ast.And: (" and ", " or "), ast.Or: (" or ", " and "), ast.USub: ("-", "+"), ast.Not: ("not ", ""),
}  # fmt: skip
OPTIONS = ("-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", "--assert=plain")
NAMES = {"min": "max", "max": "min", "floor": "ceil", "ceil": "floor", "any": "all", "all": "any", "nextafter": "float"}


@dataclass(frozen=True)
class Mutant:
    """One change: `text` stands for characters `start` to `end` of the module's source."""

    path: Path
    line: int
    start: int
    end: int
    text: str

    @property
    def module(self) -> str:
        return "choral." + ".".join(self.path.relative_to(ROOT).with_suffix("").parts)

    def source(self) -> str:
        whole = self.path.read_text()
        return whole[: self.start] + self.text + whole[self.end :]

    def described(self) -> dict[str, Any]:
        whole = self.path.read_text()
        return {
            "where": f"{self.path.relative_to(ROOT)}:{self.line}",
            "line": whole.splitlines()[self.line - 1].strip(),
            "before": whole[self.start : self.end],
            "after": self.text,
        }


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Yield the mutants of a module: swapped operators, moved constants, negated conditions, dropped statements."""
    source = path.read_text()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def at(line: int, column: int) -> int:  # columns count bytes
        return starts[line - 1] + len(source[starts[line - 1] : starts[line]].encode()[:column].decode())

    def span(node: Any) -> tuple[int, int]:
        return at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)

    def between(left: Any, right: Any, operator: ast.AST) -> Iterator[Mutant]:
        old, new = SWAPS.get(type(operator), ("", ""))
        begin, end = span(left)[1], span(right)[0]
        place = source.find(old, begin, end) if old else -1
        if place >= 0:
            yield Mutant(path, left.end_lineno, place, place + len(old), new)

    for node in _counting(ast.parse(source)):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for i, operator in enumerate(node.ops):
                yield from between(operands[i], operands[i + 1], operator)
        elif isinstance(node, ast.BinOp):
            yield from between(node.left, node.right, node.op)
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from between(left, right, node.op)
        elif isinstance(node, ast.UnaryOp) and type(node.op) in SWAPS:
            old, new = SWAPS[type(node.op)]
            begin = span(node)[0]
            yield Mutant(path, node.lineno, begin, begin + len(old), new)
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            begin, end = span(node)
            value = node.value
            yield Mutant(path, node.lineno, begin, end, repr(not value if value in (True, False) and type(value) is bool
                         else value + 1 if type(value) is int else value * 2.0 or 1.0))  # fmt: skip
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield Mutant(path, node.lineno, *span(node), NAMES[node.id])
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            begin, end = span(node.test)
            yield Mutant(path, node.test.lineno, begin, end, f"(not ({source[begin:end]}))")
        elif isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            yield Mutant(path, node.lineno, *span(node), "pass")


def _counting(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk what runs and matters: no annotation, default of a message, f-string, text of an error."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            yield child
            if not isinstance(child, ast.Raise):
                yield from _counting(child)


def drawn(count: int, seed: int, folders: Sequence[str]) -> list[Mutant]:
    """Return `count` mutants, spread evenly over all lines that can be changed."""
    paths = sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py") if not LEFT_OUT.search(p.stem))
    every = sorted({m for path in paths for m in mutants_of(path)}, key=lambda m: (str(m.path), m.start, m.end, m.text))
    return random.Random(seed).sample(every, min(count, len(every)))


def nearest_tests(path: Path) -> list[str]:
    """Return the test files nearest to a module: named for it, then those that import it, then its room's."""
    room, stem = path.relative_to(ROOT).parts[0], path.stem
    module = "choral." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    package, _, last = module.rpartition(".")
    imports = re.compile(rf"{re.escape(module)}\b|from {re.escape(package)} import [^\n]*\b{last}\b")
    found: list[tuple[int, int, str]] = []
    for test in sorted((ROOT / "tests").rglob("test_*.py")):
        text, same = test.read_text(), test.relative_to(ROOT / "tests").parts[0] == room
        own = test.stem in (f"test_{stem}", f"test_{stem.removesuffix('s')}", f"test_{stem}s")
        words = len(set(stem.split("_")) & set(test.stem.split("_")))
        if own or imports.search(text) or (same and words):
            found.append((0 if own else 1 if imports.search(text) else 2, -len(imports.findall(text)), str(test)))
    rooms = [str(test) for test in sorted((ROOT / "tests" / room).rglob("test_*.py"))]
    return [name for _, _, name in sorted(found)][:6] or rooms[:8]


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module changed."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.mutant.module:
            return None
        return importlib.util.spec_from_file_location(name, self.mutant.path, loader=self)

    def create_module(self, spec: Any) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.mutant.source(), str(self.mutant.path), "exec"), module.__dict__)  # noqa: S102


def start(mutant: Mutant | None, tests: Sequence[str]) -> int:
    """Fork a process that runs the tests, against the mutant if there is one; return its number."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    code = 3
    try:
        import pytest

        if mutant is not None:
            sys.meta_path.insert(0, _Changed(mutant))
        code = int(pytest.main([*OPTIONS, *tests]))
    finally:
        os._exit(code)


def outcome(child: int, seconds: float) -> str:
    """Wait for a process; kill it and all that it started after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="*", default=list(TARGETS), help="folders to draw from")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each mutant")
    parser.add_argument("--part", default="0/1", help="run every n-th mutant from the k-th, as k/n")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in (
        "torch",
        "numpy",
        "scipy.stats",
        "scipy.special",
        "dp_accounting.pld",
        "msgspec",
        "hypothesis",
        "pytest",
    ):
        importlib.import_module(name)
    part, parts = map(int, asked.part.split("/"))
    counts = {"killed": 0, "survived": 0, "timeout": 0, "baseline fails": 0}
    sound: dict[tuple[str, ...], str] = {}
    for mutant in drawn(asked.count, asked.seed, asked.folders)[part::parts]:
        tests, began = nearest_tests(mutant.path), time.monotonic()
        for name in tests:  # a test file that fails, or takes too long, without any change cannot tell
            if (name,) not in sound:
                sound[name,] = outcome(start(None, [name]), asked.seconds / 2)
        tests = [name for name in tests if sound[name,] == "survived"]
        result, began = "baseline fails" if not tests else "survived", time.monotonic()
        for name in tests:
            left = asked.seconds - (time.monotonic() - began)
            if result == "survived" and left > 0:
                result = outcome(start(mutant, [name]), left)
        counts[result] += 1
        took = round(time.monotonic() - began, 1)
        print(json.dumps({**mutant.described(), "result": result, "seconds": took}), flush=True)
    print(json.dumps({"seed": asked.seed, **counts}))
    return 1 if counts["survived"] or counts["baseline fails"] else 0


if __name__ == "__main__":
    sys.exit(main())
