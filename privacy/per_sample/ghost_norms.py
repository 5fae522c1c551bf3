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
  the Gram matrices (Goodfellow 2015; Li et al. 2022), T^2 (p + d) multiplications, with a bound of their rounding:

    |G_i| = |a_i| |g_i|  where T = 1,                                                                              (2)
    |G_i|^2 = sum_{t, s} <a_it, a_is> <g_it, g_is> = <a_i a_i^T, g_i g_i^T>,                                       (3)
    sum_i w_i G_i = [w_1 g_1; w_2 g_2; ...]^T [a_1; a_2; ...].                                                     (4)

A convolution is (1) with what each position of its output sees for a_it; an embedding is (1), transposed, with unit
vectors for a_it, so that row v of its gradient is

    sum over t with token_it = v of g_it.                                                                          (5)

Measured (`python benchmarks/dp_step.py`, its lines "ghost"): Outer is the faster where it keeps up to a fifth of
Dense's numbers, 5 T (p + d) <= p d, and Dense beyond, up to 3.5 times; there Outer is taken for memory alone.
The sums are float64 whichever way is taken: see :func:`weighted_sum`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from choral.privacy.errors import PrivacyError
from choral.privacy.full_precision import exact_float32

BLOCK = 1 << 10  # columns whose squares are added in float32
_WIDE, _COLUMNS = 1 << 17, 1 << 13  # numbers, and columns, widened to float64 at once: fit the second-level cache
_UNFOLDED = 1 << 18  # numbers of unfolded images made at once, likewise
_WORK = 1 << 21  # numbers of products or Gram matrices made at once
FLOAT32_POSITIONS = 64  # so many at most have Gram matrices of float32 products
_SHORT = 1 << 13  # positions times columns whose products are added in float32
_FEW = 5  # times fewer numbers in factors than in gradients: from there on factors are faster, too
_SMALL = 1 << 21  # per-sample gradients, in numbers, that are written down where that is faster: 8 MiB


Factors = Callable[[slice], tuple[torch.Tensor, torch.Tensor]]  # of some of the records


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
class Joined:
    """Gradients of some records, then of others: where they are made so, to join them would be one more copy."""

    parts: list[PerSample]

    @property
    def records(self) -> int:
        return sum(part.records for part in self.parts)

    def norms(self) -> torch.Tensor:
        return torch.cat([part.norms() for part in self.parts])

    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        first, *others = zip(self.parts, self._split(weights), strict=True)
        total = first[0].weighted_sum(first[1])
        for part, some in others:
            total += part.weighted_sum(some)
        return total

    def dense(self, first: int | None = None) -> torch.Tensor:
        left, rows = self.records if first is None else first, []
        for part in self.parts:
            rows.append(part.dense(max(min(left, part.records), 0)))
            left -= part.records
        return torch.cat(rows)

    def without(self, gone: torch.Tensor) -> PerSample:
        return Joined([part.without(some) for part, some in zip(self.parts, self._split(gone), strict=True)])

    def _split(self, of_records: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(of_records, [part.records for part in self.parts])


@dataclass(frozen=True)
class Outer:
    """Gradients g_i^T a_i of a weight of shape (p, d), times `scale`.

    `factors` gives a, shape (m, T, d), and g, shape (m, T, p), of m records; `sizes` is (T, d, p). `grams` gives the
    Gram matrices of both, as :func:`gram` does, where there is a shorter way to them.
    """

    factors: Factors
    records: int
    sizes: tuple[int, int, int]
    scale: float = 1.0
    grams: Factors | None = None

    @property
    def by_grams(self) -> bool:
        """Whether Gram matrices are the shorter way to norms; what they are made of takes longer in float64."""
        positions, d, p = self.sizes
        return positions > 1 and (2 if positions <= FLOAT32_POSITIONS else 3) * positions * (d + p) < d * p

    def norms(self) -> torch.Tensor:
        positions, d, p = self.sizes
        if self.by_grams:
            parts = self._parts(2 * positions**2 + positions * (d + p))
            found = [_gram_norms((self.grams or self._grams)(part), self.sizes) for part in parts]
        elif positions == 1:  # (2)
            found = [norms(a.flatten(1)) * norms(g.flatten(1)) for a, g in map(self.factors, self._parts(d + p))]
        else:
            found = [_product_norms(a, g) for a, g in map(self.factors, self._parts(d * p))]
        return _joined(found) * self.scale

    def _grams(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        a, g = self.factors(part)
        return gram(a), gram(g)

    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        positions, d, p = self.sizes
        total: torch.Tensor | None = None
        for part in self._parts(4 * positions * (d + p)):  # wider copies stay small beside the factors
            a, g = self.factors(part)
            few, many = (g, a) if p <= d else (a, g)  # the sum with fewer rows is the faster, and the fewer to weigh
            few = _scaled(few, weights[part] * self.scale).flatten(0, 1).T
            many = _wide(many).flatten(0, 1)
            total = few @ many if total is None else total.addmm_(few, many)  # (4)
        if total is None:
            raise PrivacyError("expected the gradients of at least one record")
        return (total if p <= d else total.T).reshape(-1)

    def dense(self, first: int | None = None) -> torch.Tensor:
        a, g = self.factors(slice(first))
        return torch.bmm(g.mT, a).flatten(1) * self.scale  # (1)

    def without(self, gone: torch.Tensor) -> PerSample:
        def factors(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            a, g = self.factors(part)
            return _zeroed(a, gone[part]), _zeroed(g, gone[part])

        return Outer(factors, self.records, self.sizes, self.scale)

    def _parts(self, work: int) -> Iterator[slice]:
        """Yield some records at a time, where `work` is how many numbers one record takes."""
        step = max(1, _WORK // max(work, 1))
        for start in range(0, self.records, step):
            yield slice(start, min(start + step, self.records))


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


def keeps_factors(records: int, sizes: tuple[int, int, int]) -> bool:
    """Return whether to keep what gradients of these `sizes` are made of, as faster or much smaller than they are."""
    positions, d, p = sizes
    kept = positions * (d + p)
    return positions == 1 or _FEW * kept <= d * p or (records * d * p > _SMALL and kept < d * p)


def written(
    factors: Factors,
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


def gram(rows: torch.Tensor) -> torch.Tensor:
    """Return the Gram matrices <row_t, row_s>, shape (records, T, T), float64, of `rows`, shape (records, T, d).

    With up to FLOAT32_POSITIONS positions, a few columns at a time in the rows' own precision: see `_gram_norms`. In
    float64 where torch was told to round float32.
    """
    positions = rows.shape[1]
    if rows.dtype is torch.float64 or positions > FLOAT32_POSITIONS or not exact_float32(rows.device):
        rows = _wide(rows)
        return torch.bmm(rows, rows.mT)
    total: torch.Tensor | None = None
    for part in torch.split(rows, _SHORT // positions, 2):
        product = _wide(torch.bmm(part, part.mT))
        total = product if total is None else total.add_(product)
    if total is None:
        raise PrivacyError("expected rows of one column at least")
    return total


def _gram_norms(grams: tuple[torch.Tensor, torch.Tensor], sizes: tuple[int, int, int]) -> torch.Tensor:
    """Return the norms of g_i^T a_i from Gram matrices, never below the true ones, shape (records,), float64.

    Where the positions' gradients cancel, so do the terms of (3), and rounding could make the norm too small. So a
    bound of its error is added: an inner product of which m columns at a time are added in float32, u = 2^-24, is off
    by m u (1 + m u) times the lengths of its rows at most, and by 2^-126 for each column where numbers are too small to
    be written down. Both matrices together, and the sum over T^2 terms in float64, make (2 m + 8) u + T^2 2^-53 of

        (sum_t |a_it| |g_it|)^2 <= T |G_i|^2  where the positions' gradients are orthogonal,

    and m T <= 2^13 keeps what this adds to the norm of such a record below 6e-4 of it; of float64, m = 0.
    """
    positions, d, p = sizes
    squares = (grams[0] * grams[1]).sum((1, 2)).clamp(min=0.0)  # (3)
    a, g = (of.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt() for of in grams)
    longest = (a * g).sum(1).square()
    columns = _SHORT // positions if positions <= FLOAT32_POSITIONS else 0
    error = (min(columns, d) + min(columns, p) + 8) * 2.0**-24 if columns else (d + p + 4) * 2.0**-53
    tiny = 2.0**-126 * (d * g.sum(1).square() + p * a.sum(1).square())
    result: torch.Tensor = (squares + (error + positions**2 * 2.0**-53) * longest + tiny).sqrt()
    return result


def _product_norms(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Return the norms of g_i^T a_i, not below the true ones for all that float32 rounds in the products."""
    longest = (torch.linalg.vector_norm(a, dim=2) * torch.linalg.vector_norm(g, dim=2)).sum(1)
    if not exact_float32(a.device):
        a, g = _wide(a), _wide(g)
    return norms(torch.bmm(g.mT, a).flatten(1)) + a.shape[1] * 2.0**-24 * _wide(longest)  # (1)


def norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the norm of each row, shape (rows,), float64.

    torch adds the squares of a row one after the other in the row's own precision: for 4 million equal float32
    columns its norm is 0.2 % too small, and the clipped row longer than C. Short blocks lose next to nothing.
    """
    count, columns = rows.shape
    if columns <= BLOCK:
        short: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
        return _wide(short)
    whole = columns // BLOCK * BLOCK
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)
    blocks = torch.linalg.vector_norm(rows[:, :whole].reshape(count, -1, BLOCK), dim=2)
    parts = torch.cat([blocks, rest], dim=1)
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
    if len(rows) <= count and rows.shape[1] <= columns:
        return weights @ rows.double()
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    wide = total.new_empty(min(count, len(rows)) * min(columns, rows.shape[1]))
    for start in range(0, rows.shape[1], columns):
        for first in range(0, len(rows), count):
            block = rows[first : first + count, start : start + columns]
            block = wide[: block.numel()].view(block.shape).copy_(block)
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


def _scaled(t: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return `t`, shape (records, T, n), float64, each record times its weight."""
    wide = _wide(t)
    weights = weights.to(wide.device)[:, None, None]
    return wide * weights if wide is t else wide.mul_(weights)


def single(t: torch.Tensor) -> torch.Tensor:
    """Return `t`, in float32 if it has fewer bits."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
