"""What noise in shares goes together with: gradient descent, schedules, frozen layers, LoRA, layers' norms, chunks.

Each against the clipped gradients of single records, by autograd in float64, where there is no noise and the draws are
known: what is opened in every step, and where the weights end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from choral import Keep, Masked, Privacy, audit, federate
from choral.privacy import PerLayerClip
from choral.privacy.noise import record_noise_shares as noise_shares
from choral.privacy.per_sample import model as per_sample_model
from choral.privacy.record_shares import party as party_module
from choral.trainers import GD, FedSGD, Run, Schedule, Task, lora
from choral.trainers.federated.record_shares.codec import SharesCodec

CLIP = 0.5
SUM = Masked(corrupt=1, dropouts=1, min_survivors=4)
STEPS = FedSGD(batch_size=40, steps_per_round=1, learning_rate=0.8)
Make = Callable[..., Task]
Names = tuple[tuple[str, ...], ...]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Nobody adds noise, and a step draws one of four records, in turn; what the server steps with, step by step."""
    counts: dict[int, int] = {}
    seen: list[np.ndarray] = []

    def forced(size: int, rate: Any, source: Any) -> np.ndarray:
        if rate == 1:
            return np.arange(size)
        counts[size] = counts.get(size, -1) + 1
        return np.arange(size)[np.arange(size) % 4 == counts[size] % 4]

    def decode(self: SharesCodec, result: Any, real: Any = SharesCodec.decode) -> Any:
        seen.append((mean := real(self, result)).value.numpy().copy())
        return mean

    monkeypatch.setattr(noise_shares, "gaussian", lambda count, source: np.zeros(count))
    monkeypatch.setattr(party_module, "poisson_sample", forced)
    monkeypatch.setattr(SharesCodec, "decode", decode)
    return seen


def private(task: Task, **changes: Any) -> Run:
    promise = Privacy(4.0, 1e-4, **{"noise": "distributed", "max_grad_norm": CLIP} | changes.pop("promise", {}))
    given: dict[str, Any] = {"rounds": 3, "algorithm": STEPS, "privacy": promise, "secure_sum": SUM}
    return federate(task, **given | changes)


def by_record(
    model: nn.Module, task: Task, drawn: Callable[[int], list[int]], layers: Mapping[tuple[str, ...], float]
) -> tuple[torch.Tensor, int]:
    """The sum of single records' gradients, each layer's clipped to its norm, at the model's weights; how many.

    layers: the parameters' names, and what they are clipped to together. float64, in the model's order.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    total, count = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}, 0
    for dataset in task.parties.values():
        for place in drawn(len(dataset)):
            point, label = dataset[place]
            loss = nn.functional.cross_entropy(model(point.double()[None]), label[None])
            found = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
            for names, norm in layers.items():
                length = float(torch.cat([found[name].flatten() for name in names]).norm())
                for name in names:
                    total[name] += found[name] * min(1.0, norm / length)
            count += 1
    return torch.cat([tensor.flatten() for tensor in total.values()]), count


def held_to_records(
    run: Run,
    task: Task,
    opened: list[np.ndarray],
    build: Callable[[], nn.Module],
    layers: Mapping[tuple[str, ...], float],
    *,
    rates: tuple[float, ...] = (0.8, 0.8, 0.8),
    drawn: Callable[[int, int], list[int]] = lambda size, step: [at for at in range(size) if at % 4 == step],
    batch: int = 40,
    ridge: float = 0.0,
) -> None:
    """Hold every opened sum to the records', and the last weights to steps with them.

    To the grid (five roundings of half a step) and 1e-4 of C a record, by which clipping stays below C.
    """
    model = build().double()
    start = federate(task, rounds=1, algorithm=FedSGD(learning_rate=1e-300)).state
    model.load_state_dict({name: tensor.double() for name, tensor in start.items()})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grid = float((run.info.fixed_point or {})["error_bound"])
    assert len(opened) == len(rates)
    for step, (mean, rate) in enumerate(zip(opened, rates, strict=True)):
        total, count = by_record(model, task, lambda size, step=step: drawn(size, step), layers)
        assert np.abs(mean - total.numpy() / batch).max() <= grid + count * CLIP * 2e-4 / batch, step
        assert np.abs(mean).max() > 3 * grid
        with torch.no_grad():
            flat = torch.cat([parameter.flatten() for parameter in trained])
            flat -= rate * (torch.from_numpy(mean) + ridge * flat)
            nn.utils.vector_to_parameters(flat, trained)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(run.state[name].double(), tensor, atol=2e-6), name


def linear() -> nn.Module:
    return nn.Linear(5, 2)


BOTH = {("weight", "bias"): CLIP}


def test_gradient_descent_sums_every_record_clipped_over_all_of_them(
    task: Make, opened: list[np.ndarray], tmp_path: Any
) -> None:
    """q = 1: no draw, the divisor is N, and the ridge is of weights that all know."""
    run = private(task(), algorithm=GD(rate=0.7, ridge=0.1), keep=Keep(out=tmp_path / "run"))
    rates, everybody = (0.7, 0.7, 0.7), lambda size, step: list(range(size))
    held_to_records(run, task(), opened, linear, BOTH, rates=rates, drawn=everybody, batch=160, ridge=0.1)
    found = audit(tmp_path / "run")
    assert found.verdict == "holds", found.sentence
    assert "a sum opened over 4 parties of which 3 are honest" in found.claim
    assert run.spent is not None
    assert (run.spent.steps, run.spent.epsilon <= 4.0) == (3, True)


def test_the_servers_rate_follows_the_schedule(task: Make, opened: list[np.ndarray]) -> None:
    falling = task(schedule=Schedule(kind="step", decay=0.5, every=1))
    held_to_records(private(falling), task(), opened, linear, BOTH, rates=(0.8, 0.4, 0.2))
    opened.clear()
    descent = private(falling, algorithm=GD(rate=0.7))
    rates, everybody = (0.7, 0.35, 0.175), lambda size, step: list(range(size))
    held_to_records(descent, task(), opened, linear, BOTH, rates=rates, drawn=everybody, batch=160)


def built(make: Callable[[], nn.Module]) -> Callable[[Any], Any]:
    def build(dataset: Any) -> Any:
        model = make()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, torch.optim.SGD(trained, lr=0.2), DataLoader(dataset, batch_size=10, shuffle=True)

    return build


def deep() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def frozen() -> nn.Module:
    model = deep()
    model[0].requires_grad_(False)
    return model


def low_rank() -> nn.Module:
    return lora(deep(), rank=2)


@pytest.mark.parametrize("make", [frozen, low_rank], ids=["frozen layers", "LoRA"])
def test_what_is_not_trained_is_neither_clipped_for_nor_sent(
    task: Make, opened: list[np.ndarray], make: Callable[[], nn.Module]
) -> None:
    made = task(build=built(make))
    run = private(made)
    trained = tuple(name for name, parameter in make().named_parameters() if parameter.requires_grad)
    fewer = sum(parameter.numel() for parameter in make().parameters() if parameter.requires_grad)
    assert fewer < sum(parameter.numel() for parameter in make().parameters())
    assert {len(mean) for mean in opened} == {fewer}
    held_to_records(run, made, opened, make, {trained: CLIP})


def test_layers_are_clipped_each_to_its_own_norm(task: Make, opened: list[np.ndarray]) -> None:
    made, clip = task(build=built(deep)), PerLayerClip({"0": 0.3, "2": 0.4})
    run = private(made, promise={"max_grad_norm": clip})
    assert run.info.fixed_point is not None
    held_to_records(run, made, opened, deep, {("0.weight", "0.bias"): 0.3, ("2.weight", "2.bias"): 0.4})


def test_rows_may_come_in_chunks(task: Make, opened: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 7 rows are in memory at once, and a step is one step: paid for once, summed once."""
    shown: list[int] = []

    def begin(self: Any, drawn: int, real: Any = per_sample_model.PerSampleModel.begin) -> None:
        shown.append(drawn)
        real(self, drawn)

    monkeypatch.setattr(per_sample_model.PerSampleModel, "begin", begin)
    run = private(task(), promise={"max_physical_batch_size": 7})
    rows = int((run.info.fixed_point or {})["rows"])
    assert shown == ([7] * (rows // 7) + [rows % 7] * (rows % 7 > 0)) * 5 * 3
    assert run.spent is not None
    assert run.spent.steps == 3
    held_to_records(run, task(), opened, linear, BOTH)
