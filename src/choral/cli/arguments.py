"""A command's flags as a dataclass, and whether whole tracebacks are wanted."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import textwrap
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar, get_type_hints

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
    """The flags were those of help; all is said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def parse(command: str, words: list[str], kind: type[T], default: T | None = None) -> T:
    """The flags of one command. After printing help, :func:`choral.cli.command_line.main` returns.

    Raises: ConfigError for flags that are not understood.
    """
    known = flags_of(kind)
    _refuse_short(words, known)
    words = ["--help" if word == "--help-all" else word for word in words]
    out, wrong = _page(), _page()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(wrong):
            if default is None:
                return tyro.cli(kind, args=words, prog=f"choral {command}")
            return tyro.cli(kind, args=words, prog=f"choral {command}", default=default)
    except SystemExit as stop:
        if stop.code:
            raise _refusal(command, _written(wrong) or _written(out), known) from None
    print(_for_users(_written(out)), end="")
    raise ArgumentsError(0)


def _page() -> io.TextIOWrapper:
    """What says that it takes UTF-8, unlike StringIO, so that boxes are drawn as on a terminal."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def _written(page: io.TextIOWrapper) -> str:
    page.seek(0)
    return page.read()


def parse_with_config(command: str, words: list[str], kind: type[T], read: Callable[[str], Any], *required: str) -> T:
    """The flags of a command whose first word is a settings file, and their defaults the settings that it holds.

    kind: with `config` and `settings`. read: the settings of a file, by its path. required: further flags without a
    default. Raises: as :func:`parse` and ``read``; ConfigError for a file behind the flags, which would not be read.
    """
    given = {"settings": read(words[0])} if words and not words[0].startswith("-") else {}
    missing = dict.fromkeys(("config", *required), tyro.MISSING)
    wanted = parse(command, words, kind, kind(**missing, **given))
    if not given:
        config = wanted.config  # type: ignore[attr-defined]
        raise ConfigError(f"{config} must come before the flags", hint=f"choral {command} {config} --out DIR ...")
    return wanted


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
            nearest = min(flag.count(".") for flag in fits)  # a table of the job before one inside a table
            meant = " or ".join(f"--{flag}" for flag in fits if flag.count(".") == nearest)
            raise ConfigError(f"unknown flag --{name}", hint=f"did you mean {meant}?")


def _refusal(command: str, text: str, known: list[str]) -> ConfigError:
    """What the parser says in a box, in the words and on the two lines of every other error."""
    said = _first_section(text)
    listed = f"choral {command} --help-all lists every flag"
    if found := re.match(r"Unrecognized options: (.+)", said):
        words = found[1].split(", ")
        word = next((word for word in words if word.startswith("-")), words[0])
        if not word.startswith("-"):
            return ConfigError(f"unexpected word {word!r}", hint=f"what goes with {command}: choral {command} --help")
        near = difflib.get_close_matches(word.partition("=")[0].lstrip("-"), known, n=1)
        return ConfigError(
            f"unknown flag {word.partition('=')[0]}", hint=f"did you mean --{near[0]}?" if near else listed
        )
    if found := re.match(r"Missing from choral [^:]+: (.+)", said):
        name, _, rest = found[1].partition(" ")
        about = rest.partition(" (required)")[0]
        about = about.partition(" ")[2] if name.startswith("--") else about  # without the kind of value
        return ConfigError(f"{name} is not given", hint=about or listed)
    if found := re.match(r"invalid choice '(.*)' for argument '(.+?)'. Expected one of \((.+?),?\)", said):
        choices = sorted(each for each in re.findall(r"'([^']*)'", found[3]) if each != "None")
        near = difflib.get_close_matches(found[1], choices, n=1)
        hint = f"did you mean {near[0]}?" if near else listed
        return ConfigError(f"{found[2]} is {found[1]!r}, expected one of {', '.join(choices)}", hint=hint)
    if found := re.match(r"Missing value for argument '(.+?)'", said):
        return ConfigError(f"{found[1]} needs a value", hint=listed)
    value = re.search(r"from \['(.*?)'\]|invalid \w+ '(.*?)'|to float: '(.*?)'|base 10: '(.*?)'", said)
    if (found := re.match(r"Error parsing (--[^:]+|[A-Z]+): ", said)) and value:
        given = next(part for part in value.groups() if part is not None)
        what = "a whole number" if re.search(r"\bINT\b|int\(\)", text) else "a number"
        what = what if re.search(r"\bINT\b|\bFLOAT\b|float|int\(\)", text) else "another value"
        return ConfigError(f"{found[1]} is {given!r}, expected {what}", hint=listed)
    return ConfigError(said[:1].lower() + said[1:] if said else "the flags were not understood", hint=listed)


def _first_section(text: str) -> str:
    """What stands in the box between its title and the first rule, or empty line, as one line."""
    lines = [re.sub(r"^[│╭╰─╮╯\s]+|[│╭╰─╮╯\s]+$", "", line) for line in text.splitlines()]
    said: list[str] = []
    for line in lines[1:]:
        if not line and said:
            break
        said.append(line)
    return " ".join(part for part in said if part)


def _for_users(text: str) -> str:
    """Help without what docstrings tell programmers: sentences on the errors that they raise."""
    kept, within = [], False
    for line in text.splitlines():
        inside = line.strip("│").strip()
        if within and (not inside or inside.startswith(("--", "──", "╰")) or not line.startswith("│")):
            within = False
        if within:
            continue
        if line.startswith("│") and "Raises:" in line:
            within, line = True, line.partition("Raises:")[0].rstrip().ljust(len(line) - 1) + "│"
            if not line.strip("│ "):
                continue
        kept += textwrap.wrap(line, 80) if len(line) > 80 else [line]
    return "\n".join(kept) + "\n"
