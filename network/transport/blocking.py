"""The hub for code without an event loop: one thread runs it, any thread may ask."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from choral.network.errors import TransportError
from choral.network.transport.certificates import CertifiedIdentity
from choral.network.transport.channel import Buffer
from choral.network.transport.hub import Hub
from choral.network.transport.limits import Limits
from choral.network.transport.pinned_tls import Directory

T = TypeVar("T")
_SAY_WAITING = 10.0  # seconds


class BlockingHub:
    """A `Hub` in a thread of its own; the calls are those of `Hub`, and return when they are done.

    Raises:
        CertificateError: the identity cannot be used.
        TransportError: the address cannot be listened at.
    """

    def __init__(
        self, identity: CertifiedIdentity, directory: Directory, *, host: str, port: int, limits: Limits | None = None
    ) -> None:
        self._hub = Hub(identity, directory, limits=limits)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="choral-hub", daemon=True)
        self._thread.start()
        try:
            self.address: tuple[str, int] = self._run(self._hub.start(host, port))
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> BlockingHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def connected(self) -> frozenset[str]:
        return self._hub.connected

    def calls(self, name: str) -> int:
        return self._hub.calls(name)

    def wait_for(self, names: Iterable[str], *, timeout: float, count: int | None = None) -> frozenset[str]:
        return self._run(self._hub.wait_for(names, timeout=timeout, count=count))

    def change(self, *, directory: Directory | None = None, identity: CertifiedIdentity | None = None) -> None:
        self._run(self._hub.change(directory=directory, identity=identity))

    def replies(
        self,
        outbox: Mapping[str, Buffer],
        *,
        timeout: float,
        reply_limit: int,
        away: float | None = None,
        waiting: Callable[[tuple[str, ...]], None] | None = None,
    ) -> Generator[tuple[str, memoryview | TransportError]]:
        """Ask all sites of `outbox` at once; yield each one's reply, or the error that it had, as soon as it and those
        before it in `outbox` are there. All are asked when the first is wanted; whoever closes it gives up on those
        that it has not yielded.

        timeout, reply_limit, away: as for `Hub.request`, to each site. waiting: called every ten seconds, in the hub's
        thread, with the names of those that have neither.
        """
        found: dict[str, Future[memoryview | TransportError]] = {name: Future() for name in outbox}
        asking = self._ask(outbox, found, timeout, reply_limit, away, waiting)
        whole = asyncio.run_coroutine_threadsafe(asking, self._loop)
        try:
            for name, reply in found.items():
                yield name, reply.result()
        except BaseException:  # Ctrl-C, too: what was asked is given up
            whole.cancel()
            raise

    def close(self) -> None:
        if not self._loop.is_closed():
            try:
                self._run(self._hub.close())
            finally:
                self._end()

    async def _ask(
        self,
        outbox: Mapping[str, Buffer],
        found: Mapping[str, Future[memoryview | TransportError]],
        timeout: float,
        reply_limit: int,
        away: float | None,
        waiting: Callable[[tuple[str, ...]], None] | None,
    ) -> None:
        async def one(name: str, body: Buffer) -> None:
            try:
                reply: memoryview | TransportError = await self._hub.request(
                    name,
                    body,
                    timeout=timeout,
                    reply_limit=reply_limit,
                    away=away,
                )
            except TransportError as error:
                reply = error
            except BaseException as error:
                if not found[name].done():
                    found[name].set_exception(error)
                raise
            found[name].set_result(reply)

        tasks = {name: asyncio.create_task(one(name, body)) for name, body in outbox.items()}
        try:
            left = set(tasks.values())
            while left:
                _, left = await asyncio.wait(left, timeout=_SAY_WAITING)
                if left and waiting is not None:
                    waiting(tuple(name for name, task in tasks.items() if task in left))
        finally:
            for name, task in tasks.items():
                task.cancel()
                found[name].cancel()  # of one that was given up before it began

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C, too: what was asked is given up
            future.cancel()
            raise

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
