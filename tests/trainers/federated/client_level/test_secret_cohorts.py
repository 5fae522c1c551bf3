"""Runs whose trusted server keeps its cohorts secret: what they cost and claim, and where they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import ClientPrivacy, Homomorphic, Keep, Masked, Participation, Plain, audit, federate
from choral.errors import ConfigError
from choral.privacy import Ledger
from choral.privacy.accounting.events import SampledClientRelease
from choral.trainers import DANE, Run, Task
from choral.trainers.federated.participation import Availability, Dropouts

CLIENTS, RATE = 1200, 0.1
PROMISE = ClientPrivacy(3.0, 1e-5, noise="central", sample_rate=RATE)
COHORTS = Participation(rate=RATE, least=2)


def build(dataset: Any) -> Any:
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=2)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x)[:, 0], y).backward()
        optimizer.step()


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0])[:, 0], batch[1], reduction="none")


TASK = Task(build=build, fit=fit, evaluate=lambda model: float(next(model.parameters()).sum()), loss=loss)


def clients(count: int = CLIENTS) -> dict[str, TensorDataset]:
    x = torch.randn(count, 2, 2, generator=torch.Generator().manual_seed(1))
    return {f"client {i:04d}": TensorDataset(x[i], x[i].sum(1)) for i in range(count)}


def trained(out: Path | None = None, **changes: Any) -> Run:
    given: dict[str, Any] = {"privacy": PROMISE, "participation": COHORTS, "secure_sum": Plain()} | changes
    keep = given.pop("keep", Keep(out=out))
    parties = given.pop("parties", clients())
    return federate(TASK, parties, rounds=2, keep=keep, **given)


def test_amplification_is_charged_and_the_claim_says_who_is_held_off(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    found = audit(tmp_path / "run")
    assert found.verdict == "holds"
    for words in (
        "differentially private for each client",
        "anyone who sees the model after any round, and nothing else of a round: neither who was selected nor how many",
        "draws each client for a round with probability 0.1, from the operating system's randomness",
        "no guarantee holds against those who see them",
    ):
        assert words in found.claim
    assert "which of them survive each round" not in found.claim
    events = Ledger(tmp_path / "run" / "ledger" / "clients.jsonl", holder="clients").releases
    assert [type(event) for event in events] == [SampledClientRelease] * 2
    info = json.loads((tmp_path / "run" / "run.json").read_bytes())
    assert info["privacy"]["sample_rate"] == RATE
    assert info["spent"]["clients"]["sample_rate"] == RATE
    assert 2.9 < info["spent"]["clients"]["guarantee"] <= 3.0


@pytest.mark.parametrize("said", [None, 0.05])
def test_another_rate_than_was_charged_is_found(said: float | None, tmp_path: Path) -> None:
    trained(tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_bytes())
    info["privacy"]["sample_rate"] = said
    if said is None:
        del info["privacy"]["sample_rate"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    found = audit(tmp_path / "run")
    assert found.verdict == "violated"
    assert any("of cohorts drawn at the rate 0.1" in check.finding for check in found.checks)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"participation": Participation()}, "participation.rate is None"),
        ({"participation": Participation(cohort=120)}, "participation.rate is None"),
        ({"participation": Participation(rate=0.2, least=2)}, "participation.rate is 0.2"),
        ({"participation": Participation(rate=RATE, least=2, draw="seed")}, "drawn from a public seed"),
        ({"participation": Participation(rate=RATE, least=2, deadline=5.0)}, "who is there, in time"),
        ({"participation": Participation(rate=RATE, least=2, patience=1)}, "who is there, in time"),
        (
            {"participation": Participation(rate=RATE, least=2, availability=Availability(peak=0.9, trough=0.1))},
            "who is there, in time",
        ),
        ({"participation": Participation(rate=RATE)}, "a round that fails would tell that few were drawn"),
        (
            {"participation": Participation(rate=RATE, least=2, dropouts=Dropouts(vector=0.9))},
            "a round that fails would tell that few were drawn",
        ),
        ({"secure_sum": Masked(corrupt=0.1, dropouts=0.1)}, "are told who else is in it"),
        ({"secure_sum": Homomorphic()}, "are told who else is in it"),
        ({"algorithm": DANE(mu=0.1)}, "2 sums in a round"),
        ({"parties": clients(200)}, "a round that fails would tell that few were drawn"),
    ],
)
def test_cohorts_that_are_public_or_of_another_law_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        trained(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_transcript_that_shows_the_cohorts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it shows who was selected"):
        trained(keep=Keep(out=tmp_path / "run", transcript="digests"))
