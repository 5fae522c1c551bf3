"""A site whose training outlasts the coordinator's patience, and one whose promise was spent by another job."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
from site_federation import Direct, Federation, approved_at, offer_for, private_sites, served
from site_rounds import a_job

from choral.jobs.serving import serve
from choral.jobs.settings import PrivacySettings, Settings
from choral.network.errors import OfferRefusedError, RequestTimeoutError
from choral.network.host.messages import TakeStep, read_request
from choral.privacy import Ledger
from choral.privacy.accounting.filters import PrivacyFilter
from choral.privacy.ledgers.plans import guarantee
from choral.protocols.errors import TooFewSurvivorsError
from choral.trainers import Participation, RoundRecord
from choral.trainers.engines.exchange_messages import Told


class InTime(Direct):
    """Waits for an answer as long as the coordinator says, and asks each site in a thread, as a hub does."""

    pool: ThreadPoolExecutor

    def replies(
        self, outbox: Mapping[str, bytes], *, timeout: float, reply_limit: int, **_: Any
    ) -> Generator[tuple[str, Any]]:
        at_work = {name: self.pool.submit(self._one, name, raw, reply_limit) for name, raw in outbox.items()}
        end = time.monotonic() + timeout
        for name, future in at_work.items():
            yield name, self._answer(name, future, end - time.monotonic())

    def _answer(self, name: str, future: Future[Any], seconds: float) -> Any:
        try:
            return future.result(max(seconds, 0))
        except LateError:
            return RequestTimeoutError("had not answered in time", peer=name)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def at_round(then: Mapping[int, Callable[[], object]]) -> Callable[[str, bytes], None]:
    """Calls what is to happen before anybody is told of a round."""
    left, lock = dict(then), Lock()

    def before(name: str, raw: bytes) -> None:
        asked = read_request(raw, limit=1 << 30)
        if isinstance(asked, TakeStep) and asked.told:
            with lock:
                left.pop(Told.read(asked.told, length=7, kept={}).number, lambda: None)()

    return before


def test_who_still_trains_for_a_round_that_is_over_says_so_at_once(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """It keeps nobody waiting for as long as a step may take, opens no session anew, and is back when it is done."""
    federation = Federation(tmp_path)
    carrier = InTime(federation)
    carrier.pool = pool
    pause, fit = tmp_path / "south" / "state" / "pause-2", tmp_path / "south" / "state" / "in-fit"

    def go_on() -> None:
        pause.unlink()
        end = time.monotonic() + 60
        while federation.site("south").log.read().entries[-1].facts["round"] != 2:
            assert time.monotonic() < end
            time.sleep(0.02)

    carrier.before = at_round({2: lambda: pause.touch(0o600), 4: go_on})
    settings = a_job(federation, "late", participation=Participation(patience=2))
    settings = replace(settings, serve=replace(settings.serve, training=2.0, step=60.0))
    began = time.monotonic()
    run, said = served(carrier, settings)
    assert time.monotonic() - began < 50  # no step was waited for
    assert fit.read_text() == "4"
    assert [entry.survivors for entry in run.history] == [0, 3, 2, 2, 3]
    assert run.history[3].dropped.keys() == {"south"}
    assert "going on without south: it is still at work for an earlier round" in said


@pytest.mark.parametrize("noise", ["distributed", "central"])
def test_a_second_job_with_noise_of_clients_spends_from_the_same_ledger(noise: Any, tmp_path: Path) -> None:
    """What every site adds, or the coordinator, must be what every ledger is charged: so the job names it."""
    federation = private_sites(tmp_path, "client")
    privacy = PrivacySettings(unit="client", epsilon=4.0, delta=1e-3, noise=noise, colluders=0)
    run, _ = served(Direct(federation), a_job(federation, "first", privacy=privacy))
    assert [entry.survivors for entry in run.history] == [0, 3, 3, 3, 3]
    more = replace(privacy, epsilon=8.0)
    said = refused(federation, a_job(federation, "unnamed", privacy=more), "something was spent must name it")
    assert re.search(r"of this data epsilon [34]\.\d+ was", said)
    room = float(re.search(r"For 4 sums it has room for privacy.noise_multiplier = ([0-9.]+)", said)[1])  # type: ignore[index]
    less = a_job(federation, "less", privacy=replace(more, noise_multiplier=0.97 * room))
    refused(federation, less, r"would come to epsilon 8\.\d+ in all, more than the 8 promised")
    named = replace(more, noise_multiplier=room)
    run, _ = served(Direct(federation), a_job(federation, "second", privacy=named), out=tmp_path / "run")
    assert [entry.survivors for entry in run.history] == [0, 3, 3, 3, 3]
    added = {release.share_variance for release in Ledger(tmp_path / "run" / "ledger" / "clients.jsonl").releases}
    for name in federation.names:
        ledger = Ledger(tmp_path / name / "ledgers" / "points.jsonl", holder=name)
        assert len(ledger.releases) == 8
        assert {release.share_variance for release in ledger.releases[4:]} == added  # no less than is charged
        assert guarantee(ledger) == 8.0
        assert 7.9 < PrivacyFilter(8.0, 1e-3).cost(ledger.releases) <= 8.0
    third = a_job(federation, "third", privacy=named)
    refused(federation, third, "the budget epsilon=8 at delta=0.001 is spent")
    with pytest.raises(TooFewSurvivorsError, match=r"missing: north \(refused\), south \(refused\), east \(refused\)"):
        served(Direct(federation), replace(third, serve=replace(third.serve, wait=0.05)))


def refused(federation: Federation, settings: Settings, why: str) -> str:
    """The reason that a site gives its own people; nothing is trained or charged for."""
    ledger = federation.path / "north" / "ledgers" / "points.jsonl"
    before = ledger.read_bytes()
    approved_at(federation, "north", offer := offer_for(federation, settings))
    with pytest.raises(OfferRefusedError, match=why) as error:
        federation.site("north").agree(offer)
    assert ledger.read_bytes() == before
    return str(error.value)


@pytest.mark.parametrize("named", [None, 5.0])
def test_a_job_with_noise_of_clients_is_run_in_two_parts(named: float | None, tmp_path: Path) -> None:
    """The way to plan two jobs ahead: stopped after two rounds of four, gone on with at sites begun anew."""
    federation = private_sites(tmp_path, "client")
    privacy = PrivacySettings(
        unit="client", epsilon=4.0, delta=1e-3, noise="distributed", colluders=0, noise_multiplier=named
    )
    settings = a_job(federation, "parts", privacy=privacy)
    for name in federation.names:
        approved_at(federation, name, offer_for(federation, settings))

    def stop(entry: RoundRecord) -> None:
        if entry.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(
            settings, Direct(federation), federation.keys,
            coordinator=federation.hub, out=tmp_path / "run", say=lambda _: None, on_round=stop,
        )  # fmt: skip
    run, _ = served(Direct(federation), settings, out=tmp_path / "run", resume=True)
    assert [entry.survivors for entry in run.history] == [0, 3, 3, 3, 3]
    for name in federation.names:
        ledger = Ledger(tmp_path / name / "ledgers" / "points.jsonl", holder=name)
        assert len(ledger.releases) == 4
        assert ledger.epsilon(1e-3) <= 4.0
