"""The engine's end of a site's local door. Standard library only: it is imported anew for each message by some engines.

    raw = relay("/run/choral/north.sock", request)       # in the engine's component: never raises
    reply = replied(raw, "north")                        # at the coordinator: the reply, or the error that it was

One connection carries one request. What comes back is a status byte and, where it is OK, the reply. An empty request
asks whether the site's process is there.
"""

from __future__ import annotations

import socket
import struct
import time

from choral.network.errors import (
    BusyError,
    MessageTooLargeError,
    PeerFailedError,
    PeerLostError,
    RefusedError,
    RequestTimeoutError,
    TransportError,
)

MAGIC = b"choral door 1\n"
HEAD = struct.Struct(f"!{len(MAGIC)}sQ")  # of a request
LENGTH = struct.Struct("!Q")  # of what comes back
OK, LOST, LATE, LARGE, FAILED, REFUSED, BUSY = range(7)
_LARGEST = 1 << 32

_ERRORS: dict[int, tuple[type[TransportError], str]] = {
    LOST: (PeerLostError, "the site's process is not there"),
    LATE: (RequestTimeoutError, "the site's process did not answer in time"),
    LARGE: (MessageTooLargeError, "a message beyond what was agreed on"),
    FAILED: (PeerFailedError, "the site's process failed"),
    REFUSED: (RefusedError, "refused"),
    BUSY: (BusyError, "the site's process has too many requests at once"),
}


def relay(path: str, request: bytes, *, seconds: float = 3600.0, reply_limit: int = _LARGEST) -> bytes:
    """Hand a request to the site's process and return what comes back: a status, then the reply. It never raises.

    path: of the door's socket. seconds: in all. reply_limit: bytes of the largest reply.
    """
    end = time.monotonic() + seconds
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
            _until(door, end)
            door.connect(path)
            try:
                door.sendall(HEAD.pack(MAGIC, len(request)))
                _until(door, end)
                door.sendall(request)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it may have said why before it closed
            (size,) = LENGTH.unpack(_read(door, LENGTH.size, end))
            return bytes([LARGE]) if not 1 <= size <= reply_limit + 1 else bytes(_read(door, size, end))
    except TimeoutError:
        return bytes([LATE])
    except Exception:
        return bytes([LOST])


def replied(raw: bytes | memoryview, site: str) -> memoryview | TransportError:
    """What `relay` brought back: the reply, or the error in its place."""
    view = memoryview(raw)
    if not len(view) or (view[0] != OK and (view[0] not in _ERRORS or len(view) > 1)):
        return PeerFailedError("what came back is no answer of a site's door", peer=site)
    if view[0] == OK:
        return view[1:].toreadonly()
    kind, why = _ERRORS[view[0]]
    return kind(why, peer=site)


def _read(door: socket.socket, size: int, end: float) -> bytearray:
    found = bytearray(size)
    view, at = memoryview(found), 0
    while at < size:
        _until(door, end)
        got = door.recv_into(view[at:])
        if not got:
            raise EOFError
        at += got
    return found


def _until(door: socket.socket, end: float) -> None:
    door.settimeout(max(0.001, end - time.monotonic()))
