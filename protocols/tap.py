"""Lets an auditor see every message of a session that plays all parties in one process, as the server sees it.

The state machines of the protocols know nothing of it: messages are shown where the session hands them over. A
watcher belongs to the context (thread or task) that set it, and sees what is sent there until it is taken away:

    with watched_by(watcher):
        session = Masked().open(spec)        # its messages are shown, and those of its rounds
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Way = Literal["up", "down"]
Watcher = Callable[[Way, str, bytes], None]
"""Called with the way (up: to the server), the party, and the message's bytes as they are on the wire."""

_watcher: ContextVar[Watcher | None] = ContextVar("choral-watcher", default=None)


@contextmanager
def watched_by(watcher: Watcher | None) -> Iterator[None]:
    """Show every message sent within to ``watcher``; None shows them to nobody."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def show(way: Way, party: str, raw: bytes) -> None:
    """A message is on its way."""
    if (watcher := _watcher.get()) is not None:
        watcher(way, party, raw)


def watched() -> bool:
    """Whether anybody looks at what is sent."""
    return _watcher.get() is not None
