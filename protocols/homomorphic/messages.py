"""The message of the split key, in the form of :mod:`choral.protocols.wire_format`; all others are the masked sum's.

| message | way | size |
|---|---|---|
| Ciphertext | up | ENVELOPE + its body |
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from choral.protocols.wire_format import ENVELOPE, Message, RoundNumber, SessionId, read

KeyId = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""Which key opens a ciphertext, so that no two keys' ciphertexts are ever added. Says nothing about the key."""


class Ciphertext(Message, frozen=True):
    """One piece of a party's encrypted vector: pieces count from 0 and are sent in order."""

    session: SessionId
    round: RoundNumber
    key: KeyId
    index: Annotated[int, Meta(ge=0, lt=1 << 32)]
    body: Annotated[bytes, Meta(min_length=1)]


def read_ciphertext(raw: bytes, *, sender: str, body: int) -> Ciphertext:
    """The Ciphertext that ``sender`` sent, with at most ``body`` bytes of body. Raises: MessageError, blaming it."""
    message: Ciphertext = read(Ciphertext, raw, sender=sender, limit=ENVELOPE + body)
    return message
