"""Numbers as they are written down: of Python's own types, so that what is written is read back the same.

A ledger's line is hashed as it is encoded, and read back strictly. An integer where a decimal number is expected is
encoded as ``10`` and, once decoded, as ``10.0``: another line. So whatever counts as a number becomes one of the two
types that JSON tells apart, once, where the object is made.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from choral.errors import ConfigError

LARGEST_INTEGER = 2**63 - 1


def as_float(name: str, value: Any) -> float:
    """Return `value` as a finite float; whole numbers, fractions and numpy's scalars count.

    Raises: ConfigError naming `name` for a bool, a text, NaN, an infinity, or anything else.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise ConfigError(f"{name} is {value!r:.80}, expected a finite number", hint="A number of Python or numpy.")


def is_number(value: Any) -> bool:
    """Return whether `value` is a finite number and no bool."""
    try:
        as_float("", value)
    except ConfigError:
        return False
    return True


def as_integer(name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int from `least`; numpy's integers count.

    Raises: ConfigError naming `name` for a bool, a number with a decimal point, one out of range, or anything else.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if least <= number <= LARGEST_INTEGER:
            return number
    raise ConfigError(
        f"{name} is {value!r:.80}, expected an integer >= {least}", hint="int(...) makes one of a whole decimal number."
    )
