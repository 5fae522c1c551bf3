"""Choral beside the pins of an engine: `make test-engines` runs this in an environment for each."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {"flower": "flwr", "nvflare": "nvflare"}


def _pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize(("engine", "package"), ENGINES.items())
def test_the_constraints_pin_the_engine_and_all_that_choral_needs(engine: str, package: str) -> None:
    """In versions that Choral's own bounds allow: else the two cannot be installed together."""
    pins = _pins(ROOT / f"constraints-{engine}.txt")
    assert package in pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["all"])]
    names = {each.name: re.sub(r"[-_.]+", "-", each.name).lower() for each in needed}
    assert set(names.values()) <= set(pins)
    refused = [str(each) for each in needed if not each.specifier.contains(pins[names[each.name]], prereleases=True)]
    assert refused == []


def _here() -> str | None:
    """The engine whose environment this is, by the folder that the interpreter stands in."""
    return next((engine for engine in ENGINES if Path(sys.prefix).name == f".venv-{engine}"), None)


@pytest.mark.skipif(_here() is None, reason="run by `make test-engines`, in an environment for each engine")
def test_the_environment_holds_what_was_pinned_and_nothing_in_it_conflicts() -> None:
    engine = _here() or ""
    pins = _pins(ROOT / f"constraints-{engine}.txt")
    found = importlib.metadata.version(ENGINES[engine])
    assert found == pins[ENGINES[engine]]
    subprocess.run([sys.executable, "-m", "pip", "check"], check=True)
    code = f"import {ENGINES[engine]}, choral; [getattr(choral, name) for name in choral.__all__]"
    subprocess.run([sys.executable, "-c", code], check=True)
