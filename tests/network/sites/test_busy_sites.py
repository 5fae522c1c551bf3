"""A site whose training outlasts the coordinator's patience, and one whose promise was spent by another job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
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
from choral.jobs.settings import PrivacySettings
from choral.network.errors import OfferRefusedError, RequestTimeoutError
from choral.network.host.messages import TakeStep, read_request
from choral.privacy import Ledger
from choral.trainers import Participation, RoundRecord
from choral.trainers.engines.exchange_messages import Told


class InTime(Direct):
    """Waits for an answer as long as the coordinator says, and asks each site in a thread, as a hub does."""

    pool: ThreadPoolExecutor

    def ask(self, outbox: Mapping[str, bytes], *, timeout: float, reply_limit: int, **_: Any) -> dict[str, Any]:
        at_work = {name: self.pool.submit(self._one, name, raw, reply_limit) for name, raw in outbox.items()}
        end = time.monotonic() + timeout
        return {name: self._answer(name, future, end - time.monotonic()) for name, future in at_work.items()}

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


@pytest.mark.parametrize("noise", ["local", "distributed"])
def test_a_second_job_with_noise_of_clients_is_refused_before_anything_is_sent(noise: Any, tmp_path: Path) -> None:
    """Its noise must be the same at all sites, and the coordinator does not know what was spent at each."""
    federation = private_sites(tmp_path, "client")
    privacy = PrivacySettings(unit="client", epsilon=4.0, delta=1e-3, noise=noise, colluders=0)
    run, _ = served(Direct(federation), a_job(federation, "first", privacy=privacy))
    assert [entry.survivors for entry in run.history] == [0, 3, 3, 3, 3]
    more = a_job(federation, "second", privacy=replace(privacy, epsilon=8.0))
    approved_at(federation, "north", offer := offer_for(federation, more))
    with pytest.raises(OfferRefusedError, match=r"made for data of which nothing was spent; of this, epsilon [34]"):
        federation.site("north").agree(offer)


def test_a_job_with_noise_of_clients_is_run_in_two_parts(tmp_path: Path) -> None:
    """The way to plan two jobs ahead: stopped after two rounds of four, gone on with at sites begun anew."""
    federation = private_sites(tmp_path, "client")
    privacy = PrivacySettings(unit="client", epsilon=4.0, delta=1e-3, noise="distributed", colluders=0)
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
