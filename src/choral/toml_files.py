"""TOML files read into dataclasses: a key that is misspelt, of the wrong type or no word is named, never dropped."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from choral.errors import ConfigError

T = TypeVar("T")


def read_toml(
    path: str | Path, kind: type[T], *, example: str, keys: str, former: Mapping[str, str] | None = None
) -> T:
    """The file as an object of a dataclass.

    example: what a missing or broken file is to be compared with, for the hint. keys: where every key is listed.
    former: keys that the file had once, and what says the same now.
    Raises: ConfigError naming the file and the key: missing file, not TOML, unknown key, wrong type, bad value.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte-order mark
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}", hint=f"{example} is one to start from") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text in UTF-8", hint="it is a TOML file: save it as UTF-8") from None
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ConfigError(f"cannot read {path}: {why}", hint="expected a TOML file") from None
    return parse_toml(text, kind, name=str(path), example=example, keys=keys, former=former)


def parse_toml(
    text: str, kind: type[T], *, name: str, example: str, keys: str, former: Mapping[str, str] | None = None
) -> T:
    """The text of such a file, as `read_toml`. name: of the file, in errors.

    Raises: ConfigError naming the file and the key: not TOML, unknown key, wrong type, bad value.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        hint = f"{example} is one to compare with"
        if name.lower().endswith((".csv", ".parquet")):
            hint = f"settings for a table of your own are written by: choral init --data {name}"
        elif "Cannot overwrite a value" in str(error):
            hint = "a key stands twice in one table; leave one of the two out"
        raise ConfigError(f"{name} is not valid TOML: {error}", hint=hint) from None
    check_keys(table, kind, name, former=former)
    try:
        return msgspec.convert(table, kind, dec_hook=lambda wanted, value: wanted(value))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name}: {_cause(error)}", hint=keys) from None


def check_keys(
    table: Mapping[str, Any], kind: Any, path: str, prefix: str = "", *, former: Mapping[str, str] | None = None
) -> None:
    """Raises: ConfigError for a key that `kind` does not have, or a word that none of its settings has."""
    if not dataclasses.is_dataclass(kind):
        each = next((part for part in get_args(kind) if dataclasses.is_dataclass(part)), None)
        if each is not None and get_origin(kind) is dict:
            for name, part in table.items():
                if isinstance(part, Mapping):
                    check_keys(part, each, path, f"{prefix}{name}.", former=former)
        elif each is not None:
            check_keys(table, each, path, prefix, former=former)
        return
    hints, was = get_type_hints(kind), former or {}
    for key, value in table.items():
        if key not in hints:
            near = [was[prefix + key]] if prefix + key in was else difflib.get_close_matches(key, hints, n=1)
            known = f"did you mean {prefix}{near[0]}?" if near else f"known keys here: {', '.join(hints)}"
            raise ConfigError(f"{path}: unknown key {prefix}{key}", hint=known)
        if isinstance(value, Mapping):
            check_keys(value, hints[key], path, f"{prefix}{key}.", former=former)
        elif isinstance(value, str) and (choices := _choices(hints[key])) and value not in choices:
            near = difflib.get_close_matches(value, choices, n=1)
            raise ConfigError(
                f"{path}: {prefix}{key} is {value!r}, expected one of {', '.join(choices)}",
                hint=f"did you mean {near[0]!r}?" if near else "one of these words, in quotation marks",
            )


def toml_of(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """A table as TOML: plain values first, then a section for each table in it. What is None is left out.

    table: strings, numbers, truth values, lists of those, and tables of all of it by name.
    """
    plain = {key: value for key, value in table.items() if value is not None and not isinstance(value, Mapping)}
    lines = [f"[{'.'.join(map(_key, path))}]"] if path and plain else []
    lines += [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    parts = ["\n".join(lines) + "\n"] if lines else []
    parts += [toml_of(value, (*path, key)) for key, value in table.items() if isinstance(value, Mapping)]
    return "\n".join(part for part in parts if part)


def _key(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else json.dumps(name)


def _value(value: Any) -> str:
    """JSON says it as TOML does, but for characters beyond 16 bits, which are left as they are, and for `del`."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _choices(kind: Any) -> tuple[str, ...]:
    """The words that a setting may have, if it has words."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    parts = [part for part in get_args(kind) if part is not type(None)]
    return _choices(parts[0]) if get_origin(kind) in (Union, UnionType) and len(parts) == 1 else ()


def _cause(error: msgspec.ValidationError) -> str:
    """msgspec's message with its `$.a.b` path written as our dotted key."""
    message, _, key = str(error).partition(" - at `$.")
    return f"{key.rstrip('`')}: {message[0].lower()}{message[1:]}" if key else message
