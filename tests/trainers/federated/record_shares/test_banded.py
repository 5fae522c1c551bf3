"""Federated SGD with banded correlated noise in shares, through the masked sum: training, drop-outs, resume, audit."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import warm_python

from choral import Keep, Masked, Participation, Plain, Privacy, audit, federate
from choral.audits.budgets.participation import _out_of_order, participation_checks, participation_of
from choral.audits.run.signed_checks import _of_receipts, evidence_in
from choral.errors import ConfigError
from choral.jobs.settings import Arm, Settings, parse_job
from choral.jobs.training import privacy_of
from choral.privacy import BandedShares, CorrelatedPrivacy, Ledger
from choral.privacy.record_shares import fixed_batches
from choral.privacy.record_shares.fixed_batches import NoiseRows, batch_of_step, first_of
from choral.trainers import GD, Dropouts, FedAvg, FedSGD, Run, Task
from choral.trainers.federated.record_shares.codec import SharesCodec

from .test_fedsgd import clipped_sum

PROMISE = CorrelatedPrivacy(4.0, 1e-4, noise="distributed", mechanism="banded", bands=4, max_grad_norm=0.5)
SUM = Masked(corrupt=1, dropouts=1, min_survivors=4)
STEPS = FedSGD(batch_size=20, steps_per_round=4, learning_rate=0.8)  # 160 records: eight batches
Make = Callable[..., Task]
HERE = Path(__file__).parent

SCRIPT = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import conftest
from choral import Keep, Masked, federate
from choral.privacy import CorrelatedPrivacy
from choral.protocols.masking.in_process import MaskedSession
from choral.trainers import FedSGD
seen, real = 0, MaskedSession.begin
def dying(*args, **kwargs):
    global seen
    seen += 1
    if seen == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
MaskedSession.begin = dying
federate(conftest.make_task(), rounds=3, algorithm=FedSGD(batch_size=20, steps_per_round=4, learning_rate=0.8),
         privacy=CorrelatedPrivacy(4.0, 1e-4, noise="distributed", mechanism="banded", bands=4, max_grad_norm=0.5),
         secure_sum=Masked(corrupt=1, dropouts=1, min_survivors=4), keep=Keep(out=sys.argv[1]))
"""


def private(task: Task, **changes: Any) -> Run:
    given: dict[str, Any] = {"rounds": 3, "algorithm": STEPS, "privacy": PROMISE, "secure_sum": SUM}
    return federate(task, **given | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose transcript has every vector. It is read by several tests, and changed by none."""
    from .conftest import make_task

    folder = tmp_path_factory.mktemp("banded") / "run"
    private(make_task(), keep=Keep(out=folder, transcript="rehearsal"))
    return folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[int, int]]]:
    """By party's noise, in order: each row that was made, and how many before it were taken back from."""
    found: dict[int, list[tuple[int, int]]] = {}
    real = NoiseRows.next

    def noted(self: NoiseRows, count: int, source: Any) -> Any:
        row, follows = int(self._told or 0), self._last is not None and self._told == self._last + 1
        known = [each.copy() for each in self._past] if follows else []
        noise = real(self, count, source)
        found.setdefault(id(self), []).append((row, len(known)))
        return noise

    monkeypatch.setattr(NoiseRows, "next", noted)
    return found


def events_of(folder: Path) -> dict[str, tuple[BandedShares, ...]]:
    return {
        path.stem: tuple(event for event in Ledger(path, holder=path.stem).events if isinstance(event, BandedShares))
        for path in (folder / "ledger").glob("*.jsonl")
    }


def test_without_noise_it_is_sgd_on_the_pooled_records_of_each_fixed_batch(
    task: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each opened sum over B is the clipped sum of the batch's records of all parties, to the grid and 1e-4 C each."""
    means: list[np.ndarray] = []
    real = SharesCodec.decode

    def decode(self: SharesCodec, result: Any) -> Any:
        mean = real(self, result)
        means.append(mean.value.numpy().copy())
        return mean

    monkeypatch.setattr(SharesCodec, "decode", decode)
    monkeypatch.setattr(fixed_batches, "gaussian", lambda count, source: np.zeros(count))
    pooled = task()
    run = private(pooled)
    start = federate(pooled, rounds=1, algorithm=FedSGD(learning_rate=1e-300)).state
    weights = {name: tensor.double() for name, tensor in start.items()}
    grid = float((run.info.fixed_point or {})["error_bound"])
    assert len(means) == 12
    for step, mean in enumerate(means):
        expected, count = np.zeros(12), 0
        for name, dataset in pooled.parties.items():
            places = batch_of_step(len(dataset), 8, first_of(name, 8), step).tolist()
            expected, count = expected + clipped_sum(weights, dataset, places), count + len(places)
        assert np.abs(mean - expected / 20).max() <= grid + count * 0.5 * 2e-4 / 20, step
        assert np.abs(mean).max() > 5 * grid
        weights["weight"] = weights["weight"] - 0.8 * torch.from_numpy(mean[:10].reshape(2, 5))
        weights["bias"] = weights["bias"] - 0.8 * torch.from_numpy(mean[10:])
    for name, tensor in run.state.items():
        assert torch.allclose(tensor.double(), weights[name], atol=2e-6), name


def test_noise_is_correlated_through_all_rounds(task: Make, made: dict[int, list[tuple[int, int]]]) -> None:
    private(task())
    assert list(made.values()) == [[(row, min(row, 3)) for row in range(12)]] * 5


def test_whoever_drops_out_begins_anew_and_the_others_go_on(
    task: Make, made: dict[int, list[tuple[int, int]]], tmp_path: Path
) -> None:
    """One in eight parties is lost before its vector, at random: rows rise, and after a gap nothing is taken back."""
    lossy = Participation(dropouts=Dropouts(keys=0.12), draw="seed", patience=12)
    each = FedSGD(batch_size=20, steps_per_round=1)
    run = private(task(), rounds=12, algorithm=each, participation=lossy, keep=Keep(out=tmp_path / "run"))
    gaps = 0
    for rows in made.values():
        back = 0
        for place, (row, before) in enumerate(rows):
            follows = place > 0 and row == rows[place - 1][0] + 1
            assert place == 0 or row > rows[place - 1][0]
            back = min(back + 1, 3) if follows else 0
            gaps += place > 0 and not follows
            assert before == back
    assert gaps >= 2
    assert any(entry.survivors == 4 or entry.failed for entry in run.history[1:])
    for name, events in events_of(tmp_path / "run").items():
        assert [event.number for event in events] == list(range(1, len(events) + 1)), name
    assert audit(tmp_path / "run").verdict == "holds"


def test_a_round_that_failed_after_its_first_sums_is_no_violation(task: Make, tmp_path: Path) -> None:
    """Receipts of those sums are right. Of a round that came to its end they say who survived, whatever is written."""
    lossy = Participation(dropouts=Dropouts(keys=0.12), draw="seed", patience=3)
    private(task(), participation=lossy, keep=Keep(out=tmp_path / "run"))
    run = Run.load(tmp_path / "run")
    sums = [len(said["sums"]) for said in evidence_in(run.folder).rounds if run.history[said["round"]].failed]
    assert 0 < max(sums) < 4
    assert audit(run).verdict == "holds"
    whole = private(task(), rounds=1, keep=Keep(out=tmp_path / "whole"))
    edited = [whole.history[0], msgspec.structs.replace(whole.history[1], survivors=0, failed="too few")]
    evidence = evidence_in(whole.folder)
    assert _of_receipts(whole, evidence) == []
    assert "5 by receipts" in _of_receipts(dataclasses.replace(whole, history=tuple(edited)), evidence)[0]


def test_a_killed_run_goes_on_with_the_next_step_and_new_noise(
    task: Make, made: dict[int, list[tuple[int, int]]], tmp_path: Path
) -> None:
    """Killed with its sixth row made: rows 0 to 5 do not come again, and steps go on at the seventh."""
    folder = tmp_path / "run"
    died = warm_python.run(["-c", SCRIPT, str(folder)], capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert {len(events) for events in events_of(folder).values()} == {6}
    run = private(task(), keep=Keep(out=folder, resume=True))
    assert run.history[-1].round == 2
    assert "is spent; ended after round 2" in run.info.ended
    assert list(made.values()) == [[(6, 0), (7, 1), (8, 2), (9, 3)]] * 5
    for events in events_of(folder).values():
        assert [(event.number, event.row) for event in events] == [(row + 1, row) for row in range(10)]
    assert run.spent is not None
    assert run.spent.epsilon <= 4.0
    assert audit(folder).verdict == "holds"


def test_the_audit_reads_its_ledgers_claim_and_transcript(finished: Path) -> None:
    found = audit(finished)
    assert found.verdict == "holds", found.sentence
    assert found.transcript is not None
    assert found.transcript.vectors == 60
    said = str(found.claim)
    assert "a record takes part in one of every 8 steps of its party" in said
    assert "correlated over steps by a matrix of 4 bands" in said
    assert "sum opened over 4 parties of which 3 are honest" in said
    assert "time of a party's answers" not in said
    counted = {name: sum(event.steps for event in events) for name, events in events_of(finished).items()}
    assert set(counted.values()) == {12}
    info = Run.load(finished).info
    assert (info.privacy or {})["mechanism"] == "banded"
    assert (info.fixed_point or {})["separation"] == 8


@pytest.mark.parametrize(
    ("privacy", "fixed_point", "words"),
    [
        ({"mechanism": "none"}, {}, "charged for correlated noise, and run.json does not say so"),
        ({"bands": 3}, {}, "charged for 4 bands, and run.json says 3"),
        ({}, {"separation": 9}, "charged for a record every 8 steps, and a pass has 8"),
        ({}, {"share": 0.1}, "charged for shares of"),
        ({"min_survivors": 5}, {}, "charged for 3 unknown shares, and 4 are promised"),
    ],
)
def test_a_run_that_says_otherwise_than_its_ledgers_is_found(
    finished: Path, privacy: dict[str, Any], fixed_point: dict[str, Any], words: str
) -> None:
    run = Run.load(finished)
    info = msgspec.structs.replace(
        run.info, privacy=(run.info.privacy or {}) | privacy, fixed_point=(run.info.fixed_point or {}) | fixed_point
    )
    edited = dataclasses.replace(run, info=info)
    checks = participation_checks(edited, participation_of(edited))
    assert any(check.verdict == "violated" and words in check.finding for check in checks), checks


def test_steps_out_of_turn_and_rows_made_twice_are_found_on_a_ledger(finished: Path) -> None:
    (*rest, last) = events_of(finished)["north"]
    assert _out_of_order([*rest, last]) == []
    skipped = msgspec.structs.replace(last, number=14)
    assert _out_of_order([*rest, skipped]) == ["its step 12 was charged as number 14 of its plan"]
    again = msgspec.structs.replace(last, row=rest[-1].row)
    assert _out_of_order([*rest, again]) == ["row 10 was made after row 10"]


def test_a_plain_sum_takes_it_for_outsiders(task: Make) -> None:
    run = private(task(), rounds=1, secure_sum=Plain())
    assert run.spent is not None
    assert run.spent.epsilon <= 4.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": GD()}, "every record takes part in every step"),
        ({"algorithm": FedAvg()}, "several steps between two sums"),
        ({"algorithm": FedSGD(batch_size=80)}, "bands is 4, expected 1 to 2"),
    ],
)
def test_what_has_no_fixed_batches_far_enough_apart_is_refused(task: Make, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        private(task(), **changes)


@pytest.mark.parametrize("mechanism", ["buffered", "tree"])
def test_other_correlated_noise_in_shares_is_refused_with_its_reason(mechanism: Any) -> None:
    with pytest.raises(ConfigError, match=f"{mechanism} correlated noise .*not proved, of a record that takes part"):
        CorrelatedPrivacy(4.0, 1e-4, noise="distributed", mechanism=mechanism)


def test_independent_noise_does_not_ask_for_rows(task: Make, made: dict[int, list[tuple[int, int]]]) -> None:
    private(task(), rounds=1, privacy=Privacy(4.0, 1e-4, noise="distributed"))
    assert not made


def settings_of(privacy: dict[str, Any], kind: str = "fedsgd") -> Settings:
    lines = [f"{key} = {value!r}".replace("'", '"') for key, value in privacy.items()]
    return parse_job("\n".join(["[algorithm]", f'kind = "{kind}"', "[privacy]", "epsilon = 2.0", *lines]), "digits")


def test_settings_say_it_in_the_same_words() -> None:
    arm = Arm(private=True)
    made = privacy_of(settings_of({"mechanism": "banded", "bands": 6, "colluders": 2}), arm, 2.0)
    assert made == CorrelatedPrivacy(2.0, 1e-5, mechanism="banded", bands=6, noise="distributed", colluders=2)
    alone = privacy_of(settings_of({"mechanism": "buffered"}, kind="fedavg"), arm, 2.0)
    assert alone == CorrelatedPrivacy(2.0, 1e-5, mechanism="buffered")
    assert type(privacy_of(settings_of({}), arm, 2.0)) is Privacy


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        ({"mechanism": "buffered"}, "buffered correlated noise .*not proved"),
        ({"bands": 4}, "privacy.bands = 4 is of banded noise"),
        ({"mechanism": "banded", "unit": "client"}, "for records, and this arm's unit is the client"),
        ({"bands": 4, "unit": "client"}, "for records, and this arm's unit is the client"),
    ],
)
def test_settings_that_do_not_fit_are_refused(privacy: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        privacy_of(settings_of(privacy), Arm(private=True), 2.0)
