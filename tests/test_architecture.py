"""The house: which room may import which, no circles, folders and files that can be taken in, the public names."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("privacy", "protocols", "trainers", "network", "audits")
MAY_IMPORT = {
    "privacy": set(),
    "protocols": set(),
    "trainers": {"privacy", "protocols"},
    "network": {"trainers", "privacy", "protocols"},
    "audits": {"trainers", "privacy", "protocols"},
}
# Small files of the front door that import no room and that every room may import.
LEAVES = {
    "choral.differences",
    "choral.doors",
    "choral.errors",
    "choral.lazy",
    "choral.locks",
    "choral.metrics",
    "choral.nested",
    "choral.progress",
    "choral.toml_files",
    "choral.verify",
}
FILES_IN_A_FOLDER, LINES_OF_A_FILE, LINES_OF_A_FUNCTION, ARGUMENTS = 14, 400, 60, 10


@cache
def modules() -> dict[str, Path]:
    """Every shipped module by its full name."""
    front = ROOT / "src/choral"
    paths = {("choral", *path.relative_to(front).with_suffix("").parts): path for path in front.glob("*.py")}
    for path in front.rglob("*.py"):
        if path.relative_to(front).parts[0] not in ROOMS:
            paths["choral", *path.relative_to(front).with_suffix("").parts] = path
    for room in ROOMS:
        paths |= {("choral", *p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / room).rglob("*.py")}
    return {".".join(name).removesuffix(".__init__"): path for name, path in paths.items()}


def imported(node: ast.AST) -> Iterator[str]:
    """What is imported anywhere below, inside functions too; not what only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from imported(ast.Module(body=child.orelse, type_ignores=[]))
        elif isinstance(child, ast.ImportFrom) and child.module:
            assert child.level == 0, "imports say where a name is from"
            for alias in child.names:
                if (child.module, alias.name) == ("choral", "__version__"):
                    continue  # a text, there before anything else of the front door
                full = f"{child.module}.{alias.name}"
                yield full if full in modules() else child.module
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        else:
            yield from imported(child)


@cache
def graph() -> dict[str, set[str]]:
    """The modules that each module imports."""
    parsed = {name: ast.parse(path.read_text("utf-8")) for name, path in modules().items()}
    return {name: set(imported(tree)) & set(modules()) - {name} for name, tree in parsed.items()}


def chapter(name: str) -> str:
    """A module's folder; a facade, and a file of a folder that has chapters, stand for themselves."""
    path = modules()[name]
    if path.name == "__init__.py":
        return f"facade of {name}"
    return name if list(path.parent.glob("*/__init__.py")) else name.rpartition(".")[0]


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """What each reaches itself from: one list for each group, found by leaving out whatever ends."""
    left = {name: set(to) for name, to in arrows.items()}
    while True:
        ends = {name for name, to in left.items() if not to & set(left) - {name}}
        starts = set(left) - set().union(*(to - {name} for name, to in left.items()), set())
        if not ends | starts:
            return [sorted(left)] if left else []
        left = {name: to for name, to in left.items() if name not in ends | starts}


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a"}}) == []


def test_late_imports_count_and_those_of_type_checkers_do_not() -> None:
    source = "if TYPE_CHECKING:\n import choral.cli\nelse:\n import choral.doors\ndef f():\n import choral.errors"
    assert set(imported(ast.parse(source))) == {"choral.doors", "choral.errors"}


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_between_rooms_point_one_way(room: str) -> None:
    for name, found in graph().items():
        if not name.startswith(f"choral.{room}"):
            continue
        for other in found:
            to = other.split(".")[1] if other != "choral" else ""
            fits = to in MAY_IMPORT[room] | {room} if to in ROOMS else other in LEAVES
            assert fits, f"{name} imports {other}"


def test_the_transport_carries_bytes_and_knows_no_other_room() -> None:
    for name, found in graph().items():
        if name.startswith("choral.network.transport"):
            assert {other for other in found if not other.startswith("choral.network")} <= LEAVES, name


def test_leaves_import_no_room() -> None:
    for leaf in LEAVES:
        assert graph()[leaf] <= LEAVES, leaf


def test_no_two_files_import_each_other_in_a_circle() -> None:
    assert circles(graph()) == []


def test_no_two_chapters_import_each_other_in_a_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for name, found in graph().items():
        own = {chapter(other) for other in found} - {chapter(name)}
        arrows.setdefault(chapter(name), set()).update(own)
    assert circles(arrows) == []


def test_folders_can_be_taken_in_at_a_glance() -> None:
    folders = {path.parent for path in modules().values()}
    tests = {path.parent for room in ROOMS for path in (ROOT / "tests" / room).rglob("*.py")}
    for folder in folders | tests:
        count = len(list(folder.glob("*.py")))
        assert count <= FILES_IN_A_FOLDER, f"{folder.relative_to(ROOT)} has {count} files"


def test_no_file_no_function_and_no_list_of_arguments_is_long() -> None:
    files, functions, arguments = {}, {}, {}
    for path in modules().values():
        source, where = path.read_text("utf-8"), path.relative_to(ROOT).as_posix()
        files[where] = len(source.splitlines())
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions[f"{where}:{node.name}"] = (node.end_lineno or node.lineno) - node.lineno + 1
                named = [found.arg for found in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                arguments[f"{where}:{node.name}"] = len(named) - (named[:1] in (["self"], ["cls"]))
    assert {name: count for name, count in files.items() if count > LINES_OF_A_FILE} == {}
    assert {name: count for name, count in functions.items() if count > LINES_OF_A_FUNCTION} == {}
    assert {name: count for name, count in arguments.items() if count > ARGUMENTS} == {}


def test_public_names_are_those_that_are_written_down() -> None:
    """A name that is added, renamed or removed changes tests/public_names.txt, and CHANGELOG.md."""
    written = {}
    for line in (ROOT / "tests/public_names.txt").read_text().splitlines():
        package, _, names = line.partition(": ")
        written[package] = names.split()
    for package, names in written.items():
        module = importlib.import_module(package)
        assert sorted(module.__all__) == names, package
        assert all(hasattr(module, name) for name in names)
    assert set(written) == {"choral", *(f"choral.{room}" for room in ROOMS)}


# Errors that a caller never sees: those who call what raises them raise another.
CAUGHT = {
    "CiphertextError": "FaultyPartyError",
    "NotToldError": "MessageError",
    "UnreadableError": "LedgerError, RunFolderError",
}


def test_errors_are_public() -> None:
    """Whoever calls a room can catch what it raises without knowing its files."""
    base = importlib.import_module("choral.errors").ChoralError
    facades = [importlib.import_module(name) for name in ("choral", *(f"choral.{room}" for room in ROOMS))]
    missing = []
    for name, path in modules().items():
        for node in ast.parse(path.read_text("utf-8")).body:
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_") or not node.name.endswith("Error"):
                continue
            kind = getattr(importlib.import_module(name), node.name)
            if not issubclass(kind, base) or node.name in CAUGHT:
                continue
            if not any(node.name in facade.__all__ and getattr(facade, node.name) is kind for facade in facades):
                missing.append(f"{name}.{node.name}")
    assert missing == []
    front = facades[0]
    for name in ("ChoralError", "ConfigError", "DataError", "PrivacyError", "BudgetExceededError", "ProtocolError"):
        assert issubclass(getattr(front, name), base)
        assert name in front.__all__


def test_no_class_name_stands_for_two_things() -> None:
    places: dict[str, list[str]] = {}
    for name, path in modules().items():
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
