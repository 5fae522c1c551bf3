"""Coordinators that are stopped in a round with noise of clients: that round is lost and stays paid, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import warm_python
from site_federation import PROMISE, Direct, Federation, algorithm, private_sites, served
from site_processes import ENVIRONMENT, Processes, until
from site_rounds import InRound, a_job

from choral.cli.command_line import main
from choral.jobs.settings import PrivacySettings
from choral.privacy import Ledger
from choral.trainers import Run
from choral.trainers.task.settings import Training

PRIVACY = PrivacySettings(unit="client", epsilon=4.0, delta=1e-3, noise="distributed", colluders=0)


def paid_by(federation: Federation, name: str) -> int:
    """Sums on a site's ledger, which holds each one that its log says it trained for, and no two of one exchange."""
    lines = [line.facts for line in federation.site(name).log.read().entries if line.event == "trained"]
    exchanges = [(line["round"], line["exchange"]) for line in lines]
    assert len(set(exchanges)) == len(exchanges)
    ledger = Ledger(federation.path / name / "ledgers" / "points.jsonl", holder=name)
    assert ledger.epsilon(1e-3) <= 4.0
    assert len(ledger.releases) >= len(exchanges)
    return len(ledger.releases)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize(
    ("number", "place", "kind"), [(1, 1, "fedavg"), (2, 3, "fedavg"), (4, 1, "fedavg"), (3, 1, "dane")]
)
def test_the_round_of_the_coordinator_that_was_stopped_is_the_only_one_that_is_lost(
    number: int, place: int, kind: str, tmp_path: Path
) -> None:
    """The noise was made for four rounds, and each of the others is trained. In each of dane's there are two sums."""

    def stop() -> None:
        raise Stopped

    federation = private_sites(tmp_path, "client")
    carrier, sums = Direct(federation), 2 if kind == "dane" else 1
    chosen: dict[str, Any] = {"mu": 0.1} if kind == "dane" else {}
    settings = a_job(federation, "stopped", privacy=PRIVACY, algorithm=algorithm(kind, **chosen))
    InRound(carrier, "east", number, place, stop)
    with pytest.raises(Stopped):
        served(carrier, settings, out=tmp_path / "run")
    carrier.before = None
    run, said = served(carrier, settings, out=tmp_path / "run", resume=True)
    assert [entry.survivors for entry in run.history] == [0, *(0 if each == number else 3 for each in range(1, 5))]
    assert [entry.round for entry in run.history if entry.failed] == [number]
    assert said[0] == f"round {number} was interrupted, and is given up: sites may have trained for it"
    assert run.info.ended == ""
    for name in federation.names:
        assert 3 * sums <= paid_by(federation, name) <= 4 * sums
    assert run.info.spent["clients"].steps >= 3 * sums
    assert run.info.spent["clients"].epsilon <= 4.0


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_coordinator_that_is_killed_with_noise_of_clients_loses_that_round_alone(number: int, tmp_path: Path) -> None:
    running = Processes(tmp_path, promise=PROMISE.replace("UNIT", "client"))
    try:
        settings = running.settings(privacy=PRIVACY, training=Training(rounds=4, batch_size=8, learning_rate=0.1))
        words = running.job("killed", settings)
        with running.paused("east", number):
            process = warm_python.start(["-m", "choral", *words], env=ENVIRONMENT)
            until(lambda: running.in_fit("east") == str(number), f"the training of round {number}")
            process.kill()
            process.wait()
        assert main([*words, "--resume"]) == 0
    finally:
        running.close()
    run = Run.load(tmp_path / "run-killed")
    assert [entry.survivors for entry in run.history] == [0, *(0 if each == number else 3 for each in range(1, 5))]
    assert run.history[number].failed == "the coordinator was stopped in this round"
    assert run.info.ended == ""
    assert {paid_by(running.federation, name) for name in running.federation.names} == {4}
