"""Parties in processes of their own, the server in this one: nothing but bytes crosses the pipes between them."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from choral.protocols import Homomorphic, Identity, Masked, SumSpec
from choral.protocols.driver import RoundTerms, Trip
from choral.protocols.errors import TooFewSurvivorsError

NAMES = ("north", "south", "east", "west")
SPEC = SumSpec(parties=NAMES, length=500, bound=2**20)

PARTY = """
import hashlib, json, os, struct, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from choral.protocols import Homomorphic, Masked, SumSpec
from choral.protocols import Identity
from choral.protocols.driver import NeedsVector
from choral.protocols.errors import ProtocolError

told = json.loads(sys.argv[1])
name, folder = told["name"], Path(told["folder"])
spec = SumSpec(parties=tuple(told["parties"]), length=told["length"], bound=told["bound"])
masked = Masked(corrupt=1)
kind = masked if told["kind"] == "masked" else Homomorphic(corrupt=1)
policy = replace(masked.policy(spec), directory={who: bytes.fromhex(key) for who, key in told["directory"].items()})
state = folder / f"{name}.state"

def store(raw):
    fresh = folder / f"{name}.fresh"
    with fresh.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(state)

driver = kind.party_driver(
    spec, name=name, identity=Identity((folder / f"{name}.key").read_bytes()), policy=policy, store=store,
    state=state.read_bytes() if state.exists() else None,
)

def vector(asked):
    seed = hashlib.sha256(name.encode() + asked.weights + bytes([asked.round])).digest()[:8]
    return np.random.default_rng(int.from_bytes(seed, "little")).integers(-spec.bound, spec.bound, spec.length)

while head := sys.stdin.buffer.read(4):
    raw = sys.stdin.buffer.read(struct.unpack("<I", head)[0])
    try:
        answer = driver.handle(raw)
        if isinstance(answer, NeedsVector):
            answer = driver.supply(vector(answer))
    except ProtocolError as error:
        print(f"{name}: {error}", file=sys.stderr)
        answer = ()
    for part in (*answer, b""):
        sys.stdout.buffer.write(struct.pack("<I", len(part)) + part)
    sys.stdout.buffer.flush()
"""


def vector_of(name: str, weights: bytes, number: int) -> Any:
    """What the party computes in its own process, from what it was sent."""
    import hashlib

    seed = hashlib.sha256(name.encode() + weights + bytes([number])).digest()[:8]
    return np.random.default_rng(int.from_bytes(seed, "little")).integers(-SPEC.bound, SPEC.bound, SPEC.length)


class Processes:
    """A party each, known to this process by a pipe."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        identities = {name: Identity(bytes([place + 7]) * 32) for place, name in enumerate(NAMES)}
        self.directory = {name: identity.public for name, identity in identities.items()}
        for name, identity in identities.items():
            (folder / f"{name}.key").write_bytes(identity.seed)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        for name in NAMES:
            self.start(name)

    def start(self, name: str) -> None:
        told = {
            "name": name,
            "folder": str(self.folder),
            "kind": self.kind,
            "parties": NAMES,
            "length": SPEC.length,
            "bound": SPEC.bound,
            "directory": {who: key.hex() for who, key in self.directory.items()},
        }
        arguments = [sys.executable, "-c", PARTY, json.dumps(told)]
        self.running[name] = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def kill(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].communicate()

    def ask(self, name: str, raw: bytes) -> list[bytes]:
        """Its answers; none where it is gone."""
        process = self.running[name]
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(struct.pack("<I", len(raw)) + raw)
            process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return []
        answers = []
        while part := frame(process.stdout):
            answers.append(part)
        return answers

    def stop(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.communicate()


def frame(pipe: BinaryIO | Any) -> bytes:
    head = pipe.read(4)
    return pipe.read(struct.unpack("<I", head)[0]) if head else b""


@pytest.fixture(params=["masked", "split"])
def processes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path, request.param)
    yield made
    made.stop()


def go(processes: Processes, trips: Iterator[Trip], lost: dict[str, str] | None = None) -> None:
    """lost: who is killed at which step, before it is asked."""
    for trip in trips:
        for name, raw in trip.outbox.items():
            if (lost or {}).get(name) == trip.step:
                processes.kill(name)
            for part in processes.ask(name, raw):
                trip.receive(name, part)
        assert not trip.faults


def test_parties_and_server_in_processes_of_their_own(processes: Processes) -> None:
    """The exact sum, with all; with one that is killed before it has sent its vector; with it again, restarted."""
    kind: Any = Masked(corrupt=1) if processes.kind == "masked" else Homomorphic(corrupt=1)
    server = kind.server_driver(SPEC, directory=processes.directory)
    go(processes, server.open())
    for number, lost in enumerate(({}, {"east": "vector"}, {}, {"west": "unmasking"}, {}), start=1):
        weights = bytes([number]) * 32
        for name, process in processes.running.items():
            if process.poll() is not None:
                processes.start(name)
        go(processes, server.round(RoundTerms(weights=weights)), lost)
        left = tuple(name for name in NAMES if lost.get(name) != "vector")
        assert server.result.survivors == left
        expected = sum(vector_of(name, weights, number) for name in left)
        assert server.result.total.tolist() == expected.tolist()
    for name in ("north", "south"):
        processes.kill(name)
    with pytest.raises(TooFewSurvivorsError):
        go(processes, server.round())
