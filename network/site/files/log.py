"""The site's log: approvals, refusals, rounds and changes of the directory, as a signed chain of lines.

Each line carries the SHA-256 of the line before it (:mod:`choral.privacy.ledgers.hash_chain`), and the site's signature
over that and its own content. So whoever has the site's public key can tell that no line was edited, left out between
two others, put in, or brought from another site. What the file alone cannot show is that lines were cut from its end,
a revocation say: note the head that `choral site log` prints, and give it back with --holds later.

An append is on disk when it returns, under an exclusive lock, so several processes may write. A torn last line was cut
in an append that never returned; it goes with the next one. Any other irregularity is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import msgspec

from choral.locks import lock_file
from choral.network.errors import SiteError
from choral.privacy.ledgers.hash_chain import GENESIS, BrokenChainError, ChainedLine, UnreadableError, follow, lines
from choral.privacy.ledgers.ledger_file import created, extend
from choral.protocols.crypto.identity import Identity
from choral.protocols.crypto.keys import ed25519_sign, ed25519_verify

Fact = str | int | float | bool | None
BEGUN, AGREED, REFUSED, APPROVED, REVOKED = "begun", "agreed", "refused", "approved", "revoked"
MOST_LINES = 50_000  # on one day, for a coordinator makes lines come to be
LONGEST_FACT = 2000  # characters; a coordinator's words are in some of them
_PURPOSE = b"choral site log 1\n"
_RESTORE = "restore it from a backup that is not older, and compare the head that was noted last"


class SiteLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """at: UTC, to the second. event: what happened. facts: of it. signature: the site's, hexadecimal."""

    at: str
    event: str
    facts: dict[str, Fact]
    signature: str

    @property
    def when(self) -> datetime:
        return datetime.fromisoformat(self.at)


_DECODER: msgspec.json.Decoder[ChainedLine[SiteLine]] = msgspec.json.Decoder(ChainedLine[SiteLine])


@dataclass(frozen=True)
class SiteLines:
    """Whole lines of a log, the digest of each, and when it was written."""

    content: bytes = b""
    entries: tuple[SiteLine, ...] = ()
    digests: tuple[str, ...] = ()
    times: tuple[datetime, ...] = ()

    @property
    def head(self) -> str:
        return self.digests[-1] if self.digests else GENESIS

    @cached_property
    def decisions(self) -> tuple[tuple[int, SiteLine], ...]:
        """The lines that approve and revoke, each with its number, from 0."""
        decided = (APPROVED, REVOKED)
        return tuple((number, entry) for number, entry in enumerate(self.entries) if entry.event in decided)


class SiteLog:
    """One site's log. identity: who signs what is appended; public: whose signatures are demanded of what is read.

    Raises: SiteError for a file that is damaged, gone, or signed by another key; NoLocksError without file locks.
    """

    def __init__(self, path: Path, public: bytes, identity: Identity | None = None) -> None:
        self.path, self._public, self._identity = path, public, identity
        self._known = SiteLines()

    def begin(self, name: str, now: datetime | None = None) -> None:
        """Make the file, with its first line. Raises: SiteError if there is one."""
        first = self._signed(GENESIS, BEGUN, {"site": name, "public_key": self._public.hex()}, now)
        if not created(self.path, lines(GENESIS, [first])[0]):
            raise SiteError(f"{self.path} is there already")

    def read(self) -> SiteLines:
        """All lines, every one checked. Raises: SiteError."""
        with self._open(write=False) as file:
            return self._read(file)

    def append(
        self,
        event: str,
        facts: dict[str, Fact],
        now: datetime | None = None,
        *,
        check: Callable[[SiteLines], None] | None = None,
    ) -> SiteLine:
        """Sign a line and write it; on return it is on disk. Texts are cut at 2000 characters.

        check: is given all lines before it while no other process can write one, and raises if it must not be written.
        Raises: SiteError; what `check` does.
        """
        with self._open(write=True) as file:
            known = self._read(file)
            if check is not None:
                check(known)
            line = self._signed(known.head, event, facts, now)
            if len(known.entries) >= MOST_LINES and _lines_on(line.at[:10], known) >= MOST_LINES:
                raise SiteError(f"{self.path} has {MOST_LINES} lines of {line.at[:10]}, and takes no more")
            try:
                raw, digest = lines(known.head, [line])
            except UnreadableError as error:
                raise SiteError(f"{self.path}: {error}", hint=error.hint) from None
            extend(file.fileno(), len(known.content), raw)
            self._known = SiteLines(
                known.content + raw, (*known.entries, line), (*known.digests, digest), (*known.times, line.when)
            )
        return line

    def _signed(self, previous: str, event: str, facts: dict[str, Fact], now: datetime | None) -> SiteLine:
        if self._identity is None:
            raise SiteError(f"{self.path} is only read here: the site's key signs what is appended")
        at = (now or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S+00:00")
        plain = {name: value[:LONGEST_FACT] if isinstance(value, str) else value for name, value in facts.items()}
        signature = ed25519_sign(self._identity.seed, _signed_bytes(previous, at, event, plain))
        return SiteLine(at=at, event=event, facts=plain, signature=signature.hex())

    @contextlib.contextmanager
    def _open(self, *, write: bool) -> Iterator[BinaryIO]:
        try:
            with open(self.path, "r+b" if write else "rb", buffering=0) as file:
                lock_file(file, exclusive=write)  # released when the file is closed
                yield file
        except FileNotFoundError:
            raise SiteError(f"{self.path} is gone: approvals and revocations are lines of it", hint=_RESTORE) from None
        except OSError as error:
            raise SiteError(
                f"{self.path} cannot be used: {error.strerror or type(error).__name__}",
                hint="nothing was agreed to or trained; mend the disk or the permissions and try again",
            ) from None

    def _read(self, file: BinaryIO) -> SiteLines:
        file.seek(0)
        content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        if not content or content != self._known.content:
            self._known = self._verified(content)
        return self._known

    def _verified(self, content: bytes) -> SiteLines:
        known = self._known if content.startswith(self._known.content) else SiteLines()
        entries, digests, head = list(known.entries), list(known.digests), known.head
        times = list(known.times)
        first = len(entries) + 1
        try:
            for number, (entry, digest) in enumerate(
                follow(content[len(known.content) :], _DECODER, head, first), first
            ):
                times.append(self._checked(entry, head, number))
                entries.append(entry)
                digests.append(digest)
                head = digest
        except BrokenChainError as error:
            what = "not a line of a site's log" if error.undecoded else "the chain of hashes is broken"
            raise SiteError(f"{self.path}, line {error.number}: {what}", hint=_RESTORE) from None
        if not entries:
            raise SiteError(f"{self.path} is empty: it was written when the site was made", hint=_RESTORE)
        return SiteLines(content, tuple(entries), tuple(digests), tuple(times))

    def _checked(self, entry: SiteLine, previous: str, number: int) -> datetime:
        """When it was written."""
        message = _signed_bytes(previous, entry.at, entry.event, entry.facts)
        try:
            signature = bytes.fromhex(entry.signature)
            when = entry.when
        except ValueError:
            raise SiteError(f"{self.path}, line {number}: not a line of a site's log", hint=_RESTORE) from None
        if not ed25519_verify(self._public, message, signature):
            raise SiteError(f"{self.path}, line {number}: it is not signed by this site's key", hint=_RESTORE)
        if (entry.event == BEGUN) != (number == 1) or when.tzinfo is None:
            raise SiteError(f"{self.path}, line {number}: not a line of a site's log", hint=_RESTORE)
        return when


def _lines_on(day: str, known: SiteLines) -> int:
    return sum(entry.at[:10] == day for entry in known.entries)


def _signed_bytes(previous: str, at: str, event: str, facts: dict[str, Fact]) -> bytes:
    return _PURPOSE + msgspec.json.encode((previous, at, event, facts), order="deterministic")
