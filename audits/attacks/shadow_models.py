"""Many models at once: shadow models of one architecture trained as one stacked cohort.

The weights of all models lie in one tensor per parameter, one row per model; each model has its own batches of its own
members. One forward and one backward pass (vmap) serve all models, and an elementwise optimizer steps all of them,
exactly as if each were trained alone on the same batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from choral.audits.attacks.canaries import flip_coins
from choral.errors import ConfigError, DataError
from choral.trainers.task.arithmetic import resolve_device

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Elementwise = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad)


@dataclass(frozen=True, kw_only=True)
class Shadows:
    """Trained models: stacked parameters and buffers, each of shape (models, ...), and who was in whose training.

    members: bool, shape (models, records). base: the architecture, without weights.
    """

    base: nn.Module
    parameters: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    members: npt.NDArray[np.bool_]

    def outputs(self, inputs: torch.Tensor, batch: int = 512) -> torch.Tensor:
        """Every model's outputs on the same inputs, shape (n, ...): float32, shape (models, n, ...), on the CPU."""
        device = next(iter(self.parameters.values())).device

        def forward(parameters: Any, buffers: Any, x: torch.Tensor) -> Any:
            return functional_call(self.base, (parameters, buffers), (x,))

        with torch.no_grad():
            parts = [
                vmap(forward, in_dims=(0, 0, None))(self.parameters, self.buffers, part.to(device)).float().cpu()
                for part in torch.split(inputs, batch)
            ]
        return torch.cat(parts, dim=1)

    def model(self, index: int) -> dict[str, torch.Tensor]:
        """One model's state dict."""
        return {name: value[index].detach().clone() for name, value in (self.parameters | self.buffers).items()}


def coin_members(models: int, records: int) -> npt.NDArray[np.bool_]:
    """A fair coin of the operating system for each record and model, shape (models, records)."""
    return flip_coins(models * records).reshape(models, records)


def batches(members: npt.NDArray[np.bool_], *, steps: int, batch_size: int, seed: int) -> npt.NDArray[np.int64]:
    """Which records each model sees at each step: shape (models, steps, batch_size).

    Each model goes through its own members in passes, each pass in a new order, so that all models make the same number
    of full steps however many members they have.
    Raises: DataError for a model with no members.
    """
    rng = np.random.default_rng(seed)
    needed = steps * batch_size
    rows = []
    for number, row in enumerate(members):
        own = np.flatnonzero(row)
        if not len(own):
            raise DataError(f"shadow model {number} has no training records", hint="use more records")
        passes = [rng.permutation(own) for _ in range(-(-needed // len(own)))]
        rows.append(np.concatenate(passes)[:needed].reshape(steps, batch_size))
    return np.stack(rows)


def train_shadows(
    build: Callable[[], nn.Module],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    members: npt.NDArray[np.bool_],
    *,
    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    steps: int,
    batch_size: int,
    loss: Loss = nn.functional.cross_entropy,
    seed: int = 0,
    device: str = "auto",
) -> Shadows:
    """Train one model per row of ``members`` on the records that its row names.

    build: a fresh model, initial weights by torch's generator, which is seeded with ``seed`` here.
    inputs, targets: all records, shapes (n, ...) and (n, ...). members: bool, shape (models, n), as
        :func:`coin_members` draws them.
    optimizer: from stacked parameters to SGD, Adam, AdamW, RMSprop or Adagrad, which treat each coordinate for itself.
    device: "auto" takes a GPU when there is one.

    Raises: ConfigError for BatchNorm, another optimizer or settings out of range; DataError for unequal lengths.
    """
    if members.ndim != 2 or members.dtype != np.bool_ or members.shape[1] != len(inputs) or len(inputs) != len(targets):
        raise DataError(
            f"members are {members.dtype} of shape {members.shape}, inputs {len(inputs)} and targets {len(targets)}"
            " records, expected bool of shape (models, records)"
        )
    if steps < 1 or batch_size < 1 or len(members) < 1:
        raise ConfigError(f"expected steps, batch_size and models >= 1, got {steps}, {batch_size} and {len(members)}")
    on = resolve_device(device)
    base, parameters, buffers = _stacked(build, len(members), seed, on)
    stepper = optimizer(list(parameters.values()))
    if not isinstance(stepper, Elementwise):
        raise ConfigError(f"optimizer is {type(stepper).__name__}, which may mix the models", hint="use SGD or Adam")
    order = torch.from_numpy(batches(members, steps=steps, batch_size=batch_size, seed=seed)).to(on)
    inputs, targets = inputs.to(on), targets.to(on)

    def one(own: Any, fixed: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss(functional_call(base, (own, fixed), (x,)), y)

    losses = vmap(one, randomness="different")
    for step in range(steps):
        chosen = order[:, step]
        stepper.zero_grad()
        losses(parameters, buffers, inputs[chosen], targets[chosen]).sum().backward()  # type: ignore[no-untyped-call]
        stepper.step()
    base.eval()
    trained = {name: value.detach() for name, value in parameters.items()}
    return Shadows(base=base, parameters=trained, buffers=buffers, members=members)


def _stacked(
    build: Callable[[], nn.Module], count: int, seed: int, on: torch.device
) -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = [build() for _ in range(count)]
    for name, module in models[0].named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"layer {name!r} is {type(module).__name__}, whose statistics cannot be stacked", hint="use GroupNorm"
            )
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta").train()
    return (
        base,
        {name: value.detach().to(on).requires_grad_() for name, value in parameters.items()},
        {name: value.to(on) for name, value in buffers.items()},
    )
