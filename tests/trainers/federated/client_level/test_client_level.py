"""Federated runs with client-level privacy: any secure sum, one ledger, resumed, audited, stopped."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flat_arguments import centralize, federate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import AdaptiveClip, ClientPrivacy, Homomorphic, Masked, Plain, audit
from choral.errors import ConfigError
from choral.privacy import BudgetExceededError, ClientPrivacyEngine, Ledger, LedgerError
from choral.protocols.errors import TooFewSurvivorsError

torch.set_num_threads(1)
SUMS = [Plain(), Masked(min_survivors=8), Homomorphic(min_survivors=8)]


@pytest.fixture
def task() -> Callable[..., dict[str, Any]]:
    """Twelve parties of one separable problem, so that a mean with noise still learns."""
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(12 * 40, 5, generator=generator)
    labels = (points @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0]) > 0).long()
    parties = {
        f"p{i:02d}": TensorDataset(points[i * 40 : i * 40 + 40], labels[i * 40 : i * 40 + 40]) for i in range(12)
    }

    def build(dataset: TensorDataset) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
        model = nn.Linear(5, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(dataset, batch_size=10, shuffle=True)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        for batch, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> float:
        return (model(points).argmax(dim=1) == labels).float().mean().item()

    def make(**replaced: Any) -> dict[str, Any]:
        return {"build": build, "fit": fit, "evaluate": evaluate, "parties": parties, "rounds": 3, "seed": 0} | replaced

    return make


def promise(**changes: Any) -> ClientPrivacy:
    return ClientPrivacy(**({"epsilon": 50.0, "delta": 1e-3, "min_survivors": 8, "clip": 1.0, "bits": 16} | changes))


@pytest.mark.parametrize("noise", ["distributed", "local", "central"])
@pytest.mark.parametrize("secure_sum", SUMS, ids=lambda kind: kind.name)
def test_any_sum_carries_any_noise(task: Any, tmp_path: Path, secure_sum: Any, noise: str) -> None:
    run = federate(**task(), privacy=promise(noise=noise), secure_sum=secure_sum, out=tmp_path / "run")
    assert run.finished
    assert run.metrics["accuracy"] > 0.7
    assert list(run.info.spent) == ["clients"]
    spent = run.info.spent["clients"]
    assert (spent.unit, spent.steps) == ("client", 3)
    assert 0 < spent.epsilon <= 50.0
    assert run.info.privacy is not None
    assert run.info.privacy["noise"] == noise
    assert [entry.clip for entry in run.history[1:]] == [1.0] * 3
    checked = audit(tmp_path / "run")
    assert checked.verdict == "holds"
    assert "zero out one client" in checked.claim
    assert ("has to be trusted" in checked.claim) == (noise == "central")


def test_the_mean_of_a_run_is_that_of_clipped_updates_with_equal_weights(task: Any) -> None:
    """At a budget without effect, one round moves the weights by the plain mean of the parties' clipped updates."""
    given = task(rounds=1)
    sizes = [40, 25, 30, 35] * 3
    given["parties"] = {
        name: TensorDataset(*(tensor[:size] for tensor in dataset.tensors))
        for size, (name, dataset) in zip(sizes, given["parties"].items(), strict=True)
    }
    run = federate(**given, privacy=promise(epsilon=1e5, clip=0.5, bits=24), secure_sum=Masked(min_survivors=8))
    start = federate(**(given | {"rounds": 1}), privacy=promise(epsilon=1e5, clip=1e-9, bits=24)).state
    moved = torch.cat([(run.state[key] - start[key]).flatten() for key in run.state])
    assert 0.3 < float(moved.norm()) <= 0.5 * 1.02  # every update is longer than the clip, and they point alike


def test_too_few_present_ends_the_run_before_anything_is_spent(task: Any, tmp_path: Path) -> None:
    with pytest.raises(TooFewSurvivorsError, match="expected at least 12"):
        federate(
            **task(rounds=10),
            privacy=promise(min_survivors=12),
            secure_sum=Plain(),
            dropout_rate=0.3,
            out=tmp_path / "run",
        )
    ledger = tmp_path / "run" / "ledger" / "clients.jsonl"
    paid = len(Ledger(ledger).releases) if ledger.exists() else 0
    from choral.trainers import Run

    assert paid == Run.load(tmp_path / "run").history[-1].round


def test_dropouts_within_the_plan_cost_more_than_none(task: Any) -> None:
    kept = federate(**task(), privacy=promise())
    lossy = federate(**task(), privacy=promise(), dropout_rate=0.15)
    assert min(entry.survivors for entry in lossy.history[1:]) < 12
    assert kept.spent is not None
    assert lossy.spent is not None
    assert kept.spent.epsilon < lossy.spent.epsilon <= 50.0


def test_a_sum_that_opens_too_early_is_refused(task: Any) -> None:
    early = Masked(min_survivors=7, corrupt=1, dropouts=2)
    with pytest.raises(ConfigError, match="may open sums of 7 clients, but the noise is sized for 8"):
        federate(**task(), privacy=promise(), secure_sum=early)
    federate(**task(rounds=1), privacy=promise(noise="central"), secure_sum=early)


@pytest.mark.parametrize("number", [1, 2])
def test_a_round_that_is_cut_short_costs_one_round(task: Any, tmp_path: Path, number: int) -> None:
    class Stopped(BaseException):
        pass

    def stop(model: Any, optimizer: Any, loader: Any, round: int) -> None:
        if round == number:
            raise Stopped
        task()["fit"](model, optimizer, loader)

    with pytest.raises(Stopped):
        federate(**task(fit=stop), privacy=promise(), out=tmp_path / "run")
    resumed = federate(**task(), privacy=promise(), out=tmp_path / "run", resume=True)
    assert [entry.round for entry in resumed.history] == [0, 1, 2]
    assert resumed.info.ended == "the clients' budget is spent; ended after round 2"
    assert resumed.info.spent["clients"].steps == 3


def test_noise_that_is_named_is_taken_if_it_fits(task: Any, tmp_path: Path) -> None:
    least = ClientPrivacyEngine(promise(), clients=12, length=12, rounds=3, ledger=Ledger()).ratio
    with pytest.raises(BudgetExceededError, match=r"would come to epsilon 5\d\.\d+ in all, more than the 50 promised"):
        federate(**task(), privacy=promise(noise_multiplier=0.97 * least))
    run = federate(**task(), privacy=promise(noise_multiplier=2 * least), out=tmp_path / "run")
    assert run.info.privacy is not None
    assert run.info.privacy["noise_multiplier"] == 2 * least
    assert run.info.spent["clients"].epsilon < 25.0
    assert audit(tmp_path / "run").verdict == "holds"
    for wrong in (0.0, -1.0, float("nan"), float("inf"), True, "2"):
        with pytest.raises(ConfigError, match="noise_multiplier is"):
            promise(noise_multiplier=wrong)


def test_a_resumed_run_goes_on_with_its_clip_and_its_ledger(task: Any, tmp_path: Path) -> None:
    privacy = promise(clip=AdaptiveClip(start=0.1, quantile=0.5, rate=0.5))

    class Stopped(Exception):
        pass

    def stop(entry: Any) -> None:
        if entry.round == 3:
            raise Stopped

    with pytest.raises(Stopped):
        federate(**task(rounds=6), privacy=privacy, out=tmp_path / "run", on_round=stop)
    resumed = federate(**task(rounds=6), privacy=privacy, out=tmp_path / "run", resume=True)
    clips = [entry.clip for entry in resumed.history[1:]]
    assert all(later > earlier for earlier, later in pairwise(clips)), clips
    assert clips[3] > 0.1 * np.exp(0.5 * 0.5 * 2)  # it did not begin again
    assert resumed.spent is not None
    assert resumed.spent.epsilon <= 50.0
    assert resumed.spent.steps == 6
    assert audit(tmp_path / "run").verdict == "holds"
    ledger = tmp_path / "run" / "ledger" / "clients.jsonl"
    ledger.write_bytes(b"\n".join(ledger.read_bytes().splitlines()[:3]) + b"\n")
    with pytest.raises(LedgerError, match="the clients' ledger holds 1 rounds"):
        federate(**task(rounds=6), privacy=privacy, out=tmp_path / "run", resume=True)
    found = audit(tmp_path / "run")
    assert found.checks[0].finding.startswith("clients: the ledger holds 1 steps, run.json claims 6")
    assert found.checks[0].verdict == "unverified"
    assert found.verdict == "violated"  # the manifest that the parties signed has another ledger


def test_a_ledger_for_the_life_of_the_clients_stops_a_second_run(task: Any, tmp_path: Path) -> None:
    privacy = promise(ledger=tmp_path / "ours.jsonl", noise="central")
    federate(**task(), privacy=privacy)
    with pytest.raises(BudgetExceededError, match="is spent"):
        federate(**task(), privacy=privacy)


def test_pooled_data_has_no_clients(task: Any) -> None:
    with pytest.raises(ConfigError, match="expected Privacy"):
        centralize(**task(), privacy=promise())


def test_an_arm_of_a_comparison(tmp_path: Path) -> None:
    from choral.jobs.settings import Arm, PrivacySettings, Settings
    from choral.jobs.training import train
    from choral.trainers.task.settings import Split, Training

    settings = Settings(
        split=Split(parties=10, alpha=100.0),
        training=Training(rounds=2, hidden=0),
        privacy=PrivacySettings(epsilon=50.0, delta=1e-3, quantile=0.5, bits=16),
    )
    for unit, holders in (("client", ["clients"]), (None, [f"party-{i:02d}" for i in range(1, 11)])):
        arm = Arm(private=True, unit=unit, secure_sum="masked")  # type: ignore[arg-type]
        run = train(settings, arm, seed=0, epsilon=50.0, out=tmp_path / str(unit), resume=False)
        assert sorted(run.info.spent) == holders
    with pytest.raises(ConfigError, match="no clients"):
        train(
            settings,
            Arm(private=True, unit="client", centralized=True),
            seed=0,
            epsilon=1.0,
            out=tmp_path / "c",
            resume=False,
        )


def test_the_curve_over_budgets_keeps_to_one_unit() -> None:
    from choral.jobs.comparison import planned_runs
    from choral.jobs.settings import Arm, PrivacySettings, Settings

    arms = {"record": Arm(private=True), "client": Arm(private=True, unit="client")}
    arms["cloud"] = Arm(private=True, centralized=True)
    for unit, on_curve in (("record", {"record", "cloud"}), ("client", {"client"})):
        chosen = {name: arm for name, arm in arms.items() if (unit, name) != ("client", "record")}
        settings = Settings(seeds=1, epsilons=(1, 2), privacy=PrivacySettings(epsilon=8, unit=unit), arms=chosen)  # type: ignore[arg-type]
        found: dict[str, list[float | None]] = {}
        for planned in planned_runs(settings):
            found.setdefault(planned.arm, []).append(planned.epsilon)
        assert found == {name: [1, 2, 8] if name in on_curve else [8] for name in chosen}


@pytest.mark.parametrize(
    ("privacy", "arm", "complaint"),
    [
        ({}, {"centralized": True, "unit": "client"}, "no clients"),
        ({"delta": 0.2}, {"unit": "client"}, "below 1/n"),
        ({"min_survivors": 11}, {"unit": "client"}, "min_survivors is 11 of 10"),
        ({"clip": 0.0}, {"unit": "client"}, "clipping norm"),
        ({"unit": "client", "bits": 99}, {}, "bits is 99"),
        ({"neighbours": "replace one record"}, {"unit": "client"}, "is for records"),
    ],
    ids=str,
)
def test_a_comparison_refuses_before_it_trains(privacy: Any, arm: Any, complaint: str) -> None:
    from choral.jobs.comparison import _check
    from choral.jobs.settings import Arm, PrivacySettings, Settings

    settings = Settings(
        privacy=PrivacySettings(**({"epsilon": 8.0, "delta": 1e-5} | privacy)), arms={"one": Arm(private=True, **arm)}
    )
    with pytest.raises(ConfigError, match=complaint):
        _check(settings)
