"""What a coordinator signs, so that a site's process knows it whoever carried the bytes.

An engine authenticates its own server. Who may submit jobs there, or runs it, is not for that the coordinator whose
certificate the site has pinned: without this signature any job of the engine could take the steps of one that was
approved, and read its sums. The signature is over the request, the coordinator's name and the site's. It proves nothing
of when, and need not: a request that comes again changes nothing at a site and gets the answer it got, and one that is
old is refused by the session and the round that it names. Whoever carries bytes can lose them, or bring them again;
neither tells anything. What sites answer is signed where it matters, in the messages of the sum.
"""

from __future__ import annotations

import hashlib

from choral.network.errors import WrongPeerError
from choral.protocols.crypto.keys import ed25519_sign, ed25519_verify

_MAGIC = b"choral signed 1\n"
_PURPOSE = b"choral: a coordinator's request to a site, by way of an engine\0"
_SIGNATURE = 64
OVERHEAD = len(_MAGIC) + _SIGNATURE
"""Bytes beside the request."""


def sealed(request: bytes | memoryview, seed: bytes, *, coordinator: str, site: str) -> bytes:
    """The request with the coordinator's signature. seed: of its Ed25519 key."""
    signature = ed25519_sign(seed, _signed(request, coordinator, site))
    return b"".join((_MAGIC, signature, request))


def unsealed(raw: bytes | memoryview, public: bytes, *, coordinator: str, site: str) -> memoryview:
    """The request. public: the coordinator's key as this site has pinned it.

    Raises: WrongPeerError for anything that it did not sign for this site.
    """
    view = memoryview(raw)
    signature, request = bytes(view[len(_MAGIC) : OVERHEAD]), view[OVERHEAD:]
    if bytes(view[: len(_MAGIC)]) != _MAGIC or len(signature) != _SIGNATURE:
        raise WrongPeerError("a request without a coordinator's signature", peer=coordinator)
    if not ed25519_verify(public, _signed(request, coordinator, site), signature):
        raise WrongPeerError(
            f"a request that its key did not sign for {site}",
            peer=coordinator,
            hint="compare its pin with the coordinator's owner before the directory is changed",
        )
    return request


def _signed(request: bytes | memoryview, coordinator: str, site: str) -> bytes:
    names = b"".join(len(name.encode()).to_bytes(2, "big") + name.encode() for name in (coordinator, site))
    return _PURPOSE + names + hashlib.sha256(request).digest()
