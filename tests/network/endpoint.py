"""One end in a process of its own: `endpoint.py FOLDER hub PORT` or `endpoint.py FOLDER NAME PORT`."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import sys
from pathlib import Path

from choral.network import CertifiedIdentity, Directory, Hub, Limits, Link, Request, TransportError, read_certificate

LIMITS = Limits(beat=0.3, silence=2.0, handshake=5.0, probe=0.4, backoff=(0.02, 0.2))
calls = 0


def peak() -> int:
    """The most memory so far, in bytes. The figure of `getrusage` would begin with that of the parent process."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def handler(request: Request) -> bytes:
    """`count` counts calls, `peak` says the memory, `make N` makes N bytes; what is large is taken and forgotten."""
    global calls
    calls += 1
    if len(request.body) > 1000:
        return b"taken"
    word, _, number = bytes(request.body).decode().partition(" ")
    if word == "make":
        return b"\1" * int(number)
    return json.dumps({"calls": calls, "pid": os.getpid(), "peak": peak()}).encode()


async def hub(folder: Path, port: int) -> None:
    """Asks north again and again, and prints what it says."""
    directory = Directory([read_certificate(folder / "north.crt")])
    async with Hub(CertifiedIdentity.load(folder, "coordinator"), directory, limits=LIMITS) as here:
        address = await here.start("127.0.0.1", port)
        print(json.dumps({"port": address[1]}), flush=True)
        while True:
            try:
                reply = await here.request("north", b"count", timeout=1, reply_limit=1000)
                print(bytes(reply).decode(), flush=True)
            except TransportError as error:
                print(json.dumps({"lost": str(error)}), flush=True)
            await asyncio.sleep(0.05)


async def receive_and_send(folder: Path, size: int) -> None:
    """A hub that sends a large message, then takes one; prints how much memory each needed, and at the site."""
    directory = Directory([read_certificate(folder / "north.crt")])
    async with Hub(CertifiedIdentity.load(folder, "coordinator"), directory, limits=LIMITS) as here:
        address = await here.start("127.0.0.1", 0)
        print(json.dumps({"port": address[1]}), flush=True)
        before = peak(), json.loads(bytes(await here.request("north", b"peak", timeout=60, reply_limit=1000)))["peak"]
        body = b"\1" * size
        assert bytes(await here.request("north", body, timeout=120, reply_limit=1000)) == b"taken"
        del body
        gc.collect()
        reply = await here.request("north", b"make %d" % size, timeout=120, reply_limit=size)
        assert len(reply) == size
        assert reply[:: size // 1000].tobytes().count(1) >= 1000
        after = peak(), json.loads(bytes(await here.request("north", b"peak", timeout=60, reply_limit=1000)))["peak"]
        print(json.dumps({"hub": after[0] - before[0], "site": after[1] - before[1]}), flush=True)


def main(folder: Path, role: str, number: int) -> None:
    if role == "hub":
        asyncio.run(hub(folder, number))
    elif role == "memory":
        asyncio.run(receive_and_send(folder, number))
    else:
        identity, directory = (
            CertifiedIdentity.load(folder, role),
            Directory([read_certificate(folder / "coordinator.crt")]),
        )
        address = ("127.0.0.1", number)
        link = Link(
            identity, directory, handler, hub="coordinator", address=address, request_limit=1 << 28, limits=LIMITS
        )
        asyncio.run(link.run())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
