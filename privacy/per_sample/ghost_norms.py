"""Per-sample gradients that need not be written down: their norms and their weighted sum, layer by layer.

Clipping needs two things of the per-sample gradients g_i: each norm, and sum_i w_i g_i for weights known once all norms
are. A layer's input `a` and the gradient `g` of its output give both, so the gradients of parameters that torch would
compute are left out altogether, and the sum is made once, with the clip factors folded in: one forward and one backward
pass (book-keeping: Bu, Wang, Zha, Karypis 2023, "Differentially private optimization on large model at small cost").
Of a linear layer with T positions, input width d and output width p, record i has a_i, shape (T, d), and g_i, shape
(T, p), and the gradients of weight and bias are

    G_i = g_i^T a_i = sum_t g_it a_it^T,    b_i = sum_t g_it.                                                      (1)

There are two ways, as in mixed ghost clipping (Bu, Mao, Xu 2022, "Scalable and efficient training of large
convolutional neural networks with DP"):

- :class:`Dense`: write G_i down, T p d multiplications and p d numbers kept;
- :class:`Outer`: keep a and g, T (p + d) numbers. The norm is that of the product, or comes from one position, or from
  the Gram matrices (Goodfellow 2015; Li et al. 2022), T^2 (p + d) multiplications:

    |G_i| = |a_i| |g_i|  where T = 1,                                                                              (2)
    |G_i|^2 = sum_{t, s} <a_it, a_is> <g_it, g_is> = <a_i a_i^T, g_i g_i^T>,                                       (3)
    sum_i w_i G_i = [w_1 g_1; w_2 g_2; ...]^T [a_1; a_2; ...].                                                     (4)

A convolution is (1) with what each position of its output sees for a_it; an embedding is (1), transposed, with unit
vectors for a_it, so that row v of its gradient is

    sum over t with token_it = v of g_it.                                                                          (5)

Measured (`python benchmarks/dp_step.py`, its lines "ghost"): Outer is the faster where it keeps up to an eighth of
Dense's numbers, 8 T (p + d) <= p d, and Dense beyond, up to 3.5 times; there Outer is taken for memory alone.
The sums are float64 whichever way is taken: see :func:`weighted_sum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from choral.privacy.errors import PrivacyError

BLOCK = 1 << 10  # columns whose squares are added in float32
_WIDE, _COLUMNS = 1 << 18, 1 << 14  # numbers, and columns, widened to float64 at once: fit the second-level cache
_UNFOLDED = 1 << 18  # numbers of unfolded images made at once, likewise
_WORK = 1 << 21  # numbers of products or Gram matrices made at once
_FEW = 8  # times fewer numbers in factors than in gradients: from there on factors are faster, too
_SMALL = 1 << 22  # per-sample gradients, in numbers, that are written down where that is faster: 16 MiB


class PerSample(Protocol):
    """The gradients of one parameter, flat, for each of `records` records."""

    @property
    def records(self) -> int:
        """How many."""
        ...

    def norms(self) -> torch.Tensor:
        """Return an upper bound of each norm, exact but for rounding, shape (records,), float64."""
        ...

    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        """Return sum_i weights[i] g_i for float64 weights, shape (numel,), float64."""
        ...

    def dense(self, first: int | None = None) -> torch.Tensor:
        """Return the gradients themselves, of the `first` records or all, shape (records, numel)."""
        ...

    def without(self, gone: torch.Tensor) -> PerSample:
        """Return the same with zeros for the records marked in `gone`, shape (records,), bool, whatever theirs were."""
        ...


@dataclass(frozen=True)
class Dense:
    """Gradients written down: `scale` times `rows`, shape (records, numel)."""

    rows: torch.Tensor
    scale: float = 1.0

    @property
    def records(self) -> int:
        return len(self.rows)

    def norms(self) -> torch.Tensor:
        return norms(self.rows) * self.scale

    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        return weighted_sum(weights * self.scale, self.rows)

    def dense(self, first: int | None = None) -> torch.Tensor:
        return self.rows[:first] * self.scale

    def without(self, gone: torch.Tensor) -> PerSample:
        return Dense(_zeroed(self.rows, gone), self.scale)


@dataclass(frozen=True)
class Outer:
    """Gradients g_i^T a_i of a weight of shape (p, d), times `scale`.

    `factors` gives a, shape (m, T, d), and g, shape (m, T, p), of m records; `sizes` is (T, d, p).
    """

    factors: Callable[[slice], tuple[torch.Tensor, torch.Tensor]]
    records: int
    sizes: tuple[int, int, int]
    scale: float = 1.0

    def norms(self) -> torch.Tensor:
        positions, d, p = self.sizes
        if positions == 1:  # (2)
            found = [norms(a.flatten(1)) * norms(g.flatten(1)) for a, g in self._chunks(d + p)]
        elif 3 * positions * (d + p) < d * p:  # float64 takes about three times as long
            found = [_gram_norms(a, g) for a, g in self._chunks(2 * positions**2 + positions * (d + p))]
        else:
            found = [_product_norms(a, g) for a, g in self._chunks(d * p)]
        return _joined(found) * self.scale

    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        positions, d, p = self.sizes
        total, done = None, 0
        for a, g in self._chunks(positions * (d + p)):
            a, g = _wide(a), _wide(g)
            if total is None:
                total = torch.zeros(p, d, dtype=torch.float64, device=a.device)
            w = weights[done : done + len(a)].to(a.device) * self.scale
            total.addmm_((g * w[:, None, None]).flatten(0, 1).T, a.flatten(0, 1))  # (4)
            done += len(a)
        if total is None:
            raise PrivacyError("expected the gradients of at least one record")
        return total.reshape(-1)

    def dense(self, first: int | None = None) -> torch.Tensor:
        a, g = self.factors(slice(first))
        return torch.bmm(g.mT, a).flatten(1) * self.scale  # (1)

    def without(self, gone: torch.Tensor) -> PerSample:
        def factors(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            a, g = self.factors(part)
            return _zeroed(a, gone[part]), _zeroed(g, gone[part])

        return Outer(factors, self.records, self.sizes, self.scale)

    def _chunks(self, work: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the factors of some records at a time, where `work` is how many numbers one record takes."""
        step = max(1, _WORK // max(work, 1))
        for start in range(0, self.records, step):
            yield self.factors(slice(start, min(start + step, self.records)))


@dataclass(frozen=True)
class Sparse:
    """Gradients of a table, shape (height, width): `scale` * values[j] is row `row[j]` of record `owner[j]`'s."""

    owner: torch.Tensor
    row: torch.Tensor
    values: torch.Tensor
    records: int
    height: int
    scale: float = 1.0

    def norms(self) -> torch.Tensor:
        squares = norms(self.values).square()
        total = torch.zeros(self.records, dtype=torch.float64, device=squares.device)
        return total.index_add_(0, self.owner.to(squares.device), squares).sqrt() * self.scale

    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        values = _wide(self.values)
        owner, row = self.owner.to(values.device), self.row.to(values.device)
        values = values * (weights.to(values.device) * self.scale)[owner][:, None]
        total = torch.zeros(self.height, values.shape[1], dtype=torch.float64, device=values.device)
        return total.index_add_(0, row, values).reshape(-1)

    def dense(self, first: int | None = None) -> torch.Tensor:
        count = self.records if first is None else min(first, self.records)
        mine = self.owner < count
        rows = torch.zeros(count, self.height, self.values.shape[1], dtype=self.values.dtype, device=self.values.device)
        rows[self.owner[mine], self.row[mine]] = self.values[mine] * self.scale
        return rows.flatten(1)

    def without(self, gone: torch.Tensor) -> PerSample:
        values = _zeroed(self.values, gone.to(self.owner.device)[self.owner])
        return Sparse(self.owner, self.row, values, self.records, self.height, self.scale)


def added(parts: list[PerSample]) -> PerSample:
    """Return the sum of gradients of one parameter that was used several times."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].dense().clone()
    for part in parts[1:]:
        total += part.dense()
    return Dense(total)


def follows(layer: nn.Module) -> bool:
    """Return whether :func:`per_sample` knows this layer: linear, embedding, convolution with whatever padding."""
    if type(layer) is nn.Embedding:
        return not layer.scale_grad_by_freq and not layer.sparse and layer.max_norm is None
    return type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def per_sample(layer: nn.Module, a: torch.Tensor, g: torch.Tensor) -> dict[str, PerSample]:
    """Return the per-sample gradients of a layer's weight and bias, by name.

    layer: one that `follows` is true of. a: its input, a record per row. g: the gradient of the mean of the records'
    losses in its output.
    """
    scale = float(len(a))
    a, g = single(a), single(g)
    if isinstance(layer, nn.Embedding):
        return {"weight": _embedding(layer, a, g, scale)}
    return _linear(a, g, scale) if isinstance(layer, nn.Linear) else _convolution(layer, a, g, scale)


def _linear(a: torch.Tensor, g: torch.Tensor, scale: float) -> dict[str, PerSample]:
    a, g = a.reshape(len(a), -1, a.shape[-1]), g.reshape(len(g), -1, g.shape[-1])
    outer = Outer(lambda part: (a[part], g[part]), len(a), (a.shape[1], a.shape[2], g.shape[2]), scale)
    return {"weight": _cheaper(outer), "bias": Dense(g.sum(1), scale)}  # (1)


def _convolution(layer: Any, a: torch.Tensor, g: torch.Tensor, scale: float) -> dict[str, PerSample]:
    """Return those of a convolution over one, two or three dimensions, once its input is padded as the layer does."""
    groups, kernel = layer.groups, math.prod(layer.kernel_size)
    a = _padded(layer, a)
    g = g.flatten(2)
    positions, d, p = g.shape[2], a.shape[1] // groups * kernel, g.shape[1] // groups

    def factors(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return _unfolded(layer, a[part], groups), g[part].reshape(-1, p, positions).mT

    bias = Dense(g.sum(2), scale)
    if groups == 1:
        return {"weight": _cheaper(Outer(factors, len(a), (positions, d, p), scale)), "bias": bias}
    return {"weight": _written(factors, len(a), groups, (positions, d, p), scale), "bias": bias}


def _padded(layer: Any, a: torch.Tensor) -> torch.Tensor:
    if layer.padding_mode != "zeros":
        return F.pad(a, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    if isinstance(layer.padding, str):  # "same" may pad the two sides differently
        sides = layer._reversed_padding_repeated_twice
    else:
        sides = [n for n in reversed(layer.padding) for _ in range(2)]
    return F.pad(a, sides) if any(sides) else a


def _unfolded(layer: Any, a: torch.Tensor, groups: int) -> torch.Tensor:
    """Return what each position of the output sees, shape (records * groups, positions, channels/group * kernel).

    Positions are innermost in memory: the copy is then of whole rows of the image.
    """
    for dim, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        a = a.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    records, channels, *rest = a.shape  # and positions, kernel: of as many dimensions each
    dims = len(rest) // 2
    places, kernels = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    a = a.view(records, groups, channels // groups, *rest).permute(0, 1, 2, *kernels, *places)
    return a.reshape(records * groups, -1, math.prod(rest[:dims])).mT


def _embedding(layer: nn.Embedding, tokens: torch.Tensor, g: torch.Tensor, scale: float) -> PerSample:
    height, records = layer.num_embeddings, len(tokens)
    place = tokens.reshape(records, -1) + height * torch.arange(records, device=tokens.device)[:, None]
    g = g.reshape(-1, g.shape[-1])
    used, inverse = torch.unique(place, return_inverse=True)
    values = torch.zeros(len(used), g.shape[1], dtype=g.dtype, device=g.device)
    values.index_add_(0, inverse.reshape(-1), g)  # (5)
    if layer.padding_idx is not None:
        real = used % height != layer.padding_idx
        used, values = used[real], values[real]
    return Sparse(used // height, used % height, values, records, height, scale)


def _cheaper(outer: Outer) -> PerSample:
    """Write the gradients down now if that is faster and not much larger than what they are made of."""
    positions, d, p = outer.sizes
    kept = positions * (d + p)
    if positions == 1 or _FEW * kept <= d * p or (outer.records * d * p > _SMALL and kept < d * p):
        return outer
    return _written(outer.factors, outer.records, 1, outer.sizes, outer.scale)


def _written(
    factors: Callable[[slice], tuple[torch.Tensor, torch.Tensor]],
    records: int,
    groups: int,
    sizes: tuple[int, int, int],
    scale: float,
) -> Dense:
    """Return the gradients of a weight of `groups` groups, each of `sizes`, written down."""
    positions, d, p = sizes
    step, rows = max(1, _UNFOLDED // (positions * d * groups)), None
    for start in range(0, records, step):
        a, g = factors(slice(start, start + step))
        if rows is None:
            rows = a.new_empty(records * groups, p, d)
        torch.bmm(g.mT, a, out=rows[start * groups : (start + step) * groups])  # (1)
    if rows is None:
        raise PrivacyError("expected the gradients of at least one record")
    return Dense(rows.view(records, -1), scale)


def _gram_norms(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Return the norms of g_i^T a_i from Gram matrices, never below the true ones, shape (records,), float64.

    Where the positions' gradients cancel, so do the terms here, and rounding could make the norm too small: float64,
    and a bound of its error added, sum of terms times (d + p + T^2 + 4) units in the last place.
    """
    a, g = _wide(a), _wide(g)
    positions, d, p = a.shape[1], a.shape[2], g.shape[2]
    squares = (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2)).clamp(min=0.0)  # (3)
    longest = (torch.linalg.vector_norm(a, dim=2) * torch.linalg.vector_norm(g, dim=2)).sum(1)
    bound: torch.Tensor = (d + p + positions**2 + 4) * 2.0**-53 * longest.square()
    return (squares + bound).sqrt()


def _product_norms(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Return the norms of g_i^T a_i, not below the true ones for all that float32 rounds in the products."""
    longest = (torch.linalg.vector_norm(a, dim=2) * torch.linalg.vector_norm(g, dim=2)).sum(1)
    return norms(torch.bmm(g.mT, a).flatten(1)) + a.shape[1] * 2.0**-24 * _wide(longest)  # (1)


def norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the norm of each row, shape (rows,), float64.

    torch adds the squares of a row one after the other in the row's own precision: for 4 million equal float32
    columns its norm is 0.2 % too small, and the clipped row longer than C. Short blocks lose next to nothing.
    """
    count, columns = rows.shape
    whole = columns // BLOCK * BLOCK
    parts = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)
    if whole:
        blocks = torch.linalg.vector_norm(rows[:, :whole].reshape(count, -1, BLOCK), dim=2)
        parts = torch.cat([blocks, parts], dim=1)
    result: torch.Tensor = torch.linalg.vector_norm(_wide(parts), dim=1)
    return result


def weighted_sum(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return weights @ rows, shape (columns,), in float64.

    In float32 the sums of neighbouring batches may differ by more than the sensitivity (Casacuberta et al.
    2022, "Widespread underestimation of sensitivity"); in float64 the excess is about 1e-13. A block at a time keeps
    the wider copy small.
    """
    if rows.device.type not in ("cpu", "cuda"):
        rows = rows.cpu()
    columns = _COLUMNS if rows.device.type == "cpu" else 1 << 20
    count = max(_WIDE // max(min(columns, rows.shape[1]), 1), 1) if rows.device.type == "cpu" else len(rows)
    weights = weights.to(rows.device, torch.float64)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], columns):
        for first in range(0, len(rows), count):
            block = rows[first : first + count, start : start + columns].double()
            total[start : start + columns].addmv_(block.T, weights[first : first + count])
    return total


def _zeroed(rows: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """Return `rows` with zeros in those that are `gone`: a factor of 0 would leave NaN where they are not finite."""
    return rows.masked_fill(gone.to(rows.device).view(-1, *[1] * (rows.ndim - 1)), 0.0)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _wide(t: torch.Tensor) -> torch.Tensor:
    """Return `t` in float64, on the CPU if its device has none."""
    return t.double() if t.device.type in ("cpu", "cuda") else t.cpu().double()


def single(t: torch.Tensor) -> torch.Tensor:
    """Return `t`, in float32 if it has fewer bits."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
