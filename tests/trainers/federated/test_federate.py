"""Federated averaging against an independent numpy version, and what a run must refuse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from flat_arguments import centralize, federate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Homomorphic, Masked, Plain, Privacy
from choral.errors import ConfigError, DataError
from choral.privacy import BudgetExceededError, EncodingError, UnsupportedLoaderError
from choral.protocols.errors import ProtocolError
from choral.trainers import DivergedError, TaskError
from choral.trainers.task.arithmetic import Arithmetic

CPU = Arithmetic(torch.device("cpu"))


def numpy_fedavg(parties, start, rounds, lr, batch_size):
    """Softmax regression by FedAvg in float64, batches in the order of the data."""
    weight, bias = start
    for _ in range(rounds):
        total, moved_weight, moved_bias = 0, np.zeros_like(weight), np.zeros_like(bias)
        for dataset in parties.values():
            x, y = dataset.tensors[0].double().numpy(), dataset.tensors[1].numpy()
            w, b = weight.copy(), bias.copy()
            for first in range(0, len(y), batch_size):
                xs, ys = x[first : first + batch_size], y[first : first + batch_size]
                logits = xs @ w.T + b
                p = np.exp(logits - logits.max(1, keepdims=True))
                p /= p.sum(1, keepdims=True)
                p[np.arange(len(ys)), ys] -= 1
                w -= lr * p.T @ xs / len(ys)
                b -= lr * p.mean(0)
            total += len(y)
            moved_weight += len(y) * (w - weight)
            moved_bias += len(y) * (b - bias)
        weight, bias = weight + moved_weight / total, bias + moved_bias / total
    return weight, bias


@pytest.fixture
def ordered(job):
    def build(dataset):
        model = nn.Linear(5, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10)

    return job(build=build, rounds=8)


@pytest.mark.parametrize("secure_sum", [Plain(), Masked(), Homomorphic(), Homomorphic(key="shared")], ids=repr)
def test_equals_numpy_fedavg_within_the_fixed_point_bound(ordered, parties, secure_sum):
    started = federate(**ordered | {"rounds": 1}).history[0]
    run = federate(**ordered, secure_sum=secure_sum)
    assert run.history[0].metrics == started.metrics
    from choral.trainers.local_steps.resident_model import initial_model

    initial = initial_model(ordered["build"], parties["north"], 0)
    start = (initial.weight.detach().double().numpy(), initial.bias.detach().double().numpy())
    weight, bias = numpy_fedavg(parties, start, rounds=8, lr=0.2, batch_size=10)
    difference = np.concatenate(
        [(run.state["weight"].double().numpy() - weight).ravel(), run.state["bias"].double().numpy() - bias]
    )
    # Convex and smooth with this step size: a local pass does not expand distances (Hardt, Recht, Singer 2016, lemma
    # 3.7), so the encoding's errors add up at most. float32 arithmetic gets the same allowance again.
    allowed = 2 * 8 * np.sqrt(12) * run.info.fixed_point["error_bound"]
    assert np.linalg.norm(difference) <= allowed
    assert np.linalg.norm(run.state["weight"].numpy() - start[0]) > 100 * allowed


@pytest.mark.parametrize("secure_sum", [Masked(), Homomorphic(), Homomorphic(key="shared")], ids=repr)
def test_secure_sums_equal_plain_exactly(job, secure_sum):
    plain, secure = federate(**job(rounds=5)), federate(**job(rounds=5), secure_sum=secure_sum)
    assert all(torch.equal(plain.state[name], secure.state[name]) for name in plain.state)
    assert plain.history[-1].metrics["accuracy"] > 0.8


def test_weights_by_example_count(job):
    """One full-batch step at each party, weighted by its examples, is one step of gradient descent on all of them."""

    def build(dataset):
        model = nn.Linear(5, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=len(dataset))

    split, pooled = federate(**job(build=build, rounds=4)), centralize(**job(build=build, rounds=4))
    for name in split.state:
        torch.testing.assert_close(split.state[name], pooled.state[name], rtol=0, atol=1e-6)
    assert split.info.parties == {"north": 60, "south": 33, "east": 21}


def test_same_seed_same_run_and_same_start_as_the_cloud(job):
    first, second = federate(**job()), federate(**job())
    other, cloud = federate(**job(seed=1)), centralize(**job())
    assert torch.equal(first.state["weight"], second.state["weight"])
    assert not torch.equal(first.state["weight"], other.state["weight"])
    assert first.history[0].metrics == cloud.history[0].metrics
    assert len(cloud.history) == 4


def test_the_caller_keeps_torchs_generator(job):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    federate(**job(rounds=1))
    assert torch.equal(torch.rand(3), expected)


def test_adam_state_is_fresh_for_each_party(job, parties):
    """Optimizer state must not leak from party to party: order of the others does not change a party's update."""

    def build(dataset):
        model = nn.Linear(5, 2)
        return model, torch.optim.Adam(model.parameters(), lr=0.05), DataLoader(dataset, batch_size=10)

    from choral.trainers.algorithms.interface import Train
    from choral.trainers.local_steps.resident_model import Resident

    updates = []
    for before in ("north", "south"):
        resident = Resident(
            build=build,
            fit=job()["fit"],
            datasets=parties,
            privacy_engines={},
            seed=0,
            arithmetic=CPU,
        )
        weights = resident.layout.read()
        *_, (_, done) = resident.do([(before, Train()), (before, Train()), ("east", Train())], weights, 1)
        updates.append(done.vector)
    assert torch.equal(*updates)


def test_a_model_that_closes_over_its_modules_is_trained(job):
    """copy.deepcopy of such a model trains the original (a defect of other frameworks)."""

    def build(dataset):
        inner = nn.Linear(5, 2)

        class Closure(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = inner
                self.call = lambda x: inner(x)

            def forward(self, x):
                return self.call(x)

        model = Closure()
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10)

    run = federate(**job(build=build))
    assert run.history[-1].metrics["accuracy"] > run.history[0].metrics["accuracy"]


def test_dropouts_are_survived_and_counted(job):
    many = {f"p{i}": TensorDataset(torch.randn(20, 5), torch.arange(20) % 2) for i in range(6)}
    run = federate(
        **job(parties=many, rounds=6, seed=7), dropout_rate=0.12, secure_sum=Masked(min_survivors=3, dropouts=2)
    )
    survivors = [entry.survivors for entry in run.history[1:]]
    assert min(survivors) < 6
    assert min(survivors) >= 4


def test_too_few_survivors_stop_the_run_and_keep_the_last_round(job, tmp_path):
    many = {f"p{i}": TensorDataset(torch.randn(20, 5), torch.arange(20) % 2) for i in range(6)}
    with pytest.raises(ProtocolError, match="of the 5 parties needed"):
        federate(
            **job(parties=many, rounds=30),
            dropout_rate=0.25,
            secure_sum=Masked(min_survivors=5),
            out=tmp_path / "run",
        )
    from choral import Run

    assert Run.load(tmp_path / "run").history


def test_private_run_has_one_ledger_per_party(job, tmp_path):
    run = federate(**job(rounds=4), privacy=Privacy(epsilon=4.0, delta=1e-3), secure_sum=Masked(), out=tmp_path / "run")
    assert sorted(run.info.spent) == ["east", "north", "south"]
    assert all(3.8 < spent.epsilon <= 4.0 for spent in run.info.spent.values())
    rates = {name: spent.sample_rate for name, spent in run.info.spent.items()}
    assert rates == pytest.approx({"north": 10 / 60, "south": 10 / 33, "east": 10 / 21})
    assert [spent.steps for spent in run.info.spent.values()] == [4 * 6, 4 * 4, 4 * 3]
    assert len(list((tmp_path / "run" / "ledger").iterdir())) == 3
    assert run.history[-1].epsilon == max(spent.epsilon for spent in run.info.spent.values())
    rising = [entry.epsilon for entry in run.history[1:]]
    assert all(earlier < later for earlier, later in itertools.pairwise(rising))


def test_a_private_party_smaller_than_a_batch_is_named_before_anybody_trains(job, tmp_path):
    """A step is divided by the batch size; the noise was calibrated for batches that the party can draw."""

    def build(dataset):
        model, optimizer, _ = job()["build"](dataset)
        return model, optimizer, DataLoader(dataset, batch_size=30, shuffle=True)

    trained = []

    def fit(model, optimizer, loader):
        trained.append(len(loader.dataset))
        job()["fit"](model, optimizer, loader)

    privacy = Privacy(epsilon=4.0, delta=1e-3)
    with pytest.raises(UnsupportedLoaderError, match="east: batches of 30 out of 21 records"):
        federate(**job(build=build, fit=fit), privacy=privacy, out=tmp_path / "run")
    assert not trained
    assert not list((tmp_path / "run").glob("ledger/*"))
    federate(**job(build=build, rounds=1))  # without a promise torch's own rule holds: one batch of what there is

    def all_of_few(dataset):
        model, optimizer, _ = job()["build"](dataset)
        return model, optimizer, DataLoader(dataset, batch_size=min(30, len(dataset)), shuffle=True)

    run = federate(**job(build=all_of_few, rounds=1), privacy=privacy)
    assert run.info.spent["east"].sample_rate == 1.0


def test_more_passes_than_planned_are_refused(job):
    plain = job()["fit"]

    def fit(model, optimizer, loader):
        for _ in range(2):
            plain(model, optimizer, loader)

    with pytest.raises(BudgetExceededError):
        federate(**job(fit=fit), privacy=Privacy(epsilon=4.0, delta=1e-3))


def test_seed_never_reaches_the_noise(job):
    first, second = (federate(**job(), privacy=Privacy(epsilon=4.0, delta=1e-3)) for _ in range(2))
    assert not torch.equal(first.state["weight"], second.state["weight"])


def _one_class(parties):
    return parties | {"west": TensorDataset(torch.randn(12, 5), torch.zeros(12, dtype=torch.long))}


def _batch_norm(dataset):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10)


def _stranger(dataset):
    return nn.Linear(5, 2), torch.optim.SGD(nn.Linear(5, 2).parameters(), lr=0.2), DataLoader(dataset)


def _half_stranger(dataset):
    model, other = nn.Linear(5, 2), nn.Linear(5, 2)
    return model, torch.optim.SGD([*model.parameters(), other.weight], lr=0.2), DataLoader(dataset)


def _by_size(dataset):
    model = nn.Linear(5, 2 if len(dataset) > 40 else 3)
    return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10)


def _nan_fit(model, optimizer, loader):
    for batch, _ in loader:
        optimizer.zero_grad()
        (model(batch).sum() * float("nan")).backward()
        optimizer.step()


def _huge_fit(model, optimizer, loader):
    with torch.no_grad():
        model.weight += 100.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: {"parties": {"north": p["north"]}}, ConfigError, "at least 2 parties"),
        (lambda p: {"parties": p | {"west": TensorDataset(torch.zeros(0, 5))}}, DataError, "'west' has no records"),
        (lambda p: {"parties": _one_class(p)}, DataError, "'west' has 1 class"),
        (lambda p: {"parties": p | {"": p["north"]}}, ConfigError, "non-empty"),
        (lambda p: {"build": _batch_norm}, ConfigError, "BatchNorm1d"),
        (lambda p: {"build": lambda d: nn.Linear(5, 2)}, TaskError, "expected a tuple"),
        (lambda p: {"build": _stranger}, TaskError, "no trainable parameter of the model"),
        (lambda p: {"build": _half_stranger}, TaskError, "not the model's"),
        (lambda p: {"parties": p | {"x" * 300: p["north"]}}, ConfigError, "too long"),
        (lambda p: {"parties": p | {"\ud800": p["north"]}}, ConfigError, "not printable"),
        (lambda p: {"privacy": Privacy(epsilon=1.0, delta=1e-3, ledger="x")}, ConfigError, "one data owner's"),
        (lambda p: {"build": _by_size}, TaskError, "differs from the first party's"),
        (lambda p: {"fit": _nan_fit}, DivergedError, "party 'north' diverged in round 1"),
        (lambda p: {"fit": _huge_fit, "secure_sum": Masked(min_survivors=2)}, EncodingError, "16"),
        (lambda p: {"evaluate": lambda m: "good"}, TaskError, "evaluate returned str"),
        (lambda p: {"evaluate": lambda m: float("nan")}, TaskError, "finite"),
        (lambda p: {"rounds": 0}, ConfigError, "rounds >= 1"),
        (lambda p: {"seed": -1}, ConfigError, "seed >= 0"),
        (lambda p: {"dropout_rate": 1.0}, ConfigError, "chances in"),
        (lambda p: {"device": "abacus"}, TaskError, "not available"),
        (lambda p: {"privacy": Privacy(epsilon=1.0, delta=0.04)}, ConfigError, "not below 1/n"),
    ],
)
def test_bad_input_is_refused(job, parties, change, error, message):
    with pytest.raises(error, match=message):
        federate(**job(**change(parties)))


def test_one_class_is_allowed_on_request(job, parties):
    assert federate(**job(parties=_one_class(parties), rounds=1), min_classes=1).finished


def test_changed_buffers_are_refused(job):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 2)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.seen += len(x)
            return self.linear(x)

    def build(dataset):
        model = Counting()
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10)

    with pytest.raises(TaskError, match="changed 'seen'"):
        federate(**job(build=build))


def test_changed_frozen_parameters_are_refused(job):
    """The next party would see them: a way around the sum and around differential privacy."""

    def build(dataset):
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2))
        model[0].requires_grad_(False)
        return model, torch.optim.SGD(model[1].parameters(), lr=0.2), DataLoader(dataset, batch_size=10)

    def fit(model, optimizer, loader):
        job()["fit"](model, optimizer, loader)
        with torch.no_grad():
            model[0].weight[0] = next(iter(loader))[0].mean(0)

    with pytest.raises(TaskError, match=r"party 'north' changed '0\.weight'"):
        federate(**job(build=build, fit=fit))


def test_frozen_parameters_stay(job):
    def build(dataset):
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2))
        model[0].requires_grad_(False)
        return model, torch.optim.SGD(model[1].parameters(), lr=0.2), DataLoader(dataset, batch_size=10)

    run = federate(**job(build=build))
    assert run.info.parameters == 12
    assert set(run.state) == {"0.weight", "0.bias", "1.weight", "1.bias"}
