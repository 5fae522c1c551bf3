"""The messages of the homomorphic sums, in the wire format of :mod:`choral.protocols.messages`.

| message | way | size |
|---|---|---|
| Ciphertext | up | ENVELOPE + its body |
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from choral.protocols.messages import ENVELOPE, Message, RoundNumber, SessionId, strictly

KeyId = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""Which key opens a ciphertext, so that no two keys' ciphertexts are ever added. Says nothing about the key."""


class Ciphertext(Message, frozen=True):
    """One piece of a party's encrypted vector: pieces count from 0 and are sent in order."""

    session: SessionId
    round: RoundNumber
    key: KeyId
    index: Annotated[int, Meta(ge=0, lt=1 << 32)]
    body: Annotated[bytes, Meta(min_length=1)]


ToServer = Ciphertext

_to_server = msgspec.msgpack.Decoder(ToServer)


def to_server(raw: bytes, *, sender: str, body: int) -> ToServer:
    """What ``sender`` sent, its body at most ``body`` bytes. Raises MessageError, blaming it, for anything else."""
    message: ToServer = strictly(_to_server, raw, sender=sender, limit=ENVELOPE + body)
    return message
