"""Where data sets lie on disk, or are fetched from, and the hash that each file must have."""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

from choral.errors import DataError
from choral.trainers.run_folder.folder import replace_file

_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of a data set.

    folder, name: below the data folder; ``name`` plain or with ``.gz``. url: https, plain or gzip.
    size, sha256: of the plain bytes, so that neither how a file is packed nor who packed it matters.
    """

    folder: str
    name: str
    url: str
    size: int
    sha256: str


def read(source: Source, data_dir: str | Path | None = None) -> bytes:
    """The plain bytes of a file: from ``data_dir``, else from the user's cache, else fetched once and kept there.

    With ``data_dir`` given nothing is fetched: a folder that lacks the file is a mistake. Nothing that fails the check
    is used or kept.

    Raises: DataError naming path and URL for a file that is missing, unreadable, of another size or another hash.
    """
    folder = Path(data_dir) if data_dir is not None else cache_folder()
    path = folder / source.folder / source.name
    packed = path.with_name(path.name + ".gz")
    for found in (path, packed):
        if found.is_file():
            return checked(source, _bytes_of(found, source), str(found))
    if data_dir is not None:
        raise DataError(
            f"no file {path} or {packed.name}",
            hint=f"fetch it from {source.url}, or leave out data_dir to have it done",
        )
    fetched = _fetch(source, path)
    plain = checked(source, unpacked(fetched, source), source.url)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, plain)
    return plain


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/choral``, by default ``~/.cache/choral``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "choral"


def unpacked(given: bytes, source: Source) -> bytes:
    """``given`` without its gzip wrapping, at most one byte more than expected. Raises: DataError if it is broken."""
    if not given.startswith(b"\x1f\x8b"):
        return given
    try:
        return zlib.decompressobj(wbits=31).decompress(given, source.size + 1)
    except zlib.error as error:
        raise DataError(f"{source.name} is not valid gzip: {error}", hint=f"fetch it again from {source.url}") from None


def checked(source: Source, plain: bytes, where: str) -> bytes:
    """``plain``. Raises: DataError unless its size and SHA-256 are the expected ones."""
    found = hashlib.sha256(plain).hexdigest()
    if len(plain) != source.size or found != source.sha256:
        raise DataError(
            f"{where} is not the expected {source.name}: SHA-256 {found[:16]}..., expected {source.sha256[:16]}...",
            hint=f"it is damaged or another version; remove it and fetch it from {source.url}",
        )
    return plain


def _bytes_of(path: Path, source: Source) -> bytes:
    """At most one byte more than expected, so that a wrong file is not read whole."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(source.size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}", hint=f"fetch it again from {source.url}") from None


def _fetch(source: Source, path: Path) -> bytes:
    if not source.url.startswith("https://"):
        raise DataError(f"{source.url} is not https", hint=f"put the file at {path}")
    try:
        with urllib.request.urlopen(source.url, timeout=_SECONDS) as answer:  # noqa: S310
            given: bytes = answer.read(2 * source.size + 1)
            return given
    except (OSError, urllib.error.URLError) as error:
        raise DataError(
            f"{source.name} is not at {path}, and cannot be fetched from {source.url}: {error}",
            hint=f"fetch it elsewhere and put it there, or give data_dir, the folder that holds {source.folder}/",
        ) from None
