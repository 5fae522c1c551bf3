"""Locks of files, and folders written to the disk: what POSIX systems have and Windows has not.

The module that locks is imported when a lock is needed, and not before: all that needs none works without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from choral.errors import ChoralError


class NoLocksError(ChoralError):
    """This system has no POSIX file locks, and two processes could write to one file without knowing of each other."""


def lock_file(file: Any, *, exclusive: bool = True, wait: bool = True) -> None:
    """Lock an open file until it is closed.

    Raises: NoLocksError on a system without such locks; BlockingIOError if another process has it and `wait` is off.
    """
    refuse_without_locks(str(file.name))
    import fcntl

    fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))


def lock_descriptor(file: int, what: str) -> None:
    """Lock a file that stays open, for this process alone, until `unlock_descriptor`. what: for the error.

    Raises: NoLocksError on a system without such locks.
    """
    refuse_without_locks(what)
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)


def unlock_descriptor(file: int) -> None:
    """Undo `lock_descriptor`."""
    import fcntl

    fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """No other process, or thread, is between these lines with the same folder.

    Raises: NoLocksError on a system without such locks.
    """
    refuse_without_locks(str(folder))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock_descriptor(descriptor, str(folder))
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the folder's entries on disk when this returns, where a system can: Windows opens no folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_without_locks(what: str) -> None:
    """Raise NoLocksError on a system without file locks. what: is to be locked."""
    try:
        import fcntl  # noqa: F401 - whether it is there
    except ModuleNotFoundError:
        raise NoLocksError(
            f"{what} has to be locked, and this system has no POSIX file locks",
            hint="Use Linux, macOS or WSL; without a file for the ledger and without a folder for the run, no lock is"
            " needed.",
        ) from None
