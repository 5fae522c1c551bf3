"""Requests to sites as NVFlare's auxiliary messages: pushed, one to each site at a time, its answer awaited.

NVFlare does not say that a client is gone before its heartbeats have been missing for ten minutes, and an answer that
will not come would be awaited for as long as a training may take. So whoever is silent for some seconds is asked
whether it is there, and is lost when it has not said so for `away` seconds.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from choral.network.door.client import OK
from choral.network.errors import PeerFailedError, PeerLostError, RequestTimeoutError, TransportError
from choral.network.nvflare.site import REPLY, TOPIC, asked

_BEAT = 3.0  # seconds without an answer until sites are asked whether they are there
_LOOK = 2.0  # seconds that they have to say so
_ON_THE_WAY = 1.0  # seconds more than the site's process has
Answers = queue.SimpleQueue[tuple[str, bytes | TransportError]]


class Aborted(KeyboardInterrupt):
    """Somebody aborted the job: as Ctrl-C, it ends the run, which can be gone on with."""


class NVFlareMessages:
    """The adapter of NVFlare's server (`EngineAdapter`). context: that of the job's controller. away: seconds."""

    def __init__(self, context: Any, *, away: float = 20.0) -> None:
        self._context, self._engine, self._away = context, context.get_engine(), away

    def carry(
        self, outbox: Mapping[str, bytes], *, seconds: float, reply_limit: int
    ) -> Iterator[tuple[str, bytes | TransportError]]:
        """Raises: Aborted."""
        answers, calls = self._sent(outbox, seconds, reply_limit)
        waiting, heard = set(outbox), dict.fromkeys(outbox, time.monotonic())
        while waiting:
            try:
                name, reply = answers.get(timeout=_BEAT)
            except queue.Empty:
                for name in self.alive(frozenset(waiting)):
                    heard[name] = time.monotonic()
                for name in sorted(waiting):
                    if time.monotonic() - heard[name] > self._away:
                        waiting.discard(name)
                        calls[name].triggered = True
                        yield name, PeerLostError(f"was away for {self._away:g} s", peer=name)
                continue
            self._check()
            if name in waiting:
                waiting.discard(name)
                yield name, reply
        self._check()

    def alive(self, names: frozenset[str]) -> frozenset[str]:
        """Which sites' processes are there. Raises: Aborted."""
        (answers, _), end = self._sent(dict.fromkeys(names, b""), _LOOK, 1), time.monotonic() + _LOOK
        found = set()
        for _ in names:
            try:
                name, reply = answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if reply == bytes([OK]):
                found.add(name)
        self._check()
        return frozenset(found)

    def _sent(self, outbox: Mapping[str, bytes], seconds: float, limit: int) -> tuple[Answers, dict[str, _Call]]:
        """Where the answers come, and how to give one up. A thread waits for each."""
        answers: Answers = queue.SimpleQueue()
        calls = {name: _Call(self._context) for name in outbox}

        def one(name: str, raw: bytes) -> None:
            answers.put((name, self._one(name, raw, seconds, limit, calls[name])))

        for name, raw in outbox.items():
            threading.Thread(target=one, args=(name, raw), name=f"choral-{name}", daemon=True).start()
        return answers, calls

    def _one(self, name: str, raw: bytes, seconds: float, limit: int, call: _Call) -> bytes | TransportError:
        if self._engine.get_client_from_name(name) is None:
            return PeerLostError("is not connected to NVFlare's server", peer=name)
        replies = self._engine.send_aux_request(  # 2.9.0 has an error in multicast_aux_requests: nothing is ever sent
            targets=[name],
            topic=TOPIC,
            request=asked(raw, seconds=seconds, limit=limit),
            timeout=seconds + _ON_THE_WAY,
            fl_ctx=call,
            optional=True,
        )
        return read_reply((replies or {}).get(name), name, seconds)

    def _check(self) -> None:
        signal = self._context.get_run_abort_signal()
        if signal is not None and signal.triggered:
            raise Aborted


class _Call:
    """The context of one request, and the signal that ends it: NVFlare's job process does not end while one waits.

    triggered: it was given up, or the job was aborted.
    """

    def __init__(self, context: Any) -> None:
        self._context, self._given_up = context, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def get_run_abort_signal(self) -> Any:
        return self

    @property
    def triggered(self) -> bool:
        signal = self._context.get_run_abort_signal()
        return self._given_up or (signal is not None and signal.triggered)

    @triggered.setter
    def triggered(self, value: bool) -> None:
        self._given_up = value


def read_reply(reply: Any, name: str, seconds: float) -> bytes | TransportError:
    """What NVFlare brought: the status and reply of the site's door, or what became of the message."""
    if reply is None:
        return RequestTimeoutError(f"did not answer within {seconds:g} s", peer=name)
    code, found = reply.get_return_code(), reply.get(REPLY)
    if code == "OK" and isinstance(found, bytes):
        return found
    if code == "TIMEOUT":
        return RequestTimeoutError(f"did not answer within {seconds:g} s", peer=name)
    if code in ("COMMUNICATION_ERROR", "TOPIC_UNKNOWN"):  # it is gone, or is not there yet
        return PeerLostError("its process in NVFlare is not there", peer=name)
    return PeerFailedError(f"NVFlare says {code!s:.40}", peer=name)
