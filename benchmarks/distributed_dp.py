"""Noise inside the secure sum: how fast it is made, and what it costs in accuracy against noise added by the server.

    python benchmarks/distributed_dp.py [speed|accuracy|cohorts] [--seeds 5] [--rounds 20] [--parties 100 1000]

JSON lines. *speed*: coordinates per second on one core for one client's whole encoding (clip, rotate, round, noise),
against the arithmetic it cannot do without, measured in the same run: a copy of the vector, and the random bytes that
it draws, in seconds of the processor. *accuracy*: Fashion-MNIST, pooled to 14 x 14 pixels and a softmax regression,
split evenly among the parties, all of which take part in every round, at epsilon = 8, delta = 1e-5 for each client;
arms differ only in where the noise is added and in the bits. Sums are taken modulo 2^bits, as the secure sums do. Seeds
decide the split, never noise. *cohorts*: the noise of a trusted server, in clips, whose cohorts are secret or not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from choral.privacy import ClientPrivacy, ClientPrivacyEngine, Ledger
from choral.privacy.client_level.client_noise_shares import DistributedScheme, design
from choral.privacy.noise.gaussian import os_stream

DATA = Path(os.environ.get("CHORAL_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data"))
EPSILON, DELTA, CLIP = 8.0, 1e-5, 0.75
LENGTH = 1 << 20


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def speed(repeats: int) -> None:
    """Per coordinate: 1 multiplication for the sign, 4 passes of 64 operations for the rotation, 2 random bytes and 6
    operations to scale, round, measure and store, 2 random bytes, a lookup and an addition for the noise."""
    for mechanism in ("discrete_gaussian", "skellam"):
        for bits in (16, 18, 20):
            scheme = design(mechanism=mechanism, bits=bits, length=LENGTH, clients=100, holders=100, ratio=10.0)
            runs = parts(scheme)
            times: dict[str, list[float]] = {name: [] for name in runs}
            for repeat in range(repeats + 1):
                for name, run in runs.items():
                    taken = seconds(run)
                    if repeat:
                        times[name].append(taken)
            middle = {name: statistics.median(values) for name, values in times.items()}
            say(
                what="speed",
                mechanism=mechanism,
                bits=bits,
                coordinates=LENGTH,
                share_deviation=round(float(scheme.share_variance) ** 0.5, 1),
                million_per_second=round(LENGTH / middle["encode and noise"] / 1e6, 1),
                nanoseconds={name: round(1e9 * value / LENGTH, 2) for name, value in middle.items()},
                over_limit=round(middle["encode and noise"] / (middle["random bytes"] + middle["copy"]), 2),
            )


def parts(scheme: DistributedScheme) -> dict[str, Callable[[], object]]:
    vector = np.random.default_rng(0).standard_normal(LENGTH).astype(np.float32)
    signs, table = scheme.signs(bytes(32)), scheme.noise
    return {
        "encode and noise": lambda: scheme.encode(vector, 1.0, scheme.signs(bytes(32)), os_stream),
        "encode": lambda: scheme.encode(vector, 1.0, signs, os_stream, noisy=False),
        "noise": lambda: [table.draw(1 << 15, os_stream) for _ in range(LENGTH >> 15)],
        "random bytes": lambda: [os_stream(1 << 16) for _ in range(LENGTH >> 14)],
        "copy": lambda: vector.astype(np.int64),
    }


def fashion() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def read(name: str, header: int) -> np.ndarray:
        [path] = [found for found in (DATA / "fashion-mnist").rglob(f"{name}*") if found.is_file()]
        raw = path.read_bytes()
        return np.frombuffer(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw, np.uint8, offset=header)

    def images(name: str) -> torch.Tensor:
        pixels = torch.from_numpy(read(name, 16).copy()).float().view(-1, 1, 28, 28) / 255
        flat = torch.nn.functional.avg_pool2d(pixels, 2).flatten(1) - 0.29
        return torch.cat([flat, torch.ones(len(flat), 1)], 1)

    train, test = images("train-images"), images("t10k-images")
    labels = [torch.from_numpy(read(name, 8).copy()).long() for name in ("train-labels", "t10k-labels")]
    return train, labels[0], test, labels[1]


def local_updates(weights: torch.Tensor, x: torch.Tensor, y: torch.Tensor, steps: int, rate: float) -> torch.Tensor:
    """Every party's update at once: `steps` batches of SGD on x, shape (n, m, f), y, shape (n, m, 10): one hot."""
    own = weights.expand(len(x), -1, -1).clone()
    for batch, target in zip(x.tensor_split(steps, 1), y.tensor_split(steps, 1), strict=True):
        error = torch.softmax(torch.bmm(batch, own), 2) - target
        own -= rate / batch.shape[1] * torch.bmm(batch.transpose(1, 2), error)
    return (own - weights).flatten(1)


def train(arm: ClientPrivacy | None, parties: int, rounds: int, seed: int, data: tuple[torch.Tensor, ...]) -> float:
    x, y, test_x, test_y = data
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).view(parties, -1)
    x, y = x[order], torch.nn.functional.one_hot(y[order], 10).float()
    weights = torch.zeros(x.shape[2], 10)
    length = weights.numel()
    privacy_engine = None
    if arm:
        privacy_engine = ClientPrivacyEngine(arm, clients=parties, length=length, rounds=rounds, ledger=Ledger())
    for _ in range(rounds):
        updates = local_updates(weights, x, y, steps=8, rate=0.5)
        if privacy_engine is None:
            mean = (updates * torch.clamp(CLIP / updates.norm(dim=1, keepdim=True), max=1.0)).mean(0)
        else:
            current = privacy_engine.begin()
            total = np.zeros(privacy_engine.scheme.padded, np.int64)
            for update in updates:
                total += current.encode(update)
            if privacy_engine.scheme.bits:
                half = 1 << (privacy_engine.scheme.bits - 1)
                total = ((total + half) & (2 * half - 1)) - half
            mean = current.decode(total, parties).float()
        weights = weights + mean.view_as(weights)
    if privacy_engine:
        assert privacy_engine.spent().epsilon <= EPSILON
    return float((test_x @ weights).argmax(1).eq(test_y).float().mean())


def accuracy(parties: int, rounds: int, seeds: int, every: bool) -> None:
    data = fashion()
    common: dict[str, Any] = {
        "epsilon": EPSILON,
        "delta": DELTA,
        "clip": CLIP,
        "min_survivors": parties,
        "colluders": 0,
    }
    arms: dict[str, ClientPrivacy | None] = {"no noise": None, "central": ClientPrivacy(**common, noise="central")}
    for mechanism in ("discrete_gaussian", "skellam") if every else ("discrete_gaussian",):
        for bits in (16, 18, 20):
            arms[f"{mechanism} {bits}"] = ClientPrivacy(**common, mechanism=mechanism, bits=bits)
    arms["local"] = ClientPrivacy(**common, noise="local")
    found: dict[str, list[float]] = {name: [] for name in arms}
    for seed in range(seeds):
        for name, arm in arms.items():
            found[name].append(train(arm, parties, rounds, seed, data))
    for name, values in found.items():
        gaps = [100 * (value - other) for value, other in zip(values, found["central"], strict=True)]
        say(
            what="accuracy",
            parties=parties,
            arm=name,
            epsilon=EPSILON,
            rounds=rounds,
            accuracy=round(100 * statistics.mean(values), 2),
            points_above_central=round(statistics.mean(gaps), 2),
            seeds=[round(100 * value, 2) for value in values],
        )


def cohorts() -> None:
    """5,000 clients, 100 rounds, epsilon 2, delta 1e-6: everybody in each, and one in fifty, drawn in secret."""
    for rate in (None, 0.02):
        promise = ClientPrivacy(2.0, 1e-6, noise="central", sample_rate=rate)
        engine = ClientPrivacyEngine(promise, clients=5000, length=3, rounds=100, ledger=Ledger())
        say(sample_rate=rate, noise_in_clips=round(engine.ratio, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["speed", "accuracy", "cohorts", "all"], default="all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--parties", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--skellam", action="store_true", help="also Skellam noise in the accuracy part")
    parser.add_argument("--repeats", type=int, default=7)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    if wanted.what in ("speed", "all"):
        speed(wanted.repeats)
    if wanted.what in ("cohorts", "all"):
        cohorts()
    if wanted.what in ("accuracy", "all"):
        for parties in wanted.parties:
            accuracy(parties, wanted.rounds, wanted.seeds, wanted.skellam)


if __name__ == "__main__":
    main()
