"""The site's end of its local door: a Unix socket that nobody but the named users of this machine can use.

    with DoorServer(path, handle, request_limit=lambda: host.request_limit) as door: door.serve()

handle: called with each request, several at once in threads; what it returns goes back. The kernel says which user a
process that connects is. By default it must be this one. Where the engine runs as another user, which keeps the code
that the coordinator ships away from the site's key and data, that one user is named.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from choral.errors import ChoralError
from choral.network.door.client import BUSY, FAILED, HEAD, LARGE, LENGTH, MAGIC, OK, REFUSED
from choral.network.errors import RefusedError, SiteError, WrongPeerError

log = logging.getLogger("choral.network")
MOST = 16  # connections at once
_SECONDS = 30.0  # in which the next bytes of a request or a reply must be taken
_LOOK = 0.2
_LONGEST_PATH = 100  # bytes; the kernel's own bound is 104 to 108


class DoorServer:
    """See the module. path: of the socket, in a folder that this user alone can write to. user: the engine's, by
    number.

    Raises: SiteError if the socket cannot be made there, is in use, or this system cannot tell users apart.
    """

    def __init__(
        self,
        path: Path,
        handle: Callable[[memoryview], bytes],
        *,
        request_limit: Callable[[], int],
        user: int | None = None,
    ) -> None:
        self.path, self._handle, self._limit = path.absolute(), handle, request_limit
        self._users = {os.geteuid()} | ({user} if user is not None else set())
        _check_place(self.path, self._users)
        self._stop = threading.Event()
        self._free = threading.Semaphore(MOST)
        self._socket = _listening(self.path, 0o600 if len(self._users) == 1 else 0o666)

    def __enter__(self) -> DoorServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Let `serve` return. From any thread, or a signal's handler."""
        self._stop.set()

    def serve(self) -> None:
        """Answer until `stop`."""
        self._socket.settimeout(_LOOK)
        while not self._stop.is_set():
            try:
                peer, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError as error:  # out of descriptors, say: the next may be served
                log.warning("a connection at the door was lost: %s", error.strerror)
                time.sleep(_LOOK)
                continue
            threading.Thread(target=self._one, args=(peer,), name="choral-door", daemon=True).start()

    def _one(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):  # it went away: nobody is left to be told
            peer.settimeout(_SECONDS)
            if (user := _user_of(peer)) not in self._users:
                log.warning("refused a connection at the door: of user %s", user)
                return
            if not self._free.acquire(blocking=False):
                _answer(peer, BUSY)
                return
            try:
                self._answer_one(peer)
            finally:
                self._free.release()

    def _answer_one(self, peer: socket.socket) -> None:
        head = _whole(peer, HEAD.size)
        if head is None:
            return
        magic, size = HEAD.unpack(head)
        if magic != MAGIC:
            log.warning("refused a connection at the door: it speaks otherwise")
            return
        if size > (limit := self._limit()):
            log.warning("refused a request of %d bytes at the door; at most %d are taken", size, limit)
            _answer(peer, LARGE)
            return
        request = _whole(peer, size)
        if request is None:
            return
        if not size:
            _answer(peer, OK)
            return
        status, reply = self._reply(memoryview(request).toreadonly())
        _answer(peer, status, reply)

    def _reply(self, request: memoryview) -> tuple[int, bytes]:
        try:
            return OK, self._handle(request)
        except (RefusedError, WrongPeerError) as error:
            log.warning("refused at the door: %s (%s)", error, error.hint)
            return REFUSED, b""
        except Exception as error:
            said = str(error) if isinstance(error, ChoralError) else "debug level has its traceback"
            log.error("a request at the door failed: %s: %s", type(error).__name__, said)
            log.debug("its traceback", exc_info=True)
            return FAILED, b""


def _answer(peer: socket.socket, status: int, reply: bytes = b"") -> None:
    peer.sendall(LENGTH.pack(len(reply) + 1) + bytes([status]))
    peer.sendall(reply)


def _whole(peer: socket.socket, size: int) -> bytearray | None:
    """So many bytes, or None if the other end has gone."""
    found = bytearray(size)
    view, at = memoryview(found), 0
    while at < size:
        got = peer.recv_into(view[at:])
        if not got:
            return None
        at += got
    return found


def _user_of(peer: socket.socket) -> int:
    """Whose process is at the other end, by the kernel; this user where it does not say and the file's mode decides."""
    if not hasattr(socket, "SO_PEERCRED"):
        return os.geteuid()
    credentials = struct.Struct("3i")
    _, user, _ = credentials.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    return int(user)


def _check_place(path: Path, users: set[int]) -> None:
    """Raises: SiteError."""
    if not hasattr(socket, "AF_UNIX"):
        raise SiteError("this system has no Unix sockets", hint="`choral join` without --local connects by itself")
    if len(users) > 1 and not hasattr(socket, "SO_PEERCRED"):
        raise SiteError("this system does not tell which user is at a socket", hint="run the engine as this user")
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise SiteError(f"{path} is longer than {_LONGEST_PATH} bytes", hint="a socket needs a short path")
    try:
        status = path.parent.lstat()
    except OSError as error:
        raise SiteError(f"{path.parent} cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise SiteError(
            f"{path.parent} may be changed by other users, who could put another socket there",
            hint="a folder of this user, mode 755 or narrower; the site's own folder is one",
        )


def _listening(path: Path, mode: int) -> socket.socket:
    """Raises: SiteError."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path)
        before = os.umask(0o777)  # nobody connects before the mode is set
        try:
            listening.bind(os.fspath(path))
        finally:
            os.umask(before)
        path.chmod(mode)
        listening.listen(MOST)
    except OSError as error:
        listening.close()
        raise SiteError(f"no door can be made at {path}: {error.strerror}") from None
    except SiteError:
        listening.close()
        raise
    return listening


def _clear(path: Path) -> None:
    """Take away the socket of a process that has ended. Raises: SiteError for anything else that is there."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise SiteError(f"{path} is there already, and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trying:
        trying.settimeout(1.0)
        try:
            trying.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise SiteError(f"another process answers at {path}", hint="one process is the site; end the other one first")
