"""Who learns what: secure sums of integer vectors, and the messages they need."""

from __future__ import annotations

from choral.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
