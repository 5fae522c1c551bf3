"""How many bytes a site has taken and sent today, in a file that all its processes count in.

    state/bytes-today      2026-01-31 00000000000000012345

It is counted several times in every round, so the file stays open. Whoever removes it, or puts another in its place,
has the day counted from there: it is opened anew.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from choral.locks import lock_descriptor, unlock_descriptor
from choral.network.errors import SiteError

_LONGEST = 64  # bytes of the file that are read


class DailyBytes:
    """See the module. It may be called by several threads."""

    def __init__(self, path: Path) -> None:
        self._path, self._text = path, str(path)
        self._threads = threading.Lock()  # those of one process share the lock of the file that they have open
        self._file, self._process = -1, 0
        self._close: Callable[[], object] = lambda: None

    def add(self, size: int, day: str, most: int) -> bool:
        """Count so many bytes more; False, and nothing is counted, where the day would then have more than ``most``.

        day: as YYYY-MM-DD. Raises: SiteError for a file that cannot be read or written; NoLocksError.
        """
        try:
            with self._threads, self._locked() as file:
                counted = self._counted(os.pread(file, _LONGEST, 0), day) + size
                if counted > most:
                    return False
                os.pwrite(file, f"{day} {counted:020d}\n".encode(), 0)
                return True
        except OSError as error:
            raise SiteError(f"{self._path} cannot be written: {error.strerror or type(error).__name__}") from None

    def _counted(self, content: bytes, today: str) -> int:
        day, _, counted = content.decode("ascii", "replace").partition(" ")
        if day and not counted.strip().isdigit():
            raise SiteError(f"{self._path} cannot be read", hint="remove it: the day's bytes are then counted anew")
        return int(counted) if day == today else 0

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file that has the name now, which no other process counts in meanwhile."""
        while True:
            if self._file < 0 or self._process != os.getpid():  # a fork shares its parent's lock
                self._open()
            lock_descriptor(self._file, self._text)
            if self._is_named(self._file):
                break
            self._open()
        file = self._file
        try:
            yield file
        finally:
            unlock_descriptor(file)

    def _open(self) -> None:
        self._close()
        self._file, self._process = -1, os.getpid()
        self._file = os.open(self._text, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._close = weakref.finalize(self, os.close, self._file)

    def _is_named(self, file: int) -> bool:
        try:
            named = os.stat(self._text)
        except FileNotFoundError:
            return False
        here = os.fstat(file)
        return (named.st_dev, named.st_ino) == (here.st_dev, here.st_ino)
