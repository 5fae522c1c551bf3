"""What an end grants the other: time, bytes, connections. Each end has its own limits and keeps to nobody else's."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from choral.errors import ConfigError
from choral.network.transport.frames import FRAME_BYTES

_ADDRESSES_KEPT = 4096


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The settings of one end; seconds where nothing else is said.

    beat: how often a sign of life is sent. silence: after how long without a whole frame the other end counts as lost,
    and how long a frame may wait to be taken by it. handshake: from the first byte to the greeting, both in all.
    probe: how long a connection may take to show that it lives when another comes under its name. backoff: shortest
    and longest pause before a site calls again. connections, connections_per_address: at once, at the hub.
    attempts_a_minute: new connections from one address. bytes_a_minute, frames_a_minute: taken from one peer; what
    comes faster waits (frames of a message count as bytes alone). outstanding: requests to one peer at a time.

    Raises:
        ConfigError: a setting is out of range, or two do not fit together.
    """

    beat: float = 10.0
    silence: float = 25.0
    handshake: float = 10.0
    probe: float = 2.0
    backoff: tuple[float, float] = (0.2, 5.0)
    connections: int = 256
    connections_per_address: int = 32
    attempts_a_minute: int = 120
    bytes_a_minute: int = 4 << 30
    frames_a_minute: int = 60_000
    outstanding: int = 4

    def __post_init__(self) -> None:
        for name in ("beat", "silence", "handshake", "probe"):
            value = getattr(self, name)
            if not 0 < value <= 3600:
                raise ConfigError(f"{name}: expected more than 0 and at most 3600 seconds, got {value}")
        if self.silence < 2 * self.beat:
            raise ConfigError(
                f"silence ({self.silence:g} s): expected at least two beats ({self.beat:g} s each)",
                hint="with less, one beat that is late cuts a connection that is well",
            )
        if self.probe >= self.handshake:
            raise ConfigError(f"probe ({self.probe:g} s): expected less than handshake ({self.handshake:g} s)")
        shortest, longest = self.backoff
        if not 0 < shortest <= longest <= 3600:
            raise ConfigError(f"backoff: expected two increasing times of at most 3600 seconds, got {self.backoff}")
        for name in ("connections", "connections_per_address", "attempts_a_minute", "frames_a_minute", "outstanding"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        fewest = math.ceil(4 * FRAME_BYTES * 60 / self.silence)
        if self.bytes_a_minute < fewest:
            raise ConfigError(
                f"bytes_a_minute: expected at least {fewest} (four frames within silence), got {self.bytes_a_minute}"
            )
        if self.frames_a_minute < 240 / self.beat:
            raise ConfigError(
                f"frames_a_minute: expected at least {240 / self.beat:g} (four beats in the time of one), "
                f"got {self.frames_a_minute}"
            )


class Meter:
    """A budget that fills at `a_minute` and holds at most `burst`; says how long to wait."""

    def __init__(self, a_minute: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = a_minute / 60, burst, clock
        self._left, self._at = burst, clock()

    def take(self, amount: float) -> float:
        """Take `amount` and return the seconds after which it is paid for: 0 if at once."""
        self._refill()
        self._left -= amount
        return max(0.0, -self._left / self._rate)

    def has(self, amount: float) -> bool:
        """Take `amount` if it is there now; else take nothing."""
        self._refill()
        if self._left < amount:
            return False
        self._left -= amount
        return True

    @property
    def full(self) -> bool:
        self._refill()
        return self._left >= self._burst

    def _refill(self) -> None:
        now = self._clock()
        self._left, self._at = min(self._burst, self._left + (now - self._at) * self._rate), now


class Door:
    """Who may connect: counts by address, before anything of a connection is read.

    An address in IPv6 is its first 64 bits, for whoever has one of them has all.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._open: dict[str, int] = {}
        self._attempts: dict[str, Meter] = {}

    def enter(self, host: str) -> str:
        """Count a connection from `host`. Return "" if it may go on, else why not; if it may, `leave` is due later."""
        place, limits = _place(host), self._limits
        if place not in self._attempts:
            self._forget()
            self._attempts[place] = Meter(limits.attempts_a_minute, limits.attempts_a_minute, self._clock)
        if not self._attempts[place].has(1):
            return f"more than {limits.attempts_a_minute} connections a minute from one address"
        if self._open.get(place, 0) >= limits.connections_per_address:
            return f"more than {limits.connections_per_address} connections at once from one address"
        if sum(self._open.values()) >= limits.connections:
            return f"more than {limits.connections} connections at once"
        self._open[place] = self._open.get(place, 0) + 1
        return ""

    def leave(self, host: str) -> None:
        place = _place(host)
        self._open[place] -= 1
        if not self._open[place]:
            del self._open[place]

    def _forget(self) -> None:
        if len(self._attempts) >= _ADDRESSES_KEPT:
            self._attempts = {place: meter for place, meter in self._attempts.items() if not meter.full}
        while len(self._attempts) >= _ADDRESSES_KEPT:
            del self._attempts[next(iter(self._attempts))]


def _place(host: str) -> str:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
    return str(address)
