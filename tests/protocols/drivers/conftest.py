"""Parties and a server behind their drivers, and a network between them that is told what to do with each message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest

from choral.protocols import Identity, Masked, Plain, Policy, SumSpec
from choral.protocols.driver import NeedsVector, RoundTerms, Trip
from choral.protocols.errors import ProtocolError

Fates = Mapping[tuple[str, str, str], str]
"""By step, way and party: "ok", "lost", "twice", or "late": it arrives after the next trip's first messages."""

TRAINED = RoundTerms(0, b"w" * 32, b"t" * 32)


class Deployment:
    """names, parties, server: as deployed. refused: what parties refused, in order. asked: each request to train.

    stored: by party, the public states that it handed to its store. stopped: who does not answer at all.
    """

    def __init__(self, n: int = 3, *, kind: Any = None, length: int = 3, bound: int = 1000, **more: Any) -> None:
        self.kind = Masked() if kind is None else kind
        self.names = tuple(f"p{place}" for place in range(n))
        self.spec = SumSpec(parties=self.names, length=length, bound=bound, **more)
        self.identities = {name: Identity(bytes([place + 1]) * 32) for place, name in enumerate(self.names)}
        self.directory = {name: identity.public for name, identity in self.identities.items()}
        self.stored: dict[str, list[bytes]] = {name: [] for name in self.names}
        self.policy = self.policy_of(self.spec)
        self.parties: dict[str, Any] = {name: self.party(name) for name in self.names}
        self.server: Any = self.kind.server_driver(self.spec, directory=self.directory)
        self.refused: list[tuple[str, ProtocolError]] = []
        self.asked: list[tuple[str, NeedsVector]] = []
        self.sent: list[tuple[str, str, str, bytes]] = []
        self.stopped: set[str] = set()
        self.late: list[Callable[[Trip], None]] = []
        self.vectors: dict[str, Any] = {}
        self.trips = 0

    def policy_of(self, spec: SumSpec) -> Policy | None:
        from dataclasses import replace

        if isinstance(self.kind, Plain):
            return None
        keys = self.kind if isinstance(self.kind, Masked) else self.kind._keys()
        return replace(keys.policy(spec), directory=self.directory, directory_size=spec.population)

    def party(self, name: str, **more: Any) -> Any:
        store = self.stored[name].append
        return self.kind.party_driver(
            self.spec, name=name, identity=self.identities[name], policy=self.policy, store=store, **more
        )

    def restart(self, name: str) -> None:
        """What is in memory is gone; the identity's file and the stored state are there."""
        self.identities[name] = Identity(self.identities[name].seed)
        self.parties[name] = self.party(name, state=self.stored[name][-1])

    def open(self, fates: Fates | None = None) -> Deployment:
        self.go(self.server.open(), fates or {})
        return self

    def fresh_vectors(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        low, high = -self.spec.bound, self.spec.bound
        self.vectors = {name: rng.integers(low, high, self.spec.length, endpoint=True) for name in self.names}

    def round(self, fates: Fates | None = None, terms: RoundTerms = TRAINED, *, seed: int = 0) -> Any:
        """The result, checked against the plain sum of what its survivors have. Raises: what ends a round."""
        self.fresh_vectors(seed)
        self.go(self.server.round(terms), fates or {})
        result = self.server.result
        expected = sum(self.vectors[name].astype(object) for name in result.survivors)
        assert result.total.tolist() == list(expected)
        return result

    def go(self, trips: Iterator[Trip], fates: Fates, tries: int = 1) -> None:
        for trip in trips:
            self.trips += 1
            before, self.late = self.late, []
            for _ in range(tries):
                for name in [name for name in trip.outbox if name in trip.waiting]:
                    self.pass_on(fates, trip, "down", name, partial(self.down, name, trip=trip, fates=fates))
                for arrive in before:
                    arrive(trip)
                before = []

    def pass_on(self, fates: Fates, trip: Trip, way: str, name: str, deliver: Callable[[Trip], None]) -> None:
        fate = fates.get((trip.step, way, name), "ok")
        if fate == "late":
            self.late.append(deliver)
        for _ in range({"ok": 1, "twice": 2}.get(fate, 0)):
            deliver(trip)

    def down(self, name: str, to: Trip, trip: Trip, fates: Fates) -> None:
        """trip: whose message it is; to: the one that is under way when it arrives."""
        if name in self.stopped:
            return
        raw = trip.outbox[name]
        self.sent.append(("down", trip.step, name, raw))
        try:
            answer = self.parties[name].handle(raw)
            if isinstance(answer, NeedsVector):
                self.asked.append((name, answer))
                answer = self.parties[name].supply(self.vectors[name])
        except ProtocolError as error:
            self.refused.append((name, error))
            return
        for part in answer:
            self.sent.append(("up", trip.step, name, part))
            self.pass_on(fates, to, "up", name, partial(_receive, name, part))


def _receive(name: str, raw: bytes, trip: Trip) -> None:
    trip.receive(name, raw)


@pytest.fixture
def deployed() -> type[Deployment]:
    return Deployment
