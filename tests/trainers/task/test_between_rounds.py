"""What changes from round to round: learning rates, as they are asked to, alike in the cloud and at the parties."""

from __future__ import annotations

import logging

import pytest
import torch
from flat_arguments import centralize, federate
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from choral.errors import ConfigError
from choral.trainers import Epochs, FedProx, Schedule, TaskError, tune
from choral.trainers.algorithms import DANE
from choral.trainers.engines import Cohort, Direct
from choral.trainers.local_steps.logistic_regression import ClosedForm
from choral.trainers.task.task import Task

BOTH = [federate, centralize]
ROUNDS = 6


def _loop(model, optimizer, loader):
    for batch, target in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), target).backward()
        optimizer.step()


def _rates(seen):
    """A loop that writes down the learning rate of each round."""

    def fit(model, optimizer, loader, round):
        seen.setdefault(round, set()).add(round_off(optimizer.param_groups[0]["lr"]))
        _loop(model, optimizer, loader)

    return fit


def round_off(rate):
    return float(f"{float(rate):.9g}")


@pytest.mark.parametrize("train", BOTH)
def test_fit_is_told_the_round_from_one(job, train, tmp_path):
    seen = {}
    train(**job(fit=_rates(seen), rounds=2), out=tmp_path / "run")
    assert list(seen) == [1, 2]


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (Schedule(kind="step", decay=0.5, every=2), lambda o: lr_scheduler.StepLR(o, 2, 0.5)),
        (Schedule(kind="cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, ROUNDS)),
        (Schedule(kind="cosine", final=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, ROUNDS, eta_min=0.02)),
        (Schedule(warmup=3), lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, total_iters=3)),
        (Schedule(kind="step", decay=0.5, every=1, warmup=0), lambda o: lr_scheduler.ExponentialLR(o, 0.5)),
    ],
)
def test_cloud_and_parties_have_the_rates_of_torchs_scheduler(job, schedule, reference):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler, expected = reference(optimizer), {}
    for number in range(1, ROUNDS + 1):
        expected[number] = pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        scheduler.step()
    for train in BOTH:
        seen = {}
        train(**job(fit=_rates(seen), rounds=ROUNDS), schedule=schedule)
        assert all(len(rates) == 1 for rates in seen.values())
        assert {number: rates.pop() for number, rates in seen.items()} == expected


@pytest.mark.parametrize("algorithm", [None, FedProx(mu=0.1)])
@pytest.mark.parametrize("engine", [Direct, Cohort, None])
def test_every_engine_follows_the_schedule(job, engine, algorithm):
    schedule = Schedule(kind="step", decay=0.5, every=1)
    one = federate(**job(fit=_loop), schedule=schedule, algorithm=algorithm)
    other = federate(
        **job(fit=Epochs()), schedule=schedule, algorithm=algorithm, **({"engine": engine} if engine else {})
    )
    constant = federate(**job(fit=Epochs()), algorithm=algorithm)
    assert torch.allclose(one.state["weight"], other.state["weight"], atol=1e-5)
    assert not torch.allclose(constant.state["weight"], other.state["weight"], atol=1e-3)


def test_the_closed_form_follows_the_schedule():
    draw = torch.Generator().manual_seed(3)
    parties = {name: TensorDataset(torch.randn(30, 4, generator=draw), torch.arange(30) % 2) for name in ("a", "b")}

    def build(dataset):
        model = nn.Linear(4, 1)
        return model, torch.optim.SGD(model.parameters(), lr=0.3), DataLoader(dataset, batch_size=8, shuffle=True)

    def fit(model, optimizer, loader):
        for points, labels in loader:
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(points)[:, 0], labels.float()).backward()
            optimizer.step()

    job = {"build": build, "fit": fit, "evaluate": lambda model: 0.5, "parties": parties, "rounds": 3}
    schedule = Schedule(kind="step", decay=0.5, every=1)
    one = federate(**job, schedule=schedule)
    other = federate(**job, schedule=schedule, engine=ClosedForm.of(rate=0.3, batch_size=8, compiled=False))
    assert torch.allclose(one.state["weight"], other.state["weight"], atol=1e-5)


def test_a_resumed_run_goes_on_in_the_schedule_and_in_no_other(job, tmp_path):
    class Killed(Exception):
        pass

    def kill(entry):
        if entry.round == 2:
            raise Killed

    schedule = Schedule(kind="step", decay=0.5, every=1)
    for train in BOTH:
        out = tmp_path / train.__name__
        whole = train(**job(), schedule=schedule)
        with pytest.raises(Killed):
            train(**job(), schedule=schedule, out=out, on_round=kill)
        with pytest.raises(ConfigError, match="schedule"):
            train(**job(), out=out, resume=True)
        assert torch.equal(
            train(**job(), schedule=schedule, out=out, resume=True).state["weight"], whole.state["weight"]
        )
        assert whole.info.schedule["kind"] == "step"


def test_tuning_follows_the_schedule(job):
    seen = {}
    made = job(fit=_rates(seen))
    task = Task(
        build=made["build"],
        fit=made["fit"],
        evaluate=made["evaluate"],
        parties=made["parties"],
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"),
    )

    def train(task):
        job = {name: getattr(task, name) for name in ("build", "fit", "evaluate", "parties")}
        return federate(**job, rounds=2, min_classes=1, schedule=Schedule(kind="step", decay=0.5, every=1))

    tune(lambda learning_rate: task, {"learning_rate": [0.2]}, train)
    assert seen == {1: {0.2}, 2: {0.1}}


def _with_scheduler(job):
    def build(dataset):
        model, optimizer, loader = job()["build"](dataset)
        model.scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
        return model, optimizer, loader

    def fit(model, optimizer, loader):
        _loop(model, optimizer, loader)
        model.scheduler.step()

    return job(build=build, fit=fit)


def _with_closure(job):
    made = []

    def fit(model, optimizer, loader):
        made[:] = made or [lr_scheduler.StepLR(optimizer, 1, 0.5)]
        _loop(model, optimizer, loader)
        made[0].step()

    return job(fit=fit)


def _with_plateau(job):
    def build(dataset):
        model, optimizer, loader = job()["build"](dataset)
        model.scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return model, optimizer, loader

    def fit(model, optimizer, loader):
        _loop(model, optimizer, loader)
        for value in (1.0, 2.0):
            model.scheduler.step(value)

    return job(build=build, fit=fit)


def _by_hand(job):
    def fit(model, optimizer, loader):
        _loop(model, optimizer, loader)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5

    return job(fit=fit)


@pytest.mark.parametrize("train", BOTH)
@pytest.mark.parametrize("make", [_with_scheduler, _with_plateau, _by_hand])
def test_a_rate_that_would_be_undone_in_one_arm_is_refused_in_both(job, train, make):
    with pytest.raises(TaskError, match=r"scheduler|left the optimizer's lr at"):
        train(**make(job))


def test_a_scheduler_that_lives_in_a_closure_is_found_at_the_party_whose_optimizer_it_holds(job):
    with pytest.raises(TaskError, match="left the optimizer's lr at"):
        centralize(**_with_closure(job))
    assert "north" in federate(**_with_closure(job)).history[2].dropped


@pytest.mark.parametrize("train", BOTH)
def test_a_scheduler_of_the_steps_of_one_round_begins_anew_in_each(job, train):
    seen = []

    def fit(model, optimizer, loader):
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        seen.append(optimizer.param_groups[0]["lr"])
        _loop(model, optimizer, loader)
        scheduler.step()

    train(**job(fit=fit))
    assert set(seen) == {0.2}


class Annealed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.temperature = nn.Linear(5, 2), 1.0

    def forward(self, points):
        return self.layer(points) / self.temperature


def _annealed(dataset):
    model = Annealed()
    return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10)


@pytest.mark.parametrize("train", BOTH)
def test_numbers_of_the_model_are_not_carried_over(job, train):
    def cools(model, optimizer, loader):
        _loop(model, optimizer, loader)
        model.temperature *= 0.5

    seen = []

    def told(model, optimizer, loader, round):
        seen.append(model.temperature)
        model.temperature = 0.5 ** (round - 1)
        _loop(model, optimizer, loader)

    evaluate = {"build": _annealed, "evaluate": lambda model: 0.5}
    with pytest.raises(TaskError, match=r"changed 'temperature' of the model's Annealed from 1\.0 to 0\.5"):
        train(**job(fit=cools, **evaluate))
    train(**job(fit=told, **evaluate))
    assert set(seen) == {1.0}


@pytest.mark.parametrize("train", BOTH)
def test_numbers_of_a_dataset_that_change_are_told_once(job, parties, train, caplog):
    class Counting(torch.utils.data.Dataset):
        def __init__(self, inner):
            self.inner, self.reads = inner, 0

        def __len__(self):
            return len(self.inner)

        def __getitem__(self, index):
            self.reads += 1
            return self.inner[index]

    made = {name: Counting(dataset) for name, dataset in parties.items()}
    if train is centralize:  # pooled in a dataset of torch's
        return
    with caplog.at_level(logging.WARNING, logger="choral.trainers"):
        train(**job(parties=made))
    assert sum("changed 'reads' of its dataset" in record.getMessage() for record in caplog.records) == 1


def test_a_schedule_that_nothing_would_follow_is_refused(job):
    schedule = Schedule(kind="step", decay=0.5, every=1)
    with pytest.raises(ConfigError, match="dane does not call"):
        federate(
            **job(loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")),
            schedule=schedule,
            algorithm=DANE(),
        )

    def own(model, optimizer, loader):
        _loop(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)

    with pytest.raises(TaskError, match=r"outside the steps .* schedule"):
        federate(**job(fit=own), schedule=schedule)
    for bad in ({"kind": "exponential"}, {"decay": 0.0}, {"every": 0}, {"warmup": -1}, {"final": 2.0}):
        with pytest.raises(ConfigError, match=r"schedule\."):
            Schedule(**bad)
