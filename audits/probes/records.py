"""Records and a model made to be watched: what every step should release is known to the last coordinate.

The model has two layers with biases, so that weights and biases of a hidden and of the last layer each have a part in
every gradient. Record i is [its number, its loudness, its features]; the loss is loudness times what the layers make of
the features, so that a record of loudness 0 has no gradient at all. A canary's features are dense, and orthogonal to
those of all others; the last columns are zero in every record, and there a step shows its noise alone.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import hadamard
from torch import nn
from torch.utils.data import Dataset

Floats = npt.NDArray[np.float64]

LOUDNESS = (3.0, 50.0, 1000.0)  # clipping norms in a canary's gradient, in turn
HIDDEN = 4
_QUIET_COLUMNS = 250
_SPREAD = 4.5  # squared length of the features: the first weights have .6 of a squared gradient, the others .13 each


@dataclasses.dataclass(frozen=True)
class ProbeLayout:
    """Where things are in a flat gradient, in the order weight and bias of the first layer, then of the last.

    signs: of each canary's loudness, so that what they have in common (the biases) does not add up.
    """

    canaries: int
    signs: Floats

    @classmethod
    def of(cls, canaries: int) -> ProbeLayout:
        return cls(canaries, np.random.default_rng().choice([-1.0, 1.0], canaries))

    @cached_property
    def columns(self) -> int:
        """Of the features that are not zero: a power of two."""
        return 1 << (self.canaries - 1).bit_length()

    @property
    def width(self) -> int:
        return self.columns + _QUIET_COLUMNS

    @property
    def length(self) -> int:
        return HIDDEN * self.width + 2 * HIDDEN + 1

    @cached_property
    def features(self) -> Floats:
        """Of the canaries; shape (canaries, columns), orthogonal rows."""
        rows = hadamard(self.columns)[: self.canaries].astype(np.float64)
        return np.asarray(rows * np.sqrt(_SPREAD / self.columns))

    @cached_property
    def hidden(self) -> Floats:
        """What the first layer makes of each canary; shape (canaries, HIDDEN), rows of length 1."""
        return np.asarray(np.random.default_rng(1).choice([-0.5, 0.5], (self.canaries, HIDDEN)))

    @cached_property
    def last(self) -> Floats:
        return np.array([0.5, -0.5, 0.5, 0.5])

    @cached_property
    def groups(self) -> dict[str, slice]:
        """Parts of a flat gradient by the name of the parameters."""
        first = HIDDEN * self.width
        ends = {"hidden weights": first, "hidden bias": first + HIDDEN, "last weights": first + 2 * HIDDEN}
        starts = [0, *ends.values()]
        named = {name: slice(start, end) for start, (name, end) in zip(starts, ends.items(), strict=False)}
        return named | {"last bias": slice(self.length - 1, self.length)}

    @cached_property
    def quiet(self) -> npt.NDArray[np.int64]:
        """Coordinates that no record touches."""
        grid = np.arange(HIDDEN * self.width).reshape(HIDDEN, self.width)
        return grid[:, self.columns :].reshape(-1)

    def model(self) -> nn.Module:
        return _Watched(self)

    def expected(self, included: Floats) -> Floats:
        """The sum of unit gradients of the canaries of each step; included: shape (steps, canaries), how often.

        Shape (steps, length), in clipping norms: what a trainer that clips exactly releases beside its noise.
        """
        weighed = included * self.signs / np.sqrt(3.0 + _SPREAD)
        first = np.zeros((len(included), HIDDEN, self.width))
        first[:, :, : self.columns] = self.last[None, :, None] * (weighed @ self.features)[:, None, :]
        total = weighed.sum(axis=1, keepdims=True)
        parts = (first.reshape(len(included), -1), total * self.last, weighed @ self.hidden, total)
        return np.concatenate(parts, axis=1)

    def projections(self, released: Floats) -> Floats:
        """Each canary's part of the first weights of each step; shape (steps, canaries). One that counts once: `share`.

        Noise of deviation s per coordinate has deviation s here.
        """
        first = released[:, : HIDDEN * self.width].reshape(len(released), HIDDEN, self.width)
        rows = np.einsum("thd,h->td", first[:, :, : self.columns], self.last)
        return np.asarray(rows @ self.features.T / np.sqrt(_SPREAD) * self.signs)

    @property
    def share(self) -> float:
        """The length of the first weights' part of a canary's unit gradient."""
        return float(np.sqrt(_SPREAD / (3.0 + _SPREAD)))


class _Watched(nn.Module):
    def __init__(self, layout: ProbeLayout) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(layout.width, HIDDEN), nn.Linear(HIDDEN, 1)
        with torch.no_grad():
            first = torch.zeros(HIDDEN, layout.width)
            first[:, : layout.columns] = torch.from_numpy(layout.hidden.T @ layout.features / _SPREAD)
            self.hidden.weight.copy_(first)
            self.last.weight.copy_(torch.from_numpy(layout.last)[None])
            self.hidden.bias.zero_()
            self.last.bias.zero_()

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.hidden(x[:, 2:])) * x[:, 1:2]


class ProbeRecords(Dataset[torch.Tensor]):
    """A party's part of the records: number `first` + `stride` i for i below `records`; canaries are the first numbers.

    inside: the canaries' coins; one that came up tails, and every other record, has no gradient. clip: the clipping
    norm, in which loudness is counted.
    """

    def __init__(
        self,
        records: int,
        layout: ProbeLayout,
        inside: npt.NDArray[np.bool_],
        clip: float,
        *,
        first: int = 0,
        stride: int = 1,
    ) -> None:
        self.records, self.layout, self.first, self.stride = records, layout, first, stride
        loud = np.resize(LOUDNESS, layout.canaries) * inside * layout.signs
        self.loudness = loud * clip / np.sqrt(3.0 + _SPREAD)
        self.features = torch.from_numpy(layout.features).float()

    def __len__(self) -> int:
        return self.records

    def __getitem__(self, index: int) -> torch.Tensor:
        number = self.first + self.stride * index
        x = torch.zeros(2 + self.layout.width)
        x[0] = number
        if number < self.layout.canaries and self.loudness[number] != 0.0:
            x[1] = self.loudness[number]
            x[2 : 2 + self.layout.columns] = self.features[number]
        return x
