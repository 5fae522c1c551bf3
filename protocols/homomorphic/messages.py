"""The messages of the homomorphic sums, in the wire format of :mod:`choral.protocols.masking.messages`.

| message | way | size |
|---|---|---|
| Ciphertext | up | ENVELOPE + its body |
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from choral.protocols.errors import MessageError, SpecError
from choral.protocols.masking.messages import ENVELOPE, VERSION, Message, RoundNumber, SessionId, encode

KeyId = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""Which key opens a ciphertext, so that no two keys' ciphertexts are ever added. Says nothing about the key."""


class Ciphertext(Message, frozen=True):
    """One piece of a party's encrypted vector: pieces count from 0 and are sent in order."""

    session: SessionId
    round: RoundNumber
    key: KeyId
    index: Annotated[int, Meta(ge=0, lt=1 << 32)]
    body: Annotated[bytes, Meta(min_length=1)]


_ciphertext = msgspec.msgpack.Decoder(Ciphertext)


def read_ciphertext(raw: bytes, *, sender: str, body: int) -> Ciphertext:
    """The Ciphertext that ``sender`` sent, with ``body`` bytes of body; as strict as :func:`strictly`.

    The body is the last field and is itself in ``raw``, so it is enough to write what stands before it again: a long
    vector is not copied and compared once more. Raises: MessageError, blaming the sender, for anything else.
    """
    if len(raw) > ENVELOPE + body:
        raise MessageError(sender, f"expected a message of at most {ENVELOPE + body} bytes, got {len(raw)}")
    if not raw or raw[0] != VERSION:
        raise MessageError(sender, f"expected a message of protocol version {VERSION}")
    try:
        message = _ciphertext.decode(memoryview(raw)[1:])
    except (msgspec.MsgspecError, RecursionError):
        raise MessageError(sender, "these bytes are no Ciphertext of this protocol") from None
    if raw[: len(raw) - len(message.body)] != _head(message):
        raise MessageError(sender, "a message in another encoding than the canonical one")
    return message


def _head(message: Ciphertext) -> bytes:
    """All that :func:`encode` writes before the body."""
    empty = encode(Ciphertext(message.session, message.round, message.key, message.index, b""))
    length = len(message.body)
    for size, kind in ((1, 0xC4), (2, 0xC5), (4, 0xC6)):  # msgpack's bin 8, 16, 32: the shortest that holds the length
        if length < 1 << 8 * size:
            return empty[:-2] + bytes([kind]) + length.to_bytes(size, "big")
    raise SpecError("a body of 2^32 bytes or more")
