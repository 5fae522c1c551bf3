"""The closed form against the torch trainer, and its two sets of loops against each other and against scipy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flat_arguments import federate
from scipy import sparse
from scipy.optimize import minimize
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Privacy
from choral.errors import ConfigError
from choral.trainers import DivergedError, TaskError
from choral.trainers.algorithms import interface
from choral.trainers.data.sparse_rows import SparseDataset
from choral.trainers.local_steps import sparse_kernels, sparse_kernels_numba
from choral.trainers.local_steps.logistic_regression import ClosedForm
from choral.trainers.local_steps.resident_model import Resident
from choral.trainers.task.arithmetic import Arithmetic

RATE, BATCH, EPOCHS, DECAY, FEATURES = 0.3, 4, 2, 0.01, 9


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1].float(), reduction="none")


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    for _ in range(EPOCHS):
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            optimizer.step()


def parties(kind: str = "sparse") -> dict[str, Any]:
    random = np.random.default_rng(4)
    made = {}
    for name, count in {"north": 23, "south": 7, "one": 1}.items():
        rows = random.normal(size=(count, FEATURES)) * (random.random((count, FEATURES)) < 0.4)
        rows[0, :3] = (1.0, -2.0, 0.5)
        labels = torch.from_numpy(random.integers(0, 2, count))
        made[name] = (
            SparseDataset(rows, labels) if kind == "sparse" else TensorDataset(torch.from_numpy(rows).float(), labels)
        )
    return made


def resident(kind: str = "sparse", *, bias: bool = False, **changed: Any) -> Resident:
    def build(dataset: Any) -> Any:
        model = nn.Linear(FEATURES, 1, bias=bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=DECAY)
        return model, optimizer, DataLoader(dataset, batch_size=BATCH, shuffle=True)

    given = {"build": build, "fit": fit, "loss": loss, "datasets": parties(kind), "privacy_engines": {}, "seed": 3}
    return Resident(**(given | {"arithmetic": Arithmetic(torch.device("cpu"))} | changed))


def closed(of: Resident, **changed: Any) -> ClosedForm:
    return ClosedForm(of, **({"rate": RATE, "batch_size": BATCH, "epochs": EPOCHS, "decay": DECAY} | changed))


def works(length: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    direction, shares = torch.randn(length, generator=random) / 5, torch.rand(length, generator=random)
    return {
        "train": interface.Train(),
        "train shifted": interface.Train(shift=direction, pull=0.7),
        "gradient": interface.Gradient(),
        "svrg": interface.Svrg(direction=direction, step=0.2, passes=2),
        "svrg scaled": interface.Svrg(direction=direction, step=0.2, shares=shares, pull=0.3),
        "minimise": interface.Minimise(direction=direction, pull=0.2),
        "touch": interface.Touch(),
    }


def orders(work: Any) -> list[tuple[str, Any]]:
    if isinstance(work, interface.Ascend):
        counts = {"north": 23, "south": 7, "one": 1}
        return [(name, replace(work, dual=torch.full((count,), 0.25))) for name, count in counts.items()]
    return [(name, work) for name in ("north", "south", "one")]


def start(length: int) -> torch.Tensor:
    return torch.linspace(-1, 1, length)


ASCEND = interface.Ascend(dual=torch.zeros(0), ridge=0.1, examples=31, slack=3.0, passes=2)


@pytest.mark.parametrize("name", [*works(1), "ascend"])
@pytest.mark.parametrize(("kind", "bias"), [("sparse", False), ("dense", True)])
def test_agrees_with_the_torch_trainer(name, kind, bias):
    """Records in the same order, the same arithmetic: what differs is float32."""
    torch_way = resident(kind, bias=bias)
    work = (works(torch_way.length) | {"ascend": ASCEND})[name]
    expected = dict(torch_way.do(orders(work), start(torch_way.length), 2))
    for compiled in (True, False):
        found = dict(closed(torch_way, compiled=compiled).do(orders(work), start(torch_way.length), 2))
        assert list(found) == list(expected)
        for party, done in found.items():
            torch.testing.assert_close(done.vector, expected[party].vector, atol=3e-5, rtol=2e-4)
            assert (done.steps, done.path) == (expected[party].steps, pytest.approx(expected[party].path))
            if done.dual is not None:
                torch.testing.assert_close(done.dual, expected[party].dual, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*works(1), "ascend"])
def test_compiled_and_plain_loops_agree(name):
    """Dense drift at each step against drift that waits for a coordinate's next use: equal to a few roundings."""
    random = np.random.default_rng(0)
    rows = sparse.csr_array(random.random((60, 200)) * (random.random((60, 200)) < 0.03))
    data = {"north": SparseDataset(rows, torch.from_numpy(random.integers(0, 2, 60)))}

    def build(dataset: Any) -> Any:
        model = nn.Linear(200, 1, bias=False)
        return model, torch.optim.SGD(model.parameters(), lr=RATE), DataLoader(dataset, batch_size=BATCH)

    of = resident(datasets=data, build=build)
    work = (works(200) | {"ascend": replace(ASCEND, dual=torch.full((60,), 0.25))})[name]
    vectors = []
    for compiled in (True, False):
        trainer = closed(of, compiled=compiled)
        block, weights = trainer.block("north"), start(200).double().numpy()
        random = torch.Generator().manual_seed(5)
        vectors.append(trainer._made_of("north", block, work, weights, random, 1)[0])
    np.testing.assert_allclose(vectors[0], vectors[1], rtol=1e-10, atol=1e-13)
    assert np.abs(vectors[0]).max() > 1e-3


@pytest.mark.parametrize("anchored", [False, True])
def test_compiled_loops_as_plain_python(anchored, uncompiled):
    """With every index checked: rows that share no column, an empty row, a batch that is not full."""
    python, random = uncompiled(sparse_kernels_numba), np.random.default_rng(1)
    assert not hasattr(python.walk, "py_func")
    dense = random.normal(size=(9, 20)) * (random.random((9, 20)) < 0.2)
    dense[4] = 0.0
    rows = sparse.csr_array(dense)
    labels, order = random.integers(0, 2, 9).astype(float), np.concatenate([random.permutation(9)] * 2)[:17]
    start, drift, scale = random.normal(size=(3, 20))
    parts = rows.indptr, rows.indices, rows.data, labels
    found = python.walk(parts, order, 5, start, drift, 0.9, 0.3, scale, anchored)
    wanted = sparse_kernels.walk(parts, order, 5, start, drift, 0.9, 0.3, scale, anchored)
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-13)
    duals = np.full(9, 0.25), np.full(9, 0.25)
    found = python.ascend(parts, order, start, duals[0], 0.5, 0.9)
    wanted = sparse_kernels.ascend(parts, order, start, duals[1], 0.5, 0.9)
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(*duals, rtol=1e-10)
    assert np.abs(duals[0] - 0.25).max() > 1e-3


def test_minimise_against_scipy():
    """The stationary point of F_k(w) + (direction - grad F_k(w_t)) w + pull/2 |w - w_t|^2, by BFGS."""
    of = resident()
    trainer, weights = closed(of), start(FEATURES)
    block, anchor = trainer.block("north"), weights.double().numpy()
    work = works(FEATURES)["minimise"]
    linear = work.direction.double().numpy() - block.slope(anchor)
    best = minimize(
        lambda w: block.loss(w) + linear @ w + work.pull / 2 * np.sum((w - anchor) ** 2), anchor, options={"gtol": 1e-9}
    )
    done = dict(trainer.do([("north", work)], weights, 1))["north"]
    np.testing.assert_allclose(done.vector.double().numpy(), best.x - anchor, atol=1e-6)


def test_a_whole_run_agrees():
    from choral.trainers.algorithms import FSVRG

    of = resident()
    job = {
        "build": of.build,
        "fit": fit,
        "loss": loss,
        "parties": of.datasets,
        "evaluate": lambda model: model.weight.norm().item(),
        "rounds": 3,
        "seed": 1,
        "min_classes": 1,
        "algorithm": FSVRG(step=2.0, ridge=0.05),
    }
    slow, fast = federate(**job), federate(**job, engine=ClosedForm.of(rate=RATE, batch_size=BATCH))
    torch.testing.assert_close(fast.state["weight"], slow.state["weight"], atol=1e-4, rtol=1e-3)
    assert not torch.equal(fast.state["weight"], torch.zeros(1, FEATURES))


class TestRefusals:
    @pytest.mark.parametrize(
        "bad", [{"rate": 0.0}, {"rate": np.nan}, {"batch_size": 0}, {"epochs": 0}, {"decay": -1.0}]
    )
    def test_settings(self, bad):
        with pytest.raises(ConfigError, match="expected rate"):
            closed(resident(), **bad)

    @pytest.mark.parametrize("model", [nn.Linear(FEATURES, 2), nn.Sequential(nn.Linear(FEATURES, 1))])
    def test_models(self, model):
        def build(dataset: Any) -> Any:
            return model, torch.optim.SGD(model.parameters(), lr=1.0), DataLoader(dataset)

        with pytest.raises(TaskError, match="closed form is for"):
            closed(resident(build=build))

    def test_another_loss(self):
        trainer = closed(resident(loss=lambda model, batch: 2 * loss(model, batch)))
        with pytest.raises(TaskError, match="not the logistic one"):
            list(trainer.do([("north", interface.Gradient())], start(FEATURES), 1))

    @pytest.mark.parametrize(
        ("told", "says"),
        [
            ({"rate": 2 * RATE}, "rate = "),
            ({"batch_size": BATCH + 1}, "batch_size = "),
            ({"epochs": EPOCHS + 1}, "epochs = "),
            ({"decay": DECAY / 2}, "decay = "),
        ],
    )
    def test_numbers_that_are_not_those_of_fit(self, told, says):
        with pytest.raises(TaskError, match=f"the closed form was told {says}"):
            list(closed(resident(), **told).do(orders(interface.Train()), start(FEATURES), 1))

    def test_a_fit_that_does_something_else(self):
        def halves(model, optimizer, loader):
            for points, labels in [batch for _ in range(EPOCHS) for batch in loader]:
                optimizer.zero_grad()
                (loss(model, (points, labels)).mean() / 2).backward()
                optimizer.step()

        def own(model, optimizer, loader):
            fit(model, torch.optim.SGD(model.parameters(), lr=RATE), loader)

        for odd, says in ((halves, "does something else"), (own, "cannot be compared")):
            with pytest.raises(TaskError, match=says):
                list(closed(resident(fit=odd)).do(orders(interface.Train()), start(FEATURES), 1))

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (SparseDataset(np.ones((2, 3)), torch.tensor([0, 1])), "has 3 features, the model 9"),
            (SparseDataset(np.ones((2, 9)), torch.tensor([0, 2])), "other than 0 and 1"),
            (TensorDataset(torch.ones(2, 3, 3), torch.tensor([0, 1])), "cannot read"),
        ],
    )
    def test_data(self, data, says):
        of = resident()
        trainer = closed(of)
        of.datasets["odd"] = data
        with pytest.raises(TaskError, match=says):
            list(trainer.do([("odd", interface.Gradient())], start(FEATURES), 1))

    def test_record_level_privacy(self, tmp_path):
        of = resident()
        with pytest.raises(ConfigError, match="single records"):
            federate(
                build=of.build,
                fit=fit,
                evaluate=lambda _: 0.0,
                parties={name: data for name, data in of.datasets.items() if name != "one"},
                rounds=1,
                min_classes=1,
                privacy=Privacy(epsilon=3.0, delta=1e-5, max_grad_norm=1.0, epochs=1),
                engine=ClosedForm.of(rate=0.1, batch_size=2),
            )

    def test_divergence_names_the_party(self):
        data = {"north": SparseDataset(np.full((30, FEATURES), 1e30), torch.arange(30) % 2)}
        trainer = closed(resident(datasets=data, loss=None))
        work = interface.Svrg(direction=torch.ones(FEATURES), step=1e30, pull=1e9)
        [(_, made)] = trainer.do([("north", work)], start(FEATURES), 2)
        assert isinstance(made.error, DivergedError)
        assert "'north' diverged in round 2" in str(made.error)

    def test_separable_without_pull(self):
        data = {"north": SparseDataset(np.ones((3, FEATURES)), torch.ones(3, dtype=torch.int64))}
        work = interface.Minimise(direction=torch.full((FEATURES,), -0.6))
        [(_, made)] = closed(resident(datasets=data)).do([("north", work)], start(FEATURES), 1)
        assert isinstance(made.error, TaskError)
        assert "no minimum" in str(made.error)


@pytest.mark.parametrize("bad", [np.array([[np.nan]]), np.array([[np.inf]])])
def test_sparse_dataset_refuses_values(bad):
    from choral.errors import DataError

    with pytest.raises(DataError, match="not finite"):
        SparseDataset(bad, torch.tensor([0]))
    with pytest.raises(DataError, match="whole labels"):
        SparseDataset(np.ones((2, 2)), torch.tensor([0]))
    with pytest.raises(DataError, match="whole labels"):
        SparseDataset(np.ones((1, 2)), torch.tensor([0.5]))
