"""Transcripts of algorithms with several sums in a round: each sum is held against what it promises, by itself.

False alarms: six honest masked runs are audited here, each with a probability of at most 1e-3 of one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from flat_arguments import federate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Homomorphic, Masked, Plain, audit
from choral.audits import Audit
from choral.privacy.ledgers.hash_chain import GENESIS, lines
from choral.protocols.in_process import ByteCounter
from choral.protocols.masking import messages, party_round
from choral.protocols.masking.mask_addition import masked
from choral.protocols.tap import show
from choral.trainers import DANE, FSVRG, Dropouts, Participation, RunFolderError, Scaffold
from choral.trainers.run_folder.transcript import ObservedMessage, Opened, Recorded, SumBegun

torch.set_num_threads(1)
Job = Mapping[str, Any]


@pytest.fixture(scope="module")
def job() -> Job:
    """Four parties, three rounds of logistic regression on 200 features."""
    generator = torch.Generator().manual_seed(2)
    points = torch.randn(4 * 25, 200, generator=generator) / 14
    labels = (points[:, 0] > 0).float()

    def build(dataset: TensorDataset) -> Any:
        model = nn.Linear(200, 1)
        return model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(dataset, batch_size=5)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1], reduction="none")

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            optimizer.step()

    parts = {f"p{i}": TensorDataset(points[25 * i : 25 * i + 25], labels[25 * i : 25 * i + 25]) for i in range(4)}
    given = {"build": build, "fit": fit, "loss": loss, "evaluate": lambda model: 0.5, "parties": parts, "rounds": 3}
    return given | {"secure_sum": Masked(corrupt=1), "transcript": "rehearsal"}


def rehearse(job: Job, folder: Path, **changes: Any) -> Audit:
    federate(**{**job, **changes}, out=folder)
    return audit(folder)


def check(report: Audit, part: str) -> tuple[str, str]:
    found = next(check for check in report.checks if part in check.name)
    return found.verdict, found.finding


def rewrite(run: Path, change: Callable[[list[Any]], list[Any]]) -> None:
    content, last = lines(GENESIS, changed := change(list(Recorded(run).entries)))
    (run / "transcript" / "index.jsonl").write_bytes(content)
    info = json.loads((run / "run.json").read_text())
    info["transcript"] = {"entries": len(changed), "head": last}
    (run / "run.json").write_text(json.dumps(info))


LATE = Participation(dropouts=Dropouts(vector=0.15))
# What the sums of three rounds are, by channel; FSVRG counts once, before the first.
DANES, FSVRGS = ["gradient", "update"] * 3, ["counts", *["gradient", "update"] * 3]
KINDS = [
    (DANE(ridge=0.1, mu=0.1), Masked(corrupt=1), DANES),
    (FSVRG(step=0.1), Masked(corrupt=1), FSVRGS),
    (FSVRG(step=0.1), Plain(), FSVRGS),
    (DANE(ridge=0.1, mu=0.1), Homomorphic(), DANES),
    (Scaffold(), Masked(corrupt=1), ["update"] * 3),
]


@pytest.mark.parametrize(("algorithm", "secure_sum", "channels"), KINDS, ids=lambda each: type(each).__name__)
def test_an_honest_run_leaves_evidence_of_every_sum(
    job: Job, tmp_path: Path, algorithm: Any, secure_sum: Any, channels: list[str]
) -> None:
    report = rehearse(job, tmp_path / "run", algorithm=algorithm, secure_sum=secure_sum)
    assert {check.verdict for check in report.checks} == {"holds"}
    begun = [entry for entry in Recorded(tmp_path / "run").entries if isinstance(entry, SumBegun)]
    assert [entry.channel for entry in begun] == channels
    assert [entry.exchange for entry in begun if entry.round == 2] == list(range(1, len(begun) // 3 + 1))
    assert report.transcript is not None
    assert report.transcript.vectors == 4 * len(channels)
    if secure_sum.name == "masked":
        assert report.transcript.uploads == 4 * len(channels)
        assert report.transcript.detectable is not None


def test_one_vector_sent_unmasked_is_caught_in_the_sum_that_it_is_of(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second sum of round 2: by its place, since each of four parties masks once in each sum. What the wire (and so
    the recorder) sees is changed; the protocol's own copy is not."""
    calls: list[bytes] = []

    def spied(vector: Any, bits: int, added: Any, subtracted: Any) -> bytes:
        calls.append(masked(vector, bits, added[:1], []))
        return masked(vector, bits, added, subtracted)

    def up(self: ByteCounter, party: str, raw: bytes) -> bytes:
        self._up[party] += len(raw)
        message = messages.to_server(raw, sender=party, limit=len(raw))
        leaks = isinstance(message, messages.Upload) and len(calls) == 3 * 4 + 2
        show("up", party, messages.encode(messages.Upload(message.session, 2, (calls[-1],))) if leaks else raw)
        return raw

    monkeypatch.setattr(party_round, "masked", spied)
    monkeypatch.setattr(ByteCounter, "up", up)
    report = rehearse(job, tmp_path / "run", algorithm=DANE(ridge=0.1, mu=0.1), rounds=2)
    verdict, finding = check(report, "single party's vector")
    assert (verdict, report.exit_code) == ("violated", 1)
    assert "p1 in round 2, update, its self-mask taken off" in finding
    assert "p1's vector" in finding


def test_masks_that_serve_two_sums_of_one_round_are_caught(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One session carries both sums where their vectors look alike; here its second masks are the first ones."""
    kept: list[tuple[Any, Any]] = []

    def stale(vector: Any, bits: int, added: Any, subtracted: Any) -> bytes:
        kept.append((added[1:], subtracted))
        pairs = kept[(len(kept) - 1) % 4]
        return masked(vector, bits, [added[0], *pairs[0]], pairs[1])

    monkeypatch.setattr(party_round, "masked", stale)
    report = rehearse(job, tmp_path / "run", algorithm=DANE(ridge=0.1, mu=0.1, mean="examples"), rounds=1)
    verdict, finding = check(report, "mask was used twice")
    assert verdict == "violated"
    assert "round 1, update" in finding


def test_a_sum_with_more_bytes_than_were_counted_is_caught(job: Job, tmp_path: Path) -> None:
    def told(entries: list[Any]) -> list[Any]:
        return [msgspec.structs.replace(entry, told=entry.told + 4) if isinstance(entry, SumBegun)
                and (entry.round, entry.exchange) == (2, 2) else entry for entry in entries]  # fmt: skip

    assert check(rehearse(job, tmp_path / "run", algorithm=DANE(ridge=0.1, mu=0.1)), "bytes that were")[0] == "holds"
    rewrite(tmp_path / "run", told)
    verdict, finding = check(audit(tmp_path / "run"), "bytes that were counted")
    assert verdict == "violated"
    assert "Round 2: the busiest party" in finding


def test_survivors_are_held_against_each_sum(job: Job, tmp_path: Path) -> None:
    """Two sums of a round may have other survivors each. Within one all must be told the same: here p0 is told of the
    first sum's, all four, in the second, to which p3 does not come."""
    rehearse(
        job, tmp_path / "run", algorithm=DANE(ridge=0.1, mu=0.1, mean="examples"), rounds=1, participation=LATE, seed=11
    )
    recorded = Recorded(tmp_path / "run")
    assert check(audit(tmp_path / "run"), "same survivors")[0] == "holds"

    def told(entry: Any) -> bool:
        if not isinstance(entry, ObservedMessage) or (entry.way, entry.party) != ("down", "p0"):
            return False
        raw = recorded.raw(entry)
        return raw is not None and isinstance(messages.to_party(raw, limit=len(raw)), messages.Survivors)

    first, second = (entry for entry in recorded.entries if told(entry))
    assert first.sha256 != second.sha256
    rewrite(
        tmp_path / "run",
        lambda entries: [first if entry == second else entry for entry in entries],
    )
    verdict, finding = check(audit(tmp_path / "run"), "same survivors")
    assert verdict == "violated"
    assert "2 different sets" in finding


def test_a_run_that_is_resumed_between_rounds_goes_on_with_its_sums(job: Job, tmp_path: Path) -> None:
    many = {"algorithm": DANE(ridge=0.1, mu=0.1), "out": tmp_path / "run"}

    def stop(entry: Any) -> None:
        if entry.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(**job, **many, on_round=stop)
    federate(**job, **many, resume=True)
    report = audit(tmp_path / "run")
    assert {check.verdict for check in report.checks} == {"holds"}
    entries = Recorded(tmp_path / "run").entries
    opened = sum(isinstance(entry, Opened) for entry in entries)
    assert opened == 4  # two channels that look different, twice
    assert {entry.session for entry in entries if isinstance(entry, SumBegun) and entry.round == 3} == {2, 3}


def test_a_transcript_of_one_sum_a_round_is_still_read(job: Job, tmp_path: Path) -> None:
    """As version 2 wrote it: no line that a sum begins."""

    def old(entries: list[Any]) -> list[Any]:
        kept = [entry for entry in entries if not isinstance(entry, SumBegun)]
        return [msgspec.structs.replace(each, version=2) if isinstance(each, Opened) else each for each in kept]

    rehearse(job, tmp_path / "run")
    rewrite(tmp_path / "run", old)
    (tmp_path / "run" / "manifest.json").unlink()  # as then
    shutil.rmtree(tmp_path / "run" / "receipts")
    report = audit(tmp_path / "run")
    assert {check.verdict for check in report.checks} == {"holds"}
    assert report.transcript is not None
    assert report.transcript.vectors == 12


def test_a_sum_of_a_session_that_was_not_opened_is_refused(job: Job, tmp_path: Path) -> None:
    def elsewhere(entries: list[Any]) -> list[Any]:
        return [msgspec.structs.replace(each, session=3) if isinstance(each, SumBegun) else each for each in entries]

    rehearse(job, tmp_path / "run", rounds=1)
    rewrite(tmp_path / "run", elsewhere)
    with pytest.raises(RunFolderError, match="session 3, of 1 opened"):
        audit(tmp_path / "run")
