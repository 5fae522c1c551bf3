"""The coordinator's end: sites connect to it, and it asks them.

    async with Hub(identity, directory) as hub:
        await hub.start("0.0.0.0", 8443)
        reply = await hub.request("north", message, timeout=600, reply_limit=len(expected) + 4096)

Two connections under one name. A name is a key, so the second is either the same site, whose first connection died
without a word (a router forgot it), or another process that has the key: a copy of the site, or a thief. The older
connection is asked for a sign of life. If it gives one, the newer is refused and both ends log it; else the newer
takes its place. So a site comes back in two seconds at most, two copies do not throw each other out in turns, and
whoever uses a stolen key while the site is connected gets nowhere; while it is not, its owner reads "in use".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from choral.errors import ConfigError
from choral.network.errors import (
    FrameError,
    MessageTooLargeError,
    PeerLostError,
    RequestTimeoutError,
    TransportError,
    UnknownPeerError,
    WrongPeerError,
)
from choral.network.transport.asking import Asking
from choral.network.transport.certificates import Certificate, CertifiedIdentity
from choral.network.transport.channel import Buffer, FrameChannel
from choral.network.transport.frames import ID_BYTES, Kind, unpack_names
from choral.network.transport.limits import Door, Limits, Meter
from choral.network.transport.pinned_tls import READ_AHEAD, Directory, refusal, secured, tls_context

log = logging.getLogger("choral.network")
_LINES_A_MINUTE = 120  # about connections that were refused
_EXPIRES_SOON = timedelta(days=30)


class Hub:
    """Everything here runs in one event loop; `BlockingHub` is for code that has none.

    identity: this end's. directory: the sites that may connect. limits: what this end grants them.
    """

    def __init__(self, identity: CertifiedIdentity, directory: Directory, *, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._identity, self._directory = identity, directory
        self._context = tls_context(identity, directory, server=True)
        self._door = Door(self.limits)
        self._sessions: dict[str, tuple[Asking, Certificate]] = {}
        self._calls: Counter[str] = Counter()
        self._admitting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._change = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._closed = False
        self._lines, self._unsaid = Meter(_LINES_A_MINUTE, _LINES_A_MINUTE), 0

    async def __aenter__(self) -> Hub:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen there, and return the address; port 0 takes one that is free.

        Raises:
            TransportError: the address cannot be listened at.
        """
        try:
            self._server = await asyncio.start_server(self._connection, host, port, limit=READ_AHEAD)
        except OSError as error:
            raise TransportError(f"cannot listen ({error.strerror})", peer=f"{host}:{port}") from None
        address: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        log.info("%s listens at %s:%s for %d sites", self._identity.name, *address, len(self._directory))
        return address

    async def close(self) -> None:
        """Take no more connections, say good-bye to all sites, and fail what still waits."""
        self._closed = True
        if self._server is not None:
            self._server.close()
        await asyncio.gather(*(session.channel.close() for session, _ in self._sessions.values()))
        self._wake()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    async def change(self, *, directory: Directory | None = None, identity: CertifiedIdentity | None = None) -> None:
        """Go on with another directory, or another certificate of this end.

        Sites that are no longer in the directory, or are there with another certificate, are told and disconnected;
        requests to a removed one fail. All others stay connected.
        """
        directory = self._directory if directory is None else directory  # one without any site is a directory, too
        self._context = tls_context(identity or self._identity, directory, server=True)
        self._identity, self._directory = identity or self._identity, directory
        gone = [
            self._sessions.pop(name)[0]
            for name, (_, certificate) in list(self._sessions.items())
            if name not in self._directory or self._directory[name].pin != certificate.pin
        ]
        self._wake()
        for session in gone:
            log.warning(
                "%s: disconnected, for it is no longer in the directory with this certificate", session.channel.peer
            )
        await asyncio.gather(*(session.channel.close(Kind.REFUSE, "unknown") for session in gone))

    @property
    def connected(self) -> frozenset[str]:
        """The names of the sites that are connected now."""
        return frozenset(self._sessions)

    def calls(self, name: str) -> int:
        """How often a site of that name has connected: one that is there again may have been started anew."""
        return self._calls[name]

    async def wait_for(self, names: Iterable[str], *, timeout: float, count: int | None = None) -> frozenset[str]:
        """Wait until `count` of these sites (all, if not said) are connected, or the time is over; return who is."""
        wanted = frozenset(names)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while len(wanted & self.connected) < (len(wanted) if count is None else count):
                    await self._change.wait()
        return wanted & self.connected

    async def request(
        self,
        name: str,
        body: Buffer,
        *,
        timeout: float,
        reply_limit: int,
        identifier: bytes | None = None,
        away: float | None = None,
    ) -> memoryview:
        """Ask a site, and return its reply.

        A site that is not connected is waited for, and one whose connection breaks is asked again when it is back,
        under the same id: its handler may see a request twice, and knows it by its id. A request after that of a
        coordinator that was started anew can have the old one's id by `identifier`.

        timeout: seconds for all of it. reply_limit: bytes; a larger reply is refused before it is read.
        identifier: 16 bytes; random, if not given. away: seconds that a site may be without a connection, each time;
        as long as `timeout` has left, if not given.

        Raises:
            ConfigError: a limit, the time or the id cannot be used.
            UnknownPeerError: the name is not in the directory, or was removed from it meanwhile.
            PeerLostError: it was not connected when the time was over, or for longer than `away`; or the hub was
                closed.
            RequestTimeoutError: it was connected and did not answer in time.
            BusyError: more than `limits.outstanding` requests at once, here or there.
            MessageTooLargeError: the site takes no request of this size, or has a reply beyond `reply_limit`.
            PeerFailedError: its handler stopped with an error.
            FrameError, RefusedError: it sent what is not of this transport, or could not read what was sent.
        """
        if not timeout > 0 or reply_limit < 0 or len(identifier or bytes(ID_BYTES)) != ID_BYTES:
            raise ConfigError(f"expected a time above 0, a limit of at least 0 and an id of {ID_BYTES} bytes")
        identifier, view, asked = identifier or os.urandom(ID_BYTES), memoryview(body).cast("B"), False
        try:
            async with asyncio.timeout(timeout):
                while True:
                    session, asked = await self._session_within(name, away), True
                    try:
                        return await session.ask(identifier, view, reply_limit)
                    except PeerLostError as error:
                        log.info("%s: the connection ended while it was asked; it is asked again when it is back", name)
                        self._forget(name, session, error)
        except TimeoutError:
            if name in self._sessions:
                raise RequestTimeoutError(f"no answer within {timeout:g} s", peer=name) from None
            lost = "the connection ended and was not made again" if asked else "was not connected"
            raise PeerLostError(f"{lost} within {timeout:g} s", peer=name) from None

    async def _session_within(self, name: str, away: float | None) -> Asking:
        if not self._closed and name in self._directory and name in self._sessions:
            return self._sessions[name][0]
        try:
            async with asyncio.timeout(away):
                return await self._session(name)
        except TimeoutError:
            raise PeerLostError(f"was away for {away:g} s", peer=name) from None

    async def _session(self, name: str) -> Asking:
        while True:
            if self._closed:
                raise PeerLostError("the hub is closed", peer=name)
            if name not in self._directory:
                raise UnknownPeerError("is not in the directory", peer=name)
            if name in self._sessions:
                return self._sessions[name][0]
            await self._change.wait()

    def _wake(self) -> None:
        before, self._change = self._change, asyncio.Event()
        before.set()

    def _forget(self, name: str, session: Asking, error: TransportError) -> None:
        if name in self._sessions and self._sessions[name][0] is session:
            del self._sessions[name]
            log.log(logging.DEBUG if self._closed else logging.WARNING, "lost a site: %s", error)
            self._wake()

    async def _connection(self, _: asyncio.StreamReader, plain: asyncio.StreamWriter) -> None:
        """One connection from its first byte to its last."""
        host, port = (plain.get_extra_info("peername") or ("unknown", 0))[:2]
        if why := "the hub is closing" if self._closed else self._door.enter(host):
            self._say_refused(f"{host}:{port}", why)
            plain.transport.abort()
            return
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            found = await self._greet(plain, f"{host}:{port}")
            if found is not None:
                await self._serve(*found, f"{host}:{port}")
        finally:
            self._door.leave(host)
            plain.transport.abort()

    async def _greet(self, plain: asyncio.StreamWriter, where: str) -> tuple[FrameChannel, bytes] | None:
        """TLS, certificate, HELLO: the channel and the certificate of a site, or None for whoever was refused."""
        limits, channel = self.limits, None
        try:
            async with asyncio.timeout(limits.handshake):
                reader, writer = await secured(plain, self._context, server=True, seconds=limits.handshake + 1)
                shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
                channel = FrameChannel(reader, writer, limits, where)
                channel.peer = name = self._directory.name_of(shown)
                hello = await channel.receive()
                if hello.kind is not Kind.HELLO:
                    raise FrameError(f"a {hello.kind.name} frame instead of HELLO")
                version, names = unpack_names(hello.payload)
        except (WrongPeerError, FrameError) as error:
            self._say_refused(where, str(error))
            if channel is not None:
                await channel.close(Kind.REFUSE, "unknown" if isinstance(error, WrongPeerError) else "frame")
            return None
        except PeerLostError as error:
            self._say_refused(where, str(error))
            return None
        except (OSError, EOFError) as error:
            self._say_refused(where, refusal(error))
            return None
        code = "" if names else "version"
        if names and names[0] != name:
            code, said = "name", f"says that it is {names[0]!a}, and its certificate is that of {name}"
        elif names and names[1] != self._identity.name:
            code, said = "called", f"{name} called {names[1]!a}, and this is {self._identity.name}"
        else:
            said = f"{name} speaks version {version} of the transport"
        if code:
            self._say_refused(where, said)
            await channel.close(Kind.REFUSE, code)
            return None
        return channel, shown

    async def _serve(self, channel: FrameChannel, shown: bytes, where: str) -> None:
        """Admit a site whose certificate is known, and stay with it until its connection ends."""
        session, name = Asking(channel), channel.peer
        async with self._admitting[name]:
            older = self._sessions.get(name)
            if older is not None and await older[0].channel.alive():
                self._say_refused(where, f"{name} is connected and alive; does a second process use its key?")
                await channel.close(Kind.REFUSE, "in use")
                return
            try:
                certificate = self._directory[self._directory.name_of(shown)]  # it may have changed meanwhile
            except WrongPeerError as error:
                self._say_refused(where, str(error))
                await channel.close(Kind.REFUSE, "unknown")
                return
            if older is not None:
                older[0].channel.abort()
            self._sessions[name] = session, certificate
            self._calls[name] += 1
        beat = asyncio.create_task(channel.beat())
        try:
            welcome = asyncio.create_task(channel.send(Kind.WELCOME))
            self._wake()
            await welcome
            log.info("%s connected from %s", name, where)
            if certificate.not_after - datetime.now(UTC) < _EXPIRES_SOON:
                log.warning("the certificate of %s expires on %s", name, f"{certificate.not_after:%Y-%m-%d}")
            await session.run()
        except (FrameError, MessageTooLargeError) as error:
            self._forget(name, session, error)
            await channel.close(Kind.REFUSE, "frame" if isinstance(error, FrameError) else "large")
        except TransportError as error:
            self._forget(name, session, error)
        finally:
            beat.cancel()
            self._forget(name, session, PeerLostError("closed at this end", peer=name))

    def _say_refused(self, where: str, why: str) -> None:
        if not self._lines.has(1):
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} before it that are not in the log)" if self._unsaid else ""
        self._unsaid = 0
        log.warning("refused %s: %s%s", where, why, more)
