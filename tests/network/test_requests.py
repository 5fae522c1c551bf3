"""Requests and replies between a hub and links in one process: real sockets, real TLS."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from typing import Any

import pytest

from choral.errors import ConfigError
from choral.network import (
    BlockingHub,
    BusyError,
    Directory,
    MessageTooLargeError,
    PeerFailedError,
    PeerLostError,
    Request,
    RequestTimeoutError,
    TransportError,
    UnknownPeerError,
    make_identity,
)

LIMIT = 1 << 20


@pytest.mark.parametrize("size", [0, 1, 262_143, 262_144, 262_145, 3_000_000])
def test_messages_of_any_size_come_whole(ends: Any, size: int) -> None:
    body = os.urandom(size)
    seen: list[Request] = []

    def handler(request: Request) -> bytes:
        seen.append(request)
        return bytes(request.body)[::-1]

    async def main() -> None:
        async with ends.hub("north") as (hub, address), ends.link("north", address, handler):
            reply = await hub.request("north", memoryview(body), timeout=20, reply_limit=size)
            assert bytes(reply) == body[::-1]

    asyncio.run(main())
    assert (seen[0].sender, seen[0].reply_limit, len(seen[0].identifier)) == ("coordinator", size, 16)
    with pytest.raises(TypeError):
        seen[0].body[0:1] = b"x"


def test_several_sites_and_several_requests_at_once(ends: Any) -> None:
    async def main() -> None:
        async with (
            ends.hub("north", "south") as (hub, address),
            ends.link("north", address),
            ends.link("south", address, lambda request: b"south"),
        ):
            assert await hub.wait_for(["north", "south"], timeout=10) == hub.connected == {"north", "south"}
            large = os.urandom(2_000_000)
            bodies = [large, b"a", b"", large[::-1]]
            work = [hub.request("north", body, timeout=20, reply_limit=2_000_000) for body in bodies]
            south = hub.request("south", b"x", timeout=20, reply_limit=5)
            assert [bytes(reply) for reply in await asyncio.gather(*work, south)] == [*bodies, b"south"]

    asyncio.run(main())


def test_a_hub_waits_for_as_many_as_it_is_told(ends: Any) -> None:
    async def main() -> None:
        async with ends.hub("north", "south") as (hub, address), ends.link("north", address):
            assert await hub.wait_for(["north", "south"], timeout=10, count=1) == {"north"}
            begun = time.monotonic()
            assert await hub.wait_for(["north", "south"], timeout=0.2) == {"north"}
            assert time.monotonic() - begun >= 0.2

    asyncio.run(main())


def test_a_small_request_passes_a_large_one(ends: Any) -> None:
    """Frames of several requests alternate, so that a sum's message need not wait for a model."""

    async def main() -> None:
        async with ends.hub("north") as (hub, address), ends.link("north", address):
            body = bytes(40_000_000)
            large = asyncio.create_task(hub.request("north", body, timeout=60, reply_limit=len(body)))
            await asyncio.sleep(0.01)
            await hub.request("north", b"small", timeout=20, reply_limit=5)
            assert not large.done()
            assert len(await large) == len(body)

    asyncio.run(main())


def test_beats_go_on_while_a_handler_works(ends: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A handler has a thread: one that takes longer than the silence that counts as death loses no connection."""

    def handler(request: Request) -> bytes:
        time.sleep(1.5)
        return str(threading.current_thread().name).encode()

    limits = ends.limits(beat=0.1, silence=0.7)

    async def main() -> None:
        async with (
            ends.hub("north", beat=0.1, silence=0.7) as (hub, address),
            ends.link("north", address, handler, limits=limits),
        ):
            reply = await hub.request("north", b"", timeout=20, reply_limit=100)
            assert bytes(reply).startswith(b"choral-request")

    with caplog.at_level(logging.INFO, "choral.network"):
        asyncio.run(main())
    assert "nothing heard" not in caplog.text
    assert caplog.text.count("north connected from") == 1


def test_no_answer_in_time_is_another_error_than_no_site(ends: Any) -> None:
    done = threading.Event()

    async def main() -> None:
        async with ends.hub("north", "south") as (hub, address):
            with pytest.raises(PeerLostError, match=r"south: was not connected within 0.1 s"):
                await hub.request("south", b"", timeout=0.1, reply_limit=0)
            with pytest.raises(UnknownPeerError, match="west: is not in the directory"):
                await hub.request("west", b"", timeout=5, reply_limit=0)
            async with ends.link("north", address, lambda request: bytes(0 * done.wait(20))):
                await hub.wait_for(["north"], timeout=10)
                with pytest.raises(RequestTimeoutError, match=r"north: no answer within 0.2 s"):
                    await hub.request("north", b"", timeout=0.2, reply_limit=0)
                assert hub.connected == {"north"}
                done.set()
                assert await hub.request("north", b"", timeout=10, reply_limit=0) == b""

    asyncio.run(main())


def test_requests_that_cannot_be_are_refused_before_anything_is_sent(ends: Any) -> None:
    async def main() -> None:
        async with ends.hub("north") as (hub, _):
            for wrong in ({"timeout": 0}, {"timeout": float("nan")}, {"reply_limit": -1}, {"identifier": b"x"}):
                with pytest.raises(ConfigError):
                    await hub.request("north", b"", **{"timeout": 5, "reply_limit": 0, **wrong})

    asyncio.run(main())


def test_what_was_given_up_is_not_sent(ends: Any) -> None:
    """A reply that nobody waits for any longer stays where it is, and the next request is answered."""
    done = threading.Event()

    def handler(request: Request) -> bytes:
        if bytes(request.body) == b"long":
            done.wait(20)
            return bytes(50_000_000)
        return b"short"

    async def main() -> None:
        async with (
            ends.hub("north") as (hub, address),
            ends.middle(address) as middle,
            ends.link("north", middle.address, handler),
        ):
            await hub.wait_for(["north"], timeout=10)
            with pytest.raises(RequestTimeoutError):
                await hub.request("north", b"long", timeout=0.2, reply_limit=1 << 30)
            await asyncio.sleep(0.2)
            done.set()
            assert await hub.request("north", b"short", timeout=10, reply_limit=5) == b"short"
            await asyncio.sleep(0.2)
            assert middle.passed < 1_000_000
            assert not hub._sessions["north"][0]._pending

    asyncio.run(main())


def test_a_request_that_is_given_up_half_sent_leaves_the_connection_well(ends: Any) -> None:
    async def main() -> None:
        async with (
            ends.hub("north") as (hub, address),
            ends.middle(address) as middle,
            ends.link("north", middle.address) as link,
        ):
            await hub.wait_for(["north"], timeout=10)
            middle.split, middle.delay = 20_000, 0.01
            with pytest.raises(RequestTimeoutError):
                await hub.request("north", bytes(60_000_000), timeout=0.4, reply_limit=0)
            middle.delay = 0
            assert await hub.request("north", b"next", timeout=20, reply_limit=5) == b"next"
            assert link.connected

    asyncio.run(main())


def test_a_handler_that_fails_tells_its_own_log_alone(ends: Any, caplog: pytest.LogCaptureFixture) -> None:
    def handler(request: Request) -> Any:
        if bytes(request.body) == b"exit":
            raise SystemExit(3)
        if bytes(request.body) == b"none":
            return None
        raise ValueError("patient 4711")

    async def main() -> None:
        async with ends.hub("north") as (hub, address), ends.link("north", address, handler):
            for body in (b"value", b"exit", b"none"):
                with pytest.raises(PeerFailedError, match="north: stopped with an error, which stands in its own log"):
                    await hub.request("north", body, timeout=10, reply_limit=0)
            assert hub.connected == {"north"}

    with caplog.at_level(logging.INFO, "choral.network"):
        asyncio.run(main())
    assert "failed: ValueError: debug level has its traceback" in caplog.text
    assert "failed: SystemExit" in caplog.text
    assert "4711" not in caplog.text


def test_a_request_beyond_the_sites_bound_is_refused_unread(ends: Any) -> None:
    called: list[Request] = []

    async def main() -> None:
        async with (
            ends.hub("north") as (hub, address),
            ends.link("north", address, lambda r: called.append(r) or b"", request_limit=1000) as link,
        ):
            for size in (1001, 5_000_000):
                with pytest.raises(MessageTooLargeError, match="north: takes no message as large") as caught:
                    await hub.request("north", bytes(size), timeout=10, reply_limit=0)
                assert "1000" not in str(caught.value) + caught.value.hint  # the bound is the site's own
            assert not called
            await hub.request("north", bytes(1000), timeout=10, reply_limit=0)
            link.request_limit = 1001
            await hub.request("north", bytes(1001), timeout=10, reply_limit=0)
            assert len(called) == 2

    asyncio.run(main())


def test_a_reply_beyond_what_was_asked_for_is_not_sent(ends: Any) -> None:
    async def main() -> None:
        async with ends.hub("north") as (hub, address), ends.link("north", address):
            with pytest.raises(MessageTooLargeError, match="its reply is larger than the 99 bytes"):
                await hub.request("north", bytes(100), timeout=10, reply_limit=99)
            assert len(await hub.request("north", bytes(100), timeout=10, reply_limit=100)) == 100

    asyncio.run(main())


def test_no_more_requests_at_once_than_either_end_grants(ends: Any) -> None:
    done = threading.Event()

    def handler(request: Request) -> bytes:
        done.wait(20)
        return b""

    async def main() -> None:
        async with (
            ends.hub("north", outstanding=3) as (hub, address),
            ends.link("north", address, handler, limits=ends.limits(outstanding=2)),
        ):
            await hub.wait_for(["north"], timeout=10)

            def ask() -> asyncio.Task[memoryview]:
                return asyncio.create_task(hub.request("north", bytes(10), timeout=20, reply_limit=0))

            first = [ask(), ask()]
            await asyncio.sleep(0.1)
            with pytest.raises(BusyError, match="as many requests as it takes"):  # the site
                await ask()
            third = asyncio.create_task(hub.request("north", bytes(100), timeout=20, reply_limit=0))
            with pytest.raises(BusyError, match="3 requests are waiting"):  # the hub
                await asyncio.gather(*(ask() for _ in range(5)))
            done.set()
            await asyncio.gather(*first)
            await asyncio.gather(third, return_exceptions=True)

    asyncio.run(main())


def test_a_busy_site_says_so_before_the_message_is_sent(ends: Any, until: Any) -> None:
    done, limits = threading.Event(), ends.limits(outstanding=1)

    async def main() -> None:
        async with (
            ends.hub("north") as (hub, address),
            ends.middle(address) as middle,
            ends.link("north", middle.address, lambda _: bytes(0 * done.wait(20)), limits=limits) as link,
        ):
            first = asyncio.create_task(hub.request("north", b"x", timeout=30, reply_limit=0))
            await until(lambda: len(link._works) == 1)
            before = middle.passed
            with pytest.raises(BusyError):
                await hub.request("north", bytes(60_000_000), timeout=30, reply_limit=0)
            assert middle.passed - before < 40_000_000
            done.set()
            await first

    asyncio.run(main())


def test_a_request_that_is_asked_again_has_the_same_id_and_joins_the_one_at_work(ends: Any, until: Any) -> None:
    """The connection breaks while a handler trains: it trains once, and its answer goes out on the next connection."""
    calls: list[bytes] = []
    done = threading.Event()

    def handler(request: Request) -> bytes:
        calls.append(request.identifier)
        done.wait(20)
        return b"trained"

    async def main() -> None:
        async with (
            ends.hub("north") as (hub, address),
            ends.middle(address) as middle,
            ends.link("north", middle.address, handler),
        ):
            asking = asyncio.create_task(hub.request("north", b"train", timeout=20, reply_limit=100))
            for _ in range(2):
                await until(lambda: calls and hub.connected)
                middle.cut()
                await until(lambda: not hub.connected)
            await hub.wait_for(["north"], timeout=10)
            await asyncio.sleep(0.5)  # it is asked again
            done.set()
            assert await asking == b"trained"
        assert len(calls) == 1

    asyncio.run(main())


def test_an_answer_that_was_lost_is_asked_for_again(ends: Any, until: Any) -> None:
    """The connection breaks while the reply is on its way: the handler sees the same id, and can answer the same."""
    calls: list[bytes] = []

    def handler(request: Request) -> bytes:
        calls.append(request.identifier)
        return bytes(4_000_000)

    async def main() -> None:
        async with (
            ends.hub("north") as (hub, address),
            ends.middle(address) as middle,
            ends.link("north", middle.address, handler),
        ):
            await hub.wait_for(["north"], timeout=10)
            middle.cut_after = middle.passed + 2_000_000
            assert len(await hub.request("north", b"x", timeout=20, reply_limit=4_000_000)) == 4_000_000
            assert (len(calls), len(set(calls))) == (2, 1)
            mine = bytes(range(16))
            await hub.request("north", b"x", timeout=20, reply_limit=4_000_000, identifier=mine)
            assert calls[-1] == mine

    asyncio.run(main())


def test_two_requests_may_not_share_an_id(ends: Any) -> None:
    done = threading.Event()

    async def main() -> None:
        async with (
            ends.hub("north") as (hub, address),
            ends.link("north", address, lambda request: done.wait(20) and request.body),
        ):
            same = {"timeout": 20, "reply_limit": 10, "identifier": bytes(16)}
            first = asyncio.create_task(hub.request("north", b"one", **same))
            await asyncio.sleep(0.1)
            with pytest.raises(PeerFailedError, match="another request under the same id"):
                await hub.request("north", b"two", **same)
            done.set()
            assert await first == b"one"

    asyncio.run(main())


def test_an_orderly_end_is_said_on_both_sides(ends: Any, caplog: pytest.LogCaptureFixture, until: Any) -> None:
    async def main() -> None:
        async with ends.hub("north") as (hub, address):
            link = ends.make_link("north", address)
            running = asyncio.create_task(link.run())
            await hub.wait_for(["north"], timeout=10)
            link.stop()
            await running
            await until(lambda: not hub.connected)
        async with ends.hub("north") as (hub, address), ends.link("north", address) as link:
            await hub.wait_for(["north"], timeout=10)
            waits = asyncio.create_task(hub.request("north", b"", timeout=20, reply_limit=0))
            await hub.close()
            with pytest.raises(PeerLostError):
                await asyncio.gather(waits, hub.request("north", b"", timeout=20, reply_limit=0))
            await until(lambda: link.error is not None)
            assert isinstance(link.error, PeerLostError)
            await asyncio.gather(waits, return_exceptions=True)

    with caplog.at_level(logging.INFO, "choral.network"):
        asyncio.run(main())
    assert "lost a site: north: closed the connection in good order" in caplog.text
    assert "not connected: coordinator: closed the connection in good order" in caplog.text


def test_a_directory_changes_while_it_runs(ends: Any, tmp_path: Any, until: Any) -> None:
    """Added: connects. Removed: told, disconnected, and whoever waits for it hears. Rotated: old out, new in."""

    async def main() -> None:
        async with (
            ends.hub("north") as (hub, address),
            ends.link("north", address),
            ends.link("south", address) as south,
        ):
            await until(lambda: south.error is not None)
            await hub.change(directory=ends.directory("north", "south"))
            assert await hub.wait_for(["north", "south"], timeout=10) == {"north", "south"}
            await hub.change(directory=ends.directory("north"))
            assert hub.connected == {"north"}
            await until(lambda: "not, or no longer, in its directory" in str(south.error))
            with pytest.raises(UnknownPeerError):
                await hub.request("south", b"", timeout=20, reply_limit=0)
            new = make_identity(tmp_path, "south")
            await hub.change(directory=ends.directory("north", "south"))
            assert await hub.wait_for(["south"], timeout=10) == {"south"}
            await hub.change(directory=ends.directory("north", "south").with_(new.certificate))
            assert hub.connected == {"north"}
            await until(lambda: "hung up" in str(south.error))
            south.change(identity=new)
            assert await hub.wait_for(["north", "south"], timeout=10) == {"north", "south"}

    asyncio.run(main())


def test_a_removed_site_fails_what_waits_for_it_at_once(ends: Any) -> None:
    async def main() -> None:
        async with ends.hub("north") as (hub, _):
            waits = asyncio.create_task(hub.request("north", b"", timeout=60, reply_limit=0))
            await asyncio.sleep(0.05)
            await hub.change(directory=Directory())
            with pytest.raises(UnknownPeerError, match="north: is not in the directory"):
                await asyncio.wait_for(waits, 5)

    asyncio.run(main())


def test_the_hubs_certificate_is_rotated(ends: Any, tmp_path: Any, until: Any) -> None:
    new = make_identity(tmp_path, "coordinator")

    async def main() -> None:
        async with ends.hub("north") as (hub, address), ends.link("north", address) as link:
            await hub.wait_for(["north"], timeout=10)
            await hub.change(identity=new)
            assert hub.connected == {"north"}  # who is connected stays
            link.change(directory=Directory([new.certificate]))
            await until(lambda: not link.connected)
            await until(lambda: link.connected)
            assert await hub.request("north", b"x", timeout=10, reply_limit=1) == b"x"
            with pytest.raises(UnknownPeerError):
                link.change(directory=ends.directory("north"))

    asyncio.run(main())


def test_a_hub_for_code_without_an_event_loop(ends: Any) -> None:
    def site(address: tuple[str, int]) -> tuple[Any, threading.Thread]:
        link = ends.make_link("north", address)
        thread = threading.Thread(target=lambda: asyncio.run(link.run()))
        thread.start()
        return link, thread

    directory = ends.directory("north", "south")
    with BlockingHub(ends.identities["coordinator"], directory, host="127.0.0.1", port=0, limits=ends.limits()) as hub:
        link, thread = site(hub.address)
        assert hub.wait_for(["north", "south"], timeout=10, count=1) == hub.connected == {"north"}
        replies = dict(hub.replies({"north": b"x", "south": b"y"}, timeout=1, reply_limit=10))
        assert replies["north"] == b"x"
        assert isinstance(replies["south"], PeerLostError)
        hub.change(directory=ends.directory("south"))
        assert isinstance(next(hub.replies({"north": b""}, timeout=5, reply_limit=0))[1], UnknownPeerError)
        link.stop()
        thread.join(10)
        assert not thread.is_alive()
    hub.close()  # a second time does no harm
    with pytest.raises(TransportError, match="cannot listen"):
        BlockingHub(ends.identities["coordinator"], directory, host="203.0.113.1", port=1)
