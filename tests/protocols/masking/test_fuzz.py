"""Mutated messages against every state that takes one: a typed error each, no hang, no growth.

CHORAL_FUZZ sets how many messages in all; 100,000 by default, 1,000,000 for a long run.
"""

from __future__ import annotations

import gc
import os
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from choral.protocols.crypto.single_use import Once
from choral.protocols.errors import ProtocolError
from choral.protocols.masking.party import join
from choral.protocols.masking.server.opening import Opening

TRIALS = int(os.environ.get("CHORAL_FUZZ", "100000"))
VECTORS = {f"p{place}": [place, -place, 1] for place in range(4)}
# A change in these can be a message that the rules allow: any vector, any seed commitment, another set or accusation.
MAY_PASS = {
    "SumSetup",
    "Roster",
    "Deliveries",
    "Survivors",
    "Confirm",
    "Confirmations",
    "DealtShares",
    "Upload",
    "Unmask",
}

Target = Callable[[bytes], None]


def targets(network: Callable[..., Any]) -> Iterator[tuple[str, bytes, Target]]:
    """(kind, a valid message, a function that feeds any bytes to the state that waits for it). States are put back."""
    net = network(4, corrupt=1)
    opening = Opening(net.setup, net.directory, net.signatures)
    arguments = {"name": "p0", "identity": net.identities["p0"], "policy": net.policy, "randomness": net.random["p0"]}
    yield "SumSetup", opening.invitation, lambda raw: ignore(join(raw, **arguments))
    stages: dict[str, Any] = {}
    valid: dict[tuple[str, str], bytes] = {}
    waiting: dict[str, Any] = {}

    def record(way: str, stage: str) -> Callable[[str, bytes], bytes]:
        def hook(name: str, raw: bytes) -> bytes:
            if name == "p0":
                valid[way, stage] = raw
            return raw

        return hook

    for way, stage in [(way, stage) for way in ("up", "down") for stage in ("hello", "reveal", *STEPS)]:
        net.hooks[way, stage] = record(way, stage)
    honest_post, honest_each = net.post, net.each

    def post(stage: str, server: Any, replies: Any) -> Any:
        stages[stage] = snapshot(server)
        waiting[stage] = keep(replies["p0"][0]) if replies["p0"][0] is not None else None
        return honest_post(stage, server, replies)

    net.post = post
    net.each = honest_each
    net.open()
    net.round(VECTORS)
    for stage, restore in stages.items():
        raw = valid["up", stage]
        yield kind_of(raw), raw, lambda raw, restore=restore: restore().receive("p0", raw)
    methods = {"hello": "reveal", "reveal": "enter", "share": "receive", "upload": "confirm", "confirm": "unmask"}
    for stage, method in methods.items():
        yield (
            kind_of(valid["down", stage]),
            valid["down", stage],
            lambda raw, stage=stage, method=method: ignore(getattr(waiting[stage](), method)(raw)),
        )
    yield (
        kind_of(valid["down", "advertise"]),
        valid["down", "advertise"],
        lambda raw: ignore(waiting["advertise"]().share(raw, randomness=net.random["p0"])),
    )


STEPS = ("advertise", "share", "upload", "confirm", "unmask")


def ignore(_: Any) -> None: ...


def kind_of(raw: bytes) -> str:
    kind = str(msgspec.msgpack.decode(raw[1:])[0])
    return next((known for known in (*MAY_PASS, "Hello") if known.lower() == kind), kind.capitalize())


def keep(state: Once[Any]) -> Callable[[], Any]:
    """Copies of a state, as no honest caller can make them."""
    (content,) = state._content
    return lambda: type(state)(content)


def snapshot(server: Any) -> Callable[[], Any]:
    def restore() -> Any:
        for name, value in saved.items():
            setattr(server, name, value.copy() if isinstance(value, dict | np.ndarray) else value)
        return server

    saved = {
        name: value.copy() if isinstance(value, dict | np.ndarray) else value for name, value in vars(server).items()
    }
    return restore


def mutate(raw: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One of: bits, bytes, cuts, insertions, repeats, splices with another message, fields, noise."""
    match rng.randrange(8):
        case 0:
            out = bytearray(raw)
            for _ in range(rng.choice((1, 1, 2, 8))):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
            return bytes(out)
        case 1:
            place = rng.randrange(len(raw))
            return raw[:place] + rng.randbytes(rng.choice((1, 2, 4, 33))) + raw[place + rng.choice((0, 1, 4)) :]
        case 2:
            return raw[: rng.randrange(len(raw))]
        case 3:
            return raw + rng.randbytes(rng.choice((1, 16, 300)))
        case 4:
            one, other = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
            return raw[:other] + raw[one:other] * rng.choice((1, 2, 20)) + raw[other:]
        case 5:
            other = rng.choice(others)
            return raw[: rng.randrange(len(raw))] + other[rng.randrange(len(other)) :]
        case 6:
            return bytes([raw[0]]) + msgspec.msgpack.encode(mutate_field(msgspec.msgpack.decode(raw[1:]), rng))
        case _:
            return bytes([rng.choice((1, 1, 1, 0, 2))]) + rng.randbytes(rng.randrange(200))


def mutate_field(value: Any, rng: random.Random) -> Any:
    """Change something inside; lists are entered."""
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        change = rng.randrange(6)
        if change == 0:
            return value[:place] + value[place + 1 :]
        if change == 1:
            return [*value, value[place]]
        if change == 2:
            return value[::-1]
        return [*value[:place], mutate_field(value[place], rng), *value[place + 1 :]]
    if isinstance(value, bytes) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return value[:place] + bytes([value[place] ^ 1 << rng.randrange(8)]) + value[place + 1 :]
    if isinstance(value, int) and rng.random() < 0.7:
        return value + rng.choice((-1, 1, 128, 1 << 20, 1 << 40))
    return rng.choice((None, 0, -1, 1 << 63, "", "x" * 300, b"", b"x" * 32, b"x" * 64, [], [[]] * 50, True, 1.0, {}))


def fuzz(network: Callable[..., Any], trials: int, seed: int) -> Counter[str]:
    """Raises whatever is not a ProtocolError. Counts outcomes by "kind: error"."""
    rng = random.Random(seed)
    everything = list(targets(network))
    assert len(everything) == 14  # every message of the protocol
    samples = [raw for _, raw, _ in everything]
    for kind, raw, feed in everything:
        feed(raw)  # each target takes its own message as it is
        assert kind
    outcomes: Counter[str] = Counter()
    for trial in range(trials):
        kind, raw, feed = everything[trial % len(everything)]
        mutated = mutate(raw, samples, rng)
        if mutated == raw:
            outcomes["unchanged"] += 1
            continue
        started = time.monotonic()
        try:
            feed(mutated)
        except ProtocolError as error:
            outcomes[f"{kind}: {type(error).__name__}"] += 1
        else:
            assert kind in MAY_PASS, (kind, mutated.hex())
            outcomes[f"{kind}: passed"] += 1
        assert time.monotonic() - started < 2, kind
    return outcomes


def test_three_thousand_mutated_messages(network: Callable[..., Any]) -> None:
    outcomes = fuzz(network, 3000, seed=1)
    assert sum(outcomes.values()) == 3000
    refused = sum(count for outcome, count in outcomes.items() if outcome.endswith("Error"))
    assert refused > 2500


@pytest.mark.slow
def test_a_great_many_mutated_messages_and_flat_memory(network: Callable[..., Any]) -> None:
    fuzz(network, 5000, seed=2)
    tracemalloc.start()
    parts, sizes = 10, []
    for part in range(parts):
        outcomes = fuzz(network, TRIALS // parts, seed=3 + part)
        assert sum(outcomes.values()) == TRIALS // parts
        del outcomes
        gc.collect()  # a network refers to itself
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[-1] - sizes[1] < 300_000, sizes
