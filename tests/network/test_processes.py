"""Ends in processes of their own, which are frozen, killed and measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
SCRIPT = Path(__file__).parent / "endpoint.py"
SILENCE = 2.0  # of both ends here, as in the script
START = 30.0  # for a process, on a busy machine


@contextlib.contextmanager
def process(ends: Any, role: str, number: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(SCRIPT), str(ends.folder), role, str(number)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGCONT)
            started.kill()
        started.communicate()


def said(started: subprocess.Popen[str]) -> Any:
    assert started.stdout is not None
    return json.loads(started.stdout.readline())


async def count(hub: Any, timeout: float = START) -> Any:
    return json.loads(bytes(await hub.request("north", b"count", timeout=timeout, reply_limit=1000)))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read in /proc")
def test_a_message_of_100_mb_needs_its_own_memory_and_little_more(ends: Any) -> None:
    """Sent and taken at either end: at most 2.2 times the message above what the process has anyway.

    A sender holds the message once, a receiver puts it together once; an end that copied a whole message would need
    twice the message, one that joined frames to do so three times.
    """
    size = 100_000_000
    with process(ends, "memory", size) as hub, process(ends, "north", said(hub)["port"]):
        peak = said(hub)
    assert 0.9 * size < peak["hub"] < 1.5 * size
    assert 0.9 * size < peak["site"] < 1.5 * size


def test_a_frozen_site_is_noticed_and_comes_back(ends: Any, until: Any) -> None:
    async def main() -> None:
        async with ends.hub("north", silence=SILENCE) as (hub, address):
            with process(ends, "north", address[1]) as site:
                assert (await count(hub))["calls"] == 1
                os.kill(site.pid, signal.SIGSTOP)
                begun = time.monotonic()
                await until(lambda: not hub.connected)
                assert SILENCE - 1 < time.monotonic() - begun < SILENCE + 5
                os.kill(site.pid, signal.SIGCONT)
                assert (await count(hub))["calls"] == 2  # the same process, its state kept

    asyncio.run(main())


def test_a_frozen_hub_is_noticed(ends: Any, until: Any) -> None:
    async def main() -> None:
        with process(ends, "hub", 0) as hub:
            port = (await asyncio.to_thread(said, hub))["port"]
            calls: list[bytes] = []
            link = ends.make_link("north", ("127.0.0.1", port), lambda r: calls.append(r.identifier) or b"{}")
            async with ends.running(link):
                await until(lambda: calls, START)
                os.kill(hub.pid, signal.SIGSTOP)
                begun = time.monotonic()
                await until(lambda: not link.connected)
                assert time.monotonic() - begun < 3.0 + 5  # the silence of this end
                assert "nothing heard" in str(link.error) or "greet" in str(link.error)
                os.kill(hub.pid, signal.SIGCONT)
                seen = len(calls)
                await until(lambda: link.connected and len(calls) > seen, START)

    asyncio.run(main())


def test_a_killed_site_is_noticed_at_once_and_its_successor_asked_again(ends: Any, until: Any) -> None:
    async def main() -> None:
        async with ends.hub("north", silence=60, beat=20) as (hub, address):
            with process(ends, "north", address[1]) as site:
                first = await count(hub)
                begun = time.monotonic()
                site.kill()
                await until(lambda: not hub.connected)
                assert time.monotonic() - begun < 5
            asked = asyncio.create_task(count(hub))  # while nobody is there
            await asyncio.sleep(0.05)
            with process(ends, "north", address[1]):
                second = await asked
            assert first["pid"] != second["pid"]
            assert second["calls"] == 1

    asyncio.run(main())


def test_a_killed_hub_is_found_again_and_the_sites_state_is_kept(ends: Any) -> None:
    with process(ends, "hub", 0) as hub:
        port = said(hub)["port"]
        site = process(ends, "north", port)
        with site:
            replies = [each for each in (said(hub) for _ in range(40)) if "pid" in each][:3]
            assert [reply["calls"] for reply in replies] == [1, 2, 3]
            hub.kill()
            hub.wait()
            with process(ends, "hub", port) as successor:
                assert said(successor)["port"] == port
                again = next(each for each in (said(successor) for _ in range(60)) if "pid" in each)
    assert again["pid"] == replies[0]["pid"]
    assert again["calls"] > 3
