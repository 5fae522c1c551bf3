"""The reference transport beside a bare loop of asyncio streams over the same TLS, in one run.

    python benchmarks/transport.py [--repeats 9] [--sizes 1 20 100]

A site in a process of its own; messages go down (to the site, which answers one byte) and up. The two take turns,
``--repeats`` times, and medians are given. ``ratio_to_bare`` is seconds of ours over seconds of the bare loop: below 1
we are faster. The bare loop has two lengths, the bytes, and nothing else: no frames, no beats, no limits, no names. One
JSON line per figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from choral.network import CertifiedIdentity, Directory, Hub, Limits, Link, Request, make_identity, read_certificate
from choral.network.transport.pinned_tls import tls_context

LIMITS = Limits(bytes_a_minute=1 << 40, frames_a_minute=1 << 30)
BARE_BUFFER = 512 * 1024
CHUNK = 256 * 1024


def handler(request: Request) -> bytes:
    """The first four bytes say how many to send back."""
    return bytes(int.from_bytes(request.body[:4], "big"))


async def bare_trip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, down: bytes, up: int) -> None:
    writer.write(len(down).to_bytes(4, "big") + up.to_bytes(4, "big"))
    await bare_write(writer, memoryview(down))
    await bare_read(reader, up)


async def bare_write(writer: asyncio.StreamWriter, body: memoryview) -> None:
    for start in range(0, len(body), CHUNK):
        writer.write(body[start : start + CHUNK])
        await writer.drain()


async def bare_read(reader: asyncio.StreamReader, size: int) -> bytearray:
    taken, at = bytearray(size), 0
    while at < size:
        chunk = await reader.read(min(CHUNK, size - at))
        taken[at : at + len(chunk)] = chunk
        at += len(chunk)
    return taken


async def site(folder: Path, port: int, bare_port: int) -> None:
    identity, directory = CertifiedIdentity.load(folder, "site"), Directory([read_certificate(folder / "hub.crt")])

    async def bare() -> None:
        context = tls_context(identity, directory, server=False)
        reader, writer = await asyncio.open_connection("127.0.0.1", bare_port, limit=BARE_BUFFER)
        await writer.start_tls(context)
        while head := await reader.read(8):
            head += await reader.readexactly(8 - len(head)) if len(head) < 8 else b""
            await bare_read(reader, int.from_bytes(head[:4], "big"))
            await bare_write(writer, memoryview(bytes(int.from_bytes(head[4:], "big"))))
        writer.transport.abort()

    link = Link(
        identity, directory, handler, hub="hub", address=("127.0.0.1", port), request_limit=1 << 30, limits=LIMITS
    )
    await asyncio.gather(link.run(), bare())


async def interleaved(repeats: int, inner: int, trips: dict[str, Callable[[], Awaitable[object]]]) -> dict[str, float]:
    """Median seconds of each, taking turns, after one turn to warm up."""
    times: dict[str, list[float]] = {name: [] for name in trips}
    for turn in range(repeats + 1):
        for name, trip in trips.items():
            start = time.perf_counter()
            for _ in range(inner):
                await trip()
            if turn:
                times[name].append((time.perf_counter() - start) / inner)
    return {name: statistics.median(values) for name, values in times.items()}


async def measure(folder: Path, repeats: int, sizes: list[int]) -> None:
    identity, directory = make_identity(folder, "hub"), Directory([make_identity(folder, "site").certificate])
    bare: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.get_running_loop().create_future()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await writer.start_tls(tls_context(identity, directory, server=True))
        bare.set_result((reader, writer))

    async with Hub(identity, directory, limits=LIMITS) as hub:
        address = await hub.start("127.0.0.1", 0)
        server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=BARE_BUFFER)
        port = server.sockets[0].getsockname()[1]
        command = [sys.executable, __file__, "--site", str(folder), str(address[1]), str(port)]
        process = subprocess.Popen(command)
        try:
            await hub.wait_for(["site"], timeout=60)
            reader, writer = await asyncio.wait_for(bare, 60)

            def ours(body: bytes, up: int) -> Callable[[], Awaitable[object]]:
                return lambda: hub.request("site", body, timeout=600, reply_limit=up)

            def beside(body: bytes, up: int) -> Callable[[], Awaitable[object]]:
                return lambda: bare_trip(reader, writer, body, up)

            small = (100).to_bytes(4, "big") + bytes(96)
            seconds = await interleaved(repeats * 4, 20, {"transport": ours(small, 100), "bare": beside(small, 100)})
            say({"what": "trip of 100 bytes each way", "ms": seconds["transport"] * 1e3}, seconds)
            for size in sizes:
                large = (1).to_bytes(4, "big") + b"\1" * (size * 10**6 - 4)
                back = (size * 10**6).to_bytes(4, "big")
                for way, body, up in (("down", large, 1), ("up", back, size * 10**6)):
                    seconds = await interleaved(repeats, 1, {"transport": ours(body, up), "bare": beside(body, up)})
                    rate = {"MB_per_second": size / seconds["transport"], "bare_MB_per_second": size / seconds["bare"]}
                    say({"what": f"{size} MB {way}", **rate}, seconds)
            writer.transport.abort()
        finally:
            process.kill()
            process.wait()
            server.close()


def say(line: dict[str, object], seconds: dict[str, float]) -> None:
    figures = {name: round(value, 3) if isinstance(value, float) else value for name, value in line.items()}
    print(json.dumps({**figures, "ratio_to_bare": round(seconds["transport"] / seconds["bare"], 3)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 20, 100], help="in MB")
    parser.add_argument("--site", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.site:
        folder, port, bare_port = given.site
        asyncio.run(site(Path(folder), int(port), int(bare_port)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(measure(Path(folder), given.repeats, given.sizes))


if __name__ == "__main__":
    main()
