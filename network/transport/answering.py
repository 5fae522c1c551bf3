"""The site's side of one connection: requests in, handlers in threads, replies out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from choral.errors import ChoralError
from choral.network.errors import FrameError, PeerFailedError, TransportError
from choral.network.transport.channel import Buffer, FrameChannel, named
from choral.network.transport.frames import REPLY, REQUEST, ArrivingMessage, Frame, Kind, unpack
from choral.network.transport.limits import Limits, Meter

log = logging.getLogger("choral.network")
_IN_FLIGHT = 64 << 20  # bytes of a refused message that may be on their way when the other end reads so
_REFUSED = 128  # refused requests whose bytes may be on their way; a hub that hears of it cancels them
_LINES_A_MINUTE = 120  # about requests that were refused


@dataclass(frozen=True)
class Request:
    """What a handler is called with.

    identifier: 16 bytes. A request that is asked again after a connection broke has the same one: a handler that has
    answered it answers the same. body: the message, in memory that is this request's own. reply_limit: a larger reply
    is not sent. sender: the name of the hub, by its certificate.
    """

    identifier: bytes
    body: memoryview
    reply_limit: int
    sender: str


Handler = Callable[[Request], Buffer]


class _NotStarted(TransportError):
    """code: what the hub is told."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Works:
    """The requests that a handler works on now. It outlives connections: a repeated request joins the one at work."""

    def __init__(self, handler: Handler, limits: Limits) -> None:
        self._handler, self._limits = handler, limits
        self._threads = ThreadPoolExecutor(limits.outstanding, thread_name_prefix="choral-request")
        self._running: dict[bytes, tuple[Request, asyncio.Future[memoryview]]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, identifier: bytes) -> bool:
        return identifier in self._running

    def start(self, request: Request) -> asyncio.Future[memoryview]:
        """Call the handler in a thread, or join the call that is under way for the same request.

        Raises:
            _NotStarted: as many are at work as may be, or another request is at work under the same id.
        """
        if request.identifier in self._running:
            first, future = self._running[request.identifier]
            if first.body != request.body:
                raise _NotStarted("other", "another request is at work under the same id")
            return future
        if len(self._running) >= self._limits.outstanding:
            raise _NotStarted("busy", f"{len(self._running)} requests are at work")
        future = asyncio.get_running_loop().run_in_executor(self._threads, self._call, request)
        self._running[request.identifier] = request, future
        future.add_done_callback(lambda done: self._done(request.identifier, done))
        return future

    def close(self) -> None:
        """Start no more. A handler that is at work finishes in its thread; Python waits for it when it ends."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _done(self, identifier: bytes, future: asyncio.Future[memoryview]) -> None:
        del self._running[identifier]
        if not future.cancelled():
            future.exception()  # read here, for nobody may be left who waits for it

    def _call(self, request: Request) -> memoryview:
        try:
            return memoryview(self._handler(request)).cast("B")
        except BaseException as error:
            said = str(error) if isinstance(error, ChoralError) else "debug level has its traceback"
            log.error("the handler of a request from %s failed: %s: %s", request.sender, type(error).__name__, said)
            log.debug("the handler's traceback", exc_info=True)
            raise PeerFailedError("the handler failed", peer=request.sender) from None


class Answering:
    """`run` takes requests until the connection ends. request_limit: bytes of a request, asked for at each one."""

    def __init__(self, channel: FrameChannel, works: Works, request_limit: Callable[[], int]) -> None:
        self.channel = channel
        self._works, self._request_limit = works, request_limit
        self._last = 0
        self._incoming: dict[int, tuple[ArrivingMessage, bytes, int]] = {}
        self._refused: dict[int, ArrivingMessage] = {}
        self._answers: dict[int, asyncio.Task[None]] = {}
        self._lines = Meter(_LINES_A_MINUTE, _LINES_A_MINUTE)

    async def run(self) -> None:
        """Raises:
        PeerLostError, RefusedError: the connection ended.
        FrameError: the other end broke the rules, and the connection is to be closed.
        """
        try:
            while True:
                await self._take(await self.channel.next())
        except TransportError as error:
            raise named(error, self.channel.peer) from None
        finally:
            for task in self._answers.values():
                task.cancel()

    async def _take(self, frame: Frame) -> None:
        stream = frame.stream
        if frame.kind is Kind.REQUEST:
            await self._open(frame)
        elif frame.kind is Kind.DATA and stream in self._incoming:
            message, identifier, reply_limit = self._incoming[stream]
            message.add(frame.payload)
            if message.whole:
                del self._incoming[stream]
                self._start(stream, Request(identifier, message.view.toreadonly(), reply_limit, self.channel.peer))
        elif frame.kind is Kind.DATA and stream in self._refused:
            self._discard(stream, frame.payload)
        elif frame.kind is Kind.CANCEL:
            await self._cancel(stream)
        else:
            raise FrameError(f"a {frame.kind.name} frame out of order", peer=self.channel.peer)

    async def _open(self, frame: Frame) -> None:
        identifier, size, reply_limit = unpack(REQUEST, frame)
        if not (isinstance(identifier, bytes) and isinstance(size, int) and isinstance(reply_limit, int)):
            raise FrameError("a REQUEST frame that holds no request", peer=self.channel.peer)
        if frame.stream <= self._last:
            raise FrameError(f"request {frame.stream} after request {self._last}", peer=self.channel.peer)
        self._last = frame.stream
        most, limit = self.channel.limits.outstanding, self._request_limit()
        if size > limit:
            self._say(f"refused a request of {size} bytes from {self.channel.peer}; at most {limit} are taken")
            await self._refuse(frame.stream, size, "large")
        elif len(self._incoming) + len(self._works) >= most and identifier not in self._works:
            self._say(f"refused a request from {self.channel.peer}: {most} are at work")
            await self._refuse(frame.stream, size, "busy")
        elif len(self._incoming) >= most or len(self._answers) >= 2 * most:  # replies that it does not take
            await self._refuse(frame.stream, size, "busy")
        elif size:
            self._incoming[frame.stream] = ArrivingMessage(size), identifier, reply_limit
        else:
            self._start(frame.stream, Request(identifier, memoryview(b""), reply_limit, self.channel.peer))

    async def _refuse(self, stream: int, size: int, code: str) -> None:
        """Say no. The bytes of the message may be on their way: they are counted, and none is kept."""
        if size:
            self._refused[stream] = ArrivingMessage(size, discard=True)
        if len(self._refused) > _REFUSED:
            raise FrameError(f"went on asking after {_REFUSED} refusals", peer=self.channel.peer)
        await self._fail(stream, code)

    def _say(self, what: str) -> None:
        if self._lines.has(1):
            log.warning("%s", what)

    async def _fail(self, stream: int, code: str) -> None:
        await self.channel.send(Kind.FAILED, stream, code.encode())

    def _discard(self, stream: int, payload: bytes) -> None:
        message = self._refused[stream]
        message.add(payload)
        if message.whole:
            del self._refused[stream]
        elif message.taken > _IN_FLIGHT:
            raise FrameError("went on with a message that was refused", peer=self.channel.peer)

    async def _cancel(self, stream: int) -> None:
        """End what there is of a request, and say so: the last word on it, whatever crossed on the way."""
        self._refused.pop(stream, None)
        self._incoming.pop(stream, None)
        if (task := self._answers.get(stream)) is not None:
            task.cancel()
            await asyncio.wait([task])
        await self._fail(stream, "cancelled")

    def _start(self, stream: int, request: Request) -> None:
        task = asyncio.create_task(self._answer(stream, request))
        self._answers[stream] = task
        task.add_done_callback(lambda _: self._answers.pop(stream, None))

    async def _answer(self, stream: int, request: Request) -> None:
        with contextlib.suppress(TransportError):  # the task that reads says that the connection is gone
            try:
                reply = await asyncio.shield(self._works.start(request))
            except TransportError as error:
                await self._fail(stream, getattr(error, "code", "failed"))
                return
            if len(reply) > request.reply_limit:
                log.warning(
                    "a reply of %d bytes was not sent: %s takes %d", len(reply), request.sender, request.reply_limit
                )
                await self._fail(stream, "reply")
                return
            del request  # its message is not held while the reply is sent
            await self.channel.send_message(Kind.REPLY, stream, REPLY.pack(len(reply)), reply)
