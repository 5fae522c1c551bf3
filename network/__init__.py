"""Parties on their own machines: messages between a coordinator's hub and the links of sites."""

from __future__ import annotations

from choral.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
