"""The base of every error that Choral raises on purpose."""

from __future__ import annotations


class ChoralError(Exception):
    """What went wrong, and what to do about it.

    ``str(error)`` is one line: what was wrong and what was expected. ``hint`` is one sentence with the
    next step; the command line prints it on a line of its own, and so does a traceback. Neither ever holds a
    secret or a data value.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # a traceback ends with it


class ConfigError(ChoralError):
    """A setting is missing, misspelt, of the wrong type or out of range."""


class DataError(ChoralError):
    """A dataset cannot be used as it is: empty, of one class, of the wrong shape or type, not finite."""
