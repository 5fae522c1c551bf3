"""SEAL's files: bytes in and out of its objects through files that exist in memory only.

SEAL saves and loads by the name of a file; ours is anonymous (Linux ``memfd``), so no secret touches a disk. What it
saves is compressed, with a fixed choice of method; the zstd that its own library carries undoes it.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import zlib
from functools import cache
from typing import Any

import tenseal.sealapi as sealapi

from choral.errors import ChoralError
from choral.protocols.errors import SpecError

MAGIC, HEADER_BYTES, RAW, ZLIB, ZSTD = 0xA15E, 16, 0, 1, 2
HEADER = struct.Struct("<HBBBBHQ")
"""SEAL's: magic, its own size, version (major, minor), compression, reserved, size with all that follows."""

_ROOM = 1 << 18
"""The largest object: a sum of degree 4096 modulo two primes has 131 KB, a key of three primes 98 KB."""


class SealFormatError(ChoralError):
    """This build of SEAL stores its objects in another form than the one known here: nothing can be sent with it."""


class CiphertextError(ChoralError):
    """Bytes that are no ciphertext of this ring. Callers name the sender."""


class Scratch:
    """One anonymous file in memory, by which SEAL and this process hand each other bytes."""

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise SpecError(
                "SEAL hands out bytes through files only, and this system has no files in memory (memfd_create)",
                hint="run the parties of a homomorphic sum on Linux",
            )
        self._file = os.memfd_create("choral", os.MFD_CLOEXEC)
        self._path = f"/proc/self/fd/{self._file}"
        self.process = os.getpid()

    def load(self, into: Any, context: Any, *parts: Any) -> Any:
        """``into``, loaded by SEAL from these parts. Raises: CiphertextError when SEAL refuses them."""
        try:
            os.pwritev(self._file, parts, 0)
            into.load(context, self._path)
        except (RuntimeError, ValueError, IndexError, MemoryError):
            # SEAL's words may quote values
            raise CiphertextError("SEAL does not take these bytes for an object of this ring") from None
        finally:
            self._wipe()
        return into

    def save(self, saveable: Any) -> bytes:
        try:
            saveable.save(self._path)
            return os.pread(self._file, os.fstat(self._file).st_size, 0)
        finally:
            self._wipe()

    def _wipe(self) -> None:
        """Nothing stays: it may have been a key, and its owner may be gone before the next object comes."""
        os.ftruncate(self._file, 0)  # its pages go back to the system, which gives none away with content

    def __del__(self) -> None:
        if getattr(self, "process", None) == os.getpid():
            os.close(self._file)


_local = threading.local()


def scratch() -> Scratch:
    """This thread's file; another one after a fork, for parent and child would write over each other's."""
    found: Scratch | None = getattr(_local, "scratch", None)
    if found is None or found.process != os.getpid():
        found = _local.scratch = Scratch()
    return found


@cache
def _zstd() -> Any:
    """The zstd that SEAL itself compresses with, by its stable C interface; None when the library hides it."""
    module = getattr(sealapi, "_sealapi_cpp", None)
    try:
        function = ctypes.CDLL(module.__file__).ZSTD_decompress  # type: ignore[union-attr]
    except (AttributeError, OSError):
        return None
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    return function


def saved(saveable: Any, version: tuple[int, int]) -> bytes:
    """What SEAL saves, without its outer header and compression. Only ever given SEAL's own fresh output."""
    raw = scratch().save(saveable)
    magic, header, major, minor, mode, _, size = HEADER.unpack_from(raw)
    if (magic, header, size) != (MAGIC, HEADER_BYTES, len(raw)) or (major, minor) != version:
        raise SealFormatError("SEAL wrote another header than the one known here")
    body = raw[HEADER_BYTES:]
    if mode == RAW:
        return body
    if mode == ZLIB:
        return zlib.decompress(body)
    decompress = _zstd()
    if mode != ZSTD or decompress is None:
        raise SealFormatError(
            "this build of SEAL compresses in a way that cannot be undone here",
            hint="install a tenseal wheel whose library exports ZSTD_decompress, such as 0.3.18",
        )
    return _inflate(decompress, body)


def _inflate(decompress: Any, body: bytes) -> bytes:
    if not hasattr(_local, "room"):
        _local.room = ctypes.create_string_buffer(_ROOM)
    size = int(decompress(_local.room, _ROOM, body, len(body)))
    try:
        if size > _ROOM:  # zstd's error codes are the largest integers
            raise SealFormatError("what SEAL wrote does not decompress")
        return ctypes.string_at(_local.room, size)
    finally:
        ctypes.memset(_local.room, 0, _ROOM)  # zstd works in the room behind the content, too


@cache
def version_of_seal() -> tuple[int, int]:
    """SEAL's version as it stands in its headers; loading takes no other."""
    raw = scratch().save(sealapi.Modulus(65537))
    _, _, major, minor, _, _, _ = HEADER.unpack_from(raw)
    return major, minor
