"""Lazily fetched names: all there, and never hidden by a module of the same name."""

from __future__ import annotations

import importlib
import types

import pytest


@pytest.mark.parametrize("package", ["choral", "choral.privacy", "choral.audits"])
def test_public_names_are_what_they_say(package: str) -> None:
    module = importlib.import_module(package)
    for name, home in module._HOME.items():
        full = home if home.startswith("choral.") else f"{package}.{home}"
        expected = getattr(importlib.import_module(full), name)
        assert getattr(module, name) is expected
        assert not isinstance(getattr(module, name), types.ModuleType)
        assert name in dir(module)
    assert set(module._HOME) <= set(module.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = module.nonsense
