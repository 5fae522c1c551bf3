"""What a party stores for its restart: public, and bound to whose it is."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from choral.protocols.errors import SERVER, MessageError, SpecError
from choral.protocols.masking import messages
from choral.protocols.wire_format import LAST_ROUND, read

STATE_VERSION = 1
NO_STATE = "these bytes are no stored state of a party"


class PublicState(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a party's restart needs. setup: encoded; b"" before a session is open. last: no round up to it is answered.

    name, purpose: whose state it is. sessions: how many the identity has joined for this purpose.
    """

    version: int
    name: str
    purpose: str
    sessions: Annotated[int, Meta(ge=0, lt=1 << 53)]
    setup: bytes = b""
    session: bytes = b""
    last: Annotated[int, Meta(ge=0, le=LAST_ROUND)] = 0


def stored(name: str, purpose: str, sessions: int, setup: bytes = b"", session: bytes = b"", last: int = 0) -> bytes:
    return msgspec.msgpack.encode(PublicState(STATE_VERSION, name, purpose, sessions, setup, session, last))


def read_stored(raw: bytes, name: str, purpose: str) -> PublicState:
    """Raises: SpecError unless it is a state of this version, of that party and purpose."""
    try:
        version = msgspec.msgpack.decode(raw, type=list[Any])[:1]
        state = msgspec.msgpack.decode(raw, type=PublicState) if version == [STATE_VERSION] else None
    except (msgspec.MsgspecError, TypeError):
        raise SpecError(NO_STATE) from None
    if state is None:
        raise SpecError(f"the stored state is of another version than {STATE_VERSION}, which this Choral reads")
    if (state.name, state.purpose) != (name, purpose):
        raise SpecError(
            "the stored state is of another party, or of another purpose",
            hint=f"give {name!r} what its own store was handed last for this purpose",
        )
    return state


def setup_of(state: PublicState, known: Any = messages.ToParty) -> messages.SumSetup:
    """The setup of its session. known: whatever the server may send in its protocol. Raises: SpecError."""
    try:
        setup = read(known, state.setup, sender=SERVER, limit=len(state.setup))
    except MessageError:
        raise SpecError(
            NO_STATE, hint="its setup is no message of this protocol's version: join a new session"
        ) from None
    if not isinstance(setup, messages.SumSetup) or len(state.session) != 32:
        raise SpecError(NO_STATE)
    return setup
