"""Values that callers give: each of the right type and in range, or a SpecError that says what was expected.

A setting that security rests on is never compared with one good value only: what is not known is refused, so that a
misspelt word cannot stand for the weaker choice.
"""

from __future__ import annotations

import math
import operator
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from choral.protocols.errors import SpecError

MAX_NAME = 255
"""Characters of a party's name, or of the text that says how values became integers."""
KEY_BYTES = 32
DIGEST_BYTES = 32


def whole(value: Any, what: str, low: int, high: int) -> int:
    """``value`` as an int, numpy's whole numbers included. Raises: SpecError for any other type, or outside the range.

    A bool is no number here, and neither is 2.0: whoever computed a count as a float may have rounded it.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise SpecError(f"expected {what} as a whole number, got {shown(value)}", hint=f"from {low} to {high}")
    if not low <= number <= high:
        raise SpecError(f"expected {low} <= {what} <= {high}, got {shown(number)}")
    return number


def optional(value: Any, what: str, low: int, high: int) -> int | None:
    """None as it is; else :func:`whole`."""
    return None if value is None else whole(value, what, low, high)


def positive(value: Any, what: str) -> float:
    """``value`` as a float. Raises: SpecError unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise SpecError(f"expected {what} as a number, got {shown(value)}")
    if not (math.isfinite(value) and value > 0):
        raise SpecError(f"expected {what} finite and above 0, got {shown(value)}")
    return float(value)


def one_of(value: Any, what: str, choices: Iterable[str]) -> None:
    """Raises: SpecError unless ``value`` is one of the texts, letter by letter."""
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        raise SpecError(f"expected {what} to be {' or '.join(map(repr, known))}, got {shown(value)}")


def share(value: Any, what: str) -> int | float:
    """A count of parties (a whole number from 0) or a fraction of them (a float in [0, 1)). Raises: SpecError."""
    if isinstance(value, float) and 0 <= value < 1:
        return float(value)
    try:
        return whole(value, what, 0, 1 << 40)
    except SpecError:
        raise SpecError(
            f"expected {what} as a count (int, from 0) or a fraction in [0, 1) (float), got {shown(value)}",
            hint="a number of parties is an int",
        ) from None


def text(value: Any, what: str) -> None:
    """Raises: SpecError unless it is text that a message can carry, of at most 255 characters."""
    if not isinstance(value, str):
        raise SpecError(f"expected {what} as text, got {shown(value)}")
    if len(value) > MAX_NAME:
        raise SpecError(f"expected {what} of at most {MAX_NAME} characters, got {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SpecError(f"{what} {value!a} has a character that no message can carry") from None


def digest(value: Any, what: str) -> None:
    """Raises: SpecError unless it is None or 32 bytes."""
    if value is not None and not (isinstance(value, bytes) and len(value) == DIGEST_BYTES):
        raise SpecError(f"expected {what} as a digest of {DIGEST_BYTES} bytes, got {shown(value)}")


def names(values: Iterable[Any], what: str) -> None:
    """Names of parties, no two the same however they are spelt.

    Unicode writes one name in several ways (an accent apart from its letter, or with it), which look alike to whoever
    reads a roster: two that are equal once normalized (NFKC) are one name, and a party would stand there twice.

    Raises: SpecError for anything else than text, an empty or too long name, or one that is there twice.
    """
    seen: dict[str, str] = {}
    for name in values:
        text(name, f"a name of {what}")
        if not name:
            raise SpecError(f"party names must be non-empty: {what} has an empty one")
        plain = name if name.isascii() else unicodedata.normalize("NFKC", name)
        if plain in seen:
            twice = (
                f"has {name!r} twice" if seen[plain] == name else f"spells one name twice: {seen[plain]!a}, {name!a}"
            )
            raise SpecError(f"party names must be distinct: {what} {twice}", hint="one name, one spelling, one party")
        seen[plain] = name


def directory(value: Any) -> None:
    """Public keys by party name, all different. Raises: SpecError for anything else than 32 bytes, or one key twice."""
    if not isinstance(value, Mapping):
        raise SpecError(f"expected a directory as a mapping from names to keys, got {shown(value)}")
    names(value, "the directory")
    keys = list(value.values())
    if not all(isinstance(key, bytes) and len(key) == KEY_BYTES for key in keys):
        raise SpecError(f"expected Ed25519 public keys of {KEY_BYTES} bytes")
    if len(set(keys)) != len(keys):
        raise SpecError("two parties of the directory have the same key: they are one")


def shown(value: Any) -> str:
    """The value, short, for an error; of anything but plain numbers and text its type alone."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value) if not isinstance(value, int) or abs(value) < 1 << 128 else "a number beyond 2^128"
    return repr(value[:40]) if type(value) is str else f"a {type(value).__name__}"
