"""What is hashed and what is signed. Every digest names what it is of, so that none can be taken for another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, TypeVar

from choral.protocols.crypto.keys import ed25519_sign, ed25519_verify, hkdf_expand, hkdf_extract, hkdf_sha256

T = TypeVar("T")

SESSION_BYTES = 16
NO_BEGIN = bytes(32)
"""In place of a Begin's digest, in a round that was begun without one."""


def digest(label: str, *parts: bytes | int) -> bytes:
    """SHA-256 of the label and the parts, each with its length in front: no two lists of parts collide. 32 bytes."""
    framed = [_framed(label)]
    for part in parts:
        framed += (_number(part),) if isinstance(part, int) else (_length(len(part)), part)
    return _hashed(*framed)


def _hashed(*framed: bytes) -> bytes:
    return hashlib.sha256(b"".join(framed)).digest()


@lru_cache(maxsize=1 << 12)
def _length(size: int) -> bytes:
    """In front of a part of so many bytes."""
    return size.to_bytes(8, "little")


@lru_cache(maxsize=1 << 12)
def _number(value: int) -> bytes:
    """A number, such as a party's place or a round's, as a part with its length in front; none is secret."""
    return _length(8) + value.to_bytes(8, "little")


@cache
def _framed(label: str) -> bytes:
    """What every digest of this kind begins with; labels are of this package, and few."""
    raw = b"choral/2/" + label.encode()
    return len(raw).to_bytes(8, "little") + raw


@lru_cache(maxsize=1 << 4)
def _of_round(label: str, session: bytes, number: int) -> bytes:
    """What the digests of this kind begin with in one round: ``digest(label, session, number, ...)``."""
    return b"".join((_framed(label), _length(len(session)), session, _number(number)))


def setup_digest(setup: bytes) -> bytes:
    """Of the encoded SumSetup: covers the roster and every parameter."""
    return digest("setup", setup)


def commitment(setup: bytes, party: int, nonce: bytes) -> bytes:
    """To a party's nonce of 32 bytes: hiding because the nonce is uniform, binding because SHA-256 is."""
    return digest("commitment", setup, party, nonce)


def session_digest(setup: bytes, commitments: Sequence[bytes], nonces: Sequence[bytes]) -> bytes:
    """Fixes the session: fresh as soon as one party's nonce is, which each honest party knows its own to be.

    Every later key, seal and signature is bound to it, so nothing of one session fits another.
    """
    return digest("session", setup, b"".join(commitments), b"".join(nonces))


def graph_seed(session: bytes) -> bytes:
    """Nobody could choose it: the commitments to all nonces were fixed before the first nonce was shown."""
    return digest("graph", session)


def hello(setup: bytes, party: int, commitment: bytes) -> bytes:
    return digest("hello", setup, party, commitment)


def advertise(session: bytes, number: int, party: int, mask: bytes, transport: bytes) -> bytes:
    """``digest("advertise", session, number, party, mask, transport)``; like others below it is made for every pair of
    parties in every round, and so without a loop."""
    beginning = _of_round("advertise", session, number)
    return _hashed(beginning, _number(party), _length(len(mask)), mask, _length(len(transport)), transport)


def begun(begin: bytes) -> bytes:
    """Of the encoded Begin: what a round is computed from, as this party was shown it."""
    return digest("begin", begin)


def confirm(session: bytes, number: int, party: int, bitmap: bytes, begun: bytes = NO_BEGIN) -> bytes:
    return digest("confirm", session, number, party, bitmap, begun)


def roster(session: bytes, number: int, begun: bytes, masks: Mapping[int, bytes]) -> bytes:
    """Of who takes part in a round and with which mask keys, by place, and of its Begin."""
    listed = b"".join(party.to_bytes(8, "little") + mask for party, mask in sorted(masks.items()))
    return digest("roster", session, number, begun, listed)


def view(session: bytes, number: int, party: int, roster: bytes) -> bytes:
    """That a party's vector of this round is masked for just this roster. roster: its digest."""
    return digest("view", session, number, party, roster)


def seed_commitment(session: bytes, number: int, party: int, seed: bytes) -> bytes:
    return digest("seed", session, number, party, seed)


def share_hash(session: bytes, number: int, kind: str, dealer: int, holder: int, share: bytes) -> bytes:
    """A commitment to one share; hiding, for the share is uniform in a field of 2^256 elements to others."""
    beginning = _of_round(f"share/{kind}", session, number)
    return _hashed(beginning, _number(dealer), _number(holder), _length(len(share)), share)


def pair_seed(shared: bytes, session: bytes, number: int, one: int, other: int, begun: bytes = NO_BEGIN) -> bytes:
    """The mask seed of two parties in one round, the same for both: HKDF of their X25519 secret.

    Two that were shown different Begins have different ones: their masks do not cancel, whatever the server does next.
    """
    low, high = (one, other) if one < other else (other, one)
    info = _hashed(_framed("mask"), _number(number), _number(low), _number(high), _length(len(begun)), begun)
    return hkdf_sha256(shared, salt=session, info=info, length=32)


def channel(shared: bytes, session: bytes) -> bytes:
    """What two parties seal their packets to each other under in one round, extracted from the X25519 secret of their
    transport keys, both fresh."""
    return hkdf_extract(shared, session)


def seal_key(channel: bytes, number: int, sender: int, receiver: int, mask: bytes) -> bytes:
    """The key for the one packet from ``sender`` to ``receiver`` in this round.

    The sender's mask key is part of it too, so that the key is fresh whenever the shares in the packet are, whatever
    the receiver does with its own key.
    """
    beginning = (_framed("seal"), _number(number))
    return hkdf_expand(channel, _hashed(*beginning, _number(sender), _number(receiver), _length(len(mask)), mask), 32)


def seal_data(session: bytes, number: int, sender: int, receiver: int, seed_hash: bytes, key_hash: bytes) -> bytes:
    beginning = (_of_round("packet", session, number), _number(sender), _number(receiver))
    return _hashed(*beginning, _length(len(seed_hash)), seed_hash, _length(len(key_hash)), key_hash)


class Signatures:
    """Verification that remembers what it accepted, so that one signature is not verified twice.

    In a process that plays many parties they share one of these; each still sees every signature checked. What opens a
    session comes to all of them alike, and is read and checked once (:meth:`once`): a thousand parties who each look
    at a thousand Hellos would look at a million.
    """

    _LIMIT = 1 << 16
    _ALIKE = 16

    def __init__(self, *, shared: bool = False) -> None:
        """shared: by several parties of this process; to one alone nothing is sent twice."""
        self.shared = shared
        self._accepted: set[tuple[bytes, bytes, bytes]] = set()
        self._before: set[tuple[bytes, bytes, bytes]] = set()
        self._alike: dict[Hashable, Any] = {}

    def valid(self, public: bytes, message: bytes, signature: bytes) -> bool:
        key = (public, message, signature)
        if key in self._accepted or key in self._before:
            return True
        if not ed25519_verify(public, message, signature):
            return False
        if len(self._accepted) >= self._LIMIT:
            self.forget()
        self._accepted.add(key)
        return True

    def once(self, key: Hashable, check: Callable[[], T]) -> T:
        """What ``check()`` gives, which is public and never changed; shared, without a second call for the same key.

        key: all that ``check`` looks at, whole and not by its digest, so that whoever asks with this key would have
        come to the very same by itself: the bytes that came, and the keys that *this* party has pinned. A refusal is
        never remembered.
        """
        if not self.shared:
            return check()
        known = self._alike
        if key not in known:
            known = {**dict([*known.items()][1 - self._ALIKE :]), key: check()}
            self._alike = known
        found: T = known[key]
        return found

    def forget(self) -> None:
        """Keep those that were accepted since this was last called: a round's keys come with the round before."""
        self._before, self._accepted, self._alike = self._accepted, set(), {}


def sign(identity: bytes, message: bytes) -> bytes:
    return ed25519_sign(identity, message)
