"""Secure rounds with sites beside bare ones: the same transport, carrying float32 vectors that the coordinator sees.

    python benchmarks/network.py [--sites 3] [--length 100000] [--rounds 10] [--train-seconds 0] [--memory]
    python benchmarks/network.py --sites 10 --corrupt 2 --dropouts 1 --trips 4 2 --latency-ms 50 [--repeats 3]

Each site is a process with a folder of its own, made as `choral poc` makes it; between them is mutual TLS on this
machine. After each secure round of a job (`fit` is one step) the coordinator makes a bare one: weights down, the same
step by the same code, weights up, mean. Medians over the rounds after the first, in ms. `secure_minus_bare_ms` is what
privacy of the sum costs, bytes_ratio what it sends more. --memory: resident MB of coordinator and sites after each
round, and of a site with no job. --trips: jobs of each, in turns; `ratio_to_first` is over the median of the first of
them. --latency-ms: so much later is each message there, and so twice as much each answer. processor_ms: of all sites,
of a round. One JSON line for each figure, with the load of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from choral.jobs.rehearsal import RehearsedSites, make_rehearsal
from choral.jobs.serving import offer_ahead, serve
from choral.jobs.settings import ServeSettings, Settings, SumSettings, read_settings
from choral.network import BlockingHub, CertifiedIdentity, Limits, Link, Request, SiteFolder
from choral.network.host.host import SiteHost
from choral.network.site.approvals import approve
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


def processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bare_step(folder: SiteFolder) -> Callable[[np.ndarray], bytes]:
    """Train by the code that is installed there; nothing of Choral's is around it."""
    (data,) = folder.settings.data.values()
    if data.path is None:
        raise SystemExit(f"{folder.path} has no file of data")
    code = runpy.run_path(str(folder.path / "tasks" / "scale.py"))
    task, dataset = code["site"](folder.path / data.path, None, 0)
    model, optimizer, loader = task.build(dataset)

    def step(weights: np.ndarray) -> bytes:
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(weights))
        task.fit(model, optimizer, loader, 1)
        made: bytes = model.weight.detach().numpy().tobytes()
        return made

    return step


def site(path: Path, latency: float) -> None:
    """Be a site until this process is ended; and answer bare rounds."""
    folder = SiteFolder.open(path)
    host, bare = SiteHost(folder), functools.cache(lambda: bare_step(folder))

    def handler(request: Request) -> bytes:
        time.sleep(latency)
        if bytes(request.body[:4]) == BARE:
            answer = bare()(np.frombuffer(bytearray(request.body[4:]), np.float32))
        else:
            answer = host.handle(request.body, sender=request.sender)
        time.sleep(latency)
        return answer

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
        self.processor: list[float] = []
        self._spent = 0.0

    def _processor(self) -> float:
        return sum(map(processor_seconds, self._processes))

    def __call__(self, entry: RoundRecord) -> None:
        if not entry.round:
            return
        self.secure.append(entry)
        self.processor.append(self._processor() - self._spent)
        if self._wanted.memory:
            self.memory.append([resident_mb(), *map(resident_mb, self._processes)])
            return
        start = time.perf_counter()
        body = BARE + self._weights.tobytes()
        outbox = dict.fromkeys(self._names, body)
        replies = dict(self._hub.replies(outbox, timeout=600, reply_limit=4 * self._wanted.length))
        total = np.zeros(self._wanted.length, np.float64)
        for reply in replies.values():
            if isinstance(reply, Exception):
                raise reply
            total += np.frombuffer(reply, np.float32)
        self._weights = (total / len(replies)).astype(np.float32)
        self.bare.append(time.perf_counter() - start)
        self._spent = self._processor()


def measure(path: Path, wanted: argparse.Namespace) -> None:
    rehearsal = made(path, wanted)
    settings = read_settings(rehearsal.job, Settings)
    words = [sys.executable, __file__]
    words += ["--latency-ms", str(wanted.latency_ms), "--site"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    sites = [subprocess.Popen([*words, str(rehearsal.site(name))], env=environment) for name in rehearsal.names]
    try:
        identity = CertifiedIdentity.load(rehearsal.path / "hub", "hub")
        pinned = Pinned.read(rehearsal.directory).sites
        with BlockingHub(identity, pinned, host="127.0.0.1", port=settings.serve.port, limits=LIMITS) as hub:
            if set(rehearsal.names) - hub.wait_for(rehearsal.names, timeout=300):
                raise SystemExit("a site did not connect")
            idle = [resident_mb(process.pid) for process in sites]
            keys = {certificate.name: certificate.public_key for certificate in pinned}
            found: dict[int, list[Rounds]] = {trips: [] for trips in wanted.trips}
            for number, trips in itertools.product(range(wanted.repeats), wanted.trips):
                rounds = Rounds(hub, rehearsal.names, [process.pid for process in sites], wanted)
                found[trips].append(rounds)
                job = approved(rehearsal, settings, keys, trips, f"benchmark-{trips}-{number}")
                serve(
                    job, hub, keys, coordinator=identity, out=rehearsal.run.with_name(f"run-{trips}-{number}"),
                    say=lambda text: print(text, file=sys.stderr), on_round=rounds,
                )  # fmt: skip
            tell(wanted, found, idle)
    finally:
        for process in sites:
            process.kill()
            process.wait()


def approved(rehearsal: RehearsedSites, settings: Settings, keys: dict[str, bytes], trips: Any, name: str) -> Settings:
    """The settings of a job of so many trips, which every site has approved."""
    summing = replace(settings.secure_sum, trips=trips if settings.secure_sum.kind == "masked" else None)
    job = replace(settings, secure_sum=summing, serve=replace(settings.serve, job=name))
    offer = offer_ahead(job, keys, coordinator="hub")
    for site in rehearsal.names:
        folder = SiteFolder.open(rehearsal.site(site))
        folder.offers.keep(offer)
        approve(folder, offer, datetime.now(UTC).date() + timedelta(days=1), by="benchmark")
    return job


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
        secure_sum=SumSettings(kind=wanted.kind, corrupt=wanted.corrupt, dropouts=wanted.dropouts),
        serve=ServeSettings(wait=300.0, training=600.0, step=600.0),
    )
    return make_rehearsal(settings, path / "sites", job="benchmark", sites=None, data=path / "data")


def tell(wanted: argparse.Namespace, found: dict[int, list[Rounds]], idle: list[float]) -> None:
    of: dict[str, Any] = {"sites": wanted.sites, "length": wanted.length, "kind": wanted.kind}
    load = [round(value, 1) for value in os.getloadavg()]
    if wanted.memory:
        after = [[round(value) for value in row] for row in found[wanted.trips[0]][0].memory]
        print(json.dumps({**of, "site_idle_mb": round(max(idle)), "load": load}))
        print(json.dumps({**of, "coordinator_mb": [row[0] for row in after], "load": load}))
        print(json.dumps({**of, "largest_site_mb": [max(row[1:]) for row in after], "load": load}))
        return
    first: tuple[float, float, float] | None = None
    for trips, runs in found.items():
        later = [entry for rounds in runs for entry in rounds.secure[1:]]
        bares = [seconds for rounds in runs for seconds in rounds.bare[1:]]
        secure, bare = (1e3 * statistics.median(each) for each in ([entry.seconds for entry in later], bares))
        up, down = (statistics.median(getattr(entry, way) for entry in later) for way in ("bytes_up", "bytes_down"))
        processor = 1e3 * statistics.mean(spent for rounds in runs for spent in rounds.processor[1:])
        first = first or (secure, up + down, processor)
        figures = {
            "trips": trips,
            "latency_ms": wanted.latency_ms,
            "train_seconds": wanted.train_seconds,
            "secure_ms": round(secure, 1),
            "bare_ms": round(bare, 1),
            "secure_minus_bare_ms": round(secure - bare, 1),
            "least_secure_minus_least_bare_ms": round(1e3 * (min(e.seconds for e in later) - min(bares)), 1),
            "ratio": round(secure / bare, 3),
            "bytes_ratio": round((up + down) / (8 * wanted.length), 3),
            "processor_ms": round(processor),
            "ratio_to_first": round(secure / first[0], 3),
            "bytes_to_first": round((up + down) / first[1], 4),
            "processor_to_first": round(processor / first[2], 3),
        }
        print(json.dumps({**of, **figures, "rounds": len(later), "load": load}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--length", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--kind", choices=("masked", "homomorphic"), default="masked")
    parser.add_argument("--train-seconds", type=float, default=0.0)
    parser.add_argument("--trips", type=int, nargs="+", choices=(2, 3, 4), default=[4])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--corrupt", type=int)
    parser.add_argument("--dropouts", type=int)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--site", type=Path)
    wanted = parser.parse_args()
    if wanted.site is not None:
        site(wanted.site, wanted.latency_ms / 1e3)
        return
    with tempfile.TemporaryDirectory() as path:
        measure(Path(path), wanted)


if __name__ == "__main__":
    main()
