"""What noise costs: budgets, accounting, mechanisms, and the torch wrapper.

`choral.privacy.accounting.record_level` needs no torch; the names below are fetched when they are first used.
"""

from __future__ import annotations

from choral.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
