"""What differs between two sets of settings, in words that fit a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHOWN = 5  # keys
_LONGEST = 60  # characters of a value


def differences(old: Any, new: Any, key: str) -> list[str]:
    """Each entry that is not the same, as "key was X, now it is Y"; tables are gone through key by key."""
    if old == new:
        return []
    if isinstance(old, Mapping) and isinstance(new, Mapping) and (old or new):
        names = sorted(old.keys() | new.keys(), key=str)
        return [
            found
            for name in names
            for found in differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [f"{key} was {_short(old)}, now it is {_short(new)}"]


def in_short(found: list[str]) -> str:
    """The first few in one line, and how many more there are."""
    more = len(found) - _SHOWN
    return "; ".join(found[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _short(value: Any) -> str:
    if value is None:
        return "not set"
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
