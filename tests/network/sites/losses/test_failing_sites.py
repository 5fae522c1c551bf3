"""Sites whose training fails, or whose disk is full: the run goes on, and nothing is sent that is not paid for."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from site_federation import CODE, PROMISE, Direct, Federation, counting_code, served, steps_of
from site_rounds import a_job

from choral.jobs.settings import PrivacySettings
from choral.network.host.messages import TakeStep, read_request
from choral.privacy import Ledger
from choral.trainers import Participation
from choral.trainers.task.settings import Training

FAILS = """            if (place / "state" / f"fail-{round}").exists():
                raise RuntimeError("record 4711 has no label")
            while (place"""


@pytest.mark.parametrize("noise", ["local", "distributed"])
def test_a_client_whose_training_fails_sends_its_noise_alone_and_pays(noise: Any, tmp_path: Path) -> None:
    """A drop-out would tell of its data, and the promise is to whole clients: so nobody learns that it failed."""
    federation = Federation(
        tmp_path, promise=PROMISE.replace("UNIT", "client"), code=CODE.replace("            while (place", FAILS)
    )
    (tmp_path / "south" / "state" / "fail-2").touch(0o600)
    privacy = PrivacySettings(unit="client", epsilon=4.0, delta=1e-3, noise=noise, colluders=0, min_survivors=2)
    run, said = served(Direct(federation), a_job(federation, f"fails-{noise}", privacy=privacy))
    assert [entry.survivors for entry in run.history] == [0, 3, 3, 3, 3]
    assert run.history[2].dropped == {}
    assert "south" not in "".join(said).replace("south took the job", "")
    lines = [line.facts for line in federation.site("south").log.read().entries if line.event == "trained"]
    assert [line["sent"] for line in lines] == [True, False, True, True]
    assert "record 4711 has no label" in str(lines[1]["reason"])
    releases = {name: len(Ledger(tmp_path / name / "ledgers" / "points.jsonl", holder=name).releases)
                for name in federation.names}  # fmt: skip
    assert releases == dict.fromkeys(federation.names, 4)  # the round that it failed in as well


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one page."""
    place = tmp_path / "small"
    place.mkdir(mode=0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,mode=700", "none", str(place)], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_disk_that_is_full_at_the_ledger_ends_no_run_and_trains_nothing(tmp_path: Path, small_disk: Path) -> None:
    """Rounds go on over the others; a disk with room again brings the site back, on the same ledger."""
    federation = Federation(tmp_path, promise=PROMISE.replace("UNIT", "record"), code=counting_code())
    federation.configure(
        "south", ("[data.points.promise]", f'ledger = "{small_disk}/points.jsonl"\n[data.points.promise]')
    )
    carrier, failed = Direct(federation), []

    def watch(name: str, raw: bytes) -> None:
        if name != "south" or not isinstance(read_request(raw, limit=1 << 30), TakeStep):
            return
        lines = [line for line in federation.site("south").log.read().entries if line.event in ("out", "trained")]
        failed[:] = [line for line in lines if line.event == "out" or not line.facts["sent"]]
        if len(failed) == 2:
            subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)

    carrier.before = watch
    settings = a_job(
        federation, "full", privacy=PrivacySettings(epsilon=4.0, delta=1e-3, noise="local"),
        participation=Participation(patience=3),
    )  # fmt: skip
    settings = type(settings)(**{**vars(settings), "training": Training(rounds=18, batch_size=8, learning_rate=0.1)})
    run, _ = served(carrier, settings)
    survivors = [entry.survivors for entry in run.history[1:]]
    assert survivors.count(2) == 2
    assert survivors[0] == survivors[-1] == 3
    assert all("No space left" in str(line.facts["reason"]) for line in failed)
    computed, paid = steps_of(federation, "south")
    assert computed <= paid
    assert (small_disk / "points.jsonl").stat().st_size > 4096
