"""What a party finds on the resident model, whatever the parties before it did; and how many are seated ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.trainers import Epochs, TaskError
from choral.trainers.algorithms.interface import Failed, Train
from choral.trainers.engines import Direct
from choral.trainers.engines.direct import planned
from choral.trainers.local_steps.resident_model import Resident
from choral.trainers.task.arithmetic import Arithmetic
from choral.trainers.task.flat_vector import several
from choral.trainers.task.seeding import caller_keeps_generators

MANY = 20  # more than are seated together


def _build(dataset: TensorDataset) -> Any:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=4)


def _loop(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    for points, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(points), labels).backward()
        optimizer.step()


def _resident(build: Callable[..., Any], fit: Any) -> Resident:
    draw = torch.Generator().manual_seed(0)
    parties = {f"p{k}": TensorDataset(torch.randn(8, 3, generator=draw), torch.arange(8) % 2) for k in range(MANY)}
    return Resident(
        build=build, fit=fit, datasets=parties, privacy_engines={}, seed=0, arithmetic=Arithmetic(torch.device("cpu"))
    )


def _round(resident: Resident) -> list[Any]:
    start = torch.zeros(resident.length)
    return [done for _, done in resident.do([(name, Train()) for name in resident.datasets], start, 1)]


@pytest.mark.parametrize("where", ["at its end", "and then raises", "of a layer alone"])
def test_each_party_trains_in_training_mode_whatever_the_one_before_it_left(where: str) -> None:
    modes = []

    def fit(model: Any, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        modes.append([module.training for module in model.modules()])
        _loop(model, optimizer, loader)
        if where == "of a layer alone":
            model[1].eval()
        elif where == "at its end" or len(modes) == 2:
            model.eval()
            if where == "and then raises":
                raise RuntimeError("as it happens")

    done = _round(_resident(_build, fit))
    assert sum(isinstance(each, Failed) for each in done) == (where == "and then raises")
    assert len(modes) == MANY
    assert all(map(all, modes))


def test_each_party_trains_in_training_mode_where_build_gives_the_resident_model_itself() -> None:
    model, modes = _build(TensorDataset(torch.zeros(1, 3)))[0], []

    def build(dataset: TensorDataset) -> Any:
        model.eval()
        return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=4)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        modes.append([module.training for module in model.modules()])
        _loop(model, optimizer, loader)

    _round(_resident(build, fit))
    assert len(modes) == MANY
    assert all(map(all, modes))


def test_a_rate_in_a_tensor_that_fit_changes_within_is_seen_and_put_back() -> None:
    rates = []

    def build(dataset: TensorDataset) -> Any:
        model = nn.Linear(3, 2)
        return model, torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5)), DataLoader(dataset, batch_size=4)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        rates.append(float(optimizer.param_groups[0]["lr"]))
        _loop(model, optimizer, loader)
        optimizer.param_groups[0]["lr"].mul_(0.5)

    resident = _resident(build, fit)
    for _ in range(2):
        assert all(isinstance(done.error, TaskError) and "lr at 0.25" in str(done.error) for done in _round(resident))
    assert set(rates) == {0.5}


def test_settings_that_no_round_checks_begin_as_they_were_made() -> None:
    seen = []

    def build(dataset: TensorDataset) -> Any:
        model = nn.Linear(3, 2)
        return model, torch.optim.Adam(model.parameters(), betas=(0.8, 0.9)), DataLoader(dataset, batch_size=4)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        [group] = optimizer.param_groups
        seen.append((group["betas"], group["eps"], "note" in group))
        _loop(model, optimizer, loader)
        group.update({"eps": 0.5} if len(seen) % 2 else {"note": 1})

    resident = _resident(build, fit)
    _round(resident)
    _round(resident)
    assert set(seen) == {((0.8, 0.9), 1e-8, False)}


def test_what_counts_steps_is_no_hook_of_the_users() -> None:
    resident = _resident(lambda dataset: (model := nn.Linear(3, 2), _sgd(model), _loader(dataset)), Epochs())
    counted = [done.steps for done in _round(resident)]
    assert counted == [2] * MANY == [done.steps for done in _round(resident)]
    assert planned(resident, "p0", Train(), 1) is not None
    start = torch.zeros(resident.length)
    [(_, done)] = Direct(resident).do([("p0", Train())], start, 1)
    assert torch.allclose(done.vector, _round(resident)[0].vector, atol=1e-6)
    resident.seat("p1").optimizer.register_step_pre_hook(lambda *_: None)
    resident.seat("p1").plan = None
    assert planned(resident, "p1", Train(), 1) is None


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _loader(dataset: TensorDataset) -> Any:
    return DataLoader(dataset, batch_size=4)


@pytest.mark.parametrize(("length", "ahead"), [(100, 16), (1 << 16, 4), (1 << 20, 1)])
def test_only_small_vectors_are_taken_together(length: int, ahead: int) -> None:
    made: list[int] = []
    used = several((made.append(k) or k for k in range(MANY)), length)  # type: ignore[func-returns-value]
    assert next(used) == 0
    assert len(made) == ahead
    assert [0, *used] == list(range(MANY))


def test_a_party_whose_build_fails_loses_its_own_turn_alone() -> None:
    order: list[str] = []

    def build(dataset: TensorDataset) -> Any:
        order.append("build")
        if len(order) == 4:  # the model's own is the first
            raise OSError("no such file")
        return _build(dataset)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        order.append("fit")
        _loop(model, optimizer, loader)

    done = _round(_resident(build, fit))
    assert [isinstance(each, Failed) for each in done] == [k == 2 for k in range(MANY)]
    assert "build at party 'p2' raised OSError" in str(done[2].error)
    assert order == ["build"] * 17 + ["fit"] * 15 + ["build"] * 4 + ["fit"] * 4


def test_the_caller_keeps_torchs_generator_around_one_party_and_around_many() -> None:
    resident = _resident(_build, _loop)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = _round(resident)
    assert torch.equal(torch.get_rng_state(), before)
    with caller_keeps_generators():
        other = _round(resident)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(one, other, strict=True))
