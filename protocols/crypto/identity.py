"""A party's identity: the key that the others have pinned, and which of its sessions is live."""

from __future__ import annotations

from choral.protocols.argument_checks import KEY_BYTES, shown
from choral.protocols.crypto.keys import ed25519_public
from choral.protocols.crypto.single_use import Sessions
from choral.protocols.errors import SpecError


class Identity:
    """An Ed25519 signing key, and the counter of the sessions that it joined: the last is live, those before are dead.

    seed: 32 secret bytes. One object per key and process, shared by all drivers of that key, so that they count
    together; across restarts each driver's stored public state carries the count on.
    """

    __slots__ = ("_public", "_sessions", "seed")

    def __init__(self, seed: bytes) -> None:
        """Raises: SpecError for anything else than 32 bytes."""
        if not isinstance(seed, bytes) or len(seed) != KEY_BYTES:
            what = f"{len(seed)} bytes" if isinstance(seed, bytes) else shown(seed)
            raise SpecError(f"expected the seed of an identity as {KEY_BYTES} bytes, got {what}")
        self.seed = seed
        self._public: bytes | None = None
        self._sessions: dict[str, Sessions] = {}

    @property
    def public(self) -> bytes:
        """What the others pin."""
        if self._public is None:
            self._public = ed25519_public(self.seed)
        return self._public

    def sessions(self, purpose: str = "") -> Sessions:
        """purpose: what is summed in them, in this party's own words. Sessions of one purpose supersede each other;
        two purposes must never sum the same vectors.
        """
        return self._sessions.setdefault(purpose, Sessions())

    def __repr__(self) -> str:
        return "<Identity>"
