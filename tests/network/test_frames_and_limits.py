"""Frames are read or refused, whatever the bytes; budgets, doors and settings keep to their figures."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from choral.errors import ConfigError
from choral.network import FrameError, Limits, PeerLostError
from choral.network.transport.channel import FrameChannel
from choral.network.transport.frames import (
    FRAME_BYTES,
    HEADER,
    REQUEST,
    SMALL_BYTES,
    ArrivingMessage,
    Frame,
    Kind,
    header,
    pack_names,
    read_header,
    unpack,
    unpack_names,
)
from choral.network.transport.limits import Door, Meter


@pytest.mark.parametrize("kind", list(Kind))
def test_each_kind_has_its_bounds(kind: Kind) -> None:
    stream = 7 if kind.name in ("REQUEST", "REPLY", "DATA", "FAILED", "CANCEL") else 0
    largest = FRAME_BYTES if kind is Kind.DATA else SMALL_BYTES
    assert read_header(header(kind, stream, largest)) == (kind, stream, largest)
    with pytest.raises(FrameError, match="at most"):
        read_header(header(kind, stream, largest + 1))
    with pytest.raises(FrameError, match="with the number"):
        read_header(header(kind, 7 - stream, 1))


def test_malformed_headers() -> None:
    for raw in (HEADER.pack(0, b"\0\0\0", 0, 0), HEADER.pack(12, b"\0\0\0", 0, 0)):
        with pytest.raises(FrameError, match="no known kind"):
            read_header(raw)
    with pytest.raises(FrameError, match="malformed"):
        read_header(HEADER.pack(Kind.BEAT, b"\0\1\0", 0, 0))
    with pytest.raises(FrameError, match="empty DATA"):
        read_header(header(Kind.DATA, 1, 0))
    with pytest.raises(FrameError, match="of 5 bytes, not 32"):
        unpack(REQUEST, Frame(Kind.REQUEST, 1, b"12345"))


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size), st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_as_frames(raw: bytes, payload: bytes) -> None:
    try:
        kind, stream, length = read_header(raw)
        assert raw == header(kind, stream, length)
    except FrameError:
        pass
    try:
        version, names = unpack_names(payload)
        assert version != 1 or pack_names(*names) == payload
    except FrameError:
        pass


def test_names_of_another_version_are_not_read() -> None:
    assert unpack_names(pack_names("north", "coordinator")) == (1, ["north", "coordinator"])
    assert unpack_names(b"\2whatever") == (2, [])
    for wrong in (b"", pack_names("a"), pack_names("a", "b", "c"), pack_names("a", "b")[:-1], b"\1\1\xff\1b"):
        with pytest.raises(FrameError):
            unpack_names(wrong)


def test_a_message_takes_what_was_announced_and_no_byte_more() -> None:
    message = ArrivingMessage(5)
    message.add(b"abc")
    assert not message.whole
    with pytest.raises(FrameError, match="more DATA than the 5 bytes"):
        message.add(b"def")
    message.add(b"de")
    assert (message.whole, bytes(message.view)) == (True, b"abcde")
    dropped = ArrivingMessage(1 << 60, discard=True)
    dropped.add(b"abc")
    assert (dropped.taken, bytes(dropped.view)) == (3, b"")
    assert ArrivingMessage(0).whole


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_meter_grants_its_burst_then_its_rate() -> None:
    clock = Clock()
    meter = Meter(60, 10, clock)
    assert meter.take(10) == 0
    assert meter.take(5) == 5  # one a second
    clock.now += 2
    assert meter.take(0) == 3
    assert not meter.has(1)
    clock.now += 1000
    assert meter.full
    assert meter.has(10)  # no more than the burst, however long it waited
    assert not meter.has(1)


def test_a_door_counts_by_address() -> None:
    clock = Clock()
    door = Door(Limits(connections=3, connections_per_address=2, attempts_a_minute=6), clock)
    assert [door.enter("10.0.0.1"), door.enter("10.0.0.1")] == ["", ""]
    assert "2 connections at once from one address" in door.enter("10.0.0.1")
    assert door.enter("10.0.0.2") == ""
    assert "3 connections at once" in door.enter("10.0.0.3")
    door.leave("10.0.0.1")
    assert door.enter("10.0.0.1") == ""
    door.leave("10.0.0.1")
    assert [door.enter("10.0.0.1"), door.leave("10.0.0.1"), door.enter("10.0.0.1")] == ["", None, ""]
    door.leave("10.0.0.1")
    assert "6 connections a minute" in door.enter("10.0.0.1")
    clock.now += 60
    assert door.enter("10.0.0.1") == ""


def test_one_holder_of_many_addresses_counts_once() -> None:
    door = Door(Limits(connections_per_address=1))
    assert door.enter("2001:db8::1") == ""
    assert "one address" in door.enter("2001:db8::ffff:1")
    assert door.enter("2001:db8:0:1::1") == ""
    assert door.enter("::ffff:10.0.0.1") == ""
    assert "one address" in door.enter("10.0.0.1")


def test_a_door_forgets_addresses_that_owe_nothing() -> None:
    clock = Clock()
    door = Door(Limits(connections=10_000), clock)
    for number in range(5000):
        clock.now += 1
        assert door.enter(f"10.1.{number // 250}.{number % 250}") == ""
    assert len(door._attempts) <= 4096


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"beat": 0}, "beat: expected more than 0"),
        ({"silence": float("nan")}, "silence: expected"),
        ({"handshake": 1e9}, "handshake: expected"),
        ({"beat": 13.0}, "at least two beats"),
        ({"probe": 10.0}, "less than handshake"),
        ({"backoff": (5.0, 0.2)}, "backoff: expected"),
        ({"connections": 0}, "connections: expected at least 1"),
        ({"outstanding": 0}, "outstanding: expected at least 1"),
        ({"bytes_a_minute": 1000}, "bytes_a_minute: expected at least 2516583"),
        ({"frames_a_minute": 20}, "frames_a_minute: expected at least 24"),
    ],
)
def test_limits_that_do_not_fit(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Limits(**wrong)


def test_silence_is_counted_while_a_frame_is_waited_for_and_not_between_two(ends: Any) -> None:
    """One timer looks after all frames: a receiver that takes its time has not lost the other end."""

    async def main() -> None:
        limits = ends.limits(beat=0.3, silence=1.0)
        made: asyncio.Future[FrameChannel] = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(
            lambda reader, writer: made.set_result(FrameChannel(reader, writer, limits)), "127.0.0.1", 0
        )
        mine = FrameChannel(*await asyncio.open_connection(*server.sockets[0].getsockname()[:2]), limits)
        other = await made
        await mine.send(Kind.BEAT)
        assert (await other.receive()).kind is Kind.BEAT
        await asyncio.sleep(1.5 * limits.silence)
        await mine.send(Kind.BEAT)
        assert (await other.receive()).kind is Kind.BEAT
        begun = time.monotonic()
        with pytest.raises(PeerLostError, match="nothing heard for 1 s"):
            await other.receive()
        assert time.monotonic() - begun >= limits.silence - 0.01
        for channel in (mine, other):
            channel.abort()
        server.close()

    asyncio.run(main())
