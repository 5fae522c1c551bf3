"""What all private trainings of a report cost together, against the accountant on all of their events."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Keep, centralize, compare, federate
from choral.audits.comparison.composition import composed
from choral.audits.findings.claims import composed_words
from choral.privacy import ClientPrivacy, Ledger, Privacy
from choral.privacy.accounting import client_level, record_level
from choral.trainers import Compute, Run, Task

SIZES = {"north": 40, "south": 25, "east": 60}


def build(data: Any) -> Any:
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=10, shuffle=True)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    for points, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(points), labels).backward()
        optimizer.step()


TASK = Task(build=build, fit=fit, evaluate=lambda model: float(model(torch.ones(1, 3)).argmax() == 1))
PARTIES = {name: TensorDataset(torch.randn(n, 3), torch.randint(2, (n,))) for name, n in SIZES.items()}


def trained(folder: Path, epsilon: float | None, *, pooled: bool = False, seed: int = 0) -> Run:
    keep, compute = Keep(out=folder), Compute(seed=seed)
    privacy = Privacy(epsilon=epsilon, delta=1e-3) if epsilon else None
    if pooled:
        return centralize(TASK, PARTIES, rounds=2, privacy=privacy, keep=keep, compute=compute)
    return federate(TASK, PARTIES, rounds=2, privacy=privacy, keep=keep, compute=compute)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    base = tmp_path_factory.mktemp("runs")
    return {
        "plain": trained(base / "plain", None),
        "cloud": trained(base / "cloud", 2.0, pooled=True),
        "first": trained(base / "first", 2.0),
        "second": trained(base / "second", 2.0, seed=1),
        "more": trained(base / "more", 4.0),
    }


def events(runs: dict[str, Run], name: str, *which: str) -> list[Any]:
    folders = [runs[each].folder or Path() for each in which]
    return [event for folder in folders for event in Ledger(folder / "ledger" / f"{name}.jsonl").events]


def test_a_partys_records_are_in_its_own_trainings_and_in_the_pooled_ones(runs: dict[str, Run]) -> None:
    """Seeds, budgets and arms; what stands at the headline's budget and on the curve is one training."""
    arms = {"plain": [runs["plain"]], "cloud-dp": [runs["cloud"]], "federated-dp": [runs["first"], runs["second"]]}
    again = Run.load(runs["first"].folder or "")  # as the command reads it
    (found,) = composed(arms, {"federated-dp": [again, runs["second"], runs["more"]]})
    by_party = {
        name: record_level.epsilon(
            [*events(runs, name, "first", "second", "more"), *events(runs, "pooled", "cloud")], 1e-3
        )
        for name in SIZES
    }
    assert found.epsilon == pytest.approx(max(by_party.values()), rel=1e-9)
    assert by_party[found.owner] == max(by_party.values())
    assert (found.unit, found.runs, found.delta) == ("record", 4, 1e-3)
    assert 3.9 < found.single <= 4.0
    assert found.epsilon > found.single * 1.2


def test_the_report_says_which_number_is_for_whom(runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    report = compare({"cloud-dp": runs["cloud"], "federated-dp": [runs["first"], runs["second"]]})
    (found,) = report.composed
    said = composed_words(found)
    assert said.startswith("For a reader of one model: ε = 2.0")
    assert "which shows 3 trainings on the same records" in said
    assert f"of {found.owner}, which has the most, all of them composed" in said
    report.print()
    assert "For a reader of this whole report" in " ".join(capsys.readouterr().out.split())


def test_one_training_composes_to_itself(runs: dict[str, Run]) -> None:
    (found,) = composed({"cloud-dp": [runs["cloud"]]}, {})
    assert found.runs == 1
    assert found.epsilon == pytest.approx(found.single, rel=1e-6)
    assert "whole report" not in composed_words(found)
    assert composed({"plain": [runs["plain"]]}, {}) == ()


def test_clients_and_records_are_counted_apart(runs: dict[str, Run], tmp_path: Path) -> None:
    privacy, made = ClientPrivacy(epsilon=8.0, delta=1e-2, clip=1.0), []
    for seed in (0, 1):
        keep, compute = Keep(out=tmp_path / str(seed)), Compute(seed=seed)
        made.append(federate(TASK, PARTIES, rounds=2, privacy=privacy, keep=keep, compute=compute))
    records, clients = composed({"federated-dp": [runs["first"]], "clients": made}, {})
    releases = [
        release for run in made for release in Ledger((run.folder or Path()) / "ledger" / "clients.jsonl").releases
    ]
    assert (records.unit, clients.unit) == ("record", "client")
    assert clients.epsilon == pytest.approx(client_level.epsilon(releases, 1e-2))


def test_a_missing_ledger_leaves_the_sum_unknown(runs: dict[str, Run], tmp_path: Path) -> None:
    shutil.copytree(runs["first"].folder or "", tmp_path / "run")
    (tmp_path / "run" / "ledger" / "south.jsonl").unlink()
    (found,) = composed({"a": [Run.load(tmp_path / "run")], "b": [runs["cloud"]]}, {})
    assert found.epsilon is None
    assert "more, and unknown, for not every ledger is there" in composed_words(found)
