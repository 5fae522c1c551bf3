"""Lines that stall, break and crawl between a site and its coordinator; who is not who was pinned."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import warm_python
from site_federation import Federation
from site_processes import ENVIRONMENT, PATIENT, Processes, until

from choral.cli.command_line import main
from choral.network import BlockingHub, SiteFolder, make_identity
from choral.network.site.files.directory import Pinned
from choral.trainers import Participation, Run
from choral.trainers.task.settings import Training


@contextmanager
def between(ends: Any, port: int) -> Iterator[tuple[Any, asyncio.AbstractEventLoop]]:
    """A proxy in a thread of its own, and its loop: what it does to bytes may be changed from there."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    made = ends.middle(("127.0.0.1", port))
    try:
        yield asyncio.run_coroutine_threadsafe(made.__aenter__(), loop).result(10), loop
    finally:
        asyncio.run_coroutine_threadsafe(made.__aexit__(None, None, None), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.slow
def test_a_line_that_crawls_breaks_and_stalls_costs_its_site_rounds_and_hangs_nothing(
    ends: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Round 1 crawls; in round 2 the line breaks while south trains; in round 4 it stands still for longer than the
    coordinator waits for a vector, and in round 6 south is back.
    """
    processes = Processes(tmp_path, running=False)
    with between(ends, processes.port) as (line, loop):
        processes.federation.configure("south", (f"127.0.0.1:{processes.port}", f"127.0.0.1:{line.address[1]}"))
        settings = processes.settings(
            training=Training(rounds=6, batch_size=8, learning_rate=0.1), participation=Participation(patience=3)
        )
        settings = replace(settings, serve=replace(settings.serve, training=8.0, step=8.0, away=5.0))
        words = processes.job("lines", settings)
        line.delay, line.split = 0.002, 1000
        try:
            for name in processes.federation.names:
                processes.start(name)
            with ThreadPoolExecutor(1) as pool, processes.paused("south", 2), processes.paused("south", 4):
                serving = pool.submit(main, words)
                until(lambda: processes.in_fit("south") == "2", "round 2")
                line.delay = 0.0
                loop.call_soon_threadsafe(line.cut)
                (tmp_path / "south" / "state" / "pause-2").unlink()
                until(lambda: processes.in_fit("south") == "4", "round 4")
                (tmp_path / "south" / "state" / "pause-2").touch()  # which is taken away in the end
                loop.call_soon_threadsafe(line.flowing.clear)
                (tmp_path / "south" / "state" / "pause-4").unlink()
                with processes.paused("north", 5):
                    until(lambda: processes.in_fit("north") == "5", "round 5, without south")
                    loop.call_soon_threadsafe(line.flowing.set)
                (tmp_path / "south" / "state" / "pause-4").touch()
                assert serving.result(PATIENT) == 0
        finally:
            processes.close()
    history = Run.load(tmp_path / "run-lines").history
    assert [entry.round for entry in history] == list(range(7))
    assert [entry.failed for entry in history] == [""] * 7
    assert [entry.survivors for entry in history][:5] == [0, 3, 3, 3, 2]  # asked again under the same number: no loss
    assert history[-1].survivors == 3
    assert "going on without south" in capfd.readouterr().err


def joined(folder: Path) -> subprocess.Popen[str]:
    words = ["-m", "choral", "join", str(folder), "--patience", "1"]
    return warm_python.start(words, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_who_is_not_who_was_pinned_reads_why_and_so_does_the_other_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stranger to the coordinator; a known name with another key; a coordinator with another certificate."""
    caplog.set_level(logging.INFO, "choral.network")
    federation = Federation(tmp_path, names=("north", "south", "east", "known"))
    directory = Pinned()
    for name in ("south", "east", "known"):  # north is not
        directory = directory.with_(federation.certificates[name])
    with BlockingHub(federation.hub, directory.sites, host="127.0.0.1", port=0) as hub:
        for name in federation.names:
            federation.configure(name, ("127.0.0.1:8443", f"127.0.0.1:{hub.address[1]}"))
        anew = make_identity(tmp_path / "anew", "south")  # its own key, which nobody was told of
        for part in ("crt", "key"):
            (tmp_path / "anew" / f"south.{part}").replace(tmp_path / "south" / f"south.{part}")
        (tmp_path / "south" / "log.jsonl").unlink()
        SiteFolder.open(tmp_path / "south").log.begin("south")
        other = make_identity(tmp_path / "other", "hub").certificate
        east = federation.site("east")
        east.pinned.without("hub").with_(other, coordinator=True).write(east.path / "directory.toml")

        processes = {name: joined(tmp_path / name) for name in federation.names}
        until(lambda: "known" in hub.connected, "the site that is known")
        said = {name: processes[name].communicate(timeout=PATIENT)[0] for name in ("north", "south", "east")}
        assert [processes[name].returncode for name in said] == [2, 2, 2]
        assert hub.connected == {"known"}
    processes["known"].communicate(timeout=PATIENT)

    for name in ("north", "south"):
        assert "hub: hung up before it greeted" in said[name]
        assert "it does not know this certificate" in said[name]
    assert "hub: its certificate is not in the directory" in said["east"]
    assert "compare its pin with the coordinator's owner" in said["east"]
    for text in said.values():
        assert "Traceback" not in text
        assert len(text.splitlines()) <= 4  # one line for each new reason, then the last one with what to do
    refused = [record.getMessage() for record in caplog.records if record.getMessage().startswith("refused 127.0.0.1")]
    assert any("certificate" in line for line in refused)
    assert anew.certificate.pin not in "".join(said.values())
