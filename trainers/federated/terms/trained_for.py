"""The last exchange that a party has trained for: written ahead, so that a party that restarts trains for none twice.

Two sums of one exchange over other survivors would differ by one party's vector, and each costs budget besides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Self

import msgspec
from msgspec import Meta

from choral.errors import ConfigError
from choral.protocols.driver import Store
from choral.trainers.run_folder.algorithm_state import State

Number = Annotated[int, Meta(ge=0, lt=1 << 32)]
VERSION = 1


class _Stored(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    name: str
    terms: Annotated[bytes, Meta(min_length=32, max_length=32)]
    number: Number
    exchange: Number


class TrainedFor:
    """A party's own, under the terms of one training. No secret is in it.

    store: is handed what a restart needs, before anything is paid for or trained; it returns once that is on disk. None
    forgets with the process. state: what ``store`` was handed last, before a restart; None at the very first.
    """

    def __init__(self, store: Store | None = None, state: bytes | None = None) -> None:
        self._store, self._state = store, state
        self._name, self._terms = "", bytes(32)
        self._last = (0, 0)

    def bound(self, name: str, terms: bytes) -> Self:
        """Itself, going on from what was stored. terms: the digest of the training terms.

        Raises: ConfigError for anything but what the same party stored under the same terms.
        """
        self._name, self._terms = name, terms
        if self._state is None:
            return self
        try:
            found = msgspec.msgpack.decode(self._state, type=_Stored)
        except msgspec.MsgspecError:
            found = None
        if found is None or (found.version, found.name, found.terms) != (VERSION, name, terms):
            raise ConfigError(
                f"what {name!r} has trained for is not told by these bytes: they are of another party or training",
                hint="give each party and each training a file of its own, and what was stored in it last",
            )
        self._last = found.number, found.exchange
        return self

    @property
    def begun(self) -> bool:
        """Whether it was begun, by this process or before a restart: it is noted ahead of any charge."""
        return self._state is not None or self._last != (0, 0)

    @property
    def last(self) -> tuple[int, int]:
        """The latest round, and the exchange in it."""
        return self._last

    def covers(self, number: int, exchange: int) -> bool:
        """Whether that exchange, or a later one, was trained for."""
        return (number, exchange) <= self._last

    def write(self, number: int, exchange: int) -> None:
        """Ahead of the exchange. Raises: what ``store`` does, after which nothing may be trained."""
        if self._store is not None:
            self._store(msgspec.msgpack.encode(_Stored(VERSION, self._name, self._terms, number, exchange)))
        self._last = number, exchange


@dataclass(frozen=True, kw_only=True)
class PartyMemory:
    """What a party in a process of its own goes on from after a restart. state: what the algorithm has it remember."""

    state: State | None = None
    trained_for: TrainedFor = field(default_factory=TrainedFor)
