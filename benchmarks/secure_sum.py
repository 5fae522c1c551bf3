"""One masked sum, all parties and the server in this process, beside Flower's SecAgg+ when flwr can be imported.

    python benchmarks/secure_sum.py --parties 50 --length 100000 --json
    python benchmarks/secure_sum.py --parties 1000 --length 1000000 --dropouts 0.05 --graph sparse --no-peer
    python benchmarks/secure_sum.py --parties 1000 --opening     # what it takes to open a session in one process

Both sum vectors of 22-bit values. Choral's sum is checked against the plain one; Flower's is a float mean, checked to
within its quantisation. Times are of one round from key advertisement to the sum: ``seconds`` is wall time, ``cpu`` the
process's own time, which other work on the machine disturbs less. ``party_cpu`` is the mean over the parties.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import secrets
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from flower_secagg import flower_sum

from choral.protocols import Masked, SumSpec
from choral.protocols.crypto.keys import ed25519_public, ed25519_sign, ed25519_verify
from choral.protocols.crypto.modular_integers import packed_bytes
from choral.protocols.masking import messages
from choral.protocols.masking.parameters import choose
from choral.protocols.masking.party import join
from choral.protocols.masking.policy import Policy
from choral.protocols.masking.server.opening import Opening
from choral.protocols.masking.signing import Signatures

VALUE_BITS = 22
BOUND = 2 ** (VALUE_BITS - 1)
FULL_VERIFICATION_UP_TO = 100


class Clock:
    """CPU seconds by who spent them."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def on(self, who: str) -> Any:
        started = time.process_time()
        yield
        self.spent[who] = self.spent.get(who, 0.0) + time.process_time() - started


def vector_of(place: int, length: int) -> Any:
    """Cheap to make again, so that the parties' inputs need not all be held at once."""
    return (np.arange(length, dtype=np.int64) * (2 * place + 1)) % (2 * BOUND + 1) - BOUND


def dropped(n: int, dropouts: float) -> set[int]:
    """Every so many-th party, round(n dropouts) of them."""
    count = round(n * dropouts)
    return {place * n // count for place in range(count)}


def make_setup(n: int, length: int, dropouts: float, graph: str) -> messages.SumSetup:
    chosen = choose(n, corrupt=0.05, dropouts=max(dropouts, 0.05), server="malicious")
    complete = graph == "complete"
    threshold = (n + chosen.corrupt) // 2 + 1 if complete else chosen.threshold
    return messages.SumSetup(
        session=secrets.token_bytes(16),
        roster=tuple(f"party {place}" for place in range(n)),
        length=length,
        bound=BOUND,
        modulus_bits=(2 * n * BOUND).bit_length(),
        neighbours=n - 1 if complete else chosen.neighbours,
        threshold=threshold,
        min_survivors=max(threshold, n // 2 + 1),
        corrupt=chosen.corrupt,
        dropouts=chosen.dropouts,
        server="malicious",
    )


def open_session(setup: messages.SumSetup, *, shared: bool) -> tuple[Any, dict[str, Any]]:
    """shared: each signature is verified once in the process instead of once by each party."""
    identities = {name: secrets.token_bytes(32) for name in setup.roster}
    directory = {name: ed25519_public(identity) for name, identity in identities.items()}
    common = Signatures()
    opening = Opening(setup, directory, common)
    states: dict[str, Any] = {}
    for name, identity in identities.items():
        policy = Policy(directory=directory, corrupt=setup.corrupt, signatures=common if shared else Signatures())
        states[name], raw = join(
            opening.invitation, name=name, identity=identity, policy=policy, randomness=secrets.token_bytes
        )
        opening.receive(name, raw)
    gathering, outbox = opening.close()
    for name, answer in outbox.items():
        states[name], raw = states[name].reveal(answer)
        gathering.receive(name, raw)
    session, outbox = gathering.close()
    return session, {name: states[name].enter(answer) for name, answer in outbox.items()}


def opening(n: int, repeats: int = 3) -> dict[str, Any]:
    """Processor seconds of sessions of ``n`` parties in this process, each of a new cohort: until all have shown their
    nonces, and from there until all have entered and sent the keys of their first round.
    """
    spec = SumSpec(parties=tuple(f"party {place}" for place in range(n)), length=100, bound=BOUND)
    spent = []
    for _ in range(repeats):
        begun = time.process_time()
        session: Any = Masked(corrupt=n // 20, dropouts=n // 20).open(spec)
        opened = time.process_time()
        trip = next(session.server.round())
        for party, raw in trip.outbox.items():
            session.deliver(party, raw, trip)
        if trip.waiting:
            raise SystemExit("a party did not enter")
        spent.append((opened - begun, time.process_time() - opened))
    return {"parties": n, "opened": [one for one, _ in spent], "entered_with_keys": [two for _, two in spent]}


def one_round(session: Any, members: dict[str, Any], gone: set[int], clock: Clock) -> tuple[Any, dict[str, int]]:
    """The outcome and the bytes per way; ``gone`` send no vector. Every message is really encoded and decoded."""
    names = session.terms.setup.roster
    length = session.terms.setup.length
    traffic = {"up": 0, "down": 0}
    states: dict[str, Any] = {}

    def send(stage: Any, name: str, step: Callable[[], tuple[Any, bytes]]) -> None:
        with clock.on("parties"):
            states[name], raw = step()
        traffic["up"] += len(raw)
        with clock.on("server"):
            stage.receive(name, raw)

    def close(stage: Any) -> tuple[Any, dict[str, bytes]]:
        with clock.on("server"):
            following, outbox = stage.close()
        traffic["down"] += sum(map(len, outbox.values()))
        return following, outbox

    stage = session.begin(1)
    for name in names:
        send(stage, name, lambda name=name: members[name].advertise(1, randomness=secrets.token_bytes)[1:])  # type: ignore[misc]
    stage, outbox = close(stage)
    for name, raw in outbox.items():
        send(stage, name, lambda name=name, raw=raw: states[name].share(raw, randomness=secrets.token_bytes))  # type: ignore[misc]
    stage, outbox = close(stage)
    for place, name in enumerate(names):
        with clock.on("parties"):
            ready = states[name].receive(outbox[name])
        if place not in gone:
            vector = vector_of(place, length)
            send(stage, name, lambda ready=ready, vector=vector: ready.upload(vector))  # type: ignore[misc]
    stage, outbox = close(stage)
    for name, raw in outbox.items():
        send(stage, name, lambda name=name, raw=raw: states[name].confirm(raw))  # type: ignore[misc]
    stage, outbox = close(stage)
    for name, raw in outbox.items():
        send(stage, name, lambda name=name, raw=raw: (None, states[name].unmask(raw)))  # type: ignore[misc]
    with clock.on("server"):
        outcome = stage.close()
    return outcome, traffic


def run_choral(n: int, length: int, dropouts: float, graph: str) -> dict[str, Any]:
    shared = n > FULL_VERIFICATION_UP_TO
    setup = make_setup(n, length, dropouts, graph)
    session, members = open_session(setup, shared=shared)
    gone = dropped(n, dropouts)
    clock = Clock()
    started = time.perf_counter()
    outcome, traffic = one_round(session, members, gone, clock)
    seconds = time.perf_counter() - started
    expected = np.zeros(length, np.int64)
    for place in range(n):
        if place not in gone:
            expected += vector_of(place, length)
    if not np.array_equal(outcome.total, expected):
        raise SystemExit("the sum is wrong")
    survivors = n - len(gone)
    packed = packed_bytes(length, setup.modulus_bits)
    verify = verify_seconds()
    extra = verify * (setup.neighbours + setup.threshold) if shared else 0.0
    total_bytes = traffic["up"] + traffic["down"]
    return {
        "who": "choral",
        "parties": n,
        "length": length,
        "survivors": survivors,
        "graph": "complete" if setup.complete else "sparse",
        "neighbours": setup.neighbours,
        "threshold": setup.threshold,
        "modulus_bits": setup.modulus_bits,
        "seconds": seconds,
        "cpu": clock.spent["parties"] + clock.spent["server"] + extra * n,
        "party_cpu": clock.spent["parties"] / n + extra,
        "server_cpu": clock.spent["server"],
        "signatures": "verified once each, and their time added per party" if shared else "verified by every party",
        "bytes_up_per_party": traffic["up"] / n,
        "bytes_down_per_party": traffic["down"] / n,
        "expansion_over_packed_modulus": total_bytes / (survivors * packed),
        "expansion_over_22_bit_input": total_bytes / (survivors * math.ceil(VALUE_BITS * length / 8)),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def verify_seconds() -> float:
    identity = secrets.token_bytes(32)
    public, signature = ed25519_public(identity), ed25519_sign(identity, b"m")
    started = time.process_time()
    for _ in range(200):
        ed25519_verify(public, b"m", signature)
    return (time.process_time() - started) / 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parties", type=int, default=50)
    parser.add_argument("--length", type=int, default=100_000)
    parser.add_argument("--dropouts", type=float, default=0.0, help="fraction that sends no vector")
    parser.add_argument("--graph", choices=["complete", "sparse"], default="complete")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--no-peer", action="store_true", help="do not run Flower's")
    parser.add_argument("--opening", action="store_true", help="the opening of a session alone")
    args = parser.parse_args()
    if args.opening:
        print(json.dumps(opening(args.parties)))
        return
    ours = run_choral(args.parties, args.length, args.dropouts, args.graph)
    lines = [ours]
    if not args.no_peer:
        vectors = [partial(vector_of, place, args.length) for place in range(args.parties)]
        gone = dropped(args.parties, args.dropouts)
        peer = flower_sum(vectors, gone, neighbours=ours["neighbours"], threshold=ours["threshold"], bound=BOUND)
        if peer:
            ratios = {key: peer[key] / ours[key] for key in ("seconds", "cpu", "bytes_up_per_party")}
            lines += [peer, {"who": "flower / choral", **ratios}]
    for line in lines:
        print(json.dumps(line) if args.json else "  ".join(f"{key}: {shown(value)}" for key, value in line.items()))


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
