"""Ends that break the rules, and networks that break: what is noticed, what is limited, what goes on."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

import pytest

from choral.network import (
    BusyError,
    FrameError,
    MessageTooLargeError,
    PeerFailedError,
    PeerLostError,
    ProxyError,
    RefusedError,
    Request,
    RequestTimeoutError,
)
from choral.network.transport.frames import FRAME_BYTES, HEADER, ID_BYTES, REPLY, REQUEST, SMALL_BYTES, Kind

BIG = 64


def answered(*frames: tuple[int, bytes]) -> Any:
    """A site by hand: to the first request it says these frames."""

    async def run(raw: Any) -> None:
        stream, _ = await raw.read_until(Kind.REQUEST)
        for kind, payload in frames:
            raw.writer.write(HEADER.pack(kind, b"\0\0\0", stream, len(payload)) + payload)
        await raw.writer.drain()

    return run


@pytest.mark.parametrize(
    ("frames", "error", "said"),
    [
        ([(Kind.REPLY, REPLY.pack(BIG + 1))], MessageTooLargeError, "announced a reply of 65 bytes; at most 64"),
        ([(Kind.REPLY, REPLY.pack(1 << 62))], MessageTooLargeError, "announced a reply of"),
        ([(Kind.REPLY, REPLY.pack(5)), (Kind.DATA, b"123456")], FrameError, "more DATA than the 5 bytes"),
        ([(Kind.DATA, b"x")], FrameError, "a DATA frame out of order"),
        ([(Kind.REPLY, REPLY.pack(5))] * 2, FrameError, "a REPLY frame out of order"),
        ([(Kind.REPLY, b"x")], FrameError, "a REPLY frame of 1 bytes, not 8"),
        ([(Kind.REPLY, REPLY.pack(0))] * 2, None, ""),
        ([(Kind.REQUEST, bytes(32))], FrameError, "a REQUEST frame out of order"),
        ([(99, b"")], FrameError, "a frame of no known kind"),
        ([(Kind.DATA, b"")], FrameError, "an empty DATA frame"),
        ([(Kind.DATA, bytes(FRAME_BYTES + 1))], FrameError, "at most 262144 are taken"),
        ([(Kind.FAILED, bytes(SMALL_BYTES + 1))], FrameError, "at most 512 are taken"),
        ([(Kind.FAILED, b"busy")], BusyError, "works on as many"),
        ([(Kind.FAILED, b"\xff\x1b[2J")], PeerFailedError, "stopped with an error"),
    ],
)
def test_a_site_that_breaks_the_rules_fails_its_request_and_is_cut(
    ends: Any, frames: Any, error: Any, said: str, until: Any
) -> None:
    async def main() -> None:
        async with ends.hub("north") as (hub, address), ends.raw_site(address) as raw:
            script = asyncio.create_task(answered(*frames)(raw))
            asking = asyncio.create_task(hub.request("north", b"x", timeout=5, reply_limit=BIG))
            if error is None:
                assert await asking == b""
            else:
                with pytest.raises(error, match=said) as caught:
                    await asking
                assert caught.value.peer == "north"
            await script
            if frames[0][0] != Kind.FAILED or len(frames[0][1]) > SMALL_BYTES:
                reason = b"large" if error is MessageTooLargeError else b"frame"
                assert (await raw.read_until(Kind.REFUSE))[1] == reason
                assert await raw.ended()
                await until(lambda: not hub.connected)

    asyncio.run(main())


def asks(*frames: tuple[int, int, bytes]) -> Any:
    """A hub by hand that says these frames, and waits for what the site says to it."""
    heard: list[tuple[Kind, int, bytes]] = []

    async def run(raw: Any) -> None:
        for kind, stream, payload in frames:
            raw.writer.write(HEADER.pack(kind, b"\0\0\0", stream, len(payload)) + payload)
        await raw.writer.drain()
        while True:
            heard.append(await raw.read())

    return run, heard


def request(size: int, number: int = 0, limit: int = 1000) -> bytes:
    return REQUEST.pack(number.to_bytes(16, "big"), size, limit)


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ([(Kind.DATA, 1, b"x")], "a DATA frame out of order"),
        ([(Kind.REPLY, 1, REPLY.pack(1))], "a REPLY frame out of order"),
        ([(Kind.WELCOME, 0, b"")], "a WELCOME frame out of order"),
        ([(Kind.REQUEST, 1, b"short")], "a REQUEST frame of 5 bytes, not 32"),
        ([(Kind.REQUEST, 2, request(9)), (Kind.REQUEST, 2, request(9))], "request 2 after request 2"),
        ([(Kind.REQUEST, 1, request(3)), (Kind.DATA, 1, b"1234")], "more DATA than the 3 bytes"),
        ([(0, 0, b"")], "a frame of no known kind"),
        ([(Kind.BEAT, 0, bytes(SMALL_BYTES + 1))], "at most 512 are taken"),
    ],
)
def test_a_coordinator_that_breaks_the_rules_is_left(ends: Any, frames: Any, said: str, until: Any) -> None:
    script, heard = asks(*frames)

    async def main() -> None:
        async with ends.raw_hub(script) as address:
            async with ends.link("north", address, limits=ends.limits(backoff=(5.0, 5.0))) as link:
                await until(lambda: link.error is not None)
                assert isinstance(link.error, FrameError)
                assert said in str(link.error)
            await until(lambda: (Kind.REFUSE, 0, b"frame") in heard)

    asyncio.run(main())


def test_a_coordinator_that_floods_gets_no_more_than_the_site_grants(ends: Any, until: Any) -> None:
    """Requests beyond the number at once, of too many bytes, and bytes after a refusal: refused, counted, cut."""
    called: list[int] = []

    def handler(request: Request) -> bytes:
        called.append(1)
        time.sleep(0.3)
        return b""

    many, heard = asks(*((Kind.REQUEST, stream, request(0, stream)) for stream in range(1, 30)))
    same, again = asks(
        (Kind.REQUEST, 1, request(0, 1)), *((Kind.REQUEST, stream, request(9, 1)) for stream in range(2, 31))
    )
    open_ones, told = asks(*((Kind.REQUEST, stream, request(9, stream)) for stream in range(1, 30)))

    async def main() -> None:
        async with ends.raw_hub(many) as address, ends.link("north", address, handler):
            await until(lambda: [kind for kind, _, _ in heard].count(Kind.REPLY) == 4)
            assert [payload for kind, _, payload in heard if kind is Kind.FAILED] == [b"busy"] * 25
        assert len(called) == 4
        async with ends.raw_hub(open_ones) as address, ends.link("north", address, handler):
            await until(lambda: [payload for kind, _, payload in told if kind is Kind.FAILED] == [b"busy"] * 25)
        async with ends.raw_hub(same) as address, ends.link("north", address, handler):
            await until(lambda: [payload for kind, _, payload in again if kind is Kind.FAILED] == [b"busy"] * 25)

    asyncio.run(main())


def test_a_site_that_says_no_last_word_is_let_go(ends: Any) -> None:
    """Requests that were given up are forgotten when the site says so; one that never does may not fill the memory."""

    async def main() -> None:
        async with ends.hub("north") as (hub, address), ends.raw_site(address):
            await hub.wait_for(["north"], timeout=10)
            for _ in range(68):
                with pytest.raises(RequestTimeoutError):
                    await hub.request("north", b"x", timeout=0.02, reply_limit=0)
            with pytest.raises(PeerLostError):
                await hub.request("north", b"x", timeout=0.2, reply_limit=0)
            assert not hub.connected

    asyncio.run(main())


def test_bytes_of_a_refused_message_are_not_taken_for_ever(ends: Any, until: Any) -> None:
    chunk = bytes(FRAME_BYTES)

    async def script(raw: Any) -> None:
        await raw.send(Kind.REQUEST, 1, request(1 << 40))
        while True:
            await raw.send(Kind.DATA, 1, chunk)

    async def main() -> None:
        limits = ends.limits(backoff=(5.0, 5.0))
        async with ends.raw_hub(script) as address, ends.link("north", address, limits=limits) as link:
            await until(lambda: "went on with a message that was refused" in str(link.error), 20)

    asyncio.run(main())


def test_refusals_fill_neither_the_memory_nor_the_log_of_a_site(ends: Any, until: Any, caplog: Any) -> None:
    """Each refused request is remembered until its bytes have come, which is never."""
    many, _ = asks(*((Kind.REQUEST, stream, request(1 << 40, stream)) for stream in range(1, 2000)))

    async def main() -> None:
        limits = ends.limits(backoff=(5.0, 5.0))
        async with ends.raw_hub(many) as address, ends.link("north", address, limits=limits) as link:
            await until(lambda: "went on asking after 128 refusals" in str(link.error), 20)

    with caplog.at_level(logging.WARNING, "choral.network"):
        asyncio.run(main())
    assert 1 <= caplog.text.count("refused a request of") <= 120


def test_replies_that_a_coordinator_does_not_take_are_few(ends: Any, until: Any) -> None:
    called, busy = list[int](), list[bytes]()

    def handler(request: Request) -> bytes:
        called.append(1)
        return bytes(8 << 20)

    async def script(raw: Any) -> None:
        for stream in range(1, 21):
            await raw.send(Kind.REQUEST, stream, REQUEST.pack(stream.to_bytes(ID_BYTES, "big"), 0, 1 << 30))
            while len(called) < min(stream, 8):
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.03)  # it is done, and its reply waits
        while True:
            kind, _, payload = await raw.read()
            busy.extend([payload] * (kind is Kind.FAILED))

    async def main() -> None:
        async with ends.raw_hub(script) as address, ends.link("north", address, handler):
            await until(lambda: len(busy) == 12, 20)

    asyncio.run(main())
    assert (len(called), set(busy)) == (8, {b"busy"})


def test_bytes_and_frames_come_no_faster_than_granted(ends: Any, until: Any) -> None:
    """A flood is slowed, not obeyed: the time that it takes follows from the limit."""
    a_minute = 30 << 20

    async def main() -> None:
        limits = ends.limits(bytes_a_minute=a_minute, frames_a_minute=800)
        async with ends.hub("north") as (hub, address), ends.link("north", address, limits=limits) as link:
            await hub.wait_for(["north"], timeout=10)
            size = 3 * a_minute // 60
            begun = time.monotonic()
            await hub.request("north", bytes(size), timeout=60, reply_limit=size)
            assert time.monotonic() - begun > 1.4  # a second's worth at once, then two seconds of waiting
            assert link.connected
        beats: list[float] = []

        async def flood(raw: Any) -> None:
            for _ in range(840):
                raw.writer.write(HEADER.pack(Kind.PROBE, b"\0\0\0", 0, 0))
            await raw.writer.drain()
            while True:
                await raw.read_until(Kind.BEAT)
                beats.append(time.monotonic())

        async with ends.raw_hub(flood) as address, ends.link("north", address, limits=limits):
            begun = time.monotonic()
            await until(lambda: len(beats) > 830, 20)
            assert time.monotonic() - begun > 1.5  # 800 at once, then 13 a second

    asyncio.run(main())


def test_a_peer_that_takes_no_bytes_is_let_go(ends: Any) -> None:
    """It sends its signs of life, and reads nothing of what it asked for."""

    async def main() -> None:
        async with ends.hub("north", silence=1.0, beat=0.3) as (hub, address), ends.raw_site(address) as raw:
            raw.writer.transport.pause_reading()

            async def beats() -> None:
                while True:
                    await raw.send(Kind.BEAT)
                    await asyncio.sleep(0.2)

            beating = asyncio.create_task(beats())
            begun = time.monotonic()
            with pytest.raises(PeerLostError):
                await hub.request("north", bytes(50_000_000), timeout=4, reply_limit=0)
            assert not hub.connected
            assert time.monotonic() - begun < 8
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize("head", [b"\1", b"\x06\0\0\0\0\0\0\1\0\0\0\x20" + bytes(5)])
def test_a_frame_that_ends_in_the_middle(ends: Any, head: bytes, until: Any, caplog: Any) -> None:
    async def main() -> None:
        async with ends.hub("north") as (hub, address), ends.raw_site(address) as raw:
            await hub.wait_for(["north"], timeout=10)
            raw.writer.write(head)
            await raw.writer.drain()
            raw.writer.close()
            await until(lambda: not hub.connected)

    with caplog.at_level(logging.INFO, "choral.network"):
        asyncio.run(main())
    assert "lost a site: north: hung up in the middle of a frame" in caplog.text


def test_a_network_that_delays_and_splits_changes_nothing(ends: Any) -> None:
    body = os.urandom(30_000)

    async def main() -> None:
        async with (
            ends.hub("north") as (hub, address),
            ends.middle(address, split=97) as middle,
            ends.link("north", middle.address),
        ):
            await hub.wait_for(["north"], timeout=10)
            middle.delay = 0.001
            assert bytes(await hub.request("north", body, timeout=60, reply_limit=len(body))) == body

    asyncio.run(main())


def test_a_network_that_stalls_is_noticed_at_both_ends_and_comes_back(ends: Any, until: Any) -> None:
    """No byte passes and no connection breaks: only the signs of life that are missing tell."""

    async def main() -> None:
        limits = ends.limits(silence=1.0)
        async with (
            ends.hub("north", silence=1.0) as (hub, address),
            ends.middle(address) as middle,
            ends.link("north", middle.address, limits=limits) as link,
        ):
            await until(lambda: hub.connected and link.connected)
            middle.flowing.clear()
            begun = time.monotonic()
            await until(lambda: not hub.connected and not link.connected)
            assert time.monotonic() - begun > 0.6
            asking = asyncio.create_task(hub.request("north", b"x", timeout=30, reply_limit=1))
            await asyncio.sleep(0.2)
            middle.flowing.set()
            assert await asking == b"x"

    asyncio.run(main())


def test_a_connection_that_is_cut_again_and_again_costs_patience_alone(ends: Any) -> None:
    body = os.urandom(1_000_000)

    async def main() -> None:
        async with (
            ends.hub("north") as (hub, address),
            ends.middle(address) as middle,
            ends.link("north", middle.address),
        ):
            for _ in range(5):
                await hub.wait_for(["north"], timeout=10)
                middle.cut_after = middle.passed + 700_000
                assert await hub.request("north", body, timeout=30, reply_limit=len(body)) == body

    asyncio.run(main())


@pytest.mark.parametrize("user", ["", "north:p%40ss@"])
def test_the_way_out_through_a_proxy(ends: Any, user: str, caplog: Any) -> None:
    async def main() -> None:
        async with ends.hub("north") as (hub, address), ends.middle(address, connect=True) as middle:
            proxy = f"http://{user}127.0.0.1:{middle.address[1]}"
            async with ends.link("north", ("hub.example.org", 443), proxy=proxy):
                assert await hub.request("north", b"x", timeout=20, reply_limit=1) == b"x"
            asked = middle.asked[0].decode().split("\r\n")
            assert asked[:2] == ["CONNECT hub.example.org:443 HTTP/1.1", "Host: hub.example.org:443"]
            assert asked[2:3] == (["Proxy-Authorization: Basic bm9ydGg6cEBzcw=="] if user else [""])

    with caplog.at_level(logging.DEBUG, "choral.network"):
        asyncio.run(main())
    assert "p%40ss" not in caplog.text
    assert "p@ss" not in caplog.text


def test_what_a_proxy_says_behind_its_answer_is_not_the_coordinators(ends: Any) -> None:
    """Frames in the clear, read before TLS: with the same reader after it, they would be the authenticated hub's."""
    body, seen = b"of the proxy", list[bytes]()

    def handler(request: Request) -> bytes:
        seen.append(bytes(request.body))
        return b"x"

    async def main() -> None:
        async with ends.hub("north") as (hub, address), ends.middle(address, connect=True) as middle:
            said = [
                (Kind.WELCOME, 0, b""),
                (Kind.REQUEST, 1, REQUEST.pack(bytes(16), len(body), 100)),
                (Kind.DATA, 1, body),
            ]
            for kind, stream, payload in said:
                middle.answer += HEADER.pack(kind, b"\0\0\0", stream, len(payload)) + payload
            proxy = f"http://127.0.0.1:{middle.address[1]}"
            async with ends.link("north", ("hub.example.org", 443), handler, proxy=proxy):
                assert await hub.request("north", b"of the hub", timeout=20, reply_limit=1) == b"x"

    asyncio.run(main())
    assert seen == [b"of the hub"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "answered CONNECT with 'HTTP/1.1 407 Proxy Auth"),
        (b"HTTP/1.1 2000 \x1b[2J\r\n\r\n", "answered CONNECT with 'HTTP/1.1 2000 \\\\x1b"),
        (b"200 OK\r\n\r\n", "answered CONNECT"),
        (b"x" * 2_000_000, "gave no answer to CONNECT"),
    ],
)
def test_a_proxy_that_refuses_is_quoted(ends: Any, answer: bytes, said: str) -> None:
    async def main() -> None:
        async with ends.middle(("127.0.0.1", 9), connect=True, answer=answer) as middle:
            proxy = f"http://user:secret@127.0.0.1:{middle.address[1]}"
            with pytest.raises(ProxyError, match=said) as caught:
                await ends.make_link("north", ("hub.example.org", 443), proxy=proxy).run(patience=0.0)
            assert "secret" not in str(caught.value) + caught.value.hint

    asyncio.run(main())


def test_a_proxy_that_is_not_there(ends: Any) -> None:
    with pytest.raises(ProxyError, match=r"127\.0\.0\.1:9: the proxy does not answer"):
        asyncio.run(ends.make_link("north", ("h", 443), proxy="http://127.0.0.1:9").run(patience=0.0))


def test_attempts_grow_rarer_and_say_the_same_thing_once(ends: Any, caplog: Any, until: Any) -> None:
    tried: list[float] = []

    async def script(raw: Any) -> None:
        tried.append(time.monotonic())
        await raw.send(Kind.REFUSE, 0, b"in use")

    async def main() -> None:
        limits = ends.limits(backoff=(0.05, 0.4))
        async with ends.raw_hub(script, welcome=False) as address:
            link = ends.make_link("north", address, limits=limits)
            with pytest.raises(RefusedError, match="second process"):
                await link.run(patience=1.5)

    with caplog.at_level(logging.INFO, "choral.network"):
        asyncio.run(main())
    assert 4 <= len(tried) <= 14
    assert tried[-1] - tried[-2] > 0.19
    assert caplog.text.count("turned this end away") == 1


def test_pauses_double_up_to_a_bound_and_are_not_all_alike(ends: Any) -> None:
    link = ends.make_link("north", ("127.0.0.1", 9), limits=ends.limits(backoff=(0.2, 5.0)))
    for failures, longest in ((0, 0.2), (1, 0.4), (3, 1.6), (5, 5.0), (10_000, 5.0)):
        pauses = {link._pause(failures) for _ in range(50)}
        assert longest / 2 <= min(pauses) <= max(pauses) <= longest
        assert len(pauses) > 40
