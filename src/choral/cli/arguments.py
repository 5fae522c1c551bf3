"""A command's flags as a dataclass, and whether whole tracebacks are wanted."""

from __future__ import annotations

import dataclasses
from contextvars import ContextVar
from typing import TypeVar, get_type_hints

import tyro

from choral.errors import ConfigError

T = TypeVar("T")

_debug: ContextVar[bool] = ContextVar("_debug", default=False)


def want_tracebacks(wanted: bool) -> None:
    """Say whether whole tracebacks are wanted."""
    _debug.set(wanted)


def debug() -> bool:
    """Whether whole tracebacks are wanted."""
    return _debug.get()


class ArgumentsError(Exception):
    """The flags were not understood, or were those of help; all is said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def parse(command: str, words: list[str], kind: type[T], default: T | None = None) -> T:
    """The flags of one command. After printing help or what is wrong, :func:`choral.cli.command_line.main` returns.

    Raises: ConfigError for a flag that lacks the name of its table.
    """
    _refuse_short(words, flags_of(kind))
    try:
        if default is None:
            return tyro.cli(kind, args=words, prog=f"choral {command}")
        return tyro.cli(kind, args=words, prog=f"choral {command}", default=default)
    except SystemExit as stop:
        raise ArgumentsError(int(stop.code or 0)) from None


def flags_of(kind: type, prefix: str = "") -> list[str]:
    """The flags that a dataclass gives, those of its tables included."""
    found: list[str] = []
    for name, hint in get_type_hints(kind).items():
        flag = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found += flags_of(hint, "" if name == "settings" else f"{flag}.")
        else:
            found.append(flag)
    return found


def _refuse_short(words: list[str], known: list[str]) -> None:
    """Refuse --epsilon where it is --privacy.epsilon: the parser would propose what is spelt alike."""
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("_", "-")
        fits = [flag for flag in known if flag.rpartition(".")[2] == name]
        if word.startswith("--") and fits and name not in fits:
            meant = " or ".join(f"--{flag}" for flag in fits)
            raise ConfigError(f"unknown flag --{name}", hint=f"did you mean {meant}?")
