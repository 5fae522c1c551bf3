"""A network of real parties and a real server in one process, with a hand on every wire."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from choral.protocols.crypto.keys import ed25519_public
from choral.protocols.errors import ProtocolError
from choral.protocols.masking import messages
from choral.protocols.masking.parameters import choose
from choral.protocols.masking.party import Member, join
from choral.protocols.masking.policy import Policy
from choral.protocols.masking.server.opening import Opening
from choral.protocols.masking.signing import Signatures

STAGES = ("advertise", "share", "upload", "confirm", "unmask")
Hook = Callable[[str, bytes], bytes | None]


class Stream:
    """Reproducible randomness for tests: SHAKE-256 of a name and a counter."""

    def __init__(self, name: str) -> None:
        self._name = name.encode()
        self._calls = 0

    def __call__(self, size: int) -> bytes:
        self._calls += 1
        return hashlib.shake_256(self._name + b"/%d" % self._calls).digest(size)


class Network:
    """hooks: by ("up" or "down", stage), a function (party, bytes) -> bytes or None (lost), on what passes.

    Stages are hello, reveal, then STAGES; down(stage) is the server's answer that leads to the *next* party step.
    refused: by party, the error of the step that it refused. rejected: (party, error) of what the server refused.
    """

    def __init__(self, n: int = 4, *, seed: int = 0, policy: Mapping[str, Any] | None = None, **setup: Any) -> None:
        self.names = tuple(f"p{place}" for place in range(n))
        self.random = {name: Stream(f"{seed}/{name}") for name in (*self.names, "server")}
        self.identities = {name: self.random[name](32) for name in self.names}
        self.directory = {name: ed25519_public(identity) for name, identity in self.identities.items()}
        self.signatures = Signatures()
        self.setup = make_setup(self.names, self.random["server"](16), **setup)
        terms = {"corrupt": self.setup.corrupt, **(policy or {})}
        self.policy = Policy(directory=self.directory, signatures=self.signatures, **terms)
        self.hooks: dict[tuple[str, str], Hook] = {}
        self.refused: dict[str, ProtocolError] = {}
        self.rejected: list[tuple[str, ProtocolError]] = []
        self.sent: list[tuple[str, str, str, bytes]] = []  # way, stage, party, bytes
        self.members: dict[str, Member] = {}
        self.number = 0

    def open(self) -> Network:
        opening = Opening(self.setup, self.directory, self.signatures)
        states = self.each(
            "down",
            "setup",
            dict.fromkeys(self.names, opening.invitation),
            lambda name, raw: join(
                raw, name=name, identity=self.identities[name], policy=self.policy, randomness=self.random[name]
            ),
        )
        states = self.post("hello", opening, states)
        gathering, outbox = opening.close()
        states = self.each("down", "hello", outbox, lambda name, raw: states[name].reveal(raw))
        states = self.post("reveal", gathering, states)
        self.session, outbox = gathering.close()
        self.members = self.each("down", "reveal", outbox, lambda name, raw: states[name].enter(raw))
        return self

    def round(
        self, vectors: Mapping[str, Any], *, drops: Mapping[str, str] | None = None, until: str | None = None
    ) -> Any:
        """One round; ``drops`` says at which stage a party falls silent. The outcome, or (stage object, states)
        when ``until`` names the stage whose messages are the last to be sent."""
        drops = drops or {}
        self.number += 1
        gone = {
            stage: {name for name, at in drops.items() if STAGES.index(at) <= place}
            for place, stage in enumerate(STAGES)
        }
        stage = self.session.begin(self.number)
        states = self.members
        advertised = {}
        for name, state in states.items():
            if name not in gone["advertise"]:
                self.members[name], *advertised[name] = state.advertise(self.number, randomness=self.random[name])
        states = self.post("advertise", stage, advertised)
        if until == "advertise":
            return stage, states
        take: dict[str, Callable[[str, bytes], Any]] = {
            "share": lambda name, raw: states[name].share(raw, randomness=self.random[name]),
            "upload": lambda name, raw: states[name].receive(raw).upload(np.asarray(vectors[name], np.int64)),
            "confirm": lambda name, raw: states[name].confirm(raw),
            "unmask": lambda name, raw: (None, states[name].unmask(raw)),
        }
        for before, now in pairwise(STAGES):
            stage, outbox = stage.close()
            outbox = {name: raw for name, raw in outbox.items() if name not in gone[now] and name in states}
            replies = self.each("down", before, outbox, take[now])
            states = self.post(now, stage, replies)
            if until == now:
                return stage, states
        return stage.close()

    def each(self, way: str, stage: str, outbox: Mapping[str, bytes], step: Callable[[str, bytes], Any]) -> Any:
        """Deliver to every party; those who refuse are noted and out."""
        results = {}
        for name, raw in outbox.items():
            passed = self.wire(way, stage, name, raw)
            if passed is None:
                continue
            try:
                results[name] = step(name, passed)
            except ProtocolError as error:
                self.refused[name] = error
        return results

    def post(self, stage: str, server: Any, replies: Mapping[str, Any]) -> dict[str, Any]:
        """Send every party's message to the server; the parties' next states."""
        states = {}
        for name, (state, raw) in replies.items():
            states[name] = state
            passed = self.wire("up", stage, name, raw)
            if passed is None:
                continue
            try:
                server.receive(name, passed)
            except ProtocolError as error:
                self.rejected.append((name, error))
        return states

    def wire(self, way: str, stage: str, name: str, raw: bytes) -> bytes | None:
        hook = self.hooks.get((way, stage))
        passed = hook(name, raw) if hook else raw
        if passed is not None:
            self.sent.append((way, stage, name, passed))
        return passed


def make_setup(
    names: Iterable[str],
    session: bytes,
    *,
    length: int = 3,
    bound: int = 1000,
    server: Any = "malicious",
    corrupt: int = 0,
    dropouts: int = 0,
    **changes: Any,
) -> messages.SumSetup:
    """The parameters that choose() gives, with ``changes`` made after."""
    roster = tuple(names)
    chosen = choose(len(roster), corrupt=corrupt, dropouts=dropouts, server=server)
    fields = {
        "session": session,
        "roster": roster,
        "length": length,
        "bound": bound,
        "modulus_bits": (2 * len(roster) * bound).bit_length(),
        "neighbours": chosen.neighbours,
        "threshold": chosen.threshold,
        "min_survivors": max(changes.get("threshold", chosen.threshold), corrupt + 2),
        "corrupt": corrupt,
        "dropouts": dropouts,
        "server": server,
    }
    return messages.SumSetup(**(fields | changes))


@pytest.fixture
def network() -> Callable[..., Network]:
    """Make a network; see :class:`Network`."""
    return Network


@pytest.fixture
def stages() -> tuple[str, ...]:
    return STAGES
