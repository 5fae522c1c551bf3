"""Secure rounds with sites beside bare ones: the same transport, carrying float32 vectors that the coordinator sees.

    python benchmarks/network.py [--sites 3] [--length 100000] [--rounds 10] [--train-seconds 0] [--memory]

Each site is a process with a folder of its own, made as `choral poc` makes it; between them is mutual TLS on this
machine. After each secure round of a job (`fit` is one step) the coordinator makes a bare one: weights down, one step,
weights up, mean. Medians over the rounds after the first, in ms. `secure_minus_bare_ms` is what privacy of the sum
costs, bytes_ratio what it sends more. --memory: resident MB of coordinator and sites after each round, and of a site
with no job. One JSON line for each figure, with the load of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from choral.jobs.rehearsal import RehearsedSites, make_rehearsal
from choral.jobs.serving import serve
from choral.jobs.settings import ServeSettings, Settings, SumSettings, read_settings
from choral.network import BlockingHub, CertifiedIdentity, Limits, Link, Request, SiteFolder
from choral.network.host.host import SiteHost
from choral.network.site.files.directory import Pinned
from choral.trainers import RoundRecord
from choral.trainers.task.settings import Split, Training

LIMITS = Limits(bytes_a_minute=1 << 40, frames_a_minute=1 << 30)
BARE = b"bare"
CODE = """
import time

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from choral.trainers import Task


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(LENGTH))

    def forward(self, points):
        return points * self.weight.mean()


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square()


def task():
    def build(dataset):
        model = Scale()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, DataLoader(dataset, batch_size=8)

    def fit(model, optimizer, loader, round):
        time.sleep(SECONDS)
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            optimizer.step()

    return Task(build=build, fit=fit, evaluate=lambda model: float(model.weight[0]), loss=loss)


def site(data, training, seed):
    points = torch.from_numpy(np.load(data))
    return task(), TensorDataset(points, 2 * points)


def coordinator(training, seed):
    return task(), TensorDataset(torch.ones(2), torch.ones(2))
"""


def resident_mb(process: int | str = "self") -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def site(path: Path, seconds: float) -> None:
    """Be a site until this process is ended; and answer bare rounds."""
    folder = SiteFolder.open(path)
    host = SiteHost(folder)

    def handler(request: Request) -> bytes:
        if bytes(request.body[:4]) == BARE:
            weights = np.frombuffer(request.body[4:], np.float32)
            time.sleep(seconds)
            return (weights - np.float32(0.1) * (weights.mean() - 2)).astype(np.float32).tobytes()
        return host.handle(request.body, sender=request.sender)

    name, _, port = folder.settings.coordinators["hub"].address.rpartition(":")
    link = Link(
        folder.identity, folder.hub_directory, handler,
        hub="hub", address=(name, int(port)), request_limit=1 << 30, limits=LIMITS,
    )  # fmt: skip
    asyncio.run(link.run())


class Rounds:
    """What is done after each secure round: a bare one, and a look at the memory."""

    def __init__(
        self, hub: BlockingHub, names: tuple[str, ...], processes: list[int], wanted: argparse.Namespace
    ) -> None:
        self._hub, self._names, self._processes, self._wanted = hub, names, processes, wanted
        self.secure: list[RoundRecord] = []
        self.bare: list[float] = []
        self.memory: list[list[float]] = []
        self._weights = np.zeros(wanted.length, np.float32)

    def __call__(self, entry: RoundRecord) -> None:
        if not entry.round:
            return
        self.secure.append(entry)
        if self._wanted.memory:
            self.memory.append([resident_mb(), *map(resident_mb, self._processes)])
            return
        start = time.perf_counter()
        body = BARE + self._weights.tobytes()
        outbox = dict.fromkeys(self._names, body)
        replies = self._hub.ask(outbox, timeout=600, reply_limit=4 * self._wanted.length)
        total = np.zeros(self._wanted.length, np.float64)
        for reply in replies.values():
            if isinstance(reply, Exception):
                raise reply
            total += np.frombuffer(reply, np.float32)
        self._weights = (total / len(replies)).astype(np.float32)
        self.bare.append(time.perf_counter() - start)


def measure(path: Path, wanted: argparse.Namespace) -> None:
    rehearsal = made(path, wanted)
    settings = read_settings(rehearsal.job, Settings)
    words = [sys.executable, __file__, "--train-seconds", str(wanted.train_seconds), "--site"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    sites = [subprocess.Popen([*words, str(rehearsal.site(name))], env=environment) for name in rehearsal.names]
    try:
        identity = CertifiedIdentity.load(rehearsal.path / "hub", "hub")
        pinned = Pinned.read(rehearsal.directory).sites
        with BlockingHub(identity, pinned, host="127.0.0.1", port=settings.serve.port, limits=LIMITS) as hub:
            if set(rehearsal.names) - hub.wait_for(rehearsal.names, timeout=300):
                raise SystemExit("a site did not connect")
            idle = [resident_mb(process.pid) for process in sites]
            rounds = Rounds(hub, rehearsal.names, [process.pid for process in sites], wanted)
            keys = {certificate.name: certificate.public_key for certificate in pinned}
            serve(
                settings, hub, keys, coordinator=identity, out=rehearsal.run,
                say=lambda text: print(text, file=sys.stderr), on_round=rounds,
            )  # fmt: skip
            tell(wanted, rounds, idle)
    finally:
        for process in sites:
            process.kill()
            process.wait()


def made(path: Path, wanted: argparse.Namespace) -> RehearsedSites:
    code = path / "scale.py"
    code.write_text(CODE.replace("LENGTH", str(wanted.length)).replace("SECONDS", str(wanted.train_seconds)))
    (path / "data").mkdir()
    for number in range(wanted.sites):
        np.save(path / "data" / f"site-{number:02d}.npy", np.ones(8, np.float32))
    settings = Settings(
        task=str(code),
        training=Training(rounds=wanted.rounds, batch_size=8, learning_rate=0.1),
        split=Split(min_classes=1),
        secure_sum=SumSettings(kind=wanted.kind),
        serve=ServeSettings(wait=300.0, training=600.0, step=600.0),
    )
    return make_rehearsal(settings, path / "sites", job="benchmark", sites=None, data=path / "data")


def tell(wanted: argparse.Namespace, rounds: Rounds, idle: list[float]) -> None:
    of: dict[str, Any] = {"sites": wanted.sites, "length": wanted.length, "kind": wanted.kind}
    load = [round(value, 1) for value in os.getloadavg()]
    if wanted.memory:
        after = [[round(value) for value in row] for row in rounds.memory]
        print(json.dumps({**of, "site_idle_mb": round(max(idle)), "load": load}))
        print(json.dumps({**of, "coordinator_mb": [row[0] for row in after], "load": load}))
        print(json.dumps({**of, "largest_site_mb": [max(row[1:]) for row in after], "load": load}))
        return
    secure = 1e3 * statistics.median(entry.seconds for entry in rounds.secure[1:])
    bare = 1e3 * statistics.median(rounds.bare[1:])
    sent = statistics.median(entry.bytes_up + entry.bytes_down for entry in rounds.secure[1:])
    figures = {
        "train_seconds": wanted.train_seconds,
        "secure_ms": round(secure, 1),
        "bare_ms": round(bare, 1),
        "secure_minus_bare_ms": round(secure - bare, 1),
        "least_secure_minus_least_bare_ms": round(
            1e3 * (min(entry.seconds for entry in rounds.secure[1:]) - min(rounds.bare[1:])), 1
        ),
        "ratio": round(secure / bare, 3),
        "bytes_ratio": round(sent / (8 * wanted.length), 3),
    }
    print(json.dumps({**of, **figures, "rounds": len(rounds.bare) - 1, "load": load}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--length", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--kind", choices=("masked", "homomorphic"), default="masked")
    parser.add_argument("--train-seconds", type=float, default=0.0)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--site", type=Path)
    wanted = parser.parse_args()
    if wanted.site is not None:
        site(wanted.site, wanted.train_seconds)
        return
    with tempfile.TemporaryDirectory() as path:
        measure(Path(path), wanted)


if __name__ == "__main__":
    main()
