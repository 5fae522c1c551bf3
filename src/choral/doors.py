"""Through which door the user came: the words of a hint are those of the command line, or those of Python."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_command_line: ContextVar[bool] = ContextVar("_command_line", default=False)


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
