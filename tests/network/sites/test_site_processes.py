"""Real processes: three sites by `choral join`, a coordinator by `choral serve`, between them mutual TLS."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from site_federation import (
    ALGORITHMS,
    Federation,
    algorithm,
    approved_at,
    offer_for,
    rehearsed,
    same_weights,
    toml_of,
    write_directory,
)

from choral.cli.command_line import main
from choral.jobs.settings import Settings, SumSettings
from choral.trainers import Participation, Run
from choral.trainers.task.settings import Training

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
PATIENT = 120.0  # seconds until anything that is waited for must have come


class Processes:
    """The sites' processes, and what of the coordinator is on disk."""

    def __init__(self, path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.federation = Federation(path, port=port)
        self.path, self.port = path, port
        self.sites: dict[str, subprocess.Popen[bytes]] = {}
        write_directory(self.federation)
        for name in self.federation.names:
            self.start(name)

    def start(self, name: str) -> None:
        words = [sys.executable, "-m", "choral", "join", str(self.path / name)]
        with (self.path / f"{name}.log").open("ab") as log:
            self.sites[name] = subprocess.Popen(words, stdout=log, stderr=log, env=ENVIRONMENT)

    def kill(self, name: str) -> None:
        self.sites[name].kill()
        self.sites[name].wait()

    def close(self) -> None:
        for process in self.sites.values():
            process.kill()
            process.wait()

    def log(self, name: str) -> str:
        return (self.path / f"{name}.log").read_text()

    def job(self, name: str, settings: Settings, *, approve: bool = True) -> list[str]:
        """Write a job file, have it approved, and give the words of its command."""
        named = replace(settings, serve=replace(settings.serve, job=name))
        if approve:
            offer = offer_for(self.federation, named)
            for site in self.federation.names:
                approved_at(self.federation, site, offer)
        job = self.path / f"{name}.toml"
        job.write_text(toml_of(named))
        out, directory = self.path / f"run-{name}", self.path / "directory.toml"
        return [
            "serve", str(job), "--out", str(out), "--directory", str(directory),
            "--serve.identity", str(self.path / "hub" / "hub.crt"),
            "--serve.host", "127.0.0.1", "--serve.port", str(self.port),
        ]  # fmt: skip

    @contextmanager
    def paused(self, name: str, number: int) -> Iterator[None]:
        """The site's training stops in that round, for as long."""
        (self.path / name / "state" / "in-fit").unlink(missing_ok=True)
        path = self.path / name / "state" / f"pause-{number}"
        path.touch(0o600)
        try:
            yield
        finally:
            path.unlink()

    def in_fit(self, name: str) -> str:
        path = self.path / name / "state" / "in-fit"
        return path.read_text() if path.exists() else ""

    def settings(self, **changed: object) -> Settings:
        made = self.federation.settings(**changed)
        return replace(made, serve=replace(made.serve, wait=PATIENT, training=PATIENT, step=20.0, away=4.0))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    made = Processes(tmp_path_factory.mktemp("sites"))
    yield made
    made.close()


def until(found: object, what: str) -> None:
    end = time.monotonic() + PATIENT
    while not found():  # type: ignore[operator]
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["fedavg", "dane"])
def test_three_processes_train_to_the_weights_of_federate_bit_by_bit(
    kind: str, running: Processes, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = running.settings(algorithm=algorithm(kind, **({"mu": 0.1} if kind == "dane" else {})))
    assert main(running.job(kind, settings)) == 0
    said = capfd.readouterr()
    assert "took the job (3 of 3)" in said.err
    assert "3 rounds with 3 sites" in said.out
    run = Run.load(running.path / f"run-{kind}")
    assert same_weights(run, rehearsed(running.federation, settings))
    assert [entry.survivors for entry in run.history] == [0, 3, 3, 3]
    assert run.info.sites == ("north", "south", "east")
    assert run.info.parties == {}


def test_who_did_not_approve_is_read_as_refused_and_no_more(
    running: Processes, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = running.settings()
    settings = replace(settings, serve=replace(settings.serve, wait=2.0))
    assert main(running.job("unapproved", settings, approve=False)) == 2
    said = capfd.readouterr().err
    assert "0 of 3 sites took the job within 2 s, 3 are needed; missing: north (refused)" in said
    assert "approved" not in said.replace("have them approve", "")
    assert "nobody approved it" in running.log("north")


def test_a_site_that_is_killed_in_a_round_is_in_the_next_one(
    running: Processes, capfd: pytest.CaptureFixture[str]
) -> None:
    """The sum of round 2 is over the others, exactly; for round 3 no session is opened anew."""
    settings = running.settings(
        training=Training(rounds=4, batch_size=8, learning_rate=0.1), participation=Participation(patience=2)
    )
    words = running.job("killed", settings)
    with ThreadPoolExecutor(1) as pool:
        with running.paused("south", 2), running.paused("north", 2):
            serving = pool.submit(main, words)
            until(lambda: running.in_fit("south") == "2", "the training of round 2")
            calls = running.log("south").count("connected to hub")
            running.kill("south")
            running.start("south")
            until(lambda: running.log("south").count("connected to hub") > calls, "the site that was killed")
        assert serving.result(PATIENT) == 0
    run = Run.load(running.path / "run-killed")
    assert [entry.survivors for entry in run.history] == [0, 3, 2, 3, 3]
    assert run.history[2].dropped == {"south": "no vector came from it"}
    assert same_weights(run, rehearsed(running.federation, settings, without={2: ["south"]}))
    said = capfd.readouterr().err
    assert re.search("going on without south: (it was started anew|was away for 4 s)", said)
    assert "south is back, and goes on" in said


def test_a_coordinator_that_is_killed_in_a_round_gives_it_up_and_goes_on(running: Processes) -> None:
    settings = running.settings(training=Training(rounds=4, batch_size=8, learning_rate=0.1))
    words = running.job("stopped", settings)
    with running.paused("east", 2):
        process = subprocess.Popen([sys.executable, "-m", "choral", *words], env=ENVIRONMENT)
        until(lambda: running.in_fit("east") == "2", "the training of round 2")
        process.kill()
        process.wait()
    assert main([*words, "--resume"]) == 0
    run = Run.load(running.path / "run-stopped")
    assert [entry.survivors for entry in run.history] == [0, 3, 0, 3, 3]
    assert run.history[2].failed == "the coordinator was stopped in this round"
    assert run.history[2].metrics == run.history[1].metrics
    assert [entry.failed for entry in run.history[3:]] == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", "homomorphic"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_and_sum_over_real_sockets(name: str, kind: Any, running: Processes) -> None:
    settings = running.settings(
        algorithm=algorithm(name, **ALGORITHMS[name]),
        secure_sum=SumSettings(kind=kind),
        training=Training(rounds=2, batch_size=8, learning_rate=0.1),
    )
    job = f"{name}-{kind}"
    assert main([*running.job(job, settings), "--quiet"]) == 0
    assert same_weights(Run.load(running.path / f"run-{job}"), rehearsed(running.federation, settings))
