"""A coordinator's way to the sites through an engine, in the place of a hub (`Carrier`).

A site that did not answer in time is not asked again in that round (`Sites`), and in the next ones only once the engine
says that it is there: what it costs meanwhile is one short look a round, and not the wait for an answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from Crypto.PublicKey import ECC

from choral.network.door.client import replied
from choral.network.door.sealed import sealed
from choral.network.errors import MessageTooLargeError, PeerLostError, RequestTimeoutError, TransportError
from choral.network.transport.certificates import CertifiedIdentity

_LOOK = 1.0
_SAY_WAITING = 10.0


class EngineAdapter(Protocol):
    """What an engine's adapter does, at the coordinator."""

    def carry(
        self, outbox: Mapping[str, bytes], *, seconds: float, reply_limit: int
    ) -> Iterable[tuple[str, bytes | TransportError]]:
        """Bring each site its bytes, and yield what `relay` returned there as it comes, for so many seconds at most.
        A site without an answer may be left out.
        """
        ...

    def alive(self, names: frozenset[str]) -> frozenset[str]:
        """Which of these sites, who were lost, could be asked now. It takes a second or two at most."""
        ...


class EngineCarrier:
    """See the module. identity: the coordinator's, which sites have pinned. names: of the sites. It has one caller."""

    def __init__(self, engine: EngineAdapter, identity: CertifiedIdentity, names: Iterable[str]) -> None:
        self._engine, self._coordinator, self._names = engine, identity.name, frozenset(names)
        self._seed = ECC.import_key(identity.key_path.read_bytes()).seed
        self._lost: set[str] = set()
        self._back = dict.fromkeys(self._names, 1)
        self._looked = -_LOOK

    @property
    def connected(self) -> frozenset[str]:
        self._look()
        return self._names - self._lost

    def calls(self, name: str) -> int:
        """How often the site was there anew. Who was lost may have been started anew meanwhile, and is looked for."""
        self._look()
        return self._back[name]

    def wait_for(self, names: Iterable[str], *, timeout: float, count: int | None = None) -> frozenset[str]:
        wanted, end = frozenset(names), time.monotonic() + timeout
        while len(found := wanted & self.connected) < (len(wanted) if count is None else count):
            left = end - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(_LOOK, left))
        return found

    def replies(
        self,
        outbox: Mapping[str, bytes],
        *,
        timeout: float,
        reply_limit: int,
        away: float | None = None,  # noqa: ARG002  an engine holds no connection that could break
        waiting: Callable[[tuple[str, ...]], None] | None = None,
    ) -> Generator[tuple[str, memoryview | TransportError]]:
        found: dict[str, memoryview | TransportError] = {}
        signed = {
            name: sealed(raw, self._seed, coordinator=self._coordinator, site=name) for name, raw in outbox.items()
        }
        with _saying(waiting, lambda: tuple(name for name in outbox if name not in found)):
            for name, raw in self._engine.carry(signed, seconds=timeout, reply_limit=reply_limit + 1):
                if name in outbox and name not in found:
                    found[name] = _taken(raw, name, reply_limit)
        for name in outbox:
            found.setdefault(name, RequestTimeoutError(f"did not answer within {timeout:g} s", peer=name))
            if isinstance(found[name], RequestTimeoutError | PeerLostError):
                self._lost.add(name)
        for name in outbox:
            yield name, found[name]

    def _look(self) -> None:
        """Whether those who were lost are there again; no more often than once a second."""
        if self._lost and time.monotonic() - self._looked >= _LOOK:
            there = self._engine.alive(frozenset(self._lost)) & self._lost
            self._looked = time.monotonic()
            for name in there:
                self._back[name] += 1
            self._lost -= there


def _taken(raw: bytes | TransportError, name: str, limit: int) -> memoryview | TransportError:
    if isinstance(raw, TransportError):
        return raw
    reply = replied(raw, name)
    if isinstance(reply, memoryview) and len(reply) > limit:
        return MessageTooLargeError(f"a reply of {len(reply)} bytes, expected at most {limit}", peer=name)
    return reply


@contextmanager
def _saying(
    waiting: Callable[[tuple[str, ...]], None] | None, missing: Callable[[], tuple[str, ...]]
) -> Iterator[None]:
    """Say every ten seconds who has not answered."""
    if waiting is None:
        yield
        return
    done = threading.Event()

    def say() -> None:
        while not done.wait(_SAY_WAITING):
            if names := missing():
                waiting(names)

    thread = threading.Thread(target=say, name="choral-waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
