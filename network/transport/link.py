"""The site's end: it connects outward, answers what it is asked, and comes back when the connection is lost.

    link = Link(identity, directory, handler, hub="coordinator", address=("fl.example.org", 8443), request_limit=2**20)
    asyncio.run(link.run())

The handler, and whatever state it has, lives as long as the process: connections come and go under it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

from choral.errors import ConfigError
from choral.network.errors import (
    FrameError,
    PeerLostError,
    RefusedError,
    TransportError,
    WrongPeerError,
)
from choral.network.transport.answering import Answering, Handler, Works
from choral.network.transport.certificates import CertifiedIdentity
from choral.network.transport.channel import FrameChannel, refused
from choral.network.transport.frames import Kind, pack_names
from choral.network.transport.limits import Limits
from choral.network.transport.pinned_tls import Directory, refusal, secured, tls_context
from choral.network.transport.proxy import check_address, check_proxy, dial

log = logging.getLogger("choral.network")


class Link:
    """One site's connection to one hub.

    identity: this end's. directory: where the hub's certificate stands. handler: called with each request, in a
    thread, several at once if the hub asks several. hub: its name. address: host and port. request_limit: bytes of the
    largest request that is taken; it may be set anew at any time. proxy: ``http://[USER:PASSWORD@]HOST:PORT``.

    Raises:
        ConfigError: the address, the proxy or the limit cannot be used.
        UnknownPeerError: the hub is not in the directory.
        CertificateError: the identity cannot be used.
    """

    def __init__(
        self,
        identity: CertifiedIdentity,
        directory: Directory,
        handler: Handler,
        *,
        hub: str,
        address: tuple[str, int],
        request_limit: int,
        proxy: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        check_proxy(proxy)
        if request_limit < 0:
            raise ConfigError(f"request_limit: expected at least 0 bytes, got {request_limit}")
        self.hub, self.request_limit, self.limits = hub, request_limit, limits or Limits()
        self._address, self._proxy = check_address(address), proxy
        self._identity, self._directory = identity, directory
        self._context = tls_context(identity, [directory[hub]], server=False)
        self._works = Works(handler, self.limits)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop, self._again = asyncio.Event(), asyncio.Event()
        self._error: TransportError | None = None
        self.connected = False

    @property
    def error(self) -> TransportError | None:
        """Why it is not connected, as far as this end knows; None while it is."""
        return None if self.connected else self._error

    def stop(self) -> None:
        """Say good-bye, and let `run` return. From any thread."""
        self._in_loop(self._stop.set)

    def change(self, *, identity: CertifiedIdentity | None = None, directory: Directory | None = None) -> None:
        """Go on with another certificate, or another directory: the connection is made anew. From any thread.

        Raises:
            UnknownPeerError, CertificateError: as at the beginning; nothing is changed.
        """
        new = identity or self._identity, self._directory if directory is None else directory
        context = tls_context(new[0], [new[1][self.hub]], server=False)

        def use() -> None:
            (self._identity, self._directory), self._context = new, context
            self._again.set()

        self._in_loop(use)

    async def run(self, *, patience: float | None = None) -> None:
        """Connect, answer, connect again, until `stop`.

        patience: give up after so many seconds in a row without a connection; None never does. Every attempt that
        fails is logged with its reason, and `error` has the last one.

        Raises:
            TransportError: there was no connection for `patience` seconds. The last attempt's error, as it was.
        """
        self._loop = asyncio.get_running_loop()
        failures, since = 0, time.monotonic()
        try:
            while not self._stop.is_set():
                self._again.clear()
                begun = time.monotonic()
                try:
                    await self._until_told(self._connection())
                except TransportError as error:
                    # Said once while it stays the same, not every five seconds.
                    again = str(error) == str(self._error) and not self.connected
                    log.log(logging.DEBUG if again else logging.WARNING, "not connected: %s", error)
                    self._error = error
                else:
                    since = time.monotonic()
                    continue
                now = time.monotonic()
                if self.connected:
                    self.connected, since = False, now
                    failures = failures if now - begun < self.limits.backoff[1] else 0
                if patience is not None and now - since >= patience:
                    raise self._error
                await self._until_told(asyncio.sleep(self._pause(failures)))
                failures += 1
        finally:
            self.connected = False
            self._works.close()

    def _pause(self, failures: int) -> float:
        """Twice as long after each failure, up to a bound, and by chance up to half of it shorter."""
        shortest, longest = self.limits.backoff
        return min(longest, shortest * 2.0 ** min(failures, 32)) * random.SystemRandom().uniform(0.5, 1)

    def _in_loop(self, call: Callable[[], None]) -> None:
        if self._loop is None or self._loop.is_closed():
            call()
        else:
            self._loop.call_soon_threadsafe(call)

    async def _until_told(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for `work`, and cancel it when `stop` or `change` is called."""
        task = asyncio.create_task(work)
        told = [asyncio.create_task(event.wait()) for event in (self._stop, self._again)]
        try:
            await asyncio.wait([task, *told], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
        finally:
            for each in (task, *told):
                each.cancel()
            await asyncio.wait([task, *told])
            if not task.cancelled():
                task.exception()  # read here: where it matters, it was raised above

    async def _connection(self) -> None:
        """One connection from its first byte to its last, which is always an error."""
        try:
            async with asyncio.timeout(self.limits.handshake):
                plain = await dial(self._address, self._proxy)
                channel = await self._greet(plain)
        except TimeoutError:
            raise PeerLostError(f"did not greet within {self.limits.handshake:g} s", peer=self.hub) from None
        log.info("connected to %s", self.hub)
        self.connected = True
        beat = asyncio.create_task(channel.beat())
        try:
            await Answering(channel, self._works, lambda: self.request_limit).run()
        except FrameError:
            await channel.close(Kind.REFUSE, "frame")
            raise
        except asyncio.CancelledError:
            self.connected = False
            await channel.close()
            raise
        finally:
            beat.cancel()
            channel.abort()

    async def _greet(self, plain: asyncio.StreamWriter) -> FrameChannel:
        try:
            try:
                reader, writer = await secured(plain, self._context, server=False, seconds=self.limits.handshake + 1)
            except TimeoutError:
                raise
            except (OSError, EOFError) as error:
                raise self._no_tls(error) from None
            shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            if (name := self._directory.name_of(shown)) != self.hub:
                raise WrongPeerError(f"shows the certificate of {name}", peer=self.hub)
            channel = FrameChannel(reader, writer, self.limits, self.hub)
            try:
                await channel.send(Kind.HELLO, payload=pack_names(self._identity.name, self.hub))
                frame = await channel.receive()
            except PeerLostError:
                raise RefusedError(
                    "hung up before it greeted",
                    peer=self.hub,
                    hint="it does not know this certificate, or it takes no more connections; its log says which",
                ) from None
            if frame.kind is Kind.REFUSE:
                raise refused(frame, self.hub)
            if frame.kind is not Kind.WELCOME:
                raise FrameError(f"a {frame.kind.name} frame instead of WELCOME", peer=self.hub)
        except BaseException:
            plain.transport.abort()
            raise
        return channel

    def _no_tls(self, error: OSError | EOFError) -> TransportError:
        why = refusal(error)
        if "certificate" in why:
            return WrongPeerError(
                why, peer=self.hub, hint="compare its pin with the coordinator's owner before the directory is changed"
            )
        return PeerLostError(f"no TLS: {why}", peer=self.hub)
