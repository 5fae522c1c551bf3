"""Sums of ciphertexts: the server adds what it cannot read."""

from __future__ import annotations

from choral.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
