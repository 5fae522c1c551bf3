"""In a notebook, a cell that is run again begins another ledger in memory: a notice says so, once."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

from choral.privacy.ledgers.ledger import Ledger

_wanted: ContextVar[bool] = ContextVar("_wanted", default=True)
_given = False


class LedgerInMemoryWarning(UserWarning):
    """What is spent is remembered for as long as this session, or less."""


def notice_memory(ledger: Ledger, remedy: str) -> None:
    """Warn, once in a session at a prompt or in a notebook, if what is spent is kept in memory alone."""
    global _given
    if _given or ledger.path is not None or not _wanted.get() or not _interactive():
        return
    _given = True
    warnings.warn(
        "what the data spends is kept in memory: run again, this cell starts the budget at zero, although the data was"
        f" used before. {remedy} remembers it.",
        LedgerInMemoryWarning,
        stacklevel=3,
    )


@contextlib.contextmanager
def no_notice() -> Iterator[None]:
    """For records that are made for a test, whose spending ends with it."""
    token = _wanted.set(False)
    try:
        yield
    finally:
        _wanted.reset(token)


def _interactive() -> bool:
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules
