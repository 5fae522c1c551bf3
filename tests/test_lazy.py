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


def test_a_promise_and_a_federation_are_named_without_loading_opacus() -> None:
    names = "choral.Privacy, choral.ClientPrivacy, choral.CorrelatedPrivacy, choral.federate, choral.compare"
    promises = "choral.Privacy(epsilon=3.0, delta=1e-5)"
    code = f"import sys, choral; {names}; {promises}; sys.exit('opacus' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
