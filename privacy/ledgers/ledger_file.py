"""A ledger's file: its lines, verified when they are read; made in one piece, and extended on disk or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import NamedTuple

import msgspec

from choral.errors import ConfigError
from choral.locks import sync_folder
from choral.privacy.accounting.events import (
    CLIENT_UNIT,
    RELATIONS,
    UNIT,
    ClientRelease,
    Event,
    ReleasePlan,
)
from choral.privacy.accounting.filters import PrivacyFilter
from choral.privacy.errors import LedgerError
from choral.privacy.ledgers.hash_chain import GENESIS, BrokenChainError, ChainedLine, follow

FORMAT = "choral ledger 1"
FILTER = "renyi mixture 1"
"""The rule of :mod:`choral.privacy.accounting.filters`; one that fixes other orders or weights has another name."""
RESTORE = "Nothing was spent. Restore the file from a backup; an empty ledger would forget what was released."


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, tag="header"):
    """The first line: whose ledger this is, and what its numbers are about.

    filter, orders: the rule that decides on what is added to the first plan, and the Renyi orders that it fixed by that
    plan's promise; empty where no plan came first, and in ledgers of earlier versions.
    """

    format: str
    holder: str
    delta: float
    unit: str
    neighbours: str
    filter: str = ""
    orders: tuple[int, ...] = ()


_DECODER: msgspec.json.Decoder[ChainedLine[Header | ReleasePlan | Event]] = msgspec.json.Decoder(
    ChainedLine[Header | ReleasePlan | Event]
)


def unit_of(entry: ReleasePlan | Event) -> str:
    """Return whose presence an entry is about."""
    event = entry.parts[0].event if isinstance(entry, ReleasePlan) else entry
    return CLIENT_UNIT if isinstance(event, ClientRelease) else UNIT


def filter_of(first: ReleasePlan | Event | None, delta: float) -> tuple[str, tuple[int, ...]]:
    """What a header says of the filter, by the first entry; ("", ()) if that is no plan."""
    if not isinstance(first, ReleasePlan):
        return "", ()
    try:
        return FILTER, PrivacyFilter(first.epsilon, delta).orders
    except ConfigError:  # a promise that no filter has been made for
        return "", ()


def extend(file: int, end: int, line: bytes) -> None:
    """Write `line` at `end`, on disk, or take back what was written of it: an event that was not paid for is not kept.

    A torn tail after `end` goes; its append never returned. Should taking back fail, too, then part of a line is left,
    which goes with the next append, or all of it, which counts although nothing was released.
    """
    os.ftruncate(file, end)
    try:
        left, place = memoryview(line), end
        while left:
            written = os.pwrite(file, left, place)
            left, place = left[written:], place + written
        os.fsync(file)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file, end)
            os.fsync(file)
        raise


def created(path: Path, content: bytes) -> bool:
    """Make the file with all of `content`, on disk, or not at all; return False if there is one already."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # unlike a rename, fails if the name is taken
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.absolute().parent)
    return True


class Verified(NamedTuple):
    """Whole lines of a ledger's file, and what they say."""

    content: bytes = b""
    header: Header | None = None
    entries: tuple[ReleasePlan | Event, ...] = ()
    head: str = GENESIS


_NOTHING = Verified()


def verified(content: bytes, name: str, known: Verified = _NOTHING) -> Verified:
    """Decode whole lines strictly; raise LedgerError at the first that is not exactly as it was written.

    known: what was verified before. If `content` begins with it, byte for byte, only what follows is decoded.
    """
    if not content.startswith(known.content):
        known = _NOTHING
    header, entries, head = known.header, list(known.entries), known.head
    first = known.content.count(b"\n") + 1
    try:
        for number, (entry, digest) in enumerate(follow(content[len(known.content) :], _DECODER, head, first), first):
            if isinstance(entry, Header) != (number == 1):
                raise BrokenChainError(number, undecoded=False)
            if isinstance(entry, Header):
                header = entry
                if header.format != FORMAT or header.neighbours not in RELATIONS.get(header.unit, ()):
                    raise LedgerError(f"{name}: of another format, unit or neighbour relation", hint=RESTORE)
            elif header is None or header.unit != unit_of(entry):
                raise LedgerError(f"{name}, line {number}: an event of another unit than the ledger's", hint=RESTORE)
            else:
                entries.append(entry)
            head = digest
    except BrokenChainError as error:
        what = "not a line of a ledger" if error.undecoded else "the chain of hashes is broken"
        raise LedgerError(f"{name}, line {error.number}: {what}", hint=RESTORE) from error
    said = (header.filter, header.orders) if header is not None else ("", ())
    if header is not None and said != ("", ()) and said != filter_of(entries[0] if entries else None, header.delta):
        raise LedgerError(
            f"{name} was begun under another filter than this Choral decides by: {said[0]!r:.80}",
            hint="Go on with the version of Choral that began it.",
        )
    return Verified(content, header, tuple(entries), head)
