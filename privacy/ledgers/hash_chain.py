"""A chain of hashes over JSON lines: each line carries the SHA-256 of the line before it and its own.

It finds an edit, a missing line, another order and lines of another file. It holds no secret, so whoever can write
the file can write another whole chain: against that, and against lines cut from the end, keep the last digest (the
head) where the writer of the file cannot change it, and compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import msgspec

from choral.errors import ChoralError

GENESIS = "0" * 64
Entry = TypeVar("Entry")


class ChainedLine(msgspec.Struct, Generic[Entry], frozen=True, forbid_unknown_fields=True, kw_only=True):
    """previous: the digest of the line before. digest: hexadecimal SHA-256 of the JSON of [previous, entry]."""

    previous: str
    entry: Entry
    digest: str


class BrokenChainError(Exception):
    """Line ``number``, counted from 1, is not as it was written. ``undecoded``: it is not even a line."""

    def __init__(self, number: int, *, undecoded: bool) -> None:
        super().__init__(f"line {number}")
        self.number, self.undecoded = number, undecoded


class UnreadableError(ChoralError):
    """An object that was about to be written could not be read back as it is; nothing was written."""


def encoded(entry: Any, *, hashed: bool = False) -> bytes:
    """Return the JSON of a struct, of which it is certain that it is read back as the same.

    hashed: and that it is then encoded to the same bytes, so that a digest of them can be checked.
    Raises: UnreadableError otherwise: a number that is NaN or not of Python's own types, a text that is no Unicode, a
    value that its type does not allow; if `hashed`, a whole number where a decimal number is read.
    """
    try:
        raw = msgspec.json.encode(entry)
        again = msgspec.json.decode(raw, type=type(entry))
        same = as_json(again) == as_json(entry) and (not hashed or msgspec.json.encode(again) == raw)
    except (TypeError, ValueError, OverflowError, RecursionError, ChoralError) as error:  # msgspec's are ValueErrors
        raise UnreadableError(
            f"{type(entry).__name__} cannot be written so that it can be read back: {error}", hint=_PLAIN
        ) from error
    if not same:
        raise UnreadableError(f"{type(entry).__name__} would not be read back as it is: {entry!r:.200}", hint=_PLAIN)
    return raw


def lines(head: str, entries: Iterable[Entry]) -> tuple[bytes, str]:
    """Return the lines of ``entries`` that follow the line of digest ``head``, and the digest of the last.

    Raises: UnreadableError for an entry that could not be read back.
    """
    written = []
    for entry in entries:
        encoded(entry, hashed=True)
        line = _line(head, entry)
        written.append(msgspec.json.encode(line) + b"\n")
        head = line.digest
    return b"".join(written), head


def follow(
    content: bytes, decoder: msgspec.json.Decoder[ChainedLine[Entry]], head: str = GENESIS, first: int = 1
) -> Iterator[tuple[Entry, str]]:
    """Yield each entry and its line's digest; ``content`` is whole lines, each exactly as it was written.

    head: the digest of the line before; first: the number of the first line of ``content``.
    Raises: BrokenChainError at the first line that is not.
    """
    for number, text in enumerate(content.split(b"\n")[:-1], first):
        try:
            entry = decoder.decode(text).entry
        except (msgspec.MsgspecError, ChoralError) as error:
            raise BrokenChainError(number, undecoded=True) from error
        line = _line(head, entry)
        if msgspec.json.encode(line) != text:
            raise BrokenChainError(number, undecoded=False)
        head = line.digest
        yield entry, head


_PLAIN = "Use finite numbers and texts of Python's own types: float(x), int(x), str(x)."


def as_json(entry: Any, enc_hook: Callable[[Any], Any] | None = None) -> Any:
    """Return `entry` in the types that JSON knows: dicts with texts for keys, lists, texts, numbers, None.

    Raises: TypeError for what has no such form, nor gets one from `enc_hook`.
    """
    return _lists(msgspec.to_builtins(entry, str_keys=True, enc_hook=enc_hook))


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(part) for key, part in value.items()}
    return [_lists(part) for part in value] if isinstance(value, list | tuple) else value


def _line(previous: str, entry: Entry) -> ChainedLine[Entry]:
    digest = hashlib.sha256(msgspec.json.encode((previous, entry))).hexdigest()
    return ChainedLine(previous=previous, entry=entry, digest=digest)
