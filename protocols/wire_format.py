"""The wire format of every protocol here: typed messages, one version, strictly decoded, bounded in length.

On the wire: one byte VERSION, then a msgpack array ``[kind, field, ...]``. :func:`read` refuses another version, an
unknown kind, a missing or extra field, another type, a length out of bounds, trailing bytes, and any encoding that is
not the one :func:`encode` writes, so that each message has exactly one form. It is the only decoder: each protocol says
which messages it knows, and how long they may be.

``session`` is 16 bytes: the session's identifier before it is open, the first half of its digest after. ``round``
counts from 1. Parties are named by their place in the roster, from 0. ENVELOPE bytes cover the version, the kind,
session, round and all headers.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from choral.protocols.errors import MessageError

VERSION = 2
ENVELOPE = 64
MAX_PARTIES = 1 << 20
MAX_NAME = 255
LAST_ROUND = (1 << 32) - 1

Index = Annotated[int, Meta(ge=0, lt=MAX_PARTIES)]
RoundNumber = Annotated[int, Meta(ge=1, le=LAST_ROUND)]
SessionId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]

_LONG = 1 << 12
"""Bytes from which a message's last field is not written again to see whether its form is the canonical one."""


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag_field="kind", tag=str.lower):
    """The base of all messages."""


class Entry(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The base of what messages hold lists of."""


_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return bytes([VERSION]) + _encoder.encode(message)


def read(kind: Any, raw: bytes, *, sender: str, limit: int) -> Any:
    """The message in ``raw``, of at most ``limit`` bytes, provided that :func:`encode` would write just that.

    kind: a kind of message, or a union of those that may come. Raises: MessageError, blaming ``sender``.
    """
    if not isinstance(raw, bytes):
        raise MessageError(sender, f"expected a message as bytes, got a {type(raw).__name__}")
    if len(raw) > limit:
        raise MessageError(sender, f"expected a message of at most {limit} bytes, got {len(raw)}")
    if not raw or raw[0] != VERSION:
        raise MessageError(sender, f"expected a message of protocol version {VERSION}")
    try:
        message = _decoder(kind).decode(memoryview(raw)[1:])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # msgspec's own text may quote what the sender wrote.
        raise MessageError(sender, "these bytes are no message of this protocol") from None
    if not _canonical(message, raw):
        raise MessageError(sender, "a message in another encoding than the canonical one")
    return message


def claims_to_be(kinds: type[Message] | tuple[type[Message], ...], raw: object) -> bool:
    """Whether these bytes begin as every message of one of the kinds does; whether they are one, :func:`read` says."""
    return isinstance(raw, bytes) and raw.startswith(_beginnings(kinds))


@cache
def _beginnings(kinds: type[Message] | tuple[type[Message], ...]) -> tuple[bytes, ...]:
    found = []
    for kind in kinds if isinstance(kinds, tuple) else (kinds,):
        fields = [None] * len(kind.__struct_fields__)  # of a byte each
        found.append(bytes([VERSION]) + _encoder.encode([kind.__struct_config__.tag, *fields])[: -len(fields)])
    return tuple(found)


@cache
def _decoder(kind: Any) -> Any:
    return msgspec.msgpack.Decoder(kind)


def _canonical(message: Message, raw: bytes) -> bool:
    """Whether ``raw`` is what :func:`encode` writes.

    A long byte string at the end, alone or as the only one of a tuple, is itself in ``raw``, so it is enough to write
    what stands before it again: a long vector is not copied and compared once more.
    """
    last = message.__struct_fields__[-1]
    found = getattr(message, last)
    whole = isinstance(found, tuple) and len(found) == 1
    body, empty = (found[0], (b"",)) if whole else (found, b"")
    if not isinstance(body, bytes) or len(body) < _LONG:
        return encode(message) == raw
    size, kind = (2, 0xC5) if len(body) < 1 << 16 else (4, 0xC6)  # msgpack's bin 16, 32: the shortest that will do
    head = encode(msgspec.structs.replace(message, **{last: empty}))[:-2]  # without the header of an empty string
    return raw[: len(raw) - len(body)] == head + bytes([kind]) + len(body).to_bytes(size, "big")
