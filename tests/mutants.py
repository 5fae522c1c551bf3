"""Change one line at a time and see whether the nearest tests notice: `make mutants`.

Draws mutants at random, by a fixed seed, from the modules that promises rest on, and runs for each those tests of the
nearest test files that run its line, one file after the other, the fastest tests first. Prints one JSON line per mutant
and a summary; a mutant that *survived* is a line that no test misses; one that is *not run* is a line that no test near
to it runs. Mutants listed in tests/mutants_equivalent.txt, as `path | line | before -> after | reason`, change nothing
that a test could see, and count as *equivalent*. Exit code 0: none survived or was not run; 1: some did.

All tests are collected once. Each mutant inside a function is put into a fork of that process, in place of the
function's code; one outside functions (a default, a constant) is imported changed, in a fork of a process that has
imported the libraries alone. Nothing is written to the working tree. Limits count processor time, so that the load of
the machine changes no result. What a test loads once more, as a compiled module without its compiler, is changed too;
processes that tests start for themselves see the module unchanged.

`--part 0/2` and `--part 1/2` share the work between two processes; `--at protocols/crypto/keys.py:120` tries all
mutants of one line or several; `--wide` asks all test files of the room, not the nearest alone.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SEED, COUNT, SECONDS = 20261128, 300, 60.0
EQUIVALENT = ROOT / "tests" / "mutants_equivalent.txt"
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
OPTIONS = ("-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", "--assert=plain", "--capture=sys")
LIBRARIES = ("torch", "numpy", "scipy.stats", "scipy.special", "dp_accounting.pld", "msgspec", "hypothesis", "pytest")
NAMES = {"min": "max", "max": "min", "floor": "ceil", "ceil": "floor", "any": "all", "all": "any", "nextafter": "float"}
ENOUGH = 200  # calls of a function in a test that are watched; the lines of further ones count as known
# What these are called with is read, not computed with.
TEXT = {"hint", "message", "help", "title", "label", "text", "metavar", "stacklevel"}
TYPING = {"TypeVar", "NewType", "cast", "Annotated", "Literal", "ParamSpec"}


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
        whole = _read(self.path)
        return whole[: self.start] + self.text + whole[self.end :]

    def described(self) -> dict[str, Any]:
        whole = _read(self.path)
        return {
            "where": f"{self.path.relative_to(ROOT)}:{self.line}",
            "line": whole.splitlines()[self.line - 1].strip(),
            "before": whole[self.start : self.end],
            "after": self.text,
        }

    def listed(self) -> str:
        """Return how this mutant begins in the list of the equivalent ones."""
        told = self.described()
        change = " ".join(f"{told['before']} -> {told['after']}".split())
        return f"{self.path.relative_to(ROOT)} | {told['line']} | {change} | "

    def lines(self) -> range:
        """Return the lines of the statement changed, its first line to that of the change."""
        starts = [n.lineno for n in ast.walk(_tree(self.path)) if isinstance(n, ast.stmt) and n.lineno <= self.line]
        return range(max(starts, default=1), self.line + 1)

    def inside(self) -> bool:
        """Return whether the change lies in the body of a function."""
        offset = _read(self.path).count("\n", 0, self.start) + 1
        functions = [n for n in ast.walk(_tree(self.path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        return any(n.body[0].lineno <= offset <= (n.end_lineno or 0) for n in functions)


@cache
def _read(path: Path) -> str:
    return path.read_text()


@cache
def _tree(path: Path) -> ast.AST:
    return ast.parse(_read(path))


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

    for node in _counting(_tree(path)):
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
    """Walk what runs and matters: no annotation, type, f-string, text of an error or of a hint."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr) or _is_text(child):
                continue
            yield child
            if not isinstance(child, ast.Raise):
                yield from _counting(child)


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.keyword):
        return node.arg in TEXT
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
    return (
        isinstance(node, ast.Call | ast.Subscript)
        and ast.unparse(node.func if isinstance(node, ast.Call) else node.value) in TYPING
    )


def drawn(count: int, seed: int, folders: Sequence[str]) -> list[Mutant]:
    """Return `count` mutants, spread evenly over all lines that can be changed."""
    paths = sorted(p for folder in folders for p in _modules(ROOT / folder) if not LEFT_OUT.search(p.stem))
    every = sorted({m for path in paths for m in mutants_of(path)}, key=lambda m: (str(m.path), m.start, m.end, m.text))
    return random.Random(seed).sample(every, min(count, len(every)))


def _modules(path: Path) -> Iterator[Path]:
    return iter([path]) if path.suffix == ".py" else path.rglob("*.py")


@cache
def nearest_tests(path: Path, wide: bool = False) -> list[str]:
    """Return the test files nearest to a module.

    First those named for it, then those that import it, or that share a word of its name or import a module that
    imports it: in the folder that mirrors its own, then elsewhere. Last the others of that folder, and of its room.
    """
    place, stem = path.relative_to(ROOT), path.stem
    modules = [one for folder in TARGETS for one in (ROOT / folder).rglob("*.py") if one.stem != "__init__"]
    users = [_imports(one) for one in modules if one != path and _imports(path).search(_read(one))]
    found: list[tuple[int, int, str]] = []
    for test in sorted((ROOT / "tests").rglob("test_*.py")):
        text, where = _read(test), test.relative_to(ROOT / "tests")
        times, words = len(_imports(path).findall(text)), len(set(stem.split("_")) & set(test.stem.split("_")))
        score = words + sum(len(one.findall(text)) for one in users)
        beside = len(where.parts) > 2 and place.is_relative_to(where.parent)
        if test.stem in (f"test_{stem}", f"test_{stem.removesuffix('s')}", f"test_{stem}s"):
            found.append((0, -times, str(test)))
        elif times:
            found.append((1 if beside else 3, -times, str(test)))
        elif beside:
            found.append((2 if score else 4, -score, str(test)))
        elif where.parts[0] == place.parts[0]:
            found.append((5, -score, str(test)))
    near = [name for _, _, name in sorted(found)]
    return near if wide else near[:6]


@cache
def _imports(path: Path) -> re.Pattern[str]:
    module = "choral." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    package, _, last = module.rpartition(".")
    return re.compile(rf"{re.escape(module)}\b|from {re.escape(package)} import [^\n]*\b{last}\b")


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


class Tests:
    """A pytest plugin: collects once, learns which test runs which lines, then runs each mutant in a fork."""

    def __init__(self, work: Callable[[Tests], None], seconds: float, kept: Path, wide: bool) -> None:
        self.work, self.seconds, self.kept, self.wide = work, seconds, kept, wide
        self.items: dict[str, list[Any]] = {}
        self.known: dict[str, dict[str, Any]] = {}
        self.functions: dict[str, list[FunctionType]] = {}

    def pytest_runtestloop(self, session: Any) -> bool:
        import gc

        for item in session.items:
            self.items.setdefault(str(item.path), []).append(item)
        roots = tuple(str(ROOT / folder) + os.sep for folder in TARGETS)
        for one in gc.get_objects():
            if type(one) is FunctionType and (path := _real(one.__code__.co_filename)).startswith(roots):
                self.functions.setdefault(path, []).append(one)
        self.work(self)
        return True

    def learn(self, name: str) -> dict[str, Any]:
        """Return of each test of a file that passes in time: its processor time and the lines of ours that it ran."""
        if name not in self.known:
            path = self.kept / (hashlib.sha256((name + _state()).encode()).hexdigest()[:24] + ".jsonl")
            if not path.exists():
                part = path.with_suffix(f".{os.getpid()}")
                part.touch()
                outcome(_forked(lambda: _traced(self.items.get(name, []), part)), self.seconds)
                part.rename(path)
            self.known[name] = {one.pop("test"): one for one in map(json.loads, path.read_text().splitlines())}
        return self.known[name]

    def covering(self, mutant: Mutant, name: str) -> list[tuple[float, str]]:
        """Return the tests of a file that run the line changed, and their times: the fastest first."""
        path, lines = str(mutant.path), set(mutant.lines())
        known = self.learn(name)
        return sorted((one["seconds"], test) for test, one in known.items() if lines & set(one["lines"].get(path, ())))

    def run(self, mutant: Mutant) -> str:
        """Return what became of a mutant: killed, survived, timeout, not run, or outside: it lies in no function."""
        changed = _code_of(mutant) if mutant.inside() else None
        if changed is None:
            return "outside"
        items = {item.nodeid: item for items in self.items.values() for item in items}
        mine = self.functions.get(str(mutant.path), [])
        result, left = "not run", self.seconds
        for name in nearest_tests(mutant.path, self.wide):
            wanted, usual = [], 0.0
            for took, test in self.covering(mutant, name) if left > 0 else []:
                if usual + took <= left or result == "not run":
                    wanted, usual = [*wanted, items[test]], usual + took
            if not wanted:
                continue
            left -= usual
            limit = min(self.seconds, 5.0 + 3.0 * usual)
            result = outcome(_forked(lambda: _against(mutant, changed, mine, wanted)), limit)  # noqa: B023
            if result != "survived":
                break
        return result


def _against(
    mutant: Mutant, changed: dict[CodeType, CodeType], functions: Sequence[FunctionType], items: Sequence[Any]
) -> int:
    for function in functions:
        function.__code__ = changed.get(function.__code__, function.__code__)
    honest = importlib.machinery.SourceFileLoader.get_code

    def get_code(loader: importlib.machinery.SourceFileLoader, name: str) -> CodeType | None:  # what loads it again
        if _real(loader.path) == str(mutant.path):
            return compile(mutant.source(), loader.path, "exec", dont_inherit=True)
        return honest(loader, name)

    importlib.machinery.SourceFileLoader.get_code = get_code
    return _run(items)


def _real(name: str) -> str:
    return _realpath(name) if name.startswith(str(ROOT)) else name


_realpath = cache(os.path.realpath)


@cache
def _state() -> str:
    """Return a digest of all that a test could run."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in (*TARGETS, "trainers", "src", "tests") for p in (ROOT / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _code_of(mutant: Mutant) -> dict[CodeType, CodeType] | None:
    """Return the module's code objects with those of the mutant, if one stands for each."""

    def every(code: CodeType) -> Iterator[CodeType]:
        for one in code.co_consts:
            if isinstance(one, CodeType):
                yield one
                yield from every(one)

    old, new = (list(every(compile(text, str(mutant.path), "exec", dont_inherit=True)))
                for text in (_read(mutant.path), mutant.source()))  # fmt: skip
    if [one.co_qualname for one in old] != [one.co_qualname for one in new]:
        return None
    if any(a.co_freevars != b.co_freevars for a, b in zip(old, new, strict=True)):
        return None
    return dict(zip(old, new, strict=True))


def _run(items: Sequence[Any], after: Callable[[Any, bool], None] | None = None) -> int:
    """Run tests; stop at the first that fails, unless each is told to `after`."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        failed = item.session.testsfailed
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if after is not None:
            after(item, item.session.testsfailed == failed)
        elif item.session.testsfailed:
            return 1
    return 0


def _traced(items: Sequence[Any], out: Path) -> int:
    """Run tests and write, one JSON line each, which lines of ours they ran."""
    lines: dict[str, set[int]] = {}
    calls: Counter[CodeType] = Counter()
    shared: dict[str, dict[str, set[int]]] = {}  # of a fixture that several tests share
    roots = tuple(str(ROOT / folder) + os.sep for folder in TARGETS)

    def enter(frame: Any, event: str, arg: Any) -> Any:
        path = _real(frame.f_code.co_filename)
        calls[frame.f_code] += 1
        if not path.startswith(roots) or calls[frame.f_code] > ENOUGH:
            return None
        ran = lines.setdefault(path, set())

        def local(frame: Any, event: str, arg: Any) -> Any:
            if event == "line":
                ran.add(frame.f_lineno)
            return local

        return local

    class Fixtures:
        def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> None:
            if fixturedef.scope != "function":
                shared.setdefault(fixturedef.argname, lines)

    if items:
        items[0].config.pluginmanager.register(Fixtures())
    began = time.process_time()
    with out.open("w") as file:

        def after(item: Any, passed: bool) -> None:
            nonlocal began
            for name in item.fixturenames:
                for path, ran in list(shared.get(name, {}).items()):
                    lines.setdefault(path, set()).update(ran)
            took = round(time.process_time() - began, 3)
            told = {path: sorted(ran) for path, ran in lines.items() if ran}
            if passed:
                file.write(json.dumps({"test": item.nodeid, "seconds": took, "lines": told}) + "\n")
                file.flush()
            for name, ran_by in list(shared.items()):  # what the first test ran counts for all that share its fixture
                if ran_by is lines:
                    shared[name] = {path: set(ran) for path, ran in lines.items()}
            lines.clear()
            calls.clear()
            began = time.process_time()

        threading.settrace(enter)
        sys.settrace(enter)
        _run(items, after)
    return 0


def _forked(body: Callable[[], int]) -> int:
    """Run in a fork, silent and in a process group of its own; return its number."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        code = body()
    finally:
        os._exit(code)


def start(mutant: Mutant | None, tests: Sequence[str]) -> int:
    """Fork a process that imports the mutant, if there is one, and runs the tests; return its number."""

    def body() -> int:
        import pytest

        if mutant is not None:
            sys.meta_path.insert(0, _Changed(mutant))
        return int(pytest.main([*OPTIONS, "-x", *tests]))

    return _forked(body)


def outcome(child: int, seconds: float) -> str:
    """Wait for a process; end it after `seconds` of the processor, or when it has waited ten times as long."""
    resource.prlimit(child, resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
    end = time.monotonic() + 10 * seconds + 60
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            _end_group(child)
            return "survived" if code == 0 else "timeout" if -code in (signal.SIGXCPU, signal.SIGKILL) else "killed"
        time.sleep(0.01)
    _end_group(child)
    os.waitpid(child, 0)
    return "timeout"


def _end_group(child: int) -> None:
    try:
        os.killpg(child, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _imported(mutant: Mutant, seconds: float) -> str:
    """Return what became of a mutant outside functions: its nearest test files against the changed module."""
    result, spent = "not run", 0.0
    for name in nearest_tests(mutant.path)[:3]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = outcome(start(mutant, [name]), max(1.0, seconds - spent))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if result != "survived" or spent > seconds:
            break
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="*", default=list(TARGETS), help="folders or modules to draw from")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the processor, for each mutant")
    parser.add_argument("--part", default="0/1", help="run every n-th mutant from the k-th, as k/n")
    parser.add_argument("--at", nargs="+", default=[], help="all mutants of some lines, as path:line")
    parser.add_argument("--wide", action="store_true", help="ask all test files of the room")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in LIBRARIES:
        importlib.import_module(name)
    _hypothesis()
    part, parts = map(int, asked.part.split("/"))
    if asked.at:
        places = [place.rpartition(":") for place in asked.at]
        mutants = [m for path, _, line in places for m in mutants_of(ROOT / path) if m.line == int(line)]
    else:
        mutants = drawn(asked.count, asked.seed, asked.folders)[part::parts]
    listed = EQUIVALENT.read_text().splitlines() if EQUIVALENT.exists() else []
    counts = {"killed": 0, "survived": 0, "timeout": 0, "not run": 0, "equivalent": 0}
    sent, told = os.pipe()
    writer = os.fdopen(told, "w", buffering=1)

    def work(tests: Tests) -> None:
        for number, mutant in enumerate(mutants):
            began = time.monotonic()
            same = any(line.startswith(mutant.listed()) for line in listed)
            result = "equivalent" if same else tests.run(mutant)
            writer.write(json.dumps([number, result, round(time.monotonic() - began, 1)]) + "\n")

    collected = os.fork()
    if collected == 0:
        import pytest

        os.close(sent)
        with tempfile.TemporaryDirectory() as folder:
            files = sorted({name for mutant in mutants for name in nearest_tests(mutant.path, asked.wide)})
            kept = Path(tempfile.gettempdir()) / "choral-mutants"
            kept.mkdir(exist_ok=True)
            os.dup2(2, 1)
            pytest.main(
                [*OPTIONS, f"--basetemp={folder}/base", *files], plugins=[Tests(work, asked.seconds, kept, asked.wide)]
            )
        os._exit(0)
    writer.close()
    outside = []

    def tell(mutant: Mutant, result: str, took: float) -> None:
        counts[result] += 1
        print(json.dumps({**mutant.described(), "result": result, "seconds": took}), flush=True)

    for line in os.fdopen(sent):
        number, result, took = json.loads(line)
        if result == "outside":
            outside.append(mutants[number])
        else:
            tell(mutants[number], result, took)
    for mutant in outside:
        began = time.monotonic()
        tell(mutant, _imported(mutant, asked.seconds), round(time.monotonic() - began, 1))
    os.waitpid(collected, 0)
    print(json.dumps({"seed": asked.seed, **counts}))
    return 1 if counts["survived"] or counts["not run"] or sum(counts.values()) != len(mutants) else 0


def _hypothesis() -> None:
    """Let a failing example be enough: nothing is shrunk or kept."""
    from hypothesis import Phase, settings

    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None, derandomize=True)
    settings.load_profile("mutants")


if __name__ == "__main__":
    sys.exit(main())
