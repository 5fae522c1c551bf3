"""One connection after TLS: frames in and out, signs of life, and what is granted to the other end."""

from __future__ import annotations

import asyncio
import contextlib
import math

from choral.network.errors import FrameError, PeerLostError, RefusedError, TransportError
from choral.network.transport.frames import FRAME_BYTES, HEADER, Frame, Kind, header, read_header
from choral.network.transport.limits import Limits, Meter
from choral.network.transport.pinned_tls import in_words

Buffer = bytes | bytearray | memoryview
_CLOSING = 2.0  # seconds for an orderly end of TLS
_HELD = 2 * FRAME_BYTES  # that may wait for the other end before a sender waits, too
_OVERHEAD = 64  # bytes that a frame costs beside its payload, about

REASONS = {
    "version": "it speaks another version of the transport",
    "name": "the name that was given is not the certificate's",
    "called": "another name was called than it has",
    "unknown": "this certificate is not, or no longer, in its directory",
    "in use": "another connection under this name is alive; does a second process use this key?",
    "frame": "it could not read what was sent",
    "large": "a message was larger than it takes",
    "closing": "it is closing",
}


class FrameChannel:
    """Frames over a stream. Only one task may `receive`; any may `send`.

    heard: a count of the frames taken so far, for whoever waits for a sign of life.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limits: Limits, peer: str = ""
    ) -> None:
        self.peer, self.limits, self.heard = peer, limits, 0
        self._reader, self._writer = reader, writer
        self._lock = asyncio.Lock()
        self._bytes = Meter(limits.bytes_a_minute, limits.bytes_a_minute / 60 + FRAME_BYTES)
        self._frames = Meter(limits.frames_a_minute, limits.frames_a_minute)
        writer.transport.set_write_buffer_limits(high=_HELD)
        self._until = math.inf  # when the frame that is waited for must be here
        self._timer: asyncio.TimerHandle | None = None

    async def send(self, kind: Kind, stream: int = 0, payload: Buffer = b"") -> None:
        """Write one frame and wait until there is room for another. Never leaves half a frame.

        Raises:
            PeerLostError: the connection is gone, or the other end took nothing for too long.
        """
        await self._write(b"".join((header(kind, stream, len(payload)), payload)))

    async def send_message(self, kind: Kind, stream: int, head: bytes, body: memoryview) -> None:
        """Write a message: its head, its bytes as DATA. Frames of others may come in between.

        Raises:
            PeerLostError: as `send`.
        """
        await self.begin_message(kind, stream, head, body)
        await self.end_message(stream, body)

    async def begin_message(self, kind: Kind, stream: int, head: bytes, body: memoryview) -> None:
        """Its head and its first bytes, which are all of a small one. Raises: as `send`."""
        first = body[:FRAME_BYTES]
        parts: list[Buffer] = [header(kind, stream, len(head)), head]
        if len(first):
            parts += [header(Kind.DATA, stream, len(first)), first]
        await self._write(b"".join(parts))  # of small ones TLS makes one record

    async def end_message(self, stream: int, body: memoryview) -> None:
        """The rest of its bytes. Raises: as `send`."""
        for start in range(FRAME_BYTES, len(body), FRAME_BYTES):
            await asyncio.sleep(0)  # others have their turn, and an end of the connection is heard of
            await self.send(Kind.DATA, stream, body[start : start + FRAME_BYTES])

    async def _write(self, raw: bytes) -> None:
        async with self._lock:
            transport = self._writer.transport
            if transport.is_closing():
                raise PeerLostError("the connection is closed", peer=self.peer)
            try:
                self._writer.write(raw)
                if transport.get_write_buffer_size() < _HELD:
                    return
                async with asyncio.timeout(self.limits.silence):
                    await self._writer.drain()
            except TimeoutError:
                self.abort()
                text = f"took no bytes for {self.limits.silence:g} s"
                raise PeerLostError(text, peer=self.peer) from None
            except OSError as error:
                raise PeerLostError(f"the connection broke ({in_words(error)})", peer=self.peer) from None

    async def receive(self) -> Frame:
        """The next frame.

        Raises:
            PeerLostError: the connection is gone, or nothing whole came for too long.
            FrameError: the bytes are no frame. Nothing can be read after that.
        """
        self._expect()
        try:
            kind, stream, length = read_header(await self._reader.readexactly(HEADER.size))
            payload = await self._reader.readexactly(length) if length else b""
        except TimeoutError:
            raise PeerLostError(f"nothing heard for {self.limits.silence:g} s", peer=self.peer) from None
        except asyncio.IncompleteReadError as error:
            where = "in the middle of a frame" if error.partial or error.expected != HEADER.size else ""
            raise PeerLostError(f"hung up {where}".strip(), peer=self.peer) from None
        except OSError as error:
            raise PeerLostError(f"the connection broke ({in_words(error)})", peer=self.peer) from None
        finally:
            self._until = math.inf
        self.heard += 1
        wait = self._bytes.take(length + _OVERHEAD)
        if kind is not Kind.DATA:
            wait = max(wait, self._frames.take(1))
        if wait:
            await asyncio.sleep(wait)
        return Frame(kind, stream, payload)

    def _expect(self) -> None:
        """A frame must be here within `limits.silence`. One timer looks after all of them, for most come at once."""
        loop = asyncio.get_running_loop()
        self._until = loop.time() + self.limits.silence
        if self._timer is None:
            self._timer = loop.call_at(self._until, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if loop.time() >= self._until:
            self._reader.set_exception(TimeoutError())
        elif self._until < math.inf:
            self._timer = loop.call_at(self._until, self._look, loop)

    async def next(self) -> Frame:
        """The next frame that is about a request: beats are taken, probes answered, an end said is an error.

        Raises:
            PeerLostError, RefusedError, FrameError: as `receive`, or the other end said that it ends here.
        """
        while True:
            frame = await self.receive()
            if frame.kind is Kind.PROBE:
                await self.send(Kind.BEAT)
            elif frame.kind is Kind.BYE:
                raise PeerLostError("closed the connection in good order", peer=self.peer)
            elif frame.kind is Kind.REFUSE:
                raise refused(frame, self.peer)
            elif frame.kind is not Kind.BEAT:
                return frame

    async def beat(self) -> None:
        """Send signs of life until the connection ends; its loss is for the task that receives to say."""
        with contextlib.suppress(TransportError):
            while True:
                await asyncio.sleep(self.limits.beat)
                await self.send(Kind.BEAT)

    async def alive(self) -> bool:
        """Whether the other end gives a sign of life now. Another task must be receiving."""
        before = self.heard
        try:
            async with asyncio.timeout(self.limits.probe):
                await self.send(Kind.PROBE)
                while self.heard == before:
                    await asyncio.sleep(self.limits.probe / 50)
        except (TimeoutError, TransportError):
            return False
        return True

    async def close(self, kind: Kind = Kind.BYE, reason: str = "") -> None:
        """Say why, end TLS in order if the other end goes along, and let go of the connection in any case."""
        try:
            async with asyncio.timeout(_CLOSING):
                with contextlib.suppress(TransportError):
                    await self.send(kind, payload=reason.encode())
                self._writer.close()
                await self._writer.wait_closed()
        except (TimeoutError, OSError):
            return  # it is aborted below
        finally:
            self.abort()

    def abort(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._writer.transport.abort()


def named(error: TransportError, peer: str) -> TransportError:
    """The error with the name of the other end, which what reads bytes does not know."""
    return FrameError(str(error), peer=peer) if isinstance(error, FrameError) and not error.peer else error


def refused(frame: Frame, peer: str) -> RefusedError:
    code = frame.payload.decode("ascii", "replace")
    known = REASONS.get(code)
    return RefusedError(
        f"turned this end away: {known or 'for a reason that this version does not know'}",
        peer=peer,
        code=code if known else "",
    )
