"""In the place of a site's door: what comes is passed on, and a test is told what it is before the site is."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from choral.network.door.client import HEAD, LENGTH, relay
from choral.network.door.sealed import OVERHEAD
from choral.network.door.trained import taken
from choral.network.host.messages import TakeStep, read_request

STEPS = ("roster", "deliveries", "survivors", "confirmations")
"""What a site is sent in a round of an open session, in this order: its vector goes up in answer to the second."""


class Tap:
    """See the module. path: of this socket. door: of the site's. before: called with the kind of each request; where it
    returns False nobody answers.
    """

    def __init__(self, path: Path, door: str) -> None:
        self.before: Callable[[str], Any] = lambda kind: None
        tap = self

        class Passing(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                _, size = HEAD.unpack(self.rfile.read(HEAD.size))
                request = self.rfile.read(size)
                if tap.before(kind_of(request)) is False:
                    return
                answer = relay(door, request)
                self.wfile.write(LENGTH.pack(len(answer)) + answer)

        self._server = socketserver.ThreadingUnixStreamServer(str(path), Passing)
        self._server.daemon_threads = True
        self.path = str(path)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def kind_of(raw: bytes) -> str:
    """ "proposejob", "endjob", the name of the sum's message, "" for one that only looks whether somebody is there."""
    if not raw:
        return ""
    request, trained = taken(memoryview(raw))
    asked = read_request(request[OVERHEAD:], limit=1 << 30)
    if not isinstance(asked, TakeStep):
        return type(asked).__name__.lower()
    name, *fields = msgspec.msgpack.decode(asked.message[1:])
    if name == "bundle":
        name, *_ = msgspec.msgpack.decode(fields[-1][-1][1:])
    return f"{name}, trained" if trained is not None else str(name)
