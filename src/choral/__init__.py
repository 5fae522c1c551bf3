"""Choral: train PyTorch models on data that may not be seen.

In a choir you hear the sum, never a single voice. Two entry points cover most uses:

- :class:`Privacy` makes one existing training loop differentially private (``privacy.wrap``);
- :func:`federate` runs the same functions over several parties that keep their data, and
  :func:`compare` says what that costs against :func:`centralize`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from choral.errors import ChoralError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from choral.audits import audit, compare
    from choral.privacy import AdaptiveClip, ClientPrivacy, CorrelatedPrivacy, PerLayerClip, Privacy, Spent
    from choral.protocols import Homomorphic, Masked, Plain
    from choral.trainers import Run, centralize, federate

_HOME = {
    "AdaptiveClip": "choral.privacy",
    "ClientPrivacy": "choral.privacy",
    "CorrelatedPrivacy": "choral.privacy",
    "PerLayerClip": "choral.privacy",
    "Privacy": "choral.privacy",
    "Spent": "choral.privacy",
    "Homomorphic": "choral.protocols",
    "Masked": "choral.protocols",
    "Plain": "choral.protocols",
    "Run": "choral.trainers",
    "centralize": "choral.trainers",
    "federate": "choral.trainers",
    "audit": "choral.audits",
    "compare": "choral.audits",
}

__all__ = [
    "AdaptiveClip",
    "ChoralError",
    "ClientPrivacy",
    "CorrelatedPrivacy",
    "Homomorphic",
    "Masked",
    "PerLayerClip",
    "Plain",
    "Privacy",
    "Run",
    "Spent",
    "audit",
    "centralize",
    "compare",
    "federate",
]


# Torch takes a second to import, so the public names are fetched when they are first used.
def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'choral' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
