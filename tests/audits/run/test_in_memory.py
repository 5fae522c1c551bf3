"""A run that was never written to a folder carries its ledgers, and is audited as one that was."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from flat_arguments import centralize, federate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import ClientPrivacy, Masked, Privacy, Run, audit, compare
from choral.privacy import Ledger, LedgerError


def records(count: int) -> TensorDataset:
    features = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))
    return TensorDataset(features, (features[:, 0] > 0).long())


def build(dataset: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=16, shuffle=True)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


JOB: dict[str, Any] = {
    "build": build,
    "fit": fit,
    "evaluate": lambda model: float(model.weight.detach().abs().mean()),
    "parties": {"north": records(60), "o/west ": records(61), "south": records(62)},
    "rounds": 2,
}
MAKE: dict[str, Any] = {
    "federated": lambda **more: federate(**JOB, privacy=Privacy(3.0, 1e-5), secure_sum=Masked(), **more),
    "pooled": lambda **more: centralize(**JOB, privacy=Privacy(3.0, 1e-5), **more),
    "clients": lambda **more: federate(
        **JOB, privacy=ClientPrivacy(8.0, 1e-3, colluders=0), secure_sum=Masked(), **more
    ),
}


@pytest.mark.parametrize("kind", MAKE)
def test_a_run_without_a_folder_holds_and_so_does_what_it_saves(kind: str, tmp_path: Path) -> None:
    run: Run = MAKE[kind]()
    assert run.folder is None
    found = audit(run)
    assert (found.verdict, found.exit_code) == ("holds", 0)
    assert found.budgets
    assert all(row.recomputed and row.steps for row in found.budgets)
    arm = compare({"arm": run}).arms[0].audit
    assert arm is not None
    assert arm.verdict == "holds"
    run.save(tmp_path / "run")
    assert [row.recomputed for row in audit(tmp_path / "run").budgets] == [row.recomputed for row in found.budgets]
    assert pickle.loads(pickle.dumps(run)).ledgers == run.ledgers  # noqa: S301 - a run's own bytes


def test_what_is_carried_is_what_a_file_would_hold(tmp_path: Path) -> None:
    run: Run = MAKE["federated"]()
    kept: Run = MAKE["federated"](out=tmp_path / "run")
    assert not kept.ledgers, "its ledgers are in the folder"
    for name, content in run.ledgers.items():
        assert Ledger.read(content, holder=name).events == Ledger(path_of(tmp_path, name)).events


def path_of(folder: Path, name: str) -> Path:
    return folder / "run" / "ledger" / f"{name.replace('/', '%2F').replace(' ', '%20')}.jsonl"


def test_a_claim_that_the_carried_ledger_contradicts_is_violated() -> None:
    run: Run = MAKE["federated"]()
    spent = {name: dataclasses.replace(cost, epsilon=1.0) for name, cost in run.info.spent.items()}
    claimed = dataclasses.replace(run, info=msgspec.structs.replace(run.info, spent=spent))
    assert audit(claimed).verdict == "violated"
    assert audit(dataclasses.replace(run, ledgers={})).verdict == "unverified"


def test_a_carried_ledger_that_is_edited_or_anothers_is_refused() -> None:
    run: Run = MAKE["federated"]()
    edited = {**run.ledgers, "north": run.ledgers["north"].replace(b'"steps":', b'"steps":1', 1)}
    with pytest.raises(LedgerError, match="chain of hashes is broken"):
        audit(dataclasses.replace(run, ledgers=edited))
    with pytest.raises(LedgerError, match="belongs to 'south'"):
        audit(dataclasses.replace(run, ledgers={**run.ledgers, "north": run.ledgers["south"]}))
    with pytest.raises(LedgerError):
        Ledger.read(b"", holder="north")
