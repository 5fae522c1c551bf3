"""What the server of a run saw: every message, recorded as the run goes, for the audit.

    DIR/transcript/index.jsonl   Opened per session, SumBegun per sum, then its messages and, in rehearsals, vectors
    DIR/transcript/messages.bin  their bytes, one after another; not with detail "digests"

detail: "digests" keeps size and SHA-256 of each message; "messages" keeps the messages themselves, which is what the
server sees anyway. "rehearsal" also keeps **each party's vector in the clear**, which no server ever sees and which
only a process that plays all parties can write down: for data that need no protection, to test whether any message
says anything of a vector. The key-exchange, masks and shares inside the parties are never recorded.

The lines of the index are a chain of hashes (:mod:`choral.privacy.ledgers.hash_chain`), and each entry holds the hash
of its bytes. run.json holds the chain's head after the latest complete round. An edit, a missing or added line, another
order, a piece of another transcript and a cut end are found by :class:`Recorded` and :meth:`Recorded.check`, which the
audit calls; a resumed run goes on with the chain, or refuses.

What the chain **cannot** show: it has no key, so whoever can write the folder can write another chain, and another
head into run.json. It says that the record was not changed after it was written, never that it was true when it was
written: a server that leaves a message out, or invents one, chains that. Against a later rewriting, keep the head
(``transcript.head`` in run.json; the report prints it) where the folder's owner cannot change it: with each party, in a
signed mail, in a public log. Each party can also compare the messages that it sent with their hashes in the index.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
import numpy as np

from choral.privacy.ledgers.hash_chain import GENESIS, BrokenChainError, ChainedLine, UnreadableError, follow, lines
from choral.protocols.interface import SumSpec
from choral.protocols.own_vector import is_tensor
from choral.protocols.tap import Watcher, Way
from choral.trainers.run_folder.info import RunFolderError, Sealed

Detail = Literal["digests", "messages", "rehearsal"]
FORMAT_VERSION = 3  # 1 had no chain, 2 one sum in a round
FOLDER = "transcript"


class Opened(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="is", tag="opened"):
    """A session of the secure sum begins; a run that was resumed has several. The spec is that of the long sum."""

    version: int = FORMAT_VERSION
    detail: Detail
    secure_sum: str
    parties: tuple[str, ...]
    length: int
    bound: int
    modulus_bits: int


class ObservedMessage(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="is", tag="message"
):
    """One message. round: 0 while the session opens. sha256: hexadecimal. at: where its bytes start, None if not
    kept."""

    round: int
    way: Way
    party: str
    size: int
    sha256: str
    at: int | None = None


class Vector(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="is", tag="vector"):
    """A party's vector of one round, int64 little-endian, in a rehearsal. sha256: None in version 1."""

    round: int
    party: str
    size: int
    at: int
    sha256: str | None = None


class SumBegun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="is", tag="sum"):
    """A sum of a round begins: the messages and vectors from here to the next such line, or session, are of it.

    exchange: which sum of the round, from 1. session: which of those opened, from 0. told: bytes of the tensors that
    each party is told beside the sum's messages, the model among them in the first. None of this in versions 1 and 2,
    which have one sum in a round, of the session opened last.
    """

    round: int
    exchange: int
    channel: str
    session: int
    told: int


Entry = Opened | SumBegun | ObservedMessage | Vector


class Transcript:
    """Writes down what it is shown, if anything is to be written down; a context manager.

    What was seen since the last :meth:`flush` is in memory, and is lost if the process is killed.
    sealed: as run.json says, of a run that is resumed: its folder's transcript must hold that, and is gone on with.
    Raises: RunFolderError for a transcript that is not whole, is gone, or has no chain.
    """

    def __init__(self, run: Path | None, detail: Detail | None, sealed: Sealed | None = None) -> None:
        self._detail, self._folder = detail, (run or Path()) / FOLDER
        self._entries: list[Entry] = []
        self._kept: list[bytes] = []
        path = self._folder / "messages.bin"
        self._at = path.stat().st_size if detail is not None and path.is_file() else 0
        self._sealed, self._sessions = _NOTHING if detail is None else _last(self._folder, sealed)
        self._begun = False
        self.round = 0

    @property
    def watcher(self) -> Watcher | None:
        """For :func:`choral.protocols.tap.watched_by`."""
        return self._saw if self._detail is not None else None

    @property
    def sealed(self) -> Sealed | None:
        """How far the transcript on disk goes, for run.json; None if nothing is recorded."""
        return self._sealed if self._detail is not None else None

    def open_session(self, name: str, spec: SumSpec) -> int:
        """A session of the secure sum ``name`` is about to be opened. Its place among all sessions."""
        self._sessions += 1
        if self._detail is not None:
            self._entries.append(
                Opened(
                    detail=self._detail,
                    secure_sum=name,
                    parties=spec.parties,
                    length=spec.length,
                    bound=int(spec.bound),
                    modulus_bits=spec.modulus_bits,
                )
            )
        return self._sessions - 1

    def begin_sum(self, exchange: int, channel: str, *, session: int, told: int) -> None:
        """A sum of this round is about to begin, in a session that was opened."""
        if self._detail is not None:
            entry = SumBegun(round=self.round, exchange=exchange, channel=channel, session=session, told=told)
            self._entries.append(entry)

    def vector(self, party: str, vector: Any) -> None:
        """A party's own vector, int64: written down in a rehearsal only."""
        if self._detail != "rehearsal":
            return
        values = vector.cpu().numpy() if is_tensor(vector) else vector
        raw = np.ascontiguousarray(values, "<i8").tobytes()
        digest = hashlib.sha256(raw).hexdigest()
        self._entries.append(Vector(round=self.round, party=party, size=len(raw), at=self._keep(raw), sha256=digest))

    def flush(self) -> None:
        """Write to disk what was seen: the bytes, then the lines that point to them, both before run.json's head.

        Raises: RunFolderError, before any of it is written, for an entry that could not be read back.
        """
        if self._detail is None:
            return
        try:
            content, head = lines(self._sealed.head, self._entries)
        except UnreadableError as error:
            raise RunFolderError(str(error), hint=error.hint) from error
        if not self._begun:
            self._folder.mkdir(exist_ok=True)
            _mend(self._folder / "index.jsonl")
            self._begun = True
        _append(self._folder / "messages.bin", self._kept)
        _append(self._folder / "index.jsonl", [content])
        self._sealed = Sealed(entries=self._sealed.entries + len(self._entries), head=head)
        self._kept, self._entries = [], []

    def _saw(self, way: Way, party: str, raw: bytes) -> None:
        at = None if self._detail == "digests" else self._keep(raw)
        digest = hashlib.sha256(raw).hexdigest()
        self._entries.append(
            ObservedMessage(round=self.round, way=way, party=party, size=len(raw), sha256=digest, at=at)
        )

    def _keep(self, raw: bytes) -> int:
        at = self._at
        self._kept.append(bytes(raw))
        self._at += len(raw)
        return at

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._begun:
            self.flush()


def _append(path: Path, pieces: list[bytes]) -> None:
    with path.open("ab") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def _mend(index: Path) -> None:
    """Cut a line that a killed process left half written."""
    if index.is_file():
        content = index.read_bytes()
        with index.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


class Recorded:
    """A recorded transcript. entries: in the order in which they were seen. head: of its chain, None if it has none.

    Raises: RunFolderError if a file is missing, damaged, edited, or of another version, or if a message's bytes are not
        those that its digest was made of.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self.entries, self._heads = _read_index(self._folder / "index.jsonl")
        path = self._folder / "messages.bin"
        self._bytes = np.memmap(path, np.uint8, "r") if path.is_file() and path.stat().st_size else None
        self.detail: Detail = self.entries[0].detail if isinstance(self.entries[0], Opened) else "digests"

    @classmethod
    def of(cls, run: Path | None) -> Self | None:
        """None for a run that recorded none."""
        return cls(run) if run is not None and (run / FOLDER).is_dir() else None

    @property
    def head(self) -> str | None:
        return self._heads[-1] if self._heads else None

    def check(self, sealed: Sealed, completed: int) -> None:
        """Hold the chain against run.json. completed: the latest complete round.

        Raises: RunFolderError if it does not pass through that head, or if anything of a complete round comes after.
        """
        _check_sealed(self._folder, self._heads, sealed)
        for number, entry in enumerate(self.entries[sealed.entries :], sealed.entries + 1):
            if not isinstance(entry, Opened) and 0 < entry.round <= completed:
                raise RunFolderError(
                    f"{self._folder / 'index.jsonl'}, line {number}, is of round {entry.round}, which was complete with"
                    f" line {sealed.entries}",
                    hint=_RESTORE,
                )

    def check_bytes(self) -> None:
        """Raises: RunFolderError if any bytes that were kept, of messages and vectors, are not those of the index."""
        for entry in self.entries:
            if isinstance(entry, ObservedMessage | Vector) and entry.at is not None:
                self._slice(entry.at, entry.size, entry.sha256)

    def raw(self, entry: ObservedMessage) -> bytes | None:
        """The bytes of a message, None if they were not kept."""
        return None if entry.at is None else self._slice(entry.at, entry.size, entry.sha256)

    def values(self, entry: Vector) -> np.ndarray[Any, np.dtype[np.int64]]:
        """int64, shape (length,)."""
        return np.frombuffer(self._slice(entry.at, entry.size, entry.sha256), "<i8").astype(np.int64)

    def _slice(self, at: int, size: int, digest: str | None) -> bytes:
        path = self._folder / "messages.bin"
        if self._bytes is None or at < 0 or size < 0 or at + size > self._bytes.size:
            raise RunFolderError(f"{path} is shorter than its index says", hint="the transcript is incomplete")
        raw = self._bytes[at : at + size].tobytes()
        if digest is not None and hashlib.sha256(raw).hexdigest() != digest:
            raise RunFolderError(f"{path}: what is at byte {at} is not what was recorded", hint=_RESTORE)
        return raw


_RESTORE = "the transcript was damaged or edited: restore it from a copy"
_Entries = tuple[tuple[Entry, ...], tuple[str, ...]]


def _read_index(path: Path) -> _Entries:
    """The entries, and the chain's digest after each; no digests for version 1, which had none."""
    if not path.is_file():
        raise RunFolderError(f"{path.parent} has no index.jsonl", hint="the transcript is incomplete")
    content = path.read_bytes()
    content = content[: content.rfind(b"\n") + 1]  # a killed process leaves a line half written
    entries, heads = _unchained(path, content) if content.startswith(b'{"is":"opened"') else _chained(path, content)
    if not entries or not isinstance(entries[0], Opened):
        raise RunFolderError(f"{path} does not begin with a session", hint="the transcript is incomplete")
    for entry in entries:
        if isinstance(entry, Opened) and entry.version not in ((FORMAT_VERSION, 2) if heads else (1,)):
            raise RunFolderError(
                f"{path} is of version {entry.version}; this Choral reads {FORMAT_VERSION} and 2, and 1 without a chain"
            )
    return entries, heads


def _chained(path: Path, content: bytes) -> _Entries:
    entries, heads = [], []
    try:
        for entry, head in follow(content, msgspec.json.Decoder(ChainedLine[Entry])):
            entries.append(entry)
            heads.append(head)
    except BrokenChainError as error:
        what = f"is damaged: {error.__cause__}" if error.undecoded else "does not follow from the line before"
        raise RunFolderError(f"{path}, line {error.number}, {what}", hint=_RESTORE) from None
    return tuple(entries), tuple(heads)


def _unchained(path: Path, content: bytes) -> _Entries:
    decoder = msgspec.json.Decoder(Entry)
    entries: list[Entry] = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            entries.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise RunFolderError(f"{path}, line {number}, is damaged: {error}") from None
    return tuple(entries), ()


def _check_sealed(folder: Path, heads: tuple[str, ...], sealed: Sealed) -> None:
    if not heads:
        raise RunFolderError(
            f"{folder / 'index.jsonl'} has no chain of hashes, and run.json tells of one", hint=_RESTORE
        )
    if len(heads) < sealed.entries:
        raise RunFolderError(
            f"{folder / 'index.jsonl'} holds {len(heads)} entries, run.json tells of {sealed.entries}: its end is cut"
            " off",
            hint=_RESTORE,
        )
    if sealed.entries < 1 or heads[sealed.entries - 1] != sealed.head:
        raise RunFolderError(
            f"{folder / 'index.jsonl'} is another transcript than the one that run.json tells of", hint=_RESTORE
        )


_NOTHING = (Sealed(entries=0, head=GENESIS), 0)


def _last(folder: Path, sealed: Sealed | None) -> tuple[Sealed, int]:
    """How far the transcript on disk goes, which a run goes on with, and how many sessions it has; it must hold what
    run.json tells of.
    """
    path = folder / "index.jsonl"
    if not path.is_file() or b"\n" not in path.read_bytes():
        if sealed is not None:
            raise RunFolderError(f"{path} is gone, and run.json tells of {sealed.entries} entries", hint=_RESTORE)
        return _NOTHING
    entries, heads = _read_index(path)
    if not heads:
        raise RunFolderError(
            f"{path} is of version 1, which has no chain of hashes to go on with",
            hint="resume without a transcript, or move that folder away: its rounds are then unverified",
        )
    if sealed is not None:
        _check_sealed(folder, heads, sealed)
    opened = sum(isinstance(entry, Opened) for entry in entries)
    return Sealed(entries=len(entries), head=heads[-1]), opened
