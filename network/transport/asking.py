"""The hub's side of one connection: requests out, replies in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from choral.network.errors import (
    BusyError,
    FrameError,
    MessageTooLargeError,
    PeerFailedError,
    PeerLostError,
    TransportError,
)
from choral.network.transport.channel import FrameChannel, named
from choral.network.transport.frames import FRAME_BYTES, REPLY, REQUEST, ArrivingMessage, Frame, Kind, unpack

_UNANSWERED = 64  # requests given up that the other end still owes a word on


@dataclass(eq=False)
class _OpenRequest:
    limit: int
    answer: asyncio.Future[memoryview]
    message: ArrivingMessage | None = None
    cancelled: bool = False


class Asking:
    """`run` reads until the connection ends; `ask` works while it runs."""

    def __init__(self, channel: FrameChannel) -> None:
        self.channel = channel
        self._pending: dict[int, _OpenRequest] = {}
        self._last = 0
        self._gone: TransportError | None = None
        self._cancels: set[asyncio.Task[None]] = set()

    async def ask(self, identifier: bytes, body: memoryview, reply_limit: int) -> memoryview:
        """Send one request and wait for its reply, in memory of its own.

        Raises:
            BusyError: too many requests are waiting here, or the other end says so.
            PeerLostError: the connection is gone.
            PeerFailedError, MessageTooLargeError: what the other end says, or what it did.
        """
        if self._gone is not None:
            raise self._gone
        peer, most = self.channel.peer, self.channel.limits.outstanding
        if sum(not pending.answer.done() for pending in self._pending.values()) >= most:
            raise BusyError(f"{most} requests are waiting for an answer already", peer=peer)
        if len(self._pending) >= most + _UNANSWERED:
            self.channel.abort()
            raise PeerLostError(f"more than {_UNANSWERED} requests that were given up got no last word", peer=peer)
        self._last += 1
        stream, pending = self._last, _OpenRequest(reply_limit, asyncio.get_running_loop().create_future())
        self._pending[stream] = pending
        head, unsent = REQUEST.pack(identifier, len(body), reply_limit), True
        sending: asyncio.Task[None] | None = None
        try:
            await self._send(pending, self.channel.begin_message(Kind.REQUEST, stream, head, body))  # in their order
            if unsent := len(body) > FRAME_BYTES:
                sending = asyncio.create_task(self._send(pending, self.channel.end_message(stream, body)))
            return await pending.answer
        finally:
            if sending is not None:
                unsent = not sending.done()
                sending.cancel()
            if not pending.answer.done() or pending.answer.cancelled():
                pending.answer.cancel()
                if pending.message is not None:
                    pending.message.discard()
            if self._gone is None and (unsent or stream in self._pending):
                # It stays until the other end has said the last word on it, which is its answer to CANCEL.
                pending.cancelled, self._pending[stream] = True, pending
                task = asyncio.create_task(self._cancel(stream))
                self._cancels.add(task)
                task.add_done_callback(self._cancels.discard)

    async def run(self) -> None:
        """Take replies until the connection ends, which is always an error.

        Raises:
            PeerLostError, RefusedError: it ended.
            FrameError, MessageTooLargeError: the other end broke the rules, and the connection is to be closed.
        """
        try:
            while True:
                self._take(await self.channel.next())
        except TransportError as error:
            known = named(error, self.channel.peer)
            self._end(known)
            raise known from None
        except asyncio.CancelledError:
            self._end(PeerLostError("the connection was closed at this end", peer=self.channel.peer))
            raise

    def _end(self, error: TransportError) -> None:
        self._gone = error
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(error)
        self._pending.clear()

    async def _send(self, pending: _OpenRequest, part: Coroutine[Any, Any, None]) -> None:
        try:
            await part
        except TransportError as error:
            if not pending.answer.done():
                pending.answer.set_exception(error)

    async def _cancel(self, stream: int) -> None:
        with contextlib.suppress(TransportError):  # a connection that is gone needs no word
            await self.channel.send(Kind.CANCEL, stream)

    def _take(self, frame: Frame) -> None:
        peer = self.channel.peer
        pending = self._pending.get(frame.stream)
        if pending is None:
            raise FrameError(f"a {frame.kind.name} frame to a request that is not open", peer=peer)
        if frame.kind is Kind.FAILED and (not pending.cancelled or frame.payload == b"cancelled"):
            del self._pending[frame.stream]
            if not pending.answer.done():
                pending.answer.set_exception(_failure(frame, pending.limit, peer))
            return
        if frame.kind is Kind.FAILED:
            return  # it crossed the word that it is not wanted any longer
        if frame.kind is Kind.REPLY and pending.message is None:
            (size,) = unpack(REPLY, frame)
            if not isinstance(size, int) or size > pending.limit:
                raise MessageTooLargeError(
                    f"announced a reply of {size} bytes; at most {pending.limit} were asked for", peer=peer
                )
            pending.message = ArrivingMessage(size, discard=pending.answer.done())
        elif frame.kind is Kind.DATA and pending.message is not None:
            pending.message.add(frame.payload)
        else:
            raise FrameError(f"a {frame.kind.name} frame out of order", peer=peer)
        if pending.message.whole and not pending.cancelled:
            del self._pending[frame.stream]
            if not pending.answer.done():
                pending.answer.set_result(pending.message.view)


def _failure(frame: Frame, limit: int, peer: str) -> TransportError:
    code = frame.payload.decode("ascii", "replace")
    if code == "busy":
        return BusyError("works on as many requests as it takes at once", peer=peer)
    if code == "large":
        return MessageTooLargeError("takes no message as large as this request", peer=peer)
    if code == "reply":
        return MessageTooLargeError(f"its reply is larger than the {limit} bytes that were asked for", peer=peer)
    if code == "other":
        return PeerFailedError("works on another request under the same id", peer=peer)
    return PeerFailedError("stopped with an error, which stands in its own log", peer=peer)
