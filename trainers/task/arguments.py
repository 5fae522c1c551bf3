"""Arguments of the right type and in range, or a ConfigError that says what was expected and what to do."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import numpy as np

from choral.errors import ConfigError


def whole_number(value: Any, name: str, least: int | None, hint: str) -> int:
    """``value`` as an int, numpy's whole numbers included; a bool is none. least: None, any. Raises: ConfigError."""
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise ConfigError(f"{name} is {shown(value)}, expected a whole number", hint=hint)
    if least is not None and number < least:
        raise ConfigError(f"expected {name} >= {least}, got {number}", hint=hint)
    return number


def number(value: Any, name: str, hint: str) -> float:
    """``value`` as a float, numpy's numbers included; a bool is none. Raises: ConfigError."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise ConfigError(f"{name} is {shown(value)}, expected a number", hint=hint)
    return float(value)


def own_numbers(made: Any, what: str) -> None:
    """Hold every field of a dataclass that is declared as a number to that, and keep it as Python's own.

    made: just made, maybe frozen; its annotations are text (``int``, ``float``, and either with ``| None``).
    what: stands before the field's name. Raises: ConfigError.
    """
    for name, kind, *optional in ((one.name, *str(one.type).split(" | ")) for one in fields(made)):
        value = getattr(made, name)
        if kind not in ("int", "float") or (value is None and optional == ["None"]):
            continue
        hint = f"{what}({name}=...), {'a whole number' if kind == 'int' else 'a number'}"
        own = whole_number(value, name, None, hint) if kind == "int" else number(value, name, hint)
        object.__setattr__(made, name, own)


def flag(value: Any, name: str) -> None:
    """Raises: ConfigError for anything but True and False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {shown(value)}, expected True or False", hint=f"{name}=True")


def one_of(value: Any, name: str, choices: Iterable[str]) -> None:
    """Raises: ConfigError unless ``value`` is one of the texts."""
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        words = " or ".join(map(repr, known)) if len(known) < 3 else f"one of {', '.join(known)}"
        raise ConfigError(f"{name} is {shown(value)}, expected {words}", hint=f"such as {known[0]!r}")


def instance(value: Any, name: str, kinds: type | tuple[type, ...], hint: str) -> None:
    """Raises: ConfigError for anything else, a class in the place of one of its objects included."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if isinstance(value, type) and issubclass(value, kinds):
        raise ConfigError(f"{name} is the class {value.__name__}", hint=f"make one of it: {value.__name__}(...)")
    if not isinstance(value, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"{name} is {shown(value)}, expected {names}", hint=hint)


def function(value: Any, name: str, takes: str, optional: str = "") -> None:
    """Hold a function of the user's to the arguments that it is called with.

    takes: their names, in order. optional: one that is given by name to a function that has it.
    Raises: ConfigError for what cannot be called, or not with these.
    """
    form = f"{name}({takes})"
    if not callable(value):
        raise ConfigError(f"{name} is {shown(value)}, expected a function", hint=form)
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # of a builtin, which says nothing
        return
    named = {optional: 1} if optional and optional in signature.parameters else {}
    try:
        signature.bind(*range(len(takes.split(", "))), **named)
    except TypeError as error:
        raise ConfigError(f"{name} is called as {form}, and cannot be: {error}", hint=f"define it as {form}") from None


def shown(value: Any) -> str:
    """A value in a message: short, and of an object no more than its type."""
    if value is None or isinstance(value, str | int | float):
        return f"{value!r:.80}"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def optional_function(value: Callable[..., Any] | None, name: str, takes: str) -> None:
    """None as it is; else as :func:`function`."""
    if value is not None:
        function(value, name, takes)
