"""A chain of hashes over JSON lines: each line carries the SHA-256 of the line before it and its own.

It finds an edit, a missing line, another order and lines of another file. It holds no secret, so whoever can write
the file can write another whole chain: against that, and against lines cut from the end, keep the last digest (the
head) where the writer of the file cannot change it, and compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import msgspec

from choral.errors import ChoralError

GENESIS = "0" * 64
Entry = TypeVar("Entry")


class Line(msgspec.Struct, Generic[Entry], frozen=True, forbid_unknown_fields=True, kw_only=True):
    """previous: the digest of the line before. digest: hexadecimal SHA-256 of the JSON of [previous, entry]."""

    previous: str
    entry: Entry
    digest: str


class BrokenChainError(Exception):
    """Line ``number``, counted from 1, is not as it was written. ``undecoded``: it is not even a line."""

    def __init__(self, number: int, *, undecoded: bool) -> None:
        super().__init__(f"line {number}")
        self.number, self.undecoded = number, undecoded


def lines(head: str, entries: Iterable[Entry]) -> tuple[bytes, str]:
    """Return the lines of ``entries`` that follow the line of digest ``head``, and the digest of the last."""
    written = []
    for entry in entries:
        line = _line(head, entry)
        written.append(msgspec.json.encode(line) + b"\n")
        head = line.digest
    return b"".join(written), head


def follow(content: bytes, decoder: msgspec.json.Decoder[Line[Entry]]) -> Iterator[tuple[Entry, str]]:
    """Yield each entry and its line's digest; ``content`` is whole lines, each exactly as it was written.

    Raises: BrokenChainError at the first line that is not.
    """
    head = GENESIS
    for number, text in enumerate(content.split(b"\n")[:-1], 1):
        try:
            entry = decoder.decode(text).entry
        except (msgspec.MsgspecError, ChoralError) as error:
            raise BrokenChainError(number, undecoded=True) from error
        line = _line(head, entry)
        if msgspec.json.encode(line) != text:
            raise BrokenChainError(number, undecoded=False)
        head = line.digest
        yield entry, head


def _line(previous: str, entry: Entry) -> Line[Entry]:
    digest = hashlib.sha256(msgspec.json.encode((previous, entry))).hexdigest()
    return Line(previous=previous, entry=entry, digest=digest)
