"""What a site refuses of a coordinator, by name in its own log, and what a coordinator does with a site that cheats.

Of each refusal the coordinator reads one word. Nothing is trained, nothing is paid for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from site_federation import (
    Direct,
    Federation,
    approved_at,
    counting_code,
    offer_for,
    private_sites,
    rehearsed,
    same_weights,
    served,
    steps_of,
)

from choral.jobs.settings import PrivacySettings, Settings, SumSettings
from choral.network.coordinator.remote import RemoteSum
from choral.network.errors import PeerFailedError
from choral.network.host import messages
from choral.network.host.host import SiteHost
from choral.network.host.messages import (
    JobRefused,
    JobTaken,
    JobUnknown,
    ProposeJob,
    StepTaken,
    TakeStep,
    largest_offer,
    read_reply,
    written,
)
from choral.protocols import Masked
from choral.protocols.errors import TooFewSurvivorsError
from choral.trainers.algorithms.interface import Exchange
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.federated import one_round
from choral.trainers.federated.session import Session
from choral.trainers.task.settings import Training

REFUSED = written(JobRefused())


@pytest.fixture(scope="module")
def open_sites(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("open"))


class Agreed:
    """north, which has agreed to a private job; the digest of that."""

    def __init__(self, path: Path) -> None:
        self.federation = private_sites(path, "record")
        settings = self.federation.settings(privacy=PrivacySettings(epsilon=4.0, delta=1e-3, noise="local"))
        self.offer = offer_for(self.federation, settings)
        approved_at(self.federation, "north", self.offer)
        self.path = path / "north"
        self.host = SiteHost(self.federation.site("north"))
        reply = read_reply(self.ask(written(ProposeJob(self.offer.message()))), limit=1 << 20)
        assert isinstance(reply, JobTaken)

    def ask(self, raw: bytes) -> bytes:
        return self.host.handle(raw, sender="hub")

    def step(self, told: bytes = b"", message: bytes = b"", channel: str = "update") -> bytes:
        return self.ask(written(TakeStep(self.offer.digest, channel, message, told)))

    def check_nothing_done(self) -> None:
        ledger = self.path / "ledgers" / "points.jsonl"
        assert not ledger.exists() or b"sampled" not in ledger.read_bytes()
        assert not (self.path / "state" / self.offer.digest / "trained-for").exists()
        assert not (self.path / "state" / "in-fit").exists()


@pytest.fixture
def agreed(tmp_path: Path) -> Iterator[Agreed]:
    made = Agreed(tmp_path)
    yield made
    made.check_nothing_done()


def told(length: int = 7, number: int = 1, **changed: Any) -> bytes:
    return Told.of(Exchange(channel="update", weights=torch.zeros(length), **changed), number, 0).message()


def test_what_is_no_message_is_refused(agreed: Agreed, caplog: pytest.LogCaptureFixture) -> None:
    step = written(TakeStep(agreed.offer.digest, "update", b"x", told()))
    odd = [
        b"", b"\0" * 100, step[1:], step[:-1], step + b"\0", step[:40], b"choral site 2\n" + step[14:],
        messages._MAGIC + msgspec.msgpack.encode(["StartShell", "rm"]),
        messages._MAGIC + msgspec.msgpack.encode(["TakeStep", agreed.offer.digest, 7, b"", b"", None]),
        messages._MAGIC + msgspec.msgpack.encode(["TakeStep", "../../x", "update", b"", b"", None]),
        messages._MAGIC + msgspec.msgpack.encode(["TakeStep", agreed.offer.digest, "u" * 65, b"", b"", None]),
        messages._MAGIC + msgspec.msgpack.encode(["TakeStep", agreed.offer.digest, "update", b"", b"", None, 1]),
    ]  # fmt: skip
    for raw in odd:
        caplog.clear()
        assert agreed.ask(raw) == REFUSED
        assert "no message between a coordinator and a site" in caplog.text


def test_what_is_larger_than_agreed_is_refused_unread(agreed: Agreed, caplog: pytest.LogCaptureFixture) -> None:
    """The bound follows the model that was agreed on; before there is one, it is that of an offer."""
    limit = agreed.host.request_limit
    assert limit < 2 * largest_offer()
    assert agreed.ask(bytes(limit + 1)) == REFUSED
    assert f"a message of {limit + 1} bytes, expected at most {limit}" in caplog.text
    assert agreed.step(told=bytes(limit - 1000)) == REFUSED
    fresh = SiteHost(agreed.federation.site("south"))
    assert fresh.request_limit == largest_offer()


def test_a_larger_model_than_agreed_is_refused(agreed: Agreed, caplog: pytest.LogCaptureFixture) -> None:
    assert agreed.step(told=told(8)) == REFUSED
    assert "expected weights of type float32 and shape (7,)" in caplog.text


def test_another_caller_and_another_job_reach_nobody(agreed: Agreed, caplog: pytest.LogCaptureFixture) -> None:
    step = written(TakeStep(agreed.offer.digest, "update", b"", told()))
    assert agreed.host.handle(step, sender="stranger") == REFUSED
    assert "'stranger' is not the coordinator" in caplog.text
    assert agreed.ask(written(TakeStep("0" * 64, "update", b"", told()))) == written(JobUnknown())


def test_a_step_of_no_sum_is_refused(agreed: Agreed, caplog: pytest.LogCaptureFixture) -> None:
    assert agreed.step(message=b"x", channel="gradient") == REFUSED
    assert "takes part in no sum of channel 'gradient'" in caplog.text
    assert agreed.step(message=b"x") == REFUSED
    assert agreed.step(told=told(), message=bytes(1 << 20)) == REFUSED
    assert "expected a message of at most" in caplog.text


def test_more_bytes_than_a_days_are_refused(agreed: Agreed, caplog: pytest.LogCaptureFixture) -> None:
    agreed.federation.configure("north", ("jobs_a_day = 1000", "jobs_a_day = 1000\nbytes_a_day = 400000"))
    host = SiteHost(agreed.federation.site("north"))
    for _ in range(20):
        last = host.handle(bytes(30_000), sender="hub")
    assert last == REFUSED
    assert "more than 400000 bytes on" in caplog.text


def job(federation: Federation, name: str, rounds: int = 2, **changed: Any) -> Settings:
    made = federation.settings(training=Training(rounds=rounds, batch_size=8, learning_rate=0.1), **changed)
    return replace(made, serve=replace(made.serve, job=name, wait=1.0))


def test_no_round_beyond_those_agreed_on_is_trained(
    open_sites: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The coordinator signs the agreed terms, and goes on after their last round."""
    rounds = Session.rounds_left

    def more(session: Session) -> Iterator[int]:
        yield from rounds(session)
        yield 3

    monkeypatch.setattr(Session, "rounds_left", more)
    with pytest.raises(TooFewSurvivorsError, match="too few sent a vector"):
        served(Direct(open_sites), job(open_sites, "more"))
    assert "it asks 'north' for round 3 of the 2 that were agreed on" in caplog.text
    assert (open_sites.path / "north" / "state" / "in-fit").read_text() == "2"


def test_no_more_exchanges_of_a_round_than_the_algorithm_has_are_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The coordinator goes on in the last round that was agreed on, with weights of its own each time."""
    federation, rounds = Federation(tmp_path, code=counting_code()), Session.rounds_left

    def more(session: Session) -> Iterator[int]:
        yield from rounds(session)
        yield 2

    class OfTheFirst(Told):
        """What the coordinator tells; a site reads it as it is."""

        @classmethod
        def of(cls, ask: Exchange, number: int, exchange: int) -> Told:
            del exchange
            return Told(1, number - 1, ask)

    monkeypatch.setattr(Session, "rounds_left", more)
    monkeypatch.setattr(one_round, "Told", OfTheFirst)
    with pytest.raises(TooFewSurvivorsError, match="too few sent a vector"):
        served(Direct(federation), job(federation, "within", rounds=1))
    assert "it asks 'north' for exchange 2 of round 1, 'update', which no round has there" in caplog.text
    assert steps_of(federation, "north")[0] == 5


def test_a_session_of_another_smallest_sum_than_was_approved_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A person approved sums of four at least; the coordinator opens its sessions for three, which site.toml allows."""
    federation, made = Federation(tmp_path, names=("north", "south", "east", "west")), RemoteSum.__init__

    def weaker(summing: RemoteSum, sites: Any, driver: Any, spec: Any, *rest: Any) -> None:
        driver = Masked(corrupt=1, min_survivors=3).server_driver(spec, directory=federation.keys)
        made(summing, sites, driver, spec, *rest)

    monkeypatch.setattr(RemoteSum, "__init__", weaker)
    approved = SumSettings(kind="masked", corrupt=1, min_survivors=4, dropouts=0)
    with pytest.raises(TooFewSurvivorsError):
        served(Direct(federation), job(federation, "weaker", secure_sum=approved))
    assert "this party accepts a smallest sum of at least 4, the setup says 3" in caplog.text
    assert not (federation.path / "north" / "state" / "in-fit").exists()


def test_other_weights_for_one_site_are_seen_before_it_trains(
    open_sites: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """A coordinator that shows one site another model than the others learns nothing of it."""
    carrier = Direct(open_sites)
    plain = carrier._one

    def cheating(name: str, raw: bytes, limit: int) -> Any:
        asked = messages.read_request(raw, limit=1 << 30)
        if name == "south" and isinstance(asked, TakeStep) and asked.told:
            number = Told.read(asked.told, length=7, kept={}).number
            shown = Told.of(Exchange(channel="update", weights=torch.ones(7)), number, 0).message()
            raw = written(TakeStep(asked.job, asked.channel, asked.message, shown, asked.past))
        return plain(name, raw, limit)

    carrier._one = cheating  # type: ignore[method-assign]
    settings = job(open_sites, "shown")
    run, said = served(carrier, settings)
    assert [entry.survivors for entry in run.history] == [0, 2, 2]
    assert "was told other weights, tensors or another exchange than the parties sign" in caplog.text
    assert "going on without south: refused" in said
    assert same_weights(run, rehearsed(open_sites, settings, without={1: ["south"], 2: ["south"]}))


def test_replays_train_nothing(open_sites: Federation) -> None:
    """Of another session, of another job, and of rounds before: the weights are those that they would be without."""
    sent: list[bytes] = []
    carrier = Direct(open_sites)
    carrier.before = lambda name, raw: sent.append(raw) if name == "north" else None
    served(carrier, job(open_sites, "first"))
    carrier = Direct(open_sites)
    host, again = carrier.hosts["north"], 0
    settings = job(open_sites, "second", rounds=3)
    offered = offer_for(open_sites, settings).digest
    trained = open_sites.path / "north" / "log.jsonl"

    def replay(name: str, raw: bytes) -> None:
        nonlocal again
        if name != "north":
            return
        mine = list(sent)
        sent.append(raw)
        before = trained.read_text().count('"trained"')
        for old in mine:
            asked = messages.read_request(old, limit=1 << 30)
            if not isinstance(asked, TakeStep):
                continue
            for given in (asked, replace_job(asked, offered)):
                reply = read_reply(host.handle(written(given), sender="hub"), limit=1 << 30)
                assert isinstance(reply, JobRefused | JobUnknown | StepTaken)
                again += 1
        assert trained.read_text().count('"trained"') == before

    carrier.before = replay
    run, _ = served(carrier, settings)
    assert again > 200
    assert [entry.survivors for entry in run.history] == [0, 3, 3, 3]
    assert same_weights(run, rehearsed(open_sites, settings))


def replace_job(asked: TakeStep, digest: str) -> TakeStep:
    return TakeStep(digest, asked.channel, asked.message, b"", None)


def test_of_two_processes_of_a_site_one_trains_for_an_exchange(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other has an older copy of what was trained for: its vector would be the second of that exchange, and its
    receipt would break the chain of the first's.
    """
    federation = Federation(tmp_path, code=counting_code())
    settings, carrier = job(federation, "twice", rounds=1), Direct(federation)
    offer = offer_for(federation, settings)
    others = {name: SiteHost(federation.site(name)) for name in federation.names}
    for name, host in others.items():
        approved_at(federation, name, offer)
        reply = host.handle(written(ProposeJob(offer.message())), sender="hub")
        assert isinstance(read_reply(reply, limit=1 << 20), JobTaken)
    run, _ = served(carrier, settings)
    steps = steps_of(federation, "north")
    receipts = (federation.path / "north" / "receipts" / f"{offer.digest}.jsonl").read_bytes()
    assert run.history[-1].survivors == 3
    carrier.hosts = others
    with pytest.raises(TooFewSurvivorsError, match="too few sent a vector"):
        served(carrier, settings)
    assert "another process of this site has trained for job" in caplog.text
    assert steps_of(federation, "north") == steps
    assert (federation.path / "north" / "receipts" / f"{offer.digest}.jsonl").read_bytes() == receipts


def test_a_site_that_answers_nonsense_is_out_and_the_others_go_on(open_sites: Federation) -> None:
    carrier = Direct(open_sites)
    odd = [b"", b"junk", written(JobTaken("0" * 64, bytes(8))), written(StepTaken((b"junk",))), written(JobRefused())]

    def answering(name: str, reply: bytes) -> bytes:
        if name != "south" or isinstance(read_reply(reply, limit=1 << 30), JobTaken):
            return reply
        return odd[len(reply) % len(odd)]

    carrier.after = answering
    settings = job(open_sites, "nonsense")
    run, _ = served(carrier, settings)
    assert [entry.survivors for entry in run.history] == [0, 2, 2]
    assert same_weights(run, rehearsed(open_sites, settings, without={1: ["south"], 2: ["south"]}))


def test_an_error_of_a_sites_own_code_stays_there(open_sites: Federation) -> None:
    carrier = Direct(open_sites)

    def failing(name: str, reply: bytes) -> bytes:
        if name == "south" and isinstance(read_reply(reply, limit=1 << 30), StepTaken):
            raise PeerFailedError("stopped with an error", peer=name)
        return reply

    carrier.after = failing
    run, said = served(carrier, job(open_sites, "failing"))
    assert [entry.survivors for entry in run.history] == [0, 2, 2]
    assert "going on without south: stopped with an error" in said
