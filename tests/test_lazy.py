"""Lazily fetched names: all there, and never hidden by a module of the same name."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest

from choral.lazy import homes

PACKAGES = ["choral", "choral.privacy", "choral.protocols", "choral.trainers", "choral.network", "choral.audits"]


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_what_they_say(package: str) -> None:
    module = importlib.import_module(package)
    found = homes(str(module.__file__))
    for name, home in found.items():
        expected = getattr(importlib.import_module(home), name)
        assert getattr(module, name) is expected
        assert not isinstance(getattr(module, name), types.ModuleType)
        assert name in dir(module)
    assert sorted(found) == module.__all__
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = module.nonsense


HEAVY = {
    "dp_accounting",
    "opacus",
    "scipy.stats",
    "scipy.signal",
    "scipy.optimize",
    "numba",
    "sklearn",
    "pandas",
    "tenseal",
}
HEAVY |= {"jinja2", "tyro", "matplotlib", "lightning", "transformers", "onnx", "pyarrow", "flwr"}


def loaded_by(code: str) -> set[str]:
    said = "sys.stderr.write('loaded: ' + ' '.join(sys.modules))"
    whole = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n{said}"
    ran = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True)
    assert ran.stderr.startswith("loaded: "), ran.stderr
    return set(ran.stderr.split())


def test_a_promise_and_a_federation_are_named_without_loading_what_only_training_needs() -> None:
    """Opacus takes as long as torch, and dp-accounting nearly so: they load where they serve."""
    names = "choral.Privacy, choral.ClientPrivacy, choral.CorrelatedPrivacy, choral.federate, choral.compare"
    assert not HEAVY & loaded_by(f"import choral; {names}; choral.Privacy(epsilon=3.0, delta=1e-5)")


def test_help_loads_no_torch_and_a_budget_none_either() -> None:
    command = "from choral.cli import main; main({})"
    assert not ({*HEAVY, "torch", "numpy"} - {"tyro"}) & loaded_by(command.format(["compare", "--help"]))
    words = ["budget", "--noise-multiplier", "1", "--delta", "1e-5", "--sample-rate", "0.5", "--steps", "3"]
    assert not {"torch", "opacus", "numba", "sklearn", "pandas"} & loaded_by(command.format(words))
