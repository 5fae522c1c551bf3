"""Means and deviations for standardisation: their sums, what they cost together with the training, and the job."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from choral import BudgetExceededError, ClientPrivacy, ConfigError, Masked, Privacy, federate, federated_statistics
from choral.audits import audit
from choral.jobs.settings import Arm, PrivacySettings, Settings, SumSettings
from choral.jobs.standardising import check_standardise
from choral.jobs.training import load_task, train
from choral.privacy import Ledger, LedgerError
from choral.privacy.accounting.events import PoissonSampledGaussian, PoissonSampledShares
from choral.privacy.accounting.record_noise import noise_multiplier
from choral.privacy.dpsgd.joint_plan import joint_plan
from choral.trainers import FedSGD, Keep, Mean, Run, RunFolderError, Task
from choral.trainers.analytics import standardise as standardise_module
from choral.trainers.analytics.federated_statistics import packing_of
from choral.trainers.analytics.scales import Scales, shrink
from choral.trainers.analytics.standardise import pooled_standardisation, standardisation
from choral.trainers.data.standardised import Standardisation, Standardised, standardised_task
from choral.trainers.federated.plan import Plan
from choral.trainers.task.settings import AlgorithmSettings, DataSettings, Split, Training

SUM = Masked(corrupt=1, min_survivors=3)
CENTRE, SPREAD = np.array([4.0, -30.0, 0.1]), np.array([0.5, 3.0, 0.02])
BOUNDS = [(0.0, 10.0), (-50.0, 50.0), (0.0, 1.0), None]
PROMISE = Privacy(3.0, 1e-5)


def records(count: int, seed: int) -> TensorDataset:
    """Three columns of very different size, and a flag; the label is by what is standardised."""
    generator = np.random.default_rng(seed)
    plain = generator.normal(size=(count, 3))
    features = np.column_stack([CENTRE + SPREAD * plain, generator.integers(0, 2, count)])
    labels = (plain @ np.array([2.0, -1.0, 1.0]) > 0).astype(np.int64)
    return TensorDataset(torch.from_numpy(features).float(), torch.from_numpy(labels))


PARTIES = {name: records(count, count) for name, count in (("a", 300), ("b", 250), ("c", 350))}
HELD = records(500, 1)


def build(dataset: Any) -> Any:
    model = nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.3), DataLoader(dataset, batch_size=50, shuffle=True)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    for features, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(features), labels).backward()
        optimizer.step()


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def evaluate(model: nn.Module) -> float:
    features, labels = HELD.tensors
    return float((model(features).argmax(1) == labels).float().mean())


TASK = Task(build=build, fit=fit, evaluate=evaluate, loss=loss, parties=PARTIES, bounds=BOUNDS)


def plain_numbers() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    whole = torch.cat([each.tensors[0] for each in PARTIES.values()]).double().numpy()
    return whole.mean(0), whole.std(0)


def test_without_noise_they_are_those_of_plain_arithmetic(tmp_path: Path) -> None:
    by = standardisation(Plan.of(TASK, rounds=1, secure_sum=SUM), share=0.1, ledgers=tmp_path)
    mean, deviation = plain_numbers()
    assert by.means[:3] == pytest.approx(mean[:3], abs=1e-5)
    assert by.deviations[:3] == pytest.approx(deviation[:3], rel=1e-3)
    assert (by.means[3], by.deviations[3]) == (0.0, 1.0)
    assert list(tmp_path.iterdir()) == []
    pooled = pooled_standardisation(TASK, privacy=None, share=0.1, rounds=1, ledgers=tmp_path)
    assert pooled == by


def test_no_record_contributes_more_than_one() -> None:
    """Of the packed vector over its unit: all corners, and random values, of five columns."""
    wanted = {"scales": Scales({str(at): (-1.0, 3.0 + at) for at in range(5)}, 100)}
    packing = packing_of(wanted, 100, noisy=True)
    generator = np.random.default_rng(3)
    corners = np.array(np.meshgrid(*[[-1.0, 3.0]] * 5)).reshape(5, -1).T
    norms = [
        np.linalg.norm(packing.sums({str(at): row[at : at + 1] for at in range(5)}) / packing.unit)
        for row in (*corners, *generator.uniform(-9, 9, (200, 5)))
    ]
    assert 0.99 < max(norms) <= 1.0
    assert not packing.sums({str(at): np.array([np.nan]) for at in range(5)}).any()


def test_the_sums_have_the_noise_that_is_stated(tmp_path: Path) -> None:
    """20 draws of the three means, against the exact ones: chi-square, a false alarm once in 10^6."""
    mean, _ = plain_numbers()
    wanted = Scales({str(at): each for at, each in enumerate(BOUNDS) if each is not None}, 900)
    unit = packing_of({"scales": wanted}, 900, noisy=True)
    found = []
    for draw in range(20):
        by = pooled_standardisation(TASK, privacy=PROMISE, share=0.3, rounds=2, ledgers=_made(tmp_path / str(draw)))
        (event, *_) = Ledger(tmp_path / str(draw) / "pooled.jsonl").events
        error = event.noise_multiplier * np.asarray(unit.unit)[:3] / 900
        steps = np.array([grid.step for grid in unit.parts["scales"].grids.values()])  # type: ignore[attr-defined]
        found += list((np.array(by.means[:3]) - mean[:3]) / (error * steps))
    assert 1e-6 < stats.chi2.cdf(float(np.square(found).sum()), 60) < 1 - 1e-6


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_variances_are_drawn_towards_their_mean_by_the_noise() -> None:
    generator = np.random.default_rng(4)
    true = generator.uniform(0.02, 0.06, 40)
    assert shrink(true, np.zeros(40)).tolist() == true.tolist()
    for size in (0.01, 0.1):
        noisy = true + generator.normal(0, size, 40)
        assert np.abs(shrink(noisy, np.full(40, size)) - true).mean() < 0.8 * np.abs(noisy - true).mean()
    assert shrink(np.array([-1.0, 0.04, 0.04]), np.full(3, 0.5)).min() > 0.0


def test_one_plan_stands_in_each_ledger_and_is_priced_as_one(tmp_path: Path) -> None:
    """A filter would price the training after the sum by itself, and take more noise for it."""
    job: dict[str, Any] = {"rounds": 4, "privacy": PROMISE, "secure_sum": SUM}
    by = standardisation(Plan.of(TASK, **job), share=0.2, ledgers=tmp_path)
    mean, deviation = plain_numbers()
    assert np.abs(np.array(by.means) - mean)[:3] == pytest.approx(np.zeros(3), abs=0.1 * 50)
    assert 0.1 < by.deviations[0] / deviation[0] < 10.0
    before = {name: Ledger(tmp_path / f"{name}.jsonl") for name in PARTIES}
    for ledger in before.values():
        ((plan, events),) = ledger.segments
        assert plan is not None
        assert len(events) == 1
        assert isinstance(events[0], PoissonSampledShares)
        assert [part.times for part in plan.parts] == [1, 4]
    run = federate(standardised_task(TASK, by), **job, keep=Keep(out=tmp_path / "run", ledgers=tmp_path))
    for name, dataset in PARTIES.items():
        ledger = Ledger(tmp_path / f"{name}.jsonl")
        first, *rest = ledger.events
        assert isinstance(first, PoissonSampledShares)
        assert len(rest) == 4
        assert all(isinstance(event, PoissonSampledGaussian) for event in rest)
        assert 2.9 < ledger.epsilon(1e-5) <= 3.0
        if name != "a":
            continue
        rate, steps = 50 / len(dataset), 4 * math.ceil(len(dataset) / 50)
        alone = noise_multiplier(3.0, 1e-5, rate, steps, slack=1e-3)
        filtered = noise_multiplier(3.0, 1e-5, rate, steps, [first], slack=1e-3)
        assert alone < rest[0].noise_multiplier < 1.1 * alone
        assert filtered > 1.1 * rest[0].noise_multiplier
    assert run.spent is not None
    assert run.spent.guarantee is not None
    assert run.spent.guarantee <= 3.0
    found = audit(run)
    assert found.verdict != "violated"
    assert "That the server saw this sum only rests on the secure sum" in str(found.claim)  # as it does not in training


def test_with_noise_in_shares_all_parties_have_one_plan(tmp_path: Path) -> None:
    job: dict[str, Any] = {
        "rounds": 2,
        "privacy": Privacy(3.0, 1e-5, noise="distributed"),
        "secure_sum": SUM,
        "algorithm": FedSGD(batch_size=100, steps_per_round=2, learning_rate=0.5),
    }
    by = standardisation(Plan.of(TASK, **job), share=0.2, ledgers=tmp_path)
    run = federate(standardised_task(TASK, by), **job, keep=Keep(out=tmp_path / "run", ledgers=tmp_path))
    assert run.history[-1].round == 2
    for name in PARTIES:
        ledger = Ledger(tmp_path / f"{name}.jsonl")
        assert [len(events) for _, events in ledger.segments] == [5]
        assert len(set(ledger.events)) == 2
        assert ledger.epsilon(1e-5) <= 3.0
    assert audit(run).verdict != "violated"


def test_nothing_is_released_on_a_plan_that_somebody_spent_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process spends from the same ledger while the noise is calibrated."""
    path = tmp_path / "pooled.jsonl"

    def overtaken(*given: Any, **named: Any) -> Any:
        whole = joint_plan(*given, **named)
        other = Ledger(path)
        other.bind("pooled", PROMISE.delta)
        other.append(PoissonSampledGaussian(sample_rate=1.0, noise_multiplier=1.5, steps=1), after=0)
        return whole

    monkeypatch.setattr(standardise_module, "joint_plan", overtaken)
    with pytest.raises(LedgerError, match="somebody else has spent"):
        pooled_standardisation(TASK, privacy=PROMISE, share=0.5, rounds=2, ledgers=tmp_path)
    assert len(Ledger(path).events) == 1


def test_the_model_takes_records_as_they_are() -> None:
    by = Standardisation(means=(1.0, 2.0, 3.0, 0.0), deviations=(2.0, 4.0, 0.5, 1.0))
    model, optimizer, _ = standardised_task(TASK, by).build(PARTIES["a"])
    assert isinstance(model, Standardised)
    features = torch.tensor([[1.0, 6.0, 3.5, 1.0]])
    assert torch.equal(model(features), model.model(torch.tensor([[0.0, 1.0, 1.0, 1.0]])))
    assert {"means", "deviations", "model.weight"} <= set(model.state_dict())
    assert {id(each) for group in optimizer.param_groups for each in group["params"]} == set(
        map(id, model.parameters())
    )
    for wrong in ({"means": (1.0,), "deviations": (0.0,)}, {"means": (math.nan,), "deviations": (1.0,)}):
        with pytest.raises(ConfigError, match="above 0"):
            Standardisation(**wrong)
    with pytest.raises(ConfigError, match="as many"):
        Standardisation(means=(1.0,), deviations=(1.0, 2.0))


def test_what_it_does_not_go_with_is_refused(tmp_path: Path) -> None:
    clients = Plan.of(TASK, rounds=1, privacy=ClientPrivacy(8.0, 1e-2, clip=1.0))
    with pytest.raises(ConfigError, match="a promise to clients"):
        standardisation(clients, share=0.1, ledgers=tmp_path)
    for bounds in (None, [None] * 4):
        with pytest.raises(ConfigError, match="public bounds"):
            standardisation(Plan.of(replace(TASK, bounds=bounds), rounds=1), share=0.1, ledgers=tmp_path)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        DataSettings(standardise_share=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_training_after_statistics_composes_on_the_same_ledgers(tmp_path: Path) -> None:
    """Not fixed together: the filter prices the training on top, within one promise for the life of the data."""
    columns = {name: {"0": dataset.tensors[0][:, 0].numpy()} for name, dataset in PARTIES.items()}
    promise = Privacy(0.6, 1e-5, noise="distributed")
    asked = {"0": Mean(0, 10)}
    found = federated_statistics(columns, asked, privacy=promise, secure_sum=SUM, ledgers=tmp_path / "books")
    assert 0.59 < found.spent["a"].epsilon <= 0.6
    keep = Keep(out=tmp_path / "run", ledgers=tmp_path / "books")
    run = federate(TASK, rounds=2, privacy=PROMISE, secure_sum=SUM, keep=keep)
    for name in PARTIES:
        ledger = Ledger(tmp_path / "books" / f"{name}.jsonl")
        assert [len(events) for _, events in ledger.segments] == [1, 2]
        assert ledger.epsilon(1e-5) <= 3.0
    assert run.spent is not None
    assert run.spent.guarantee == 3.0
    found_by_audit = audit(run)
    assert found_by_audit.verdict != "violated", found_by_audit.checks
    with pytest.raises(BudgetExceededError):
        federated_statistics(columns, asked, privacy=promise, secure_sum=SUM, ledgers=tmp_path / "books")


# ---------------------------------------------------------------------------------------------------------- as a job


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "visits.csv"
    lines = ["hospital,dose,score,rate,flag,died"]
    for name, dataset in PARTIES.items():
        for features, label in zip(*(tensor.tolist() for tensor in dataset.tensors), strict=True):
            lines.append(",".join([name, *(f"{value:.6g}" for value in features), str(label)]))
    path.write_text("\n".join(lines) + "\n")
    return path


def job_of(table: Path, **changed: Any) -> Settings:
    data = DataSettings(
        path=table,
        key="hospital",
        label="died",
        bounds={"dose": (0, 10), "score": (-50, 50), "rate": (0, 1)},
        standardise="private",
    )
    settings = Settings(
        data=data,
        split=Split(min_records=2),
        training=Training(rounds=2, batch_size=50, learning_rate=0.3, hidden=0),
        privacy=PrivacySettings(epsilon=3.0),
        secure_sum=SumSettings(kind="masked", corrupt=1, min_survivors=3),
    )
    return replace(settings, **changed)


@pytest.mark.parametrize(
    "arm", [Arm(private=True), Arm(private=True, centralized=True), Arm()], ids=["own", "pooled", "open"]
)
def test_a_job_standardises_once_and_a_resumed_one_reads_it(table: Path, tmp_path: Path, arm: Arm) -> None:
    settings, out = job_of(table), tmp_path / "run"
    run = train(settings, arm, seed=0, epsilon=3.0, out=out, resume=False)
    kept = json.loads((out / "standardise.json").read_bytes())
    assert run.state["means"].tolist() == pytest.approx(kept["means"])
    assert kept["means"][3] == 0.0  # the flag has no bounds
    spent = {path.name: Ledger(path).events for path in sorted((out / "ledger").glob("*"))} if arm.private else {}
    assert len(spent) == (0 if not arm.private else 1 if arm.centralized else 3)
    assert all(len(events) == 3 for events in spent.values())  # the sum, and two rounds
    assert audit(Run.load(out)).verdict != "violated"
    again = train(settings, arm, seed=0, epsilon=3.0, out=out, resume=True)
    assert again.history == run.history
    assert {path.name: Ledger(path).events for path in sorted((out / "ledger").glob("*"))} == spent
    with pytest.raises(ConfigError, match="had begun"):
        train(settings, arm, seed=0, epsilon=3.0, out=out, resume=False)


def test_a_job_that_ended_after_the_sum_goes_on_from_it(table: Path, tmp_path: Path) -> None:
    settings, out = job_of(table), tmp_path / "run"
    bad = replace(settings, training=replace(settings.training, start=tmp_path / "none.safetensors"))
    with pytest.raises(Exception, match=r"none\.safetensors"):
        train(bad, Arm(private=True), seed=0, epsilon=3.0, out=out, resume=False)
    out.mkdir(exist_ok=True)
    run = train(settings, Arm(private=True), seed=0, epsilon=3.0, out=out, resume=True)
    assert run.history[-1].round == 2
    spent = Ledger(out / "ledger" / "a.jsonl").events
    for damaged in (b'{"means": [', b'{"means": [0.0], "deviations": [0.0]}'):
        (out / "standardise.json").write_bytes(damaged)
        with pytest.raises(RunFolderError, match="is damaged"):
            train(settings, Arm(private=True), seed=0, epsilon=3.0, out=out, resume=True)
    (out / "standardise.json").unlink()  # what was paid for is lost: nothing is computed anew from the same budget
    with pytest.raises(BudgetExceededError):
        train(settings, Arm(private=True), seed=0, epsilon=3.0, out=out, resume=True)
    assert Ledger(out / "ledger" / "a.jsonl").events == spent


def test_a_task_says_its_bounds_before_anything_is_trained(table: Path) -> None:
    settings = job_of(table)
    settings = replace(settings, data=replace(settings.data, bounds={}))
    with pytest.raises(ConfigError, match="public bounds"):
        check_standardise(settings, load_task(settings, 0), None)
    client = replace(settings, algorithm=AlgorithmSettings())
    with pytest.raises(ConfigError, match="a promise to clients"):
        check_standardise(client, load_task(client, 0), ClientPrivacy(8.0, 1e-2, clip=1.0))
