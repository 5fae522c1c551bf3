"""Real processes: three sites by `choral join`, a coordinator by `choral serve`, between them mutual TLS."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import warm_python
from site_federation import (
    ALGORITHMS,
    Federation,
    algorithm,
    rehearsed,
    same_weights,
    toml_of,
    write_directory,
)
from site_processes import ENVIRONMENT, PATIENT, Processes, Proxy, until

from choral.cli.command_line import main
from choral.jobs.settings import SumSettings
from choral.network import Offer
from choral.network.site.files.directory import Pinned
from choral.trainers import Participation, Run
from choral.trainers.task.settings import Training


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Three sites; the last one's way out is an HTTP proxy."""
    made, proxy = Processes(tmp_path_factory.mktemp("sites"), running=False), Proxy()
    address = f'address = "127.0.0.1:{made.port}"'
    made.federation.configure("east", (address, f'{address}\nproxy = "http://127.0.0.1:{proxy.port}"'))
    for name in made.federation.names:
        made.start(name)
    yield made
    made.close()
    proxy.close()
    assert f"CONNECT 127.0.0.1:{made.port} HTTP/1.1" in proxy.asked


@pytest.mark.slow  # 380 MB with torch's CPU build; its CUDA build alone takes 600
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read in /proc")
def test_a_site_that_waits_takes_at_most_400_mb(tmp_path: Path) -> None:
    """Resident, before any job: that of a site which waits for its coordinator."""
    running = Processes(tmp_path, warm=False)
    try:
        for name, process in running.sites.items():
            until(lambda name=name: "not connected" in running.log(name), "a site that waits")  # type: ignore[misc]
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            kib = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
            assert 50_000 < kib <= 400_000, (name, kib)
    finally:
        running.close()


@pytest.mark.parametrize(("kind", "trips"), [("fedavg", 4), ("dane", 3)])
def test_three_processes_train_to_the_weights_of_federate_bit_by_bit(
    kind: str, trips: Any, running: Processes, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = running.settings(
        algorithm=algorithm(kind, **({"mu": 0.1} if kind == "dane" else {})), secure_sum=SumSettings(trips=trips)
    )
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
    settings = replace(settings, serve=replace(settings.serve, wait=5.0))
    assert main(running.job("unapproved", settings, approve=False)) == 2
    said = capfd.readouterr().err
    assert "0 of 3 sites took the job within 5 s, 3 are needed; missing: north (refused)" in said
    assert "approved" not in said.replace("have them approve", "")
    assert "nobody approved it" in running.log("north")


@pytest.mark.parametrize("trips", [4, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_site_that_is_killed_in_a_round_is_in_the_next_one(
    trips: Any, running: Processes, capfd: pytest.CaptureFixture[str]
) -> None:
    """The sum of round 2 is over the others, exactly; for round 3 no session is opened anew. In two and three trips the
    site has dealt for round 2 before, and all deal anew for round 3.
    """
    settings = running.settings(
        training=Training(rounds=4, batch_size=8, learning_rate=0.1),
        participation=Participation(patience=2),
        secure_sum=SumSettings(trips=trips),
    )
    words = running.job(f"killed-{trips}", settings)
    with ThreadPoolExecutor(1) as pool:
        with running.paused("south", 2), running.paused("north", 2):
            serving = pool.submit(main, words)
            until(lambda: running.in_fit("south") == "2", "the training of round 2")
            calls = running.log("south").count("connected to hub")
            running.kill("south")
            running.start("south")
            until(lambda: running.log("south").count("connected to hub") > calls, "the site that was killed")
        assert serving.result(PATIENT) == 0
    run = Run.load(running.path / f"run-killed-{trips}")
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
        process = warm_python.start(["-m", "choral", *words], env=ENVIRONMENT)
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


def test_the_key_that_lies_beside_the_directory_is_the_coordinators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `choral site init hub` makes both; nothing is guessed where there are none, or two."""
    sites = Federation(tmp_path)
    job = tmp_path / "job.toml"
    job.write_text(toml_of(sites.settings()))
    assert main(["site", "init", "centre", "--folder", str(tmp_path / "centre")]) == 0
    pinned = Pinned.read(write_directory(sites))
    pinned.write(tmp_path / "centre" / "directory.toml")
    offer = ["serve", str(job), "--offer", str(tmp_path / "job.offer"), "--directory"]
    assert main([*offer, str(tmp_path / "centre" / "directory.toml")]) == 0
    assert Offer.read((tmp_path / "job.offer").read_bytes()).coordinator == "centre"
    capsys.readouterr()
    assert main([*offer, str(tmp_path / "directory.toml")]) == 2
    assert "there are 0 keys, expected one" in capsys.readouterr().err
