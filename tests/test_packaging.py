"""The wheel holds every package, leaks no other name, and `import choral` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_jobs import PROGRAM

import choral

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("privacy", "protocols", "trainers", "network", "audits")


@pytest.fixture(scope="session")
def setup():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_with_an_init_is_listed(setup):
    found = {"choral": "src/choral"}
    front = ROOT / "src/choral"
    for path in front.rglob("__init__.py"):
        folder = path.parent.relative_to(front)
        if folder.parts and folder.parts[0] not in ROOMS:
            found[".".join(("choral", *folder.parts))] = f"src/choral/{folder.as_posix()}"
    for room in ROOMS:
        for init in (ROOT / room).rglob("__init__.py"):
            folder = init.parent.relative_to(ROOT)
            found["choral." + ".".join(folder.parts)] = folder.as_posix()
    assert setup["package-dir"] == found
    assert sorted(setup["packages"]) == sorted(found)


def _listed():
    """The repository's files; of an unpacked source distribution, which git does not know, all that it holds."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-co", "--exclude-standard"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    else:
        hidden = (".venv", "build", "dist", "runs", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis")
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if "__pycache__" not in path.parts)
        found = [path.as_posix() for path in paths if not path.parts[0].startswith(hidden)]
    return [name for name in found if (ROOT / name).is_file() and not (ROOT / name).is_symlink()]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    # A copy, so that no build folder is left in the repository and none that lies there is packed.
    source = tmp_path_factory.mktemp("source")
    for name in _listed():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_source_distribution_can_run_its_own_tests(source, tmp_path):
    """All that the repository holds is in it: tests with their settings and known answers, docs, examples, pins."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {name for name in _listed() if name != ".gitignore" and ".egg-info/" not in name}
    assert wanted - held == set()
    assert {"tests/conftest.py", "tests/vectors/SHA256SUMS", "constraints.txt", "Makefile"} <= held
    assert not {name for name in held if name.startswith("src/choral/privacy/")}, "packed twice"


def test_wheel_holds_every_module_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    front = [path.relative_to(ROOT / "src") for path in (ROOT / "src/choral").rglob("*.py")]
    own = [path for path in front if path.parts[1] not in ROOMS]
    expected = {path.as_posix() for path in own} | {"choral/py.typed", "choral/__init__.pyi"}
    for room in ROOMS:
        for kind in ("*.py", "*.pyi", "*.html", "*.toml"):
            expected |= {f"choral/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / room).rglob(kind)}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_imports_alone(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import choral, choral.privacy, choral.protocols, choral.trainers, choral.network, choral.audits\n"
        "import choral.cli.command_line\n"
        f"assert choral.trainers.__file__.startswith({str(target)!r}), choral.trainers.__file__\n"
        "[getattr(choral, name) for name in choral.__all__]\n"
    )
    # A user's own folders of these names must not be imported instead.
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("raise RuntimeError('shadowed')")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_import_is_light():
    code = (
        "import sys, choral\n"
        "heavy = {'torch', 'opacus', 'sklearn', 'scipy', 'tenseal', 'numba', 'flwr', 'mlflow',\n"
        "    'lightning', 'transformers', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _nodes(*folders: str) -> Iterator[tuple[ast.AST, str]]:
    for path in [path for folder in folders for path in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            yield node, f"{path.name}:{getattr(node, 'lineno', 0)}"


def test_nothing_is_pickled_in_shipped_code_benchmarks_or_examples():
    """By syntax tree rather than by text. torch.save and torch.load are pickle, too."""
    for node, where in _nodes(*ROOMS, "src/choral", "benchmarks", "examples"):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "cloudpickle", "dill"} & {module.partition(".")[0] for module in modules}, where
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in {"save", "load"}, where


def test_no_eval_and_no_assert_in_shipped_code():
    for node, where in _nodes(*ROOMS, "src/choral"):
        assert not isinstance(node, ast.Assert), where
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec"}, where


def test_the_version_stands_in_one_place(wheel):
    """In `choral/__init__.py`, which the build reads; the citation repeats it."""
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"-{choral.__version__}-" in wheel.name
    assert f"\nversion: {choral.__version__}\n" in (ROOT / "CITATION.cff").read_text()


WITHOUT = """
import sys
for name in ("tenseal", "sklearn", "jinja2", "tyro"):
    sys.modules[name] = None  # as if it were not installed
"""
REFUSING = """
from choral import ConfigError, Homomorphic, audit, federate
report = audit(federate(**job, secure_sum="masked"))
report.save("report.json")
for refused in (
    lambda: report.save("report.html"),
    lambda: federate(**job, secure_sum=Homomorphic(key="shared")),
):
    try:
        refused()
    except ConfigError as error:
        assert "is not installed" in str(error) and "pip install" in error.hint
    else:
        raise AssertionError("it went on without its package")
try:
    import choral.cli
except SystemExit as stop:
    assert "choral[cli]" in str(stop)
else:
    raise AssertionError("a command line without tyro")
"""


def test_wrapping_and_federating_need_no_extra(tmp_path):
    subprocess.run([sys.executable, "-c", WITHOUT + PROGRAM + REFUSING], cwd=tmp_path, check=True)
