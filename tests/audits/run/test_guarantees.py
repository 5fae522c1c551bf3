"""What was spent and what is guaranteed are two numbers: the audit recomputes both, and the claim says both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_arguments import centralize
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Privacy, audit
from choral.privacy import Ledger, PlannedEvents, PoissonSampledGaussian, ReleasePlan
from choral.privacy.accounting import record_noise
from choral.trainers import Run

DELTA = 1e-3


class Stop(Exception):
    pass


@pytest.fixture
def job() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    parties = {}
    for name, count in {"north": 60, "south": 40}.items():
        points = torch.randn(count, 4, generator=generator)
        parties[name] = TensorDataset(points, (points[:, 0] > 0).long())

    def build(dataset: Any) -> Any:
        model = nn.Linear(4, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10, shuffle=True)

    def fit(model: Any, optimizer: Any, loader: Any) -> None:
        for batch, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()

    return {"build": build, "fit": fit, "evaluate": lambda _: 0.5, "parties": parties, "rounds": 4, "seed": 0}


def stop_after(number: int, at: str = "end") -> Callable[[Any], None]:
    def on_round(entry: Any) -> None:
        if entry.round == number:
            raise Stop(at)

    return on_round


@pytest.fixture
def stopped(job: dict[str, Any], tmp_path: Path) -> Path:
    """A run that somebody ended after two of its four rounds."""
    with pytest.raises(Stop):
        centralize(**job, privacy=Privacy(epsilon=3.0, delta=DELTA), out=tmp_path / "run", on_round=stop_after(2))
    return tmp_path / "run"


def test_a_run_that_was_stopped_claims_the_whole_plan_and_tells_what_was_released(stopped: Path) -> None:
    run = Run.load(stopped)
    spent = run.info.spent["pooled"]
    assert spent.guarantee is not None
    assert spent.epsilon < 2.6 < 2.99 < spent.guarantee <= 3.0
    found = audit(run)
    (row,) = found.budgets
    assert (row.verdict, row.guarantee, row.claimed) == ("holds", spent.guarantee, spent.epsilon)
    assert found.claim.count("ε\u00a0=\u00a0") >= 3
    assert "Training is (ε\u00a0=\u00a0" + f"{spent.guarantee:.2f}"[:3] in found.claim
    assert "whoever chose when to stop" in found.claim


def test_a_run_to_its_end_claims_one_number(job: dict[str, Any], tmp_path: Path) -> None:
    run = centralize(**job, privacy=Privacy(epsilon=3.0, delta=DELTA), out=tmp_path / "run")
    spent = run.info.spent["pooled"]
    assert spent.guarantee == spent.epsilon
    found = audit(run)
    assert found.verdict == "holds"
    assert "whoever chose when to stop" not in found.claim


def test_a_guarantee_that_the_ledger_does_not_give_is_violated(stopped: Path) -> None:
    path = stopped / "run.json"
    info = json.loads(path.read_text())
    info["spent"]["pooled"]["guarantee"] = info["spent"]["pooled"]["epsilon"]  # as if stopping had been planned
    path.write_text(json.dumps(info))
    (row,) = audit(Run.load(stopped)).budgets
    assert (row.verdict, row.finding) == ("violated", "the ledger guarantees less than run.json claims")


def test_a_ledger_that_was_trained_on_by_what_was_seen_is_violated(stopped: Path) -> None:
    """Somebody calibrated on top by privacy loss distributions: each figure alone is within the promise."""
    path = stopped / "ledger" / "pooled.jsonl"
    ledger = Ledger(path)
    ledger.bind("pooled", DELTA)
    before = ledger.events
    noise = record_noise.noise_multiplier(3.0, DELTA, 0.1, 20, before, slack=1e-3, fixed=True)
    more = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=noise, steps=20)
    ledger.append(more, after=len(before), plan=ReleasePlan(epsilon=3.0, parts=(PlannedEvents(event=more, times=1),)))
    assert ledger.epsilon(DELTA) <= 3.0
    (row,) = audit(Run.load(stopped)).budgets
    assert row.verdict == "violated"
    assert "no filter admits" in row.finding


def test_a_resumed_run_ends_at_the_guarantee(job: dict[str, Any], stopped: Path) -> None:
    run = centralize(**job, privacy=Privacy(epsilon=3.0, delta=DELTA), out=stopped, resume=True)
    spent = run.info.spent["pooled"]
    assert spent.guarantee == spent.epsilon
    assert len(Ledger(stopped / "ledger" / "pooled.jsonl").segments) == 1
    assert audit(run).verdict == "holds"
