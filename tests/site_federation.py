"""A coordinator and sites with folders of their own, joined by function calls: what is between them is bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from choral.jobs.serving import offer_ahead, serve
from choral.jobs.settings import Arm, ServeSettings, Settings, SitesSettings, SumSettings, to_json
from choral.network import Offer, SiteFolder, TransportError, make_identity
from choral.network.errors import PeerLostError
from choral.network.host.host import SiteHost
from choral.network.host.training_code import coordinator_task
from choral.network.site.approvals import approve
from choral.network.site.budget import open_ledger
from choral.network.site.files.directory import Pinned
from choral.trainers import Run, federate
from choral.trainers.task.settings import AlgorithmSettings, Split, Training

SIZES = {"north": 40, "south": 25, "east": 21}
CODE = '''
"""A linear model of six numbers. At a site it can be made to stop in a round, and says in which it is."""
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.trainers import Task

def criterion(outputs, labels):
    return nn.functional.binary_cross_entropy_with_logits(outputs, labels.float())


def loss(model, batch):
    return nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1].float(), reduction="none")


def task(training, place=None, held=None):
    def build(dataset):
        model = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))
        optimizer = torch.optim.SGD(model.parameters(), lr=training.learning_rate)
        return model, optimizer, DataLoader(dataset, batch_size=training.batch_size, shuffle=True)

    def fit(model, optimizer, loader, round):
        if place is not None:
            with open(place / "state" / "in-fit", "w", opener=lambda *given: os.open(*given, 0o600)) as file:
                file.write(str(round))
            while (place / "state" / f"pause-{round}").exists():
                time.sleep(0.02)
        for points, labels in loader:
            optimizer.zero_grad()
            criterion(model(points), labels).backward()
            optimizer.step()

    def evaluate(model):
        return float(next(model.parameters()).sum())

    def right(model, dataset):
        points, labels = dataset.tensors
        outputs = model(points)
        found = float(((outputs > 0) == (labels > 0)).float().mean())
        return {"accuracy": found, "loss": float(criterion(outputs, labels))}

    held = {"here": held} if held is not None else None
    return Task(build=build, fit=fit, evaluate=evaluate, loss=loss, held_out=held, evaluate_party=right)


def site(data, training, seed):
    table = torch.from_numpy(np.load(data))
    dataset = TensorDataset(table[:, :6].contiguous(), table[:, 6].long())
    held = TensorDataset(*(tensor[: len(table) // 2] for tensor in dataset.tensors))
    return task(training, Path(data).parent, held), dataset


def coordinator(training, seed):
    return task(training), TensorDataset(torch.zeros(2, 6), torch.tensor([0, 1]))
'''
SITE = """
name = "NAME"
[coordinators.hub]
address = "127.0.0.1:PORT"
[sum]
minimum_cohort = 2
corrupt = 0
maximum_weight = 1024
[job]
algorithms = [
  "fedavg", "fedprox", "scaffold", "fedadam", "fedyogi", "fednova", "fedsgd", "fsvrg", "dane", "gd", "cocoa"
]
releases = ["fit", "derived", "data"]
[maxima]
jobs_a_day = 1000
[data.points]
path = "points.npy"
records = RECORDS
PROMISE
[tasks."linear.py"]
data = "points"
"""
NO_PROMISE = "without_privacy = true"
PROMISE = """
[data.points.promise]
epsilon = 8.0
delta = 1e-3
max_grad_norm = 1.0
unit = "UNIT"
noise = ["local", "distributed", "central"]
colluders = 0
"""


ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {"mu": 0.1},
    "scaffold": {},
    "fedadam": {},
    "fedyogi": {},
    "fednova": {},
    "fedsgd": {"batch_size": 20},
    "fsvrg": {},
    "dane": {"mu": 0.1},
    "gd": {},
    "cocoa": {"ridge": 0.1},
}


def records_of(name: str) -> np.ndarray[Any, Any]:
    """float32, shape (n, 7): the label is the last."""
    size = SIZES.get(name, 30)
    generator = torch.Generator().manual_seed(sum(name.encode()) + size)
    points = torch.randn(size, 6, generator=generator)
    labels = (points @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0, 0.3]) > 0).float()
    return torch.cat([points, labels[:, None]], 1).numpy()


def dataset_of(name: str) -> TensorDataset:
    table = torch.from_numpy(records_of(name))
    return TensorDataset(table[:, :6].contiguous(), table[:, 6].long())


@dataclass
class Federation:
    """Site folders below ``path``, with each other's certificates, and the coordinator's identity in ``path``/hub."""

    path: Path
    names: tuple[str, ...] = tuple(SIZES)
    promise: str = NO_PROMISE
    port: int = 8443
    code: str = CODE

    def __post_init__(self) -> None:
        self.hub = make_identity(self.path / "hub", "hub")
        made = {name: SiteFolder.init(self.path / name, name) for name in self.names}
        for name, folder in made.items():
            pinned = folder.pinned.with_(self.hub.certificate, coordinator=True)
            for other in self.names:
                if other != name:
                    pinned = pinned.with_(made[other].identity.certificate)
            pinned.write(folder.path / "directory.toml")
            self.configure(name)
        self.keys = {name: folder.signing.public for name, folder in made.items()}
        self.certificates = {name: folder.identity.certificate for name, folder in made.items()}
        (self.path / "linear.py").write_text(self.code)

    def configure(self, name: str, *edits: tuple[str, str]) -> None:
        """Write a site's data, code and site.toml, with these texts in the place of others."""
        folder = self.path / name
        table = records_of(name)
        text = SITE.replace("NAME", name).replace("PORT", str(self.port)).replace("RECORDS", str(len(table)))
        text = text.replace("PROMISE", self.promise)
        for old, new in edits:
            assert old in text
            text = text.replace(old, new)
        for path, content in (("site.toml", text), ("tasks/linear.py", self.code)):
            (folder / path).touch(0o600)
            (folder / path).write_text(content)
        (folder / "points.npy").touch(0o600)
        np.save(folder / "points.npy", table)

    def site(self, name: str) -> SiteFolder:
        return SiteFolder.open(self.path / name, coordinator="hub")

    @property
    def records(self) -> dict[str, int]:
        return {name: len(records_of(name)) for name in self.names}

    def settings(self, **changed: Any) -> Settings:
        """A job of three quick rounds."""
        given: dict[str, Any] = {
            "task": str(self.path / "linear.py"),
            "seed": 4,
            "training": Training(rounds=3, batch_size=8, learning_rate=0.1),
            "split": Split(min_classes=1),
            "secure_sum": SumSettings(kind="masked"),
            "sites": SitesSettings(records=sum(self.records.values()), largest=max(self.records.values())),
            "serve": ServeSettings(wait=0.2, step=5, training=30, away=0.5),
        }
        return Settings(**{**given, **changed})


def counting_code() -> str:
    """The same code, which notes every step that it computed at a site on that site's disk."""
    note = """            optimizer.step()
            if place is not None:
                with open(place / "state" / "steps", "ab", opener=lambda *given: os.open(*given, 0o600)) as file:
                    file.write(b"x")
"""
    return CODE.replace("            optimizer.step()\n", note)


def steps_of(federation: Federation, name: str) -> tuple[int, int]:
    """Of a site that counts: how many steps it has computed, and how many are on its ledger."""
    path = federation.path / name / "state" / "steps"
    ledger = open_ledger(federation.site(name), "points")
    paid = sum(getattr(event, "steps", 1) for _, events in ledger.segments for event in events)
    return path.stat().st_size if path.exists() else 0, paid


def private_sites(path: Path, unit: str) -> Federation:
    """Sites whose data may be used with a promise only."""
    return Federation(path, promise=PROMISE.replace("UNIT", unit))


def algorithm(kind: str, **settings: Any) -> AlgorithmSettings:
    return AlgorithmSettings(kind=kind, **settings)  # type: ignore[arg-type]


@dataclass
class Direct:
    """Carries requests to sites in this process. approving: whether an officer approves whatever is offered.

    before, after: called with a site's name and a request, before it answers, and with what it answered; what they
    raise is what became of it.
    """

    federation: Federation
    approving: bool = True
    hosts: dict[str, SiteHost] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)
    before: Callable[[str, bytes], None] | None = None
    after: Callable[[str, bytes], bytes] | None = None
    gone: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name in self.federation.names:
            self.start(name)

    def start(self, name: str) -> None:
        """The site's process, anew: nothing that it had in memory is left."""
        self.hosts[name] = SiteHost(self.federation.site(name))
        self.made[name] = self.made.get(name, 0) + 1
        self.gone.discard(name)

    def stop(self, name: str) -> None:
        self.gone.add(name)

    @property
    def connected(self) -> frozenset[str]:
        return frozenset(self.hosts) - self.gone

    def calls(self, name: str) -> int:
        return self.made[name]

    def wait_for(self, names: Iterable[str], *, timeout: float, count: int | None = None) -> frozenset[str]:
        del timeout, count
        return frozenset(names) & self.connected

    def replies(
        self,
        outbox: Mapping[str, bytes],
        *,
        timeout: float,
        reply_limit: int,
        away: float | None = None,
        waiting: Callable[[tuple[str, ...]], None] | None = None,
    ) -> Generator[tuple[str, memoryview | TransportError]]:
        del timeout, away, waiting
        yield from {name: self._one(name, raw, reply_limit) for name, raw in outbox.items()}.items()

    def _one(self, name: str, raw: bytes, limit: int) -> memoryview | TransportError:
        self.asked[name] = self.asked.get(name, 0) + 1
        try:
            if self.before is not None:
                self.before(name, raw)
            if name in self.gone:
                raise PeerLostError("was away for 0.5 s", peer=name)
            reply = self.hosts[name].handle(raw, sender="hub")
            if self.after is not None:
                reply = self.after(name, reply)
        except TransportError as error:
            return error
        assert len(reply) <= limit
        return memoryview(reply)

    def approve_all(self) -> None:
        """Whatever was offered, at each site."""
        for name in self.federation.names:
            folder = self.federation.site(name)
            for offer in folder.offers.all():
                approved(folder, offer)


def rehearsed(
    federation: Federation, settings: Settings, *, without: Mapping[int, Iterable[str]] | None = None, **options: Any
) -> Run:
    """The same job by `federate`, in this process. without: whose training fails, by round."""
    from choral.jobs.training import compute_of, federation_of, privacy_of

    arm = Arm(private=settings.privacy.epsilon is not None)
    privacy = privacy_of(settings, arm, settings.privacy.epsilon) if arm.private else None
    (task, _), _ = coordinator_task(Path(settings.task), settings.training, settings.seed)
    parties = {name: dataset_of(name) for name in federation.names}
    fit = task.fit
    missing = {number: [len(parties[name]) for name in names] for number, names in (without or {}).items()}

    def failing(model: Any, optimizer: Any, loader: Any, round: int) -> None:
        if len(loader.dataset) in missing.get(round, ()):
            raise RuntimeError("away")
        fit(model, optimizer, loader, round)

    given = federation_of(settings, arm, replace(task, fit=failing) if missing else task, privacy)
    return federate(parties=parties, compute=compute_of(settings, settings.seed), **given, **options)


def same_weights(run: Run, other: Run) -> bool:
    """Bit by bit."""
    mine, theirs = run.state, other.state
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def approved(folder: SiteFolder, offer: Offer) -> None:
    approve(folder, offer, until_tomorrow(), by="officer", now=datetime.now(UTC))


def until_tomorrow() -> date:
    return (datetime.now(UTC) + timedelta(days=1)).date()


def served(
    carrier: Direct, settings: Settings, *, out: Path | None = None, resume: bool = False
) -> tuple[Run, list[str]]:
    """The run, and what was said. The offer is approved beforehand where an officer approves all."""
    said: list[str] = []
    if carrier.approving:
        offer = offer_for(carrier.federation, settings)
        for name in carrier.federation.names:
            approved_at(carrier.federation, name, offer)
    hub = carrier.federation.hub
    run = serve(settings, carrier, carrier.federation.keys, coordinator=hub, out=out, resume=resume, say=said.append)
    return run, said


def approved_at(federation: Federation, name: str, offer: Offer) -> None:
    folder = federation.site(name)
    folder.offers.keep(offer)
    approved(folder, offer)


def offer_for(federation: Federation, settings: Settings) -> Offer:
    """The offer that the coordinator will make."""
    return offer_ahead(settings, federation.keys, coordinator="hub")


def toml_of(settings: Settings) -> str:
    """The settings that differ from the usual ones, as a job file."""
    usual, given = to_json(Settings()), to_json(settings)
    lines = [f"{key} = {json.dumps(value)}" for key, value in given.items() if not isinstance(value, dict)
             and value != usual[key]]  # fmt: skip
    for table, values in given.items():
        if isinstance(values, dict) and values != usual[table]:
            plain = {key: value for key, value in values.items() if value != usual[table].get(key)}
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in plain.items())]
    return "\n".join(lines) + "\n"


def write_directory(federation: Federation) -> Path:
    """The coordinator's directory.toml."""
    pinned = Pinned()
    for certificate in federation.certificates.values():
        pinned = pinned.with_(certificate)
    pinned.write(federation.path / "directory.toml")
    return federation.path / "directory.toml"
