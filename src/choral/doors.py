"""Words for the user: hints in those of the door that they came through, command line or Python; text from others, made
visible.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_command_line: ContextVar[bool] = ContextVar("_command_line", default=False)
_KEPT = "\t\u00a0"  # a tab, and the space before a unit


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """Hints within speak of flags and settings."""
    token = _command_line.set(True)
    try:
        yield
    finally:
        _command_line.reset(token)


def enter_by_command_line() -> None:
    """The same for the rest of this process, or thread: a worker of the command line."""
    _command_line.set(True)


def worded(*, command: str, python: str) -> str:
    """Return the hint for the door that this was called through."""
    return command if _command_line.get() else python


def visible(text: str) -> str:
    """Text from others as it may be printed: what is not printable is spelt out, as \\x1b or \\u202e."""
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() or sign in _KEPT else sign.encode("unicode_escape").decode() for sign in text
    )
