"""Sums of ciphertexts: the server adds what it cannot read."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from choral.protocols.homomorphic.front import Homomorphic

if TYPE_CHECKING:
    from choral.protocols.homomorphic.shared.float_sum import FloatResult, FloatSpec, FloatSum

__all__ = ["FloatResult", "FloatSpec", "FloatSum", "Homomorphic"]


# SEAL takes a moment to load, so what needs it is fetched when it is first used.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'choral.protocols.homomorphic' has no attribute {name!r}")
    value = getattr(import_module("choral.protocols.homomorphic.shared.float_sum"), name)
    globals()[name] = value
    return value
