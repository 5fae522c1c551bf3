"""What the server of a run saw: every message, recorded as the run goes, for the audit.

    DIR/transcript/index.jsonl   per session an Opened, then a Seen for each message (and each Vector, in rehearsals)
    DIR/transcript/messages.bin  their bytes, one after another; not with detail "digests"

detail: "digests" keeps size and SHA-256 of each message; "messages" keeps the messages themselves, which is what the
server sees anyway. "rehearsal" also keeps **each party's vector in the clear**, which no server ever sees and which
only a process that plays all parties can write down: for data that need no protection, to test whether any message
says anything of a vector. The key-exchange, masks and shares inside the parties are never recorded.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, Self, get_args

import msgspec
import numpy as np

from choral.errors import ConfigError
from choral.protocols.seam import SumSpec
from choral.protocols.vectors import is_tensor
from choral.protocols.watch import Watcher, Way
from choral.trainers.run import RunFolderError

Detail = Literal["digests", "messages", "rehearsal"]
FORMAT_VERSION = 1
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


class Seen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="is", tag="message"):
    """One message. round: 0 while the session opens. sha256: hexadecimal. at: where its bytes start, None if not
    kept."""

    round: int
    way: Way
    party: str
    size: int
    sha256: str
    at: int | None = None


class Vector(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="is", tag="vector"):
    """A party's vector of one round, int64 little-endian, in a rehearsal."""

    round: int
    party: str
    size: int
    at: int


Entry = Opened | Seen | Vector


class Transcript:
    """Writes down what it is shown, if anything is to be written down; a context manager.

    What was seen since the last :meth:`flush` is in memory, and is lost if the process is killed.
    Raises: ConfigError for another detail, or without a folder.
    """

    def __init__(self, run: Path | None, detail: Detail | None) -> None:
        if detail is not None and detail not in get_args(Detail):
            raise ConfigError(f"transcript is {detail!r}, expected one of {', '.join(get_args(Detail))}")
        if detail is not None and run is None:
            raise ConfigError("a transcript is kept in the run's folder", hint="give out=FOLDER")
        self._detail, self._folder = detail, (run or Path()) / FOLDER
        self._lines: list[bytes] = []
        self._kept: list[bytes] = []
        path = self._folder / "messages.bin"
        self._at = path.stat().st_size if detail is not None and path.is_file() else 0
        self._begun = False
        self.round = 0

    @property
    def watcher(self) -> Watcher | None:
        """For :func:`choral.protocols.watch.watched_by`."""
        return self._saw if self._detail is not None else None

    def begin(self, name: str, spec: SumSpec) -> None:
        """A session of the secure sum ``name`` is about to be opened."""
        if self._detail is not None:
            self._add(
                Opened(
                    detail=self._detail,
                    secure_sum=name,
                    parties=spec.parties,
                    length=spec.length,
                    bound=int(spec.bound),
                    modulus_bits=spec.modulus_bits,
                )
            )

    def vector(self, party: str, vector: Any) -> None:
        """A party's own vector, int64: written down in a rehearsal only."""
        if self._detail != "rehearsal":
            return
        values = vector.cpu().numpy() if is_tensor(vector) else vector
        raw = np.ascontiguousarray(values, "<i8").tobytes()
        self._add(Vector(round=self.round, party=party, size=len(raw), at=self._keep(raw)))

    def flush(self) -> None:
        """Write to disk what was seen: the bytes first, then the lines that point to them."""
        if self._detail is None:
            return
        if not self._begun:
            self._folder.mkdir(exist_ok=True)
            _mend(self._folder / "index.jsonl")
            self._begun = True
        with (self._folder / "messages.bin").open("ab") as file:
            file.writelines(self._kept)
        with (self._folder / "index.jsonl").open("ab") as file:
            file.writelines(self._lines)
        self._kept, self._lines = [], []

    def _saw(self, way: Way, party: str, raw: bytes) -> None:
        at = None if self._detail == "digests" else self._keep(raw)
        digest = hashlib.sha256(raw).hexdigest()
        self._add(Seen(round=self.round, way=way, party=party, size=len(raw), sha256=digest, at=at))

    def _keep(self, raw: bytes) -> int:
        at = self._at
        self._kept.append(bytes(raw))
        self._at += len(raw)
        return at

    def _add(self, entry: Entry) -> None:
        self._lines.append(msgspec.json.encode(entry) + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._begun:
            self.flush()


def _mend(index: Path) -> None:
    """Cut a line that a killed process left half written."""
    if index.is_file():
        content = index.read_bytes()
        with index.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


class Recorded:
    """A recorded transcript. entries: in the order in which they were seen.

    Raises: RunFolderError if a file is missing, damaged, or of another version, or if a message's bytes are not those
        that its digest was made of.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self.entries = _read_index(self._folder / "index.jsonl")
        path = self._folder / "messages.bin"
        self._bytes = np.memmap(path, np.uint8, "r") if path.is_file() and path.stat().st_size else None
        self.detail: Detail = self.entries[0].detail if isinstance(self.entries[0], Opened) else "digests"

    @classmethod
    def of(cls, run: Path | None) -> Self | None:
        """None for a run that recorded none."""
        return cls(run) if run is not None and (run / FOLDER).is_dir() else None

    def raw(self, entry: Seen) -> bytes | None:
        """The bytes of a message, None if they were not kept."""
        if entry.at is None:
            return None
        raw = self._slice(entry.at, entry.size)
        if hashlib.sha256(raw).hexdigest() != entry.sha256:
            raise RunFolderError(
                f"{self._folder / 'messages.bin'}: the message at byte {entry.at} is not the one that was recorded",
                hint="the transcript was damaged or edited",
            )
        return raw

    def values(self, entry: Vector) -> np.ndarray[Any, np.dtype[np.int64]]:
        """int64, shape (length,)."""
        return np.frombuffer(self._slice(entry.at, entry.size), "<i8").astype(np.int64)

    def _slice(self, at: int, size: int) -> bytes:
        if self._bytes is None or at < 0 or at + size > self._bytes.size:
            raise RunFolderError(
                f"{self._folder / 'messages.bin'} is shorter than its index says", hint="the transcript is incomplete"
            )
        return self._bytes[at : at + size].tobytes()


def _read_index(path: Path) -> tuple[Entry, ...]:
    if not path.is_file():
        raise RunFolderError(f"{path.parent} has no index.jsonl", hint="the transcript is incomplete")
    decoder = msgspec.json.Decoder(Entry)
    entries: list[Entry] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            entries.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise RunFolderError(f"{path}, line {number}, is damaged: {error}") from None
    if not entries or not isinstance(entries[0], Opened):
        raise RunFolderError(f"{path} does not begin with a session", hint="the transcript is incomplete")
    for entry in entries:
        if isinstance(entry, Opened) and entry.version != FORMAT_VERSION:
            raise RunFolderError(f"{path} is of version {entry.version}; this Choral reads {FORMAT_VERSION}")
    return tuple(entries)
