"""Errors of the protocols: one type per kind of culprit."""

from __future__ import annotations

from choral.errors import ChoralError


class ProtocolError(ChoralError):
    """A secure sum was refused or stopped. The subclasses say who is to blame."""


class SpecError(ProtocolError):
    """The caller asked for something that cannot be summed safely."""
