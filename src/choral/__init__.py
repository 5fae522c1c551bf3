"""Choral: train PyTorch models on data that may not be seen.

In a choir you hear the sum, never a single voice. Two entry points cover most uses:

- :class:`Privacy` makes one existing training loop differentially private (``privacy.wrap``);
- :func:`federate` runs the same functions over several parties that keep their data, and
  :func:`compare` says what that costs against :func:`centralize`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from choral.errors import ChoralError
from choral.lazy import exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from choral.audits import audit, compare
    from choral.privacy import AdaptiveClip, ClientPrivacy, CorrelatedPrivacy, PerLayerClip, Privacy, Spent
    from choral.protocols import Homomorphic, Masked, Plain, Policy
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
    "Policy": "choral.protocols",
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
    "Policy",
    "Privacy",
    "Run",
    "Spent",
    "audit",
    "centralize",
    "compare",
    "federate",
]

__getattr__, __dir__ = exports(__name__, _HOME)
