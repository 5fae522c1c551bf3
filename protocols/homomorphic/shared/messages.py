"""The messages that hand out a shared key and open a sum under it; Ciphertext stands in :mod:`..messages`.

Sizes in bytes, at most :func:`limit`; n: parties.

| message | way | size |
|---|---|---|
| KeySetup | down | ENVELOPE + 1200 + 1025 n (names of 255 characters; one of c ASCII characters takes c + 2) |
| KeyHello | up | ENVELOPE + 134 |
| KeyHellos | down | ENVELOPE + 135 n |
| KeyDeal | up | ENVELOPE + 100 + 50 n |
| KeyDealt | down | ENVELOPE + 150 |
| KeyConfirm | up | ENVELOPE + 100 |
| KeyConfirmations | down | ENVELOPE + 101 n |
| Ciphertext | up | ENVELOPE + its body |
| SumPiece | down | ENVELOPE + n / 8 + 16 + its body |
| TotalPiece | up | ENVELOPE + its body |
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from choral.protocols.homomorphic.messages import Ciphertext, KeyId
from choral.protocols.wire_format import (
    ENVELOPE,
    MAX_NAME,
    MAX_PARTIES,
    Bytes32,
    Entry,
    Message,
    Name,
    RoundNumber,
    SessionId,
    Signature,
)
from choral.protocols.wire_format import read as read

Sealed = Annotated[bytes, Meta(min_length=48, max_length=48)]
"""A seed of 32 bytes and its tag."""

PieceIndex = Annotated[int, Meta(ge=0, lt=1 << 32)]
Body = Annotated[bytes, Meta(min_length=1)]
Prime = Annotated[int, Meta(ge=0, lt=1 << 62)]


class KeySetup(Message, frozen=True):
    """What a session sums, and in which ring. Every party signs its digest (in its KeyHello).

    bound: largest |value| of one party in BFV, else 0. magnitude, precision: the same, and the error wanted of the sum,
    in CKKS, else 0.0. degree, primes, special, plain_modulus: the ring; each party computes its own and compares.
    The first of the roster deals the key.
    """

    session: SessionId
    roster: Annotated[tuple[Name, ...], Meta(min_length=2, max_length=MAX_PARTIES)]
    length: Annotated[int, Meta(ge=1, le=1 << 31)]
    scheme: Literal["bfv", "ckks"]
    bound: Annotated[int, Meta(ge=0, lt=1 << 62)]
    magnitude: float
    precision: float
    min_survivors: Annotated[int, Meta(ge=2, lt=MAX_PARTIES)]
    degree: Annotated[int, Meta(ge=1, le=1 << 16)]
    primes: Annotated[tuple[Prime, ...], Meta(min_length=1, max_length=8)]
    special: Prime
    plain_modulus: Prime
    encoding: Annotated[str, Meta(max_length=MAX_NAME)] = ""


class KeyHello(Message, frozen=True):
    """A party accepts the setup: a fresh X25519 public key and a nonce, signed by its identity."""

    session: SessionId
    public: Bytes32
    nonce: Bytes32
    signature: Signature


class HelloEntry(Entry, frozen=True):
    public: Bytes32
    nonce: Bytes32
    signature: Signature


class KeyHellos(Message, frozen=True):
    """Everybody's KeyHello, in roster order."""

    session: SessionId
    entries: Annotated[tuple[HelloEntry, ...], Meta(max_length=MAX_PARTIES)]


class KeyDeal(Message, frozen=True):
    """The dealer's seed, sealed to each other party in roster order, and the one-way commitment to it, signed."""

    session: SessionId
    commitment: Bytes32
    sealed: Annotated[tuple[Sealed, ...], Meta(max_length=MAX_PARTIES)]
    signature: Signature


class KeyDealt(Message, frozen=True):
    """One party's part of KeyDeal."""

    session: SessionId
    commitment: Bytes32
    sealed: Sealed
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
    """Everybody's KeyConfirm, in roster order."""

    session: SessionId
    entries: Annotated[tuple[ConfirmEntry, ...], Meta(max_length=MAX_PARTIES)]


class SumPiece(Message, frozen=True):
    """One piece of the encrypted sum; survivors: whose vectors are in it, as a bitmap."""

    session: SessionId
    round: RoundNumber
    key: KeyId
    survivors: Annotated[bytes, Meta(min_length=1, max_length=MAX_PARTIES // 8)]
    index: PieceIndex
    body: Body


class TotalPiece(Message, frozen=True):
    """One piece of the sum in clear, packed to the modulus bits: BFV only."""

    session: SessionId
    round: RoundNumber
    index: PieceIndex
    body: Body


_FIXED: dict[type[Message], int] = {KeySetup: 1200, KeyHello: 134, KeyDeal: 100, KeyDealt: 150, KeyConfirm: 100}
_EACH: dict[type[Message], int] = {KeySetup: 1025, KeyHellos: 135, KeyDeal: 50, KeyConfirmations: 101}

ToServer = KeyHello | KeyDeal | KeyConfirm | Ciphertext | TotalPiece
ToParty = KeySetup | KeyHellos | KeyDealt | KeyConfirmations | SumPiece


def limit(kind: type[Message], entries: int = 0) -> int:
    """The largest size in bytes of a message with so many entries; whatever has a body adds that."""
    return ENVELOPE + _FIXED.get(kind, 0) + _EACH.get(kind, 0) * entries
