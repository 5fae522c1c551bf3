"""A federation whose parties are given bytes and answer with bytes: what test_party.py runs in processes and in one.

A frame to a party is a letter and what follows: T, the exchange that comes next; M, a message of a sum, after its
channel and a zero byte; S, whether its vector is in the sum. Its answer is any number of frames, and an empty one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.privacy import ClientPrivacy, CorrelatedPrivacy, Ledger, Privacy, SharesPlan, SharesTerms, plan_shares
from choral.protocols import Masked, SumSpec
from choral.protocols.crypto.identity import Identity
from choral.protocols.driver import PartyDriver, ServerDriver
from choral.protocols.errors import ProtocolError
from choral.trainers import DANE, Compute, Encoding, Epochs, FedAvg, FedSGD, Scaffold, Task
from choral.trainers.algorithms.interface import FederationInfo, Server
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.federated.codec import cap_of
from choral.trainers.federated.one_round import Steps
from choral.trainers.federated.party import TrainingParty, own_party
from choral.trainers.federated.terms.clients import clients_of
from choral.trainers.federated.terms.task_code import code_of
from choral.trainers.federated.terms.trained_for import PartyMemory, TrainedFor
from choral.trainers.federated.terms.training_terms import TrainingTerms
from choral.trainers.run_folder.describe import settings_of
from choral.trainers.run_folder.evidence.party_receipts import Receipted

SIZES = {"north": 40, "south": 25, "east": 21}
NAMES = tuple(SIZES)
STEPS = FedSGD(batch_size=16, steps_per_round=2)
ALGORITHMS = {
    "fedavg": FedAvg(),
    "private": FedAvg(),
    "scaffold": Scaffold(),
    "dane": DANE(mu=0.1),
    "shares": STEPS,
    "banded": STEPS,
    "clients": FedAvg(),
    "central": FedAvg(),
}
PRIVACY = Privacy(epsilon=4.0, delta=1e-3)
IN_SHARES = Privacy(epsilon=4.0, delta=1e-3, noise="distributed")
CLIENTS = ClientPrivacy(epsilon=1e6, delta=1e-3, clip=0.05, min_survivors=2, colluders=0)  # hardly any noise
BANDED = CorrelatedPrivacy(epsilon=4.0, delta=1e-3, mechanism="banded", bands=3, noise="distributed")
PROMISES: dict[str, Any] = {
    "private": PRIVACY,
    "shares": IN_SHARES,
    "banded": BANDED,
    "clients": CLIENTS,
    "central": replace(CLIENTS, noise="central"),
}
IDENTITIES = {name: Identity(bytes([place + 1]) * 32) for place, name in enumerate(NAMES)}
ROUNDS, SEED = 3, 4
EPOCHS = Epochs(criterion=nn.functional.binary_cross_entropy_with_logits)


def dataset_of(name: str) -> TensorDataset:
    generator = torch.Generator().manual_seed(SIZES[name])
    points = torch.randn(SIZES[name], 6, generator=generator)
    return TensorDataset(points, (points @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0, 0.3]) > 0).float())


def build(dataset: Any) -> Any:
    model = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=8, shuffle=True)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    for points, labels in loader:
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(points), labels).backward()
        optimizer.step()


TASK = Task(build=build, fit=fit, evaluate=lambda model: float(next(model.parameters()).sum()), loss=EPOCHS.loss)


def privacy_of(kind: str) -> Privacy | ClientPrivacy | None:
    return PROMISES.get(kind)


def sum_of(kind: str) -> Masked:
    return Masked(corrupt=1, dropouts=0, min_survivors=3) if kind in ("shares", "banded") else Masked()


def plan_of(promise: Privacy = IN_SHARES, **changed: Any) -> SharesPlan:
    """Of the noise in shares: two honest parties of three."""
    numbers = {"records": sum(SIZES.values()), "most_records": cap_of(max(SIZES.values())), "length": 7}
    terms = SharesTerms(batch_size=16, steps=ROUNDS * 2, parties=3, min_survivors=3, **numbers)
    return plan_shares(replace(promise, **changed), terms)


def terms_of(kind: str) -> TrainingTerms:
    info = FederationInfo(
        parties=len(NAMES),
        length=7,
        examples=sum(SIZES.values()),
        largest=cap_of(max(SIZES.values())),
        value_bound=16.0,
        weight=sum(SIZES.values()),
    )
    return TrainingTerms(
        algorithm=ALGORITHMS[kind],
        federation=info,
        encoding=Encoding(),
        privacy=settings_of(privacy_of(kind), len(NAMES)),
        shapes={"0.weight": (1, 6), "0.bias": (1,)},
        rounds=ROUNDS,
        code=code_of(TASK),
        shares=plan_of(PROMISES[kind]) if kind in ("shares", "banded") else None,
    )


def specs_of(terms: TrainingTerms, signed: bytes | None) -> dict[str, SumSpec]:
    channels = terms.algorithm.channels(terms.federation)
    return {name: replace(terms.codec(name, NAMES).spec, directory=len(NAMES), terms=signed) for name in channels}


class Site:
    """One party with its driver of each sum, whose public states are kept in a folder."""

    def __init__(self, name: str, kind: str, folder: Path, *, signed: bool = True, **changed: Any) -> None:
        self.name, self.folder, self.signed = name, folder, signed
        self.sum = sum_of(kind)
        privacy = privacy_of(kind)
        self.refused: list[str] = []
        self.party: TrainingParty = own_party(
            name,
            dataset_of(name),
            TASK,
            replace(terms_of(kind), **changed),
            self._drivers,
            privacy=privacy,
            ledger=Ledger(folder / f"{name}.jsonl", holder=name) if privacy else None,
            compute=Compute(seed=SEED),
            receipts=Receipted(path=folder / "receipts" / f"{name}.jsonl", identity=IDENTITIES[name], run="a run"),
            memory=PartyMemory(trained_for=TrainedFor(self._store("trained for"), self._stored("trained for"))),
        )

    def _drivers(self, terms: TrainingTerms) -> dict[str, PartyDriver]:
        drivers: dict[SumSpec, PartyDriver] = {}
        found = {}
        for channel, spec in specs_of(terms, terms.digest if self.signed else None).items():
            if spec not in drivers:
                drivers[spec] = self._driver(spec, f"sum {len(drivers)}")
            found[channel] = drivers[spec]
        return found

    def _path(self, what: str) -> Path:
        return self.folder / f"{self.name} {what}"

    def _store(self, what: str) -> Callable[[bytes], None]:
        path = self._path(what)

        def store(raw: bytes) -> None:
            with path.with_suffix(".fresh").open("wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            path.with_suffix(".fresh").replace(path)

        return store

    def _stored(self, what: str) -> bytes | None:
        return self._path(what).read_bytes() if self._path(what).exists() else None

    def _driver(self, spec: SumSpec, purpose: str) -> PartyDriver:
        policy = replace(self.sum.policy(spec), directory={name: IDENTITIES[name].public for name in NAMES})
        return self.sum.party_driver(
            spec,
            name=self.name,
            identity=IDENTITIES[self.name],
            policy=policy,
            store=self._store(purpose),
            state=self._stored(purpose),
            purpose=purpose,
        )

    def answer(self, frame: bytes) -> tuple[bytes, ...]:
        kind, body = frame[:1], frame[1:]
        try:
            if kind == b"T":
                self.party.hear(body)
            elif kind == b"S":
                self.party.settle(survived=body == b"yes")
            else:
                channel, _, raw = body.partition(b"\0")
                return self.party.handle(channel.decode(), raw)
        except ProtocolError as error:
            self.refused.append(f"{type(error).__name__}: {error}")
        return ()


def serve(pipe: Connection, raw: bytes) -> None:
    """A party's process. told["dies"]: the place where it is killed, as by a power cut."""
    torch.set_num_threads(1)
    told = json.loads(raw)
    folder, dies = Path(told["folder"]), told["dies"]
    arm(dies)
    site = Site(told["name"], told["kind"], folder)
    trained: list[int] = []
    answer = TrainingParty.answer

    def noticed(self: TrainingParty, done: Any) -> Any:
        encoded = answer(self, done)
        trained.append(1)
        if dies == "before it is sent":
            os.kill(os.getpid(), signal.SIGKILL)
        return encoded

    TrainingParty.answer = noticed  # type: ignore[method-assign]
    while frame := pipe.recv_bytes():
        for part in site.answer(frame):
            pipe.send_bytes(part)
        if trained and dies == "after it is sent":
            os.kill(os.getpid(), signal.SIGKILL)
        pipe.send_bytes(b"")
    pipe.close()


def arm(dies: str) -> None:
    append = Ledger.append

    def killed(self: Ledger, *args: Any, **kwargs: Any) -> None:
        if dies == "before it is written down":
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, *args, **kwargs)
        if dies == "before it trains":
            os.kill(os.getpid(), signal.SIGKILL)

    Ledger.append = killed  # type: ignore[method-assign]


class Ways(Protocol):
    """How frames reach a party."""

    def ask(self, name: str, frame: bytes) -> list[bytes]: ...


class Coordinator:
    """The server: it holds the weights, what the algorithm has it remember, and a driver of each sum."""

    def __init__(self, ways: Ways, kind: str, weights: torch.Tensor, *, signed: bool = True) -> None:
        self.ways, self.terms, self.weights = ways, terms_of(kind), weights
        if isinstance(privacy := privacy_of(kind), ClientPrivacy):
            self.terms = replace(self.terms, clients=clients_of(self.terms, privacy, Ledger(), "clients"))
        self.state: dict[str, torch.Tensor] = {}
        self.survivors: list[tuple[str, ...]] = []
        self.sums: dict[str, ServerDriver] = {}
        drivers: dict[SumSpec, ServerDriver] = {}
        directory = {name: identity.public for name, identity in IDENTITIES.items()}
        for channel, spec in specs_of(self.terms, self.terms.digest if signed else None).items():
            if spec not in drivers:
                drivers[spec] = sum_of(kind).server_driver(spec, directory=directory)
                self.pass_on(channel, drivers[spec].open())
            self.sums[channel] = drivers[spec]

    def pass_on(self, channel: str, trips: Iterator[Any]) -> None:
        for trip in trips:
            for name, raw in trip.outbox.items():
                for part in self.ways.ask(name, b"M" + channel.encode() + b"\0" + raw):
                    trip.receive(name, part)
            assert not trip.faults, trip.faults

    def round(self, number: int, shown: Mapping[str, torch.Tensor] | None = None) -> None:
        """shown: to some parties, other weights than to the rest."""
        server = Server(federation=self.terms.federation, number=number, state=dict(self.state))
        steps, mean, exchange = Steps(self.terms.algorithm.round(server, self.weights)), None, 0
        while (ask := steps.advance(mean)) is not None:
            told = Told.of(ask, number, exchange)
            for name in NAMES:
                other = (shown or {}).get(name)
                mine = told if other is None else Told.of(dataclasses.replace(ask, weights=other), number, exchange)
                self.ways.ask(name, b"T" + mine.message())
            driver = self.sums[ask.channel]
            codec = self.terms.codec(ask.channel, NAMES)
            codec.begin(NAMES, partial(getattr, told, "digest"))
            self.pass_on(ask.channel, driver.round(told.terms(self.terms.digest)))
            assert driver.result is not None
            self.survivors.append(driver.result.survivors)
            for name in NAMES:
                self.ways.ask(name, b"S" + (b"yes" if name in driver.result.survivors else b"no"))
            mean, exchange = codec.decode(driver.result), exchange + 1
        self.weights, self.state = steps.weights, dict(server.state)
