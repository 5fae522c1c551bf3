"""What travels: frames of bounded size, of which each message is made.

A frame is a header of 12 bytes (kind, three zero bytes, number of the request on this connection, length) and at most
256 KiB. The hub sends REQUEST with the head of a message, then its bytes as DATA; the link answers REPLY and DATA, or
FAILED with a reason in one word. Frames of several requests may alternate, those of one keep their order.

    link                     hub
      HELLO name, called ->                    version 1, who I am, whom I called
                         <- WELCOME            or REFUSE reason
                         <- REQUEST id, size, largest reply; DATA ...
      REPLY size; DATA ... ->                  or FAILED reason
                         <- CANCEL             no more DATA of this request, and no answer to it is wanted
      FAILED cancelled  ->                     the last word on it, whatever crossed on the way
      BEAT, PROBE        <->                   a sign of life; PROBE asks for one
      BYE                <->                   an orderly end
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from choral.network.errors import FrameError

VERSION = 1
HEADER = struct.Struct("!B3sII")
REQUEST = struct.Struct("!16sQQ")  # id, bytes of the message, bytes of the largest reply
REPLY = struct.Struct("!Q")  # bytes of the message
FRAME_BYTES = 256 * 1024  # of DATA
SMALL_BYTES = 512  # of every other kind
ID_BYTES = 16


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    BEAT = 4
    PROBE = 5
    REQUEST = 6
    REPLY = 7
    DATA = 8
    FAILED = 9
    CANCEL = 10
    BYE = 11


OF_A_REQUEST = {Kind.REQUEST, Kind.REPLY, Kind.DATA, Kind.FAILED, Kind.CANCEL}


@dataclass(frozen=True)
class Frame:
    kind: Kind
    stream: int
    payload: bytes


def header(kind: Kind, stream: int, length: int) -> bytes:
    return HEADER.pack(kind, b"\0\0\0", stream, length)


def read_header(raw: bytes) -> tuple[Kind, int, int]:
    """Kind, number and length of the frame that `raw` begins.

    Raises:
        FrameError: no such kind, a length beyond the kind's, or a number where none belongs.
    """
    number, zeros, stream, length = HEADER.unpack(raw)
    try:
        kind = Kind(number)
    except ValueError:
        raise FrameError(f"a frame of no known kind ({number})") from None
    if zeros != b"\0\0\0":
        raise FrameError(f"a {kind.name} frame with a malformed header")
    if (stream > 0) != (kind in OF_A_REQUEST):
        raise FrameError(f"a {kind.name} frame with the number {stream}")
    largest = FRAME_BYTES if kind is Kind.DATA else SMALL_BYTES
    if length > largest:
        raise FrameError(f"a {kind.name} frame of {length} bytes; at most {largest} are taken")
    if kind is Kind.DATA and not length:
        raise FrameError("an empty DATA frame")
    return kind, stream, length


def unpack(form: struct.Struct, frame: Frame) -> tuple[object, ...]:
    """The fields of a frame's head.

    Raises:
        FrameError: it has another length.
    """
    if len(frame.payload) != form.size:
        raise FrameError(f"a {frame.kind.name} frame of {len(frame.payload)} bytes, not {form.size}")
    return form.unpack(frame.payload)


def pack_names(*names: str) -> bytes:
    """HELLO: the version, then each name with its length."""
    return bytes([VERSION]) + b"".join(bytes([len(name.encode())]) + name.encode() for name in names)


def unpack_names(payload: bytes) -> tuple[int, list[str]]:
    """Version and names of a HELLO. Of another version than this one, no names are read.

    Raises:
        FrameError: bytes that are no such list.
    """
    if not payload:
        raise FrameError("an empty HELLO")
    if payload[0] != VERSION:
        return payload[0], []
    names, at = [], 1
    while at < len(payload):
        end = at + 1 + payload[at]
        try:
            names.append(payload[at + 1 : end].decode("ascii"))
        except UnicodeDecodeError:
            raise FrameError("a HELLO with a name that is no text") from None
        at = end
    if at != len(payload) or len(names) != 2:
        raise FrameError("a HELLO that does not hold two names")
    return VERSION, names


class ArrivingMessage:
    """A message that is being put together, in memory of its own size; taken is what has come.

    discard: count the bytes and keep none.
    """

    def __init__(self, size: int, *, discard: bool = False) -> None:
        self.size, self.taken = size, 0
        self._buffer = None if discard else bytearray(size)

    def add(self, payload: bytes) -> None:
        """Raises:
        FrameError: more bytes than were announced.
        """
        end = self.taken + len(payload)
        if end > self.size:
            raise FrameError(f"more DATA than the {self.size} bytes announced")
        if self._buffer is not None:
            self._buffer[self.taken : end] = payload
        self.taken = end

    def discard(self) -> None:
        self._buffer = None

    @property
    def whole(self) -> bool:
        return self.taken == self.size

    @property
    def view(self) -> memoryview:
        return memoryview(b"" if self._buffer is None else self._buffer)
