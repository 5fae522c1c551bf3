"""A party as one object: in processes of their own, killed on the way, shown other models, asked under other terms."""

from __future__ import annotations

import functools
import json
import multiprocessing
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import party_program as program
from party_program import NAMES, Coordinator, Site

from choral import Keep, Masked, federate
from choral.errors import ConfigError
from choral.privacy import AdaptiveClip, ClientPrivacy, EncodingError, Ledger, Privacy
from choral.privacy.accounting.events import CLIENT_UNIT
from choral.protocols import Plain
from choral.protocols.errors import FaultyServerError, MessageError, TooFewSurvivorsError
from choral.trainers import FSVRG, CoCoA, Compute, Encoding, Epochs, FedProx, Task
from choral.trainers.algorithms.interface import Done, Exchange
from choral.trainers.engines.exchange_messages import Told, digest_of
from choral.trainers.federated.party import TrainingParty, own_party
from choral.trainers.federated.terms.site_metrics import CHANNEL
from choral.trainers.federated.terms.task_code import code_of
from choral.trainers.federated.terms.trained_for import TrainedFor
from choral.trainers.federated.terms.training_terms import TrainingTerms
from choral.trainers.local_steps.resident_model import initial_model
from choral.trainers.run_folder.evidence.receipts import model_digest, read
from choral.trainers.task.flat_vector import Layout

PATIENCE = 60.0  # seconds for one answer, on a busy machine
PRELOADED = ["choral.trainers.federated.federate", "choral.privacy.per_sample.model", "choral.protocols.masking.masked"]
PRELOADED += ["torch._dynamo"]  # an optimizer's first step imports it
"""What every party's process would take seconds to import: once, in the process that they are forked from."""


class Processes:
    """Each party in a process of its own; between them and this one go bytes."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.pipes: dict[str, Any] = {}
        self.running: dict[str, Any] = {}

    def start(self, name: str, dies: str = "") -> None:
        ours, theirs = self.context.Pipe()
        told = json.dumps({"name": name, "kind": self.kind, "folder": str(self.folder), "dies": dies}).encode()
        self.running[name] = self.context.Process(target=program.serve, args=(theirs, told), daemon=True)
        self.running[name].start()
        theirs.close()
        self.pipes[name] = ours

    def ask(self, name: str, frame: bytes) -> list[bytes]:
        """Its answers; those that came before it died, if it does."""
        pipe, answers = self.pipes.get(name), []
        try:
            if pipe is not None:
                pipe.send_bytes(frame)
                assert pipe.poll(PATIENCE), f"{name} does not answer"
                while part := pipe.recv_bytes():
                    answers.append(part)
                    assert pipe.poll(PATIENCE), f"{name} does not answer"
        except (EOFError, OSError):
            self.pipes.pop(name).close()
        return answers

    def stop(self) -> None:
        for pipe in self.pipes.values():
            pipe.send_bytes(b"")
            pipe.close()
        for process in self.running.values():
            process.join(PATIENCE)
            process.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Callable[[str], Processes]]:
    made: list[Processes] = []

    def make(kind: str) -> Processes:
        folder = tmp_path / kind
        folder.mkdir()
        made.append(Processes(kind, folder))
        return made[-1]

    yield make
    for one in made:
        one.stop()


class Here:
    """The same parties in this process."""

    def __init__(self, kind: str, folder: Path, changed: dict[str, dict[str, Any]] | None = None, **same: Any) -> None:
        self.sites = {name: Site(name, kind, folder, **same, **(changed or {}).get(name, {})) for name in NAMES}

    def ask(self, name: str, frame: bytes) -> list[bytes]:
        return list(self.sites[name].answer(frame))


def first_weights() -> torch.Tensor:
    return Layout(initial_model(program.build, program.dataset_of(NAMES[0]), program.SEED)).read()


def paid(folder: Path, name: str) -> int:
    path = folder / f"{name}.jsonl"
    if not path.exists():
        return 0
    ledger = Ledger(path)
    return len(ledger.releases if ledger.unit == CLIENT_UNIT else ledger.events)


@pytest.mark.parametrize("kind", ["fedavg", "dane", "scaffold", "private"])
def test_parties_and_server_in_processes_of_their_own(
    kind: str, processes: Callable[[str], Processes], tmp_path: Path
) -> None:
    """The weights of `federate` bit by bit where no noise is in them; the ledgers byte by byte where it is."""
    run = federate(
        program.TASK,
        {name: program.dataset_of(name) for name in NAMES},
        rounds=program.ROUNDS,
        algorithm=program.ALGORITHMS[kind],
        privacy=program.privacy_of(kind),
        secure_sum=Masked(),
        compute=Compute(seed=program.SEED),
        keep=Keep(out=tmp_path / "run"),
    )
    apart = processes(kind)
    for name in NAMES:
        apart.start(name)
    server = Coordinator(apart, kind, first_weights())
    for number in range(1, program.ROUNDS + 1):
        server.round(number)
    assert set(server.survivors) == {NAMES}
    whole = torch.cat([run.state[name].reshape(-1) for name in server.terms.shapes])
    if kind == "private":
        for name in NAMES:
            in_one = (tmp_path / "run" / "ledger" / f"{name}.jsonl").read_bytes()
            assert (apart.folder / f"{name}.jsonl").read_bytes() == in_one
        assert not torch.equal(server.weights, first_weights())
    else:
        assert torch.equal(server.weights, whole)


@pytest.mark.parametrize(
    ("dies", "charged", "seen"),
    [
        ("before it is written down", 0, False),
        ("before it trains", 1, False),
        ("before it is sent", 1, False),
        ("after it is sent", 1, True),
    ],
)
def test_a_party_that_is_killed_has_told_nothing_that_its_ledger_does_not_hold(
    dies: str, charged: int, seen: bool, processes: Callable[[str], Processes]
) -> None:
    apart = processes("private")
    for name in NAMES:
        apart.start(name, dies if name == "east" else "")
    server = Coordinator(apart, "private", first_weights())
    server.round(1)
    assert ("east" in server.survivors[0]) == seen
    assert paid(apart.folder, "east") == charged
    assert [paid(apart.folder, name) for name in ("north", "south")] == [1, 1]
    apart.running["east"].join(PATIENCE)
    apart.start("east")  # from its ledger and its public state
    server.round(2)
    assert server.survivors[1] == NAMES
    assert paid(apart.folder, "east") == charged + 1


def test_a_party_that_is_shown_another_model_refuses_before_it_has_paid(tmp_path: Path) -> None:
    here = Here("private", tmp_path)
    server = Coordinator(here, "private", first_weights())
    server.round(1, shown={"south": first_weights() + 0.5})
    assert server.survivors == [("north", "east")]
    assert [paid(tmp_path, name) for name in NAMES] == [1, 0, 1]
    assert "was told other weights, tensors or another exchange" in here.sites["south"].refused[0]
    server.round(2)
    assert server.survivors[1] == NAMES
    assert [paid(tmp_path, name) for name in NAMES] == [2, 1, 2]


@pytest.mark.parametrize("kind", ["private", "dane"])
def test_each_party_keeps_receipts_under_the_identity_that_the_others_have_pinned(kind: str, tmp_path: Path) -> None:
    """One for each round, with what came of it; every sum of it, with the signatures of the others on the survivors."""
    here = Here(kind, tmp_path)
    server = Coordinator(here, kind, first_weights())
    server.round(1)
    server.round(2)
    for name in NAMES:
        here.sites[name].party.leave(model_digest(server.weights), completed=2)
        here.sites[name].party.leave(model_digest(server.weights), completed=2)  # and nothing more
    found = {name: [content for content, _ in read(tmp_path / "receipts" / f"{name}.jsonl")] for name in NAMES}
    for name, (terms, first, second) in found.items():
        assert terms["text"] == server.terms.text.decode()
        assert (first["round"], second["round"], first["came"]) == (1, 2, second["given"])
        assert second["came"] == model_digest(server.weights)
        assert first["given"] == model_digest(first_weights())
        assert all(line["key"] == program.IDENTITIES[name].public.hex() for line in (terms, first, second))
        assert [each["channel"] for each in first["sums"]] == list(server.sums)
        for each in (*first["sums"], *second["sums"]):
            assert each["vector"]
            assert each["in_sum"]
            assert each["dropped"] == []
            assert set(each["signatures"]) < set(NAMES) - {name} or len(each["signatures"]) == 2
            assert each["keys"] == {other: program.IDENTITIES[other].public.hex() for other in each["signatures"]}
        if kind == "private":
            ledger = Ledger(tmp_path / f"{name}.jsonl")
            assert first["ledger"]["after"] == second["ledger"]["before"] == ledger.head_after(1)
            assert second["ledger"]["after"] == ledger.head
            assert second["ledger"]["epsilon"] == pytest.approx(ledger.epsilon(1e-3))
    assert len({json.dumps([each["session"] for each in lines[1]["sums"]]) for lines in found.values()}) == 1


def test_a_party_that_was_shown_another_model_has_that_in_its_receipt(tmp_path: Path) -> None:
    here = Here("private", tmp_path)
    server = Coordinator(here, "private", first_weights())
    server.round(1, shown={"south": first_weights() + 0.5})
    for name in NAMES:
        here.sites[name].party.leave()
    (_, north), (_, south) = (
        [content for content, _ in read(tmp_path / "receipts" / f"{name}.jsonl")] for name in ("north", "south")
    )
    assert (north["given"], south["given"]) == (model_digest(first_weights()), model_digest(first_weights() + 0.5))
    assert north["sums"][0]["told"] != south["sums"][0]["told"]
    assert north["sums"][0]["dropped"] == ["south"]
    assert not south["sums"][0]["vector"]
    assert south["sums"][0]["in_sum"] is False
    assert south["came"] is None


def test_a_server_that_has_a_party_train_twice_or_for_ever_is_refused_before_it_has_paid(tmp_path: Path) -> None:
    """Its sums of one exchange over other survivors would differ by one party's vector; each costs budget besides."""
    here = Here("private", tmp_path)
    server = Coordinator(here, "private", first_weights())
    server.round(2)
    for again, why in (
        (2, "has trained for exchange 0 of round 2 or a later one"),
        (1, "or a later one"),
        (4, "of the 3"),
    ):
        with pytest.raises(TooFewSurvivorsError):
            server.round(again)
        assert all(why in site.refused[-1] for site in here.sites.values())
        assert [paid(tmp_path, name) for name in NAMES] == [1, 1, 1]
    server.round(3)
    assert server.survivors[-1] == NAMES


@pytest.mark.parametrize(
    ("changed", "signed", "refusal"),
    [
        ({"algorithm": FedProx(mu=0.3)}, False, "the training terms that the parties sign are not those of 'south'"),
        ({"rounds": 4}, False, "the training terms that the parties sign are not those of 'south'"),
        ({"encoding": Encoding(weights="equal")}, False, "accepts modulus bits of at most 30"),
        ({"rounds": 4}, True, "other training terms than this party was told of"),
    ],
)
def test_a_party_with_other_terms_refuses_before_it_has_paid(
    changed: dict[str, Any], signed: bool, refusal: str, tmp_path: Path
) -> None:
    """At the opening where they are signed with it, or are of the sum; else at Begin."""
    here = Here("private", tmp_path, {"south": changed}, signed=signed)
    server = Coordinator(here, "private", first_weights(), signed=signed)
    server.round(1)
    assert server.survivors == [("north", "east")]
    assert refusal in here.sites["south"].refused[0]
    assert [paid(tmp_path, name) for name in NAMES] == [1, 0, 1]


def test_the_promise_in_the_terms_is_the_partys_own(tmp_path: Path) -> None:
    """A server that asks for a weaker promise gets no digest that fits it."""
    asked = replace(program.terms_of("private"), privacy={"epsilon": 400.0})
    party = own(tmp_path, terms=asked)
    assert party.terms.digest == program.terms_of("private").digest != asked.digest


def own(tmp_path: Path, **changed: Any) -> TrainingParty:
    """What north makes of terms, by itself."""
    given: dict[str, Any] = {"privacy": program.PRIVACY, "ledger": Ledger(tmp_path / "north.jsonl")}
    asked = changed.pop("terms", program.terms_of("private"))
    given |= changed
    return own_party("north", program.dataset_of("north"), program.TASK, asked, lambda _: {}, **given)


def test_a_party_refuses_at_its_own_door_what_its_promise_does_not_cover(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="read from the records outside fit"):
        own(tmp_path, terms=program.terms_of("dane"))
    with pytest.raises(ConfigError, match="go together"):
        own(tmp_path, ledger=None)
    with pytest.raises(ConfigError, match="not below 1/n"):
        own(tmp_path, privacy=Privacy(epsilon=1.0, delta=0.1))
    small = replace(program.terms_of("private").federation, largest=32)
    with pytest.raises(ConfigError, match="40 records weigh more than the cap of 32 that was agreed on"):
        own(tmp_path, terms=replace(program.terms_of("private"), federation=small))
    alike = replace(program.terms_of("dane"), algorithm=CoCoA(), encoding=Encoding(weights="equal"))
    with pytest.raises(ConfigError, match='cocoa with weights="equal"'):
        own(tmp_path, terms=alike, privacy=None, ledger=None)
    assert not (tmp_path / "north.jsonl").exists()


def test_training_that_goes_by_the_ledger_is_not_sent(tmp_path: Path) -> None:
    class Careless:
        length = 7

        def do(self, orders: Any, weights: torch.Tensor, number: int) -> Any:
            for name, _ in orders:
                yield name, Done(vector=torch.full((7,), 0.25), steps=1)

    here = Here("private", tmp_path)
    here.sites["south"].party._trainer = Careless()
    server = Coordinator(here, "private", first_weights())
    server.round(1)
    assert server.survivors == [("north", "east")]
    assert "went by its ledger" in str(here.sites["south"].party.error)


def test_a_failure_is_a_dropout_and_what_the_party_remembers_counts_only_if_it_survived(tmp_path: Path) -> None:
    here = Here("scaffold", tmp_path)
    server = Coordinator(here, "scaffold", first_weights())
    south = here.sites["south"].party
    codecs, south._codecs = south._codecs, {"update": Beyond()}
    server.round(1)
    assert server.survivors == [("north", "east")]
    assert isinstance(south.error, EncodingError)
    assert south.state is None
    assert here.sites["north"].party.state is not None
    south._codecs = codecs
    server.round(2)
    assert south.error is None
    assert south.state is not None
    before = here.sites["north"].party.state["variate"].clone()
    server.round(3)
    assert not torch.equal(here.sites["north"].party.state["variate"], before)
    here.sites["north"].party.undo()
    assert torch.equal(here.sites["north"].party.state["variate"], before)


class Beyond:
    def pay(self, exchange: Any) -> None: ...

    def encode(self, update: torch.Tensor) -> Any:
        raise EncodingError("the largest coordinate is 17, expected at most the bound 16")

    def stand_in(self) -> None: ...


def test_in_one_process_too_each_party_compares_what_it_is_told_with_what_is_signed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from choral.protocols.in_process import DriverRound

    needs = DriverRound.needs
    monkeypatch.setattr(DriverRound, "needs", lambda self, name: replace(needs(self, name), weights=bytes(32)))
    with pytest.raises(FaultyServerError, match="told other weights"):
        federate(
            program.TASK,
            {name: program.dataset_of(name) for name in NAMES},
            rounds=1,
            privacy=program.PRIVACY,
            secure_sum=Masked(),
            keep=Keep(out=tmp_path / "run"),
        )
    assert not list((tmp_path / "run" / "ledger").glob("*.jsonl"))


def test_the_digest_is_of_all_that_a_party_computes_from() -> None:
    weights = torch.arange(4.0)
    ask = Exchange(channel="update", weights=weights, new={"a": torch.ones(2)}, kept={"b": torch.zeros(2)})
    others = [
        (replace(ask, weights=weights + 1e-7), 1),
        (replace(ask, channel="gradient"), 1),
        (replace(ask, new={"a": torch.ones(2, dtype=torch.float64)}), 1),
        (replace(ask, new={"a": torch.ones(1, 2)}), 1),
        (replace(ask, new={"c": torch.ones(2)}), 1),
        (replace(ask, kept={"b": torch.full((2,), -0.0)}), 1),
        (ask, 2),
    ]
    digests = {digest_of(other, number) for other, number in others}
    assert len(digests | {digest_of(ask, 1)}) == len(others) + 1
    same = replace(ask, new={"a": torch.ones(2), "b": torch.zeros(2)}, kept={})  # wherever it has them from
    assert digest_of(same, 1) == digest_of(ask, 1)


def test_the_exchanges_of_a_round_come_in_the_order_of_its_algorithm() -> None:
    """Each is a training at weights of the server's choice: another order would be one more of some kind."""
    channels = ("counts", "gradient", "update", CHANNEL, "other")

    def had(terms: TrainingTerms) -> list[set[str]]:
        return [{name for name in channels if terms.has(name, exchange)} for exchange in range(5)]

    plain, dane, shares = (program.terms_of(kind) for kind in ("fedavg", "dane", "shares"))
    assert had(plain) == [{"update"}, set(), set(), set(), set()]
    assert had(dane) == [{"gradient"}, {"update"}, set(), set(), set()]
    assert had(shares) == [{"update"}, {"update"}, set(), set(), set()]  # two steps
    assert had(replace(dane, metrics=("accuracy",))) == [{"gradient"}, {"update", CHANNEL}, {CHANNEL}, set(), set()]
    scaled = replace(plain, algorithm=FSVRG(step=0.1))
    assert had(scaled) == [{"counts", "gradient"}, {"gradient", "update"}, {"update"}, set(), set()]
    assert not plain.has("update", -1)


def test_an_exchange_as_bytes_is_what_it_was_or_is_refused() -> None:
    ask = Exchange(channel="update", weights=torch.arange(7.0), new={"a": torch.ones(2)}, kept={"b": torch.zeros(2)})
    told = Told.of(ask, 3, 1)
    raw, kept = told.message(), {"b": torch.zeros(2), "c": torch.ones(1)}
    read = Told.read(raw, length=7, kept=kept)
    assert (read.number, read.exchange, read.digest) == (3, 1, told.digest)
    assert Told.read(raw, length=7, kept={"b": torch.ones(2)}).digest != told.digest
    with pytest.raises(MessageError, match="goes on from 'b'"):
        Told.read(raw, length=7, kept={})
    with pytest.raises(MessageError, match="shape"):
        Told.read(raw, length=8, kept=kept)
    with pytest.raises(MessageError, match="at most"):
        Told.read(raw + bytes(1 << 20), length=7, kept=kept)
    for cut in (b"", raw[:4], raw[:40], raw[:-1], bytes(64), b"\xff" * 200):
        with pytest.raises(MessageError):
            Told.read(cut, length=7, kept=kept)
    for change in (b"exchange", b"number", b"weights", b"new a"):
        assert change in raw
        with pytest.raises(MessageError):
            Told.read(raw.replace(change, b"x" * len(change)), length=7, kept=kept)


def test_a_channel_that_was_not_agreed_on_is_refused(tmp_path: Path) -> None:
    site = Site("north", "fedavg", tmp_path)
    strange = Exchange(channel="gradient", weights=torch.zeros(7))
    with pytest.raises(MessageError, match="no channel 'gradient'"):
        site.party.hear(Told.of(strange, 1, 0).message())
    with pytest.raises(MessageError, match="no sum of channel 'gradient'"):
        site.party.handle("gradient", b"")


@pytest.mark.parametrize(("kind", "kept", "hashed"), [(Plain(), False, 0), (Plain(), True, 2), (Masked(), False, 2)])
def test_what_a_round_is_computed_from_is_hashed_once_before_anybody_trains_and_only_if_somebody_signs_it(
    kind: Any, kept: bool, hashed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order: list[str] = []

    def hashing(*given: Any) -> bytes:
        order.append("hashed")
        return digest_of(*given)

    def fit(*given: Any) -> None:
        order.append("trained")
        program.TASK.fit(*given)

    monkeypatch.setattr("choral.trainers.engines.exchange_messages.digest_of", hashing)
    federate(
        replace(program.TASK, fit=fit),
        {name: program.dataset_of(name) for name in NAMES},
        rounds=2,
        secure_sum=kind,
        keep=Keep(out=tmp_path / "run") if kept else None,
    )
    assert order == ["hashed"] * (hashed > 0) + ["trained"] * 3 + ["hashed"] * (hashed > 1) + ["trained"] * 3


# ------------------------------------------------------------------------------------------- trained for, over restarts


def test_a_party_that_restarts_in_mid_round_does_not_train_twice_for_one_exchange(
    processes: Callable[[str], Processes],
) -> None:
    """Killed when it has paid, or sent: the same round again, under whichever number of the sum, costs it nothing."""
    apart = processes("private")
    for name in NAMES:
        apart.start(name, "before it trains" if name == "east" else "")
    server = Coordinator(apart, "private", first_weights())
    server.round(1)
    assert server.survivors == [("north", "south")]
    apart.running["east"].join(PATIENCE)
    apart.start("east")
    with pytest.raises(TooFewSurvivorsError):
        server.round(1)
    assert [paid(apart.folder, name) for name in NAMES] == [1, 1, 1]
    server.round(2)
    assert server.survivors[-1] == NAMES
    assert [paid(apart.folder, name) for name in NAMES] == [2, 2, 2]


def test_what_was_trained_for_is_stored_before_anything_is_paid_for(tmp_path: Path) -> None:
    here = Here("private", tmp_path)
    server = Coordinator(here, "private", first_weights())
    east = here.sites["east"]

    def full(raw: bytes) -> None:
        raise OSError("no space left on device")

    keeps, east.party._trained_for._store = east.party._trained_for._store, full
    with pytest.raises(OSError, match="no space"):
        server.round(1)
    assert [paid(tmp_path, name) for name in NAMES] == [1, 1, 0]
    east.party._trained_for._store = keeps
    server.round(2)
    assert server.survivors == [NAMES]


def test_what_was_trained_for_is_of_one_party_and_of_one_training() -> None:
    kept: list[bytes] = []
    first = TrainedFor(kept.append).bound("north", b"t" * 32)
    first.write(2, 1)
    again = TrainedFor(kept.append, kept[-1]).bound("north", b"t" * 32)
    covered = [again.covers(*at) for at in ((1, 9), (2, 0), (2, 1), (2, 2), (3, 0))]
    assert covered == [True, True, True, False, False]
    for name, terms, state in (
        ("south", b"t" * 32, kept[-1]),
        ("north", b"u" * 32, kept[-1]),
        ("north", b"t" * 32, b""),
        ("north", b"t" * 32, kept[-1][:-1]),
        ("north", b"t" * 32, kept[-1].replace(b"\x95\x01", b"\x95\x02")),
    ):
        with pytest.raises(ConfigError, match="of another party or training"):
            TrainedFor(None, state).bound(name, terms)


# ------------------------------------------------------------------------------------------ promises to clients apart


@pytest.mark.parametrize("kind", ["clients", "central"])
def test_each_client_adds_its_share_of_the_noise_where_it_stands(
    kind: str, processes: Callable[[str], Processes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hardly any noise the mean is that of the clipped updates, found without privacy and clipped here."""
    apart = processes(kind)
    for name in NAMES:
        apart.start(name, "before it is sent" if name == "east" else "")
    server = Coordinator(apart, kind, first_weights())
    server.round(1)
    assert server.survivors == [("north", "south")]
    assert [paid(apart.folder, name) for name in NAMES] == [1, 1, 1]
    change = server.weights - first_weights()
    federate(
        program.TASK,
        {name: program.dataset_of(name) for name in NAMES},
        rounds=1,
        compute=Compute(seed=program.SEED, engine=lambda resident: Noted(resident)),
    )
    clipped = [Noted.seen[name] * (0.05 / Noted.seen[name].norm()) for name in ("north", "south")]
    assert all(Noted.seen[name].norm() > 0.05 for name in NAMES)
    assert torch.allclose(change.double(), sum(clipped).double() / 2, atol=0.02 * 0.05)  # 16 deviations of the noise
    apart.running["east"].join(PATIENCE)
    apart.start("east")  # its ledger has a plan, which it goes on with, and not one of more noise
    server.round(2)
    assert server.survivors[-1] == NAMES
    assert [paid(apart.folder, name) for name in NAMES] == [2, 2, 2]


class Noted:
    """The resident trainer, noting what each party sent."""

    seen: dict[str, torch.Tensor] = {}  # noqa: RUF012 - of the class

    def __init__(self, resident: Any) -> None:
        from choral.trainers.engines.fastest import Fastest

        self._trainer, self.length = Fastest(resident), resident.layout.length

    def do(self, orders: Any, weights: torch.Tensor, number: int) -> Any:
        for name, done in self._trainer.do(orders, weights, number):
            self.seen[name] = done.vector.clone()
            yield name, done


def test_a_client_whose_training_fails_sends_its_noise_all_the_same(tmp_path: Path) -> None:
    here = Here("clients", tmp_path)
    server = Coordinator(here, "clients", first_weights())

    class Failing:
        length = 7

        def do(self, orders: Any, weights: torch.Tensor, number: int) -> Any:
            for name, _ in orders:
                yield name, Done(vector=torch.full((7,), torch.nan), steps=1)

    here.sites["south"].party._trainer = Failing()
    server.round(1)
    assert server.survivors == [NAMES]
    assert here.sites["south"].party.error is not None


def test_a_share_of_noise_needs_a_sum_that_hides_it(tmp_path: Path) -> None:
    """What the party's own terms of the sum do not keep up is refused before anything is trained."""
    spec = program.specs_of(program.terms_of("fedavg"), None)["update"]

    def driver(**policy: Any) -> Any:
        held = replace(Masked(corrupt=1).policy(spec), directory={n: program.IDENTITIES[n].public for n in NAMES})
        return Masked(corrupt=1).party_driver(
            spec, name="north", identity=program.IDENTITIES["north"], policy=replace(held, **policy)
        )

    def client(promise: ClientPrivacy, driver: Any) -> TrainingParty:
        return own_party(
            "north",
            program.dataset_of("north"),
            program.TASK,
            program.terms_of("clients"),
            lambda _: {"update": driver},
            privacy=promise,
            ledger=Ledger(),
        )

    plain = Plain().party_driver(spec, name="north", identity=program.IDENTITIES["north"], policy=None)
    with pytest.raises(ConfigError, match="no policy that this party holds the server to"):
        client(program.CLIENTS, plain)
    with pytest.raises(ConfigError, match="takes part in sums of 2, but the noise is sized for 3"):
        client(replace(program.CLIENTS, min_survivors=3), driver(corrupt=0))
    with pytest.raises(ConfigError, match="expects 0 corrupt parties, and the noise 1"):
        client(replace(program.CLIENTS, colluders=1), driver(corrupt=0))
    with pytest.raises(ConfigError, match="follows the sums"):
        client(replace(program.CLIENTS, clip=AdaptiveClip()), driver())
    for noise in ("local", "central"):
        client(replace(program.CLIENTS, noise=noise), plain)
    client(replace(program.CLIENTS, colluders=1), driver())


# ----------------------------------------------------------------------------------------------- the code that is run


def test_the_code_in_the_terms_is_that_of_the_tasks_files(tmp_path: Path) -> None:
    """The same file anywhere gives the same text; a line more in it, or another function of it, another."""
    source = "def build(dataset): ...\ndef fit(model, optimizer, loader): ...\ndef loss(model, batch): ...\n"

    def task(text: str, folder: str, **more: Any) -> Task:
        path = tmp_path / folder / "job.py"
        path.parent.mkdir()
        path.write_text(text)
        found = runpy.run_path(str(path))
        return Task(build=found["build"], fit=found["fit"], evaluate=lambda _: 0.0, **more)

    here = code_of(task(source, "a"))
    assert here == code_of(task(source, "b"))
    assert re.fullmatch(r"choral \S+, task sha256:[0-9a-f]{64}", here)
    assert here != code_of(task(source + "RATE = 0.1\n", "c"))
    given = task(source, "d")
    assert here != code_of(replace(given, build=lambda _: given.build(_)))
    assert here == code_of(replace(given, fit=functools.partial(given.fit)))
    assert here != code_of(replace(given, fit=program.fit))
    assert code_of(replace(given, fit=program.EPOCHS)) == code_of(replace(given, fit=Epochs(criterion=print)))
    typed = eval(compile("lambda model, optimizer, loader: None", "<typed at a prompt>", "eval"))  # noqa: S307
    assert code_of(replace(given, fit=typed)).endswith("task of unknown source")


def test_parties_that_run_other_code_are_found_when_the_session_is_signed(tmp_path: Path) -> None:
    party = own(tmp_path, terms=replace(program.terms_of("private"), code="whatever the server says"))
    assert party.terms.code == code_of(program.TASK) == program.terms_of("private").code
