"""Choral: train PyTorch models on data that may not be seen.

In a choir you hear the sum, never a single voice. Two entry points cover most uses:

- :class:`Privacy` makes one existing training loop differentially private (``privacy.wrap``);
- :func:`federate` runs the same functions over several parties that keep their data, and
  :func:`compare` says what that costs against :func:`centralize`.
"""

from __future__ import annotations

from choral.lazy import exports

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = exports(__name__, __file__)
