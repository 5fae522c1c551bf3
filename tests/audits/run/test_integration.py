"""From real training to a saved report: every arm, every ledger, nothing made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_arguments import centralize, federate
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Masked, Privacy, audit, compare
from choral.audits import Comparison
from choral.trainers import Run

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def job() -> Callable[[int], dict[str, Any]]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    parties = {name: TensorDataset(x[i:600:3], y[i:600:3]) for i, name in enumerate(("north", "south", "east"))}

    def build(dataset: Any) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
        model = nn.Linear(64, 10)
        return model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(dataset, batch_size=16, shuffle=True)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]) -> None:
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x[600:]).argmax(1) == y[600:]).float().mean())

    return lambda seed: {
        "build": build, "fit": fit, "evaluate": evaluate, "parties": parties, "rounds": 2, "seed": seed,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def arms(job: Callable[[int], dict[str, Any]], folder: Path) -> dict[str, list[Run]]:
    privacy, masked = Privacy(epsilon=8.0, delta=1e-4, max_grad_norm=1.0, epochs=1), Masked(min_survivors=2)
    recipes: dict[str, tuple[Callable[..., Run], dict[str, Any]]] = {
        "cloud": (centralize, {}),
        "cloud-dp": (centralize, {"privacy": privacy}),
        "federated": (federate, {}),
        "federated-masked": (federate, {"secure_sum": masked}),
        "federated-dp": (federate, {"privacy": privacy, "secure_sum": masked}),
    }
    return {
        arm: [train(**job(seed), **extra, out=folder / arm / str(seed)) for seed in SEEDS]
        for arm, (train, extra) in recipes.items()
    }


def test_real_runs_compare(arms: dict[str, list[Run]], tmp_path: Path) -> None:
    report = compare(arms, budgets={"cloud-dp": arms["cloud-dp"]})
    assert {check.verdict for check in report.checks} == {"holds"}
    assert [row.difference for row in report.matches] == [0.0, 0.0]
    rows = {arm.name: arm for arm in report.arms}
    assert rows["cloud"].metric.mean > 0.8
    assert rows["federated-dp"].claim is not None
    assert 0 < rows["federated-dp"].claim.epsilon <= 8
    assert len(rows["federated-dp"].holders) == 3
    assert rows["federated-masked"].bytes_per_party > rows["federated"].bytes_per_party > 2 * 2 * 650
    assert Comparison.load(report.save(tmp_path / "report.json")) == report
    assert "federated-masked equals federated" in report.save(tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize("arm", ["cloud", "cloud-dp", "federated", "federated-masked", "federated-dp"])
def test_real_run_folders_pass_their_audit(arm: str, arms: dict[str, list[Run]], folder: Path, tmp_path: Path) -> None:
    report = audit(folder / arm / "0")
    assert (report.verdict, report.exit_code) == ("holds", 0)
    assert report.title == f"Audit of {arm}/0"
    claimed = [each.epsilon for each in arms[arm][0].info.spent.values()]
    assert [row.recomputed for row in report.budgets] == pytest.approx(claimed, rel=1e-5)
    assert report.save(tmp_path / "audit.html").stat().st_size > 10_000
    assert report.traces[0].values == tuple(entry.metrics["accuracy"] for entry in arms[arm][0].history)


def test_a_ledger_that_vanished_shows_in_the_comparison(arms: dict[str, list[Run]], folder: Path) -> None:
    ledger = folder / "federated-dp" / "1" / "ledger" / "east.jsonl"
    hidden = ledger.rename(ledger.with_suffix(".gone"))
    try:
        found = next(check for check in compare(arms).checks if check.name.startswith("federated-dp stays"))
    finally:
        hidden.rename(ledger)
    assert found.verdict == "unverified"
    assert "Seed 1, east" in found.finding
