"""Files that a site alone may read and write: 0600, in folders of 0700, written in one piece."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from choral.locks import sync_folder
from choral.network.errors import SiteError


def write_private(path: Path, content: bytes) -> None:
    """Put `content` into the file, whole and on disk, or leave it as it was. Raises: SiteError."""
    folder = path.absolute().parent
    draft = f"{folder}/.{path.name}.{secrets.token_hex(8)}"
    try:
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                left = memoryview(content)
                while left:
                    left = left[os.write(file, left) :]
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise
        sync_folder(folder)
    except OSError as error:
        raise SiteError(f"{path} cannot be written: {error.strerror or type(error).__name__}") from None


def check_private(folder: Path, *, public: tuple[str, ...] = ()) -> None:
    """That folder and all in it belong to this user, who alone may use them. public: endings that others may read.

    Raises: SiteError naming the first that does not. On Windows nothing is checked: it has no such modes.
    """
    if os.name != "posix":
        return
    for path in (folder, *_below(folder)):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # a draft, meanwhile in its place
        readable = 0o022 if path.suffix in public else 0o077  # which nobody else may have
        if stat.S_ISLNK(status.st_mode):
            raise SiteError(f"{path} is a link: a site's files lie in its own folder", hint="put the file itself there")
        if status.st_uid != os.geteuid():
            raise SiteError(f"{path} belongs to another user, who may change it", hint=f"chown {path}")
        if status.st_mode & readable:
            kind = "700" if path.is_dir() else "600"
            raise SiteError(
                f"{path} may be used by other users (mode {status.st_mode & 0o777:o})", hint=f"chmod {kind} {path}"
            )


def _below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _below(path)
