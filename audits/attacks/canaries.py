"""Canaries: records or clients that are put into training by a coin each, to see whether the model tells how it fell.

Record canaries are inputs of noise under random labels, which a model can only know by heart. Client canaries live in
gradient space, in the manner of CANIFE (Maddock et al. 2023) and of Andrew et al. 2023: the client's update *is* a long
secret direction, so that no client could be more visible, and the final model's component along it is the score. Heads
submits the direction in every round, tails the zero update: the neighbours of client-level privacy ("zero out one
client").

Coins and directions are the operating system's, so that no seed of the training can agree with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.privacy.noise.gaussian import gaussian, os_stream

if TYPE_CHECKING:
    import torch
    from torch import nn

    from choral.trainers.task.task import Build, Fit

VISIBLE = 10.0  # canary updates have this many clipping norms, to show whether they are clipped


def flip_coins(count: int) -> npt.NDArray[np.bool_]:
    """Independent fair coins from the operating system, shape (count,)."""
    if count < 1:
        raise ConfigError(f"expected at least one coin, got {count}")
    return np.unpackbits(np.frombuffer(os_stream((count + 7) // 8), dtype=np.uint8))[:count].astype(np.bool_)


def record_canaries(count: int, shape: Sequence[int], classes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``count`` records: inputs of standard normal noise of this shape, float32, under labels below ``classes``."""
    import torch

    if count < 1 or classes < 2:
        raise ConfigError(f"expected count >= 1 and classes >= 2, got {count} and {classes}")
    size = int(np.prod(shape))
    noise = gaussian(count * size, os_stream).astype(np.float32).reshape(count, *shape)
    labels = np.frombuffer(os_stream(8 * count), dtype="<u8") % np.uint64(classes)
    return [(torch.from_numpy(noise[i].copy()), torch.tensor(int(labels[i]))) for i in range(count)]


def loss_scores(
    model: nn.Module, canaries: Sequence[tuple[torch.Tensor, torch.Tensor]], batch: int = 1024
) -> npt.NDArray[np.float64]:
    """Minus the cross-entropy of each canary, shape (m,): high for what the model knows by heart.

    The model is in evaluation mode meanwhile, and each of its parts in its own mode again afterwards.
    """
    import torch

    from choral.privacy.record_independence.shared_inputs import evaluating

    device = next(model.parameters()).device
    found = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(canaries), batch):
            part = canaries[start : start + batch]
            inputs = torch.stack([x for x, _ in part]).to(device)
            labels = torch.stack([torch.as_tensor(y) for _, y in part]).to(device)
            found.append(-torch.nn.functional.cross_entropy(model(inputs), labels, reduction="none").double().cpu())
    return torch.cat(found).numpy()


@dataclass(frozen=True)
class CanaryClient:
    """A client whose update is one vector, float32, shape (d,), as a dataset of one record."""

    update: torch.Tensor

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        if index:
            raise IndexError(index)
        return self.update


@dataclass(frozen=True)
class _CanaryLoader:
    canary: CanaryClient

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield self.canary.update

    def __len__(self) -> int:
        return 1


def directions(count: int, length: int) -> torch.Tensor:
    """Secret directions of norm 1, float32, shape (count, length); nearly orthogonal if count << length."""
    import torch

    rows = torch.from_numpy(gaussian(count * length, os_stream).astype(np.float32).reshape(count, length))
    unit: torch.Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def with_canary_clients(
    build: Build, fit: Fit, parties: Mapping[str, Any], updates: torch.Tensor, inside: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    """The arguments build, fit and parties of ``federate``, with one more client per row of ``updates``, shape (m, d).

    A client whose coin says so submits its row as its update, the others submit zero.
    """
    import torch

    from choral.trainers.task.flat_vector import Layout

    host = next(iter(parties.values()))

    def build_both(dataset: Any) -> Any:
        if not isinstance(dataset, CanaryClient):
            return build(dataset)
        model, optimizer, _ = build(host)
        return model, optimizer, _CanaryLoader(dataset)

    def fit_both(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> object:
        canary = getattr(loader, "canary", None)
        if not isinstance(canary, CanaryClient):
            return fit(model, optimizer, loader)
        layout = Layout(model)
        weights = layout.read()
        for parameter in layout.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # a client that makes no step is taken for a mistake; what it did is overwritten
        layout.write(weights + canary.update.to(weights.device))
        return None

    width = len(str(len(updates)))
    extra = {
        f"canary-{number:0{width}d}": CanaryClient(update if enters else 0.0 * update)
        for number, (update, enters) in enumerate(zip(updates, inside.tolist(), strict=True), start=1)
    }
    if clash := sorted(extra.keys() & parties.keys()):
        raise ConfigError(f"a party is named {clash[0]!r}, as a canary would be", hint="rename the party")
    return {"build": build_both, "fit": fit_both, "parties": {**parties, **extra}}
