"""Loops that return something odd or train something else, and parties that are hardly any."""

from __future__ import annotations

import copy

import pytest
import torch
from flat_arguments import federate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Run
from choral.errors import DataError
from choral.trainers import DivergedError, TaskError
from choral.trainers.algorithms import DANE, FSVRG, GD, CoCoA, FedAvg, FedNova, Scaffold

from .conftest import fit as good
from .conftest import loss


def _copies(model, optimizer, loader):
    twin = copy.deepcopy(model)
    own = torch.optim.SGD(twin.parameters(), lr=0.1)
    good(twin, own, loader)


def _returns_a_copy(model, optimizer, loader):
    good(model, optimizer, loader)
    return copy.deepcopy(model)


def _yields(model, optimizer, loader):
    good(model, optimizer, loader)
    yield 1.0


async def _waits(model, optimizer, loader):
    good(model, optimizer, loader)


def _grows(model, optimizer, loader):
    good(model, optimizer, loader)
    model.weight = nn.Parameter(torch.zeros(1, 7))


def _replaces(model, optimizer, loader):
    good(model, optimizer, loader)
    model.weight = nn.Parameter(model.weight.detach() + 1.0)


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (_copies, "party 'north' made no step .* left its model"),
        (_returns_a_copy, "party 'north' returned another model"),
        (_yields, "returned a generator"),
        (_waits, "returned a coroutine"),
        (_grows, "weight"),
        (_replaces, "replaced a parameter"),
    ],
)
def test_a_fit_that_does_not_train_the_model_it_is_given_is_refused(convex, fit, message):
    with pytest.raises(TaskError, match=message):
        federate(**convex(fit=fit))


def test_what_fit_returns_does_not_matter_otherwise(convex):
    def fit(model, optimizer, loader):
        good(model, optimizer, loader)
        return {"loss": [0.5, object()]}

    assert torch.equal(federate(**convex(fit=fit)).state["weight"], federate(**convex()).state["weight"])


ALL = [FedAvg(), Scaffold(), FedNova(), FSVRG(step=0.5), DANE(mu=0.5), GD(), CoCoA()]


@pytest.mark.parametrize("algorithm", ALL, ids=lambda kind: kind.kind)
def test_parties_of_one_class_and_of_one_record(convex, shards, algorithm):
    draw = torch.Generator().manual_seed(2)
    lonely = TensorDataset(torch.randn(1, 6, generator=draw), torch.ones(1, dtype=torch.long))
    alike = TensorDataset(torch.randn(9, 6, generator=draw), torch.zeros(9, dtype=torch.long))
    odd = convex(parties=shards | {"lonely": lonely, "alike": alike}, rounds=2)
    with pytest.raises(DataError, match="'lonely' has 1 class in 1 records"):
        federate(**odd, algorithm=algorithm)
    assert federate(**odd, algorithm=algorithm, min_classes=1).finished


def test_parties_with_other_features_are_named(convex, shards):
    other = TensorDataset(torch.randn(9, 5), torch.arange(9) % 2)

    def build(dataset):
        model = nn.Linear(dataset.tensors[0].shape[1], 1)
        return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=8)

    with pytest.raises(TaskError, match="party 'other' differs from the first party's in weight"):
        federate(**convex(build=build, parties=shards | {"other": other}))


@pytest.mark.parametrize("algorithm", [FedAvg(), GD()], ids=lambda kind: kind.kind)
def test_divergence_keeps_the_last_good_round(convex, tmp_path, algorithm):
    calls = iter(range(10**6))

    def breaks(model, batch):
        return loss(model, batch) * (float("nan") if next(calls) >= limit else 1.0)

    def fit(model, optimizer, loader):
        for batch in loader:
            optimizer.zero_grad()
            breaks(model, batch).mean().backward()
            optimizer.step()

    limit = 2 * sum(-(-n // 8) for n in (30, 17, 9, 24)) if algorithm.kind == "fedavg" else 2 * 4
    with pytest.raises(DivergedError, match="party 'north' diverged in round 3"):
        federate(**convex(fit=fit, loss=breaks), algorithm=algorithm, out=tmp_path / "run")
    kept = Run.load(tmp_path / "run")
    assert kept.history[-1].round == 2
    assert all(torch.isfinite(tensor).all() for tensor in kept.state.values())


def test_an_engine_that_leaves_out_a_party_is_refused(convex):
    """It must not pass for a party that dropped out."""

    class Lazy:
        def __init__(self, resident):
            self.resident, self.length = resident, resident.length

        def do(self, orders, weights, round_number):
            return (pair for pair in self.resident.do(orders, weights, round_number) if pair[0] != "east")

    with pytest.raises(TaskError, match="engine Lazy made nothing of the work of party 'east'"):
        federate(**convex(), engine=Lazy)


def test_an_engine_may_read_ahead(convex):
    class Eager:
        def __init__(self, resident):
            self.resident, self.length = resident, resident.length

        def do(self, orders, weights, round_number):
            return iter(list(self.resident.do(list(orders), weights, round_number)))

    for algorithm in (Scaffold(), FSVRG()):
        one, other = federate(**convex(), algorithm=algorithm), federate(**convex(), algorithm=algorithm, engine=Eager)
        assert torch.equal(one.state["weight"], other.state["weight"])
