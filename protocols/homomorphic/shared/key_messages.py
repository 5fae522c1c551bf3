"""The messages that hand out a shared key and open a sum under it, in the form of :mod:`choral.protocols.wire_format`.

A session opens with the masked sum's SumSetup, Hello, Hellos, Reveal and Reveals, where a party's nonce is its X25519
public key; and a round's ciphertext is an Upload. n: parties. Sizes in bytes, at most :func:`limit`:

| message | way | size |
|---|---|---|
| KeyDeal | up, down | ENVELOPE + 100 + 50 m (m: n - 1 up, 1 down) |
| KeyConfirm | up | ENVELOPE + 100 |
| KeyConfirmations | down | ENVELOPE + 101 n |
| EncryptedSum | down | ENVELOPE + 80 + n / 8 + its ciphertexts |
| OpenedSum | up | ENVELOPE + 80 + its total |
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from choral.protocols.masking import messages as masked
from choral.protocols.wire_format import (
    ENVELOPE,
    MAX_PARTIES,
    Bytes32,
    Entry,
    Message,
    RoundNumber,
    SessionId,
    Signature,
)

Sealed = Annotated[bytes, Meta(min_length=48, max_length=48)]
"""A seed of 32 bytes and its tag."""

Pieces = Annotated[tuple[bytes, ...], Meta(min_length=1, max_length=16)]
"""Of as many bytes as msgpack takes in one string; only the last one is shorter."""


class KeyDeal(Message, frozen=True):
    """The dealer's seed, sealed to each other party in roster order (or to one, on the way down), and the one-way
    commitment to it. signature: the dealer's, of the same as in a KeyConfirm."""

    session: SessionId
    commitment: Bytes32
    sealed: Annotated[tuple[Sealed, ...], Meta(min_length=1, max_length=MAX_PARTIES)]
    signature: Signature


class KeyConfirm(Message, frozen=True):
    """The commitment to the seed that a party holds, signed."""

    session: SessionId
    commitment: Bytes32
    signature: Signature


class ConfirmEntry(Entry, frozen=True):
    commitment: Bytes32
    signature: Signature


class KeyConfirmations(Message, frozen=True):
    """What everybody confirms, in roster order."""

    session: SessionId
    entries: Annotated[tuple[ConfirmEntry, ...], Meta(max_length=MAX_PARTIES)]


class EncryptedSum(Message, frozen=True):
    """The encrypted sum; survivors: whose vectors are in it, as a bitmap."""

    session: SessionId
    round: RoundNumber
    survivors: Annotated[bytes, Meta(min_length=1, max_length=MAX_PARTIES // 8)]
    ciphertexts: Pieces


class OpenedSum(Message, frozen=True):
    """The sum in clear, packed to the modulus bits: BFV only."""

    session: SessionId
    round: RoundNumber
    total: Pieces


_FIXED: dict[type[Message], int] = {KeyDeal: 100, KeyConfirm: 100, EncryptedSum: 80, OpenedSum: 80}
_EACH: dict[type[Message], int] = {KeyDeal: 50, KeyConfirmations: 101, EncryptedSum: 1, OpenedSum: 1}

ToServer = masked.ToServer | KeyDeal | KeyConfirm | OpenedSum
ToParty = masked.ToParty | KeyDeal | KeyConfirmations | EncryptedSum


def limit(kind: type[Message], entries: int = 0) -> int:
    """The largest size in bytes of a message with so many entries in its list, or bytes in what it carries."""
    return ENVELOPE + _FIXED.get(kind, 0) + _EACH.get(kind, 0) * entries
