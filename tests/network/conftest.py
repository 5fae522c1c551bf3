"""Hubs, links, raw ends and a proxy that misbehaves: real sockets and real TLS, with short times."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from choral.network import CertifiedIdentity, Directory, Hub, Limits, Link, Request, make_identity
from choral.network.transport.frames import HEADER, Kind, header, pack_names
from choral.network.transport.pinned_tls import tls_context

QUICK = {"beat": 0.3, "silence": 3.0, "handshake": 2.0, "probe": 0.4, "backoff": (0.02, 0.2)}
NAMES = ("coordinator", "north", "south", "stranger")


def echo(request: Request) -> memoryview:
    return request.body


@dataclass
class Raw:
    """An end of TLS that speaks frames by hand."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, kind: int, stream: int = 0, payload: bytes = b"") -> None:
        self.writer.write(header(Kind(kind), stream, len(payload)) + payload)
        await self.writer.drain()
        await asyncio.sleep(0)  # a connection that ended is not known to `drain` before

    async def read(self) -> tuple[Kind, int, bytes]:
        kind, _, stream, length = HEADER.unpack(await self.reader.readexactly(HEADER.size))
        return Kind(kind), stream, await self.reader.readexactly(length)

    async def read_until(self, kind: Kind) -> tuple[int, bytes]:
        while True:
            found, stream, payload = await self.read()
            if found is kind:
                return stream, payload

    async def ended(self) -> bool:
        """Read to the end, if it comes within two seconds."""
        try:
            async with asyncio.timeout(2):
                while await self.reader.read(65536):
                    pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def abort(self) -> None:
        self.writer.transport.abort()


@dataclass
class Middle:
    """A proxy: HTTP CONNECT or plain forwarding. What it does to bytes may change at any time."""

    target: tuple[str, int]
    connect: bool = False
    answer: bytes = b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n"
    delay: float = 0.0
    split: int = 65536
    flowing: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[bytes] = field(default_factory=list)
    passed: int = 0
    cut_after: int | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    address: tuple[str, int] = ("", 0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self.connect:
                self.asked.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(self.answer)
                await writer.drain()
                if b" 200 " not in self.answer:
                    return
            out_reader, out = await asyncio.open_connection(*self.target)
            self._writers.add(out)
            await asyncio.wait(
                [asyncio.create_task(self.pump(*ends)) for ends in ((reader, out), (out_reader, writer))],
                return_when=asyncio.FIRST_COMPLETED,
            )
            out.transport.abort()
        except (OSError, EOFError):
            return
        finally:
            writer.transport.abort()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(self.split):
                await self.flowing.wait()
                if self.delay:
                    await asyncio.sleep(self.delay)
                self.passed += len(chunk)
                if self.cut_after is not None and self.passed > self.cut_after:
                    self.cut_after = None
                    return self.cut()
                writer.write(chunk)
                await writer.drain()
        return None

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


@dataclass
class Ends:
    folder: Path
    identities: dict[str, CertifiedIdentity]

    def directory(self, *names: str) -> Directory:
        return Directory(self.identities[name].certificate for name in names)

    def limits(self, **changed: Any) -> Limits:
        return Limits(**{**QUICK, **changed})

    @contextlib.asynccontextmanager
    async def hub(self, *names: str, **changed: Any) -> AsyncIterator[tuple[Hub, tuple[str, int]]]:
        hub = Hub(self.identities["coordinator"], self.directory(*names), limits=self.limits(**changed))
        async with hub:
            yield hub, await hub.start("127.0.0.1", 0)

    def make_link(
        self, name: str, address: tuple[str, int], handler: Callable[[Request], Any] = echo, **settings: Any
    ) -> Link:
        given = {"request_limit": 1 << 27, "hub": "coordinator", "limits": self.limits(), **settings}
        return Link(self.identities[name], self.directory("coordinator"), handler, address=address, **given)

    @contextlib.asynccontextmanager
    async def link(self, *args: Any, **settings: Any) -> AsyncIterator[Link]:
        async with self.running(self.make_link(*args, **settings)) as link:
            yield link

    @contextlib.asynccontextmanager
    async def running(self, link: Link) -> AsyncIterator[Link]:
        task = asyncio.create_task(link.run())
        try:
            yield link
        finally:
            link.stop()
            await task

    @contextlib.asynccontextmanager
    async def middle(self, target: tuple[str, int], **settings: Any) -> AsyncIterator[Middle]:
        middle = Middle(target, **settings)
        middle.flowing.set()
        server = await asyncio.start_server(middle.serve, "127.0.0.1", 0)
        middle.address = server.sockets[0].getsockname()[:2]
        try:
            yield middle
        finally:
            server.close()
            middle.flowing.set()
            middle.cut()
            await asyncio.sleep(0.02)

    @contextlib.asynccontextmanager
    async def raw_site(
        self, address: tuple[str, int], name: str = "north", *, says: str | None = None, hello: bool = True
    ) -> AsyncIterator[Raw]:
        """The end of a site, after HELLO and WELCOME if `hello`."""
        reader, writer = await asyncio.open_connection(*address)
        raw = Raw(reader, writer)
        try:
            context = tls_context(self.identities[name], self.directory("coordinator"), server=False)
            await writer.start_tls(context)
            if hello:
                await raw.send(Kind.HELLO, 0, pack_names(says or name, "coordinator"))
                await raw.read_until(Kind.WELCOME)
            yield raw
        finally:
            raw.abort()
            await asyncio.sleep(0)

    @contextlib.asynccontextmanager
    async def raw_hub(
        self,
        script: Callable[[Raw], Any],
        name: str = "coordinator",
        context: ssl.SSLContext | None = None,
        welcome: bool = True,
    ) -> AsyncIterator[tuple[str, int]]:
        """A hub that welcomes each connection, then does what `script` says."""
        context = context or tls_context(self.identities[name], self.directory("north"), server=True)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            raw = Raw(reader, writer)
            try:
                await writer.start_tls(context)
                await raw.read_until(Kind.HELLO)
                if welcome:
                    await raw.send(Kind.WELCOME)
                await script(raw)
            except (OSError, EOFError):
                return
            finally:
                raw.abort()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[:2]
        finally:
            server.close()
            await asyncio.sleep(0.02)


@pytest.fixture(scope="session")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    folder = tmp_path_factory.mktemp("identities")
    return Ends(folder, {name: make_identity(folder, name) for name in NAMES})


async def until(fact: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until `fact` holds, or fail."""
    async with asyncio.timeout(seconds):
        while not fact():
            await asyncio.sleep(0.005)


@pytest.fixture(scope="session", name="until")
def until_fixture() -> Callable[..., Any]:
    return until
