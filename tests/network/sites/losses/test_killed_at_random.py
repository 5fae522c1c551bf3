"""kill -9 at a hundred points of time: whatever was computed on a site's records is on its ledger."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from pathlib import Path

import pytest
from site_federation import PROMISE, SITE, Direct, Federation, approved_at, counting_code, offer_for, served, steps_of

from choral.jobs.settings import PrivacySettings
from choral.trainers import Participation
from choral.trainers.run_folder.evidence.receipts import read
from choral.trainers.task.settings import Training

KILLS = 100


def child(federation: Federation, settings: object, out: Path) -> int:
    """The coordinator and its three sites, until they are killed. Returns its process id."""
    if pid := os.fork():
        return pid
    try:
        resume = (out / "run.json").exists()
        served(Direct(federation, approving=False), settings, out=out, resume=resume)  # type: ignore[arg-type]
    except BaseException:
        (federation.path / "failed").write_text(traceback.format_exc())
    os._exit(0)


@pytest.mark.slow
def test_no_step_on_records_is_missing_from_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("site_federation.SITE", SITE.replace("jobs_a_day", "rounds = 1000\njobs_a_day"))
    federation = Federation(tmp_path, promise=PROMISE.replace("UNIT", "record"), code=counting_code())
    settings = federation.settings(
        privacy=PrivacySettings(epsilon=8.0, delta=1e-3, noise="local"),
        training=Training(rounds=400, batch_size=8, learning_rate=0.1),
        participation=Participation(patience=400),
    )
    offer = offer_for(federation, settings)
    for name in federation.names:
        approved_at(federation, name, offer)
    draws, window, before = random.Random(5), 0.0, dict.fromkeys(federation.names, (0, 0))
    for kill in range(KILLS + 1):
        began, pid = time.monotonic(), child(federation, settings, tmp_path / "run")
        if kill == 0:  # how long it takes to come to the third round
            while sum(steps_of(federation, "east")) < 10 and time.monotonic() - began < 120:
                time.sleep(0.01)
            window = time.monotonic() - began
        else:
            time.sleep(draws.uniform(0.2, 1.2) * window)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert not (tmp_path / "failed").exists(), (tmp_path / "failed").read_text()
        for name in federation.names:
            computed, paid = steps_of(federation, name)
            assert computed <= paid, f"kill {kill}: {name} computed {computed} steps and has paid for {paid}"
            assert (computed, paid) >= before[name]
            before[name] = computed, paid
            folder = federation.site(name)
            folder.log.read()
            for receipts in (folder.path / "receipts").iterdir():
                list(read(receipts))
    print({name: steps_of(federation, name) for name in federation.names})
    assert all(computed > 2 * KILLS for computed, _ in before.values())
