"""Does a model treat the records of a batch one by one? Found out on a real batch, in the mode it trains in.

If a record's output depends on other records, then so does its gradient, and clipping no longer bounds what one
record changes. Two tests look for such a dependence, for several splits of the batch into kept and other records
(up to 16 records every pair of them is split; above, four random splits, each way round):

- by value: with the other records replaced by copies of kept ones, and torch's random numbers the same, the
  outputs of the kept ones must not change. Sees what no gradient passes through. Left out if the outputs differ
  even for the same input.
- by gradient: the model's outputs, and what goes into and out of each trainable layer, of the kept records must have
  no gradient in the other records' rows of float inputs and of those layers. Needs no repetition, and sees
  through dropout.

Both see the dependence that there is on this batch, not one that starts later.

What computes the loss itself from a batch (a training step, rather than a model) is held to more, in evaluation mode:
for each split, the loss must be the mean of the two parts' losses, weighted by their sizes. Sums over records, means
over the tokens of a batch and weights that are divided by their sum are not, and neither are losses that mix records.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from choral.privacy.errors import UnsupportedModelError

_SPLITS = 4
_RELATIVE = 1e-4  # rounding of a float32 loss


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors with a first dimension in `value`: a tensor, or nested mappings, lists and tuples."""
    if isinstance(value, torch.Tensor):
        if value.ndim > 0:
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, list | tuple) and not isinstance(value, PackedSequence):
        for part in value:
            yield from tensors(part)


def changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return `value` with `change` applied to each of its :func:`tensors`."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.ndim > 0 else value
    if isinstance(value, MutableMapping):
        result = copy.copy(value)
        for key, part in value.items():
            result[key] = changed(part, change)
        return result
    if isinstance(value, list | tuple) and not isinstance(value, PackedSequence):
        parts = [changed(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def rows_of(inputs: Any, drawn: int | None) -> int:
    """Return the number of records in a model's `inputs`: `drawn` if an input has as many rows, else the first's rows.

    Raises: UnsupportedModelError (no tensor among the inputs, and nothing was drawn).
    """
    lengths = [len(t) for t in tensors(inputs)]
    if drawn is not None and (drawn in lengths or not lengths):
        return drawn
    if not lengths:
        raise UnsupportedModelError(
            "the model's inputs hold no tensor with one row per record",
            hint="Pass the batch as tensors, in lists, tuples or mappings if need be.",
        )
    return lengths[0]


def same_random_numbers(value: Any) -> AbstractContextManager[None]:
    """Leave torch's random numbers as they were, on the CPU and on the GPUs that hold the tensors in `value`."""
    return torch.random.fork_rng(sorted({t.device.index for t in tensors(value) if t.device.type == "cuda"}))


def run(forward: Callable[..., Any], args: Any, kwargs: Any, take: torch.Tensor, rows: int) -> Any:
    """Return what `forward` makes of the records `take`, without gradients; torch's random numbers stay as they were.

    rows: how many records `args` and `kwargs` hold.
    """

    def picked(t: torch.Tensor) -> torch.Tensor:
        return t.detach()[take.to(t.device)] if len(t) == rows else t.detach().clone()

    with same_random_numbers((args, kwargs)), torch.no_grad():
        return forward(*changed(args, picked), **changed(kwargs, picked))


def same(a: Any, b: Any, rows: int) -> bool:
    """Return whether two outputs of a model for `rows` records, or two losses, are equal, but for rounding."""
    x, y = ([t] if isinstance(t, torch.Tensor) and t.ndim == 0 else _by_record(t, rows) for t in (a, b))
    return len(x) == len(y) and all(map(_close, x, y))


def refuse_by_value(forward: Callable[..., Any], args: Any, kwargs: Any, rows: int) -> None:
    """Run `forward` with other records in place of some; raise UnsupportedModelError if the rest notice."""

    def outputs(take: torch.Tensor) -> list[torch.Tensor]:
        return _by_record(run(forward, args, kwargs, take, rows), rows)

    as_it_is = torch.arange(rows)
    whole, again = outputs(as_it_is), outputs(as_it_is)
    if len(whole) != len(again) or not all(map(_close, whole, again)):
        return
    for kept in _splits(rows):
        (mine,) = torch.nonzero(kept, as_tuple=True)
        take = as_it_is.clone()
        take[~kept] = mine[torch.arange(rows - len(mine)) % len(mine)]
        other = outputs(take)
        if len(other) != len(whole) or not all(
            _close(a[kept.to(a.device)], b[kept.to(b.device)]) for a, b in zip(whole, other, strict=True)
        ):
            raise _mixes()


def refuse_inseparable(step: Callable[[Any], torch.Tensor], batch: Any, rows: int) -> bool:
    """Raise UnsupportedModelError unless the loss of a batch is the mean over its records of a loss of each alone.

    step: returns a batch's loss, in evaluation mode now. Returns False if the loss is random, and so proves nothing.
    """

    def loss(take: torch.Tensor, seed: int = 0) -> float:
        def seeded(part: Any) -> torch.Tensor:
            torch.manual_seed(seed)
            return step(part)

        return float(run(seeded, (batch,), {}, take, rows))

    whole = loss(torch.arange(rows))
    if not math.isfinite(whole) or abs(whole - loss(torch.arange(rows), seed=1)) > _RELATIVE * abs(whole):
        return False
    for kept in _splits(rows):
        parts = [torch.nonzero(part)[:, 0] for part in (kept, ~kept)]
        shares = [len(part) / rows * loss(part) for part in parts]
        if not abs(sum(shares) - whole) <= _RELATIVE * sum(map(abs, (*shares, whole))) + 1e-7:
            raise UnsupportedModelError(
                "the loss of a batch is not the mean over its records of a loss of each record alone, so one record "
                "changes the gradients of others",
                hint="Take means, not sums, over records; average over tokens within a record first; do not divide by "
                "what depends on the batch, as class weights and ignore_index do; mix no records.",
            )
    return True


def refuse_by_gradient(
    output: Any, layers: list[torch.Tensor], inputs: list[torch.Tensor], rows: int, *, layers_only: bool = False
) -> bool:
    """Raise UnsupportedModelError if a record's output has a gradient in another record's row.

    output: what the forward pass returned. layers: what went into and out of trainable layers in it. inputs: its
    float inputs, all part of the graph, which is kept. Records whose output is NaN are left out; returns False if
    fewer than two are left, which prove nothing.
    Raises it, too, if nothing in `output` has one row per record, unless that is none's business: `layers_only`.
    """
    layers = [t for t in layers if len(t) == rows and t.requires_grad]
    sources = [*(t for t in inputs if len(t) == rows), *layers]
    results = _by_record(output, rows)
    targets = [t for t in (*results, *(t.reshape(rows, -1) for t in layers)) if t.requires_grad]
    if not (results or layers_only) or not targets or not sources:
        raise UnsupportedModelError(
            f"nothing in the model's output has one row for each of the {rows} records, so it cannot be checked that "
            "it treats them one by one",
            hint="Return a tensor, batch dimension first, and compute the loss from it outside the model.",
        )
    valid = torch.stack([~t.detach().isnan().any(1).cpu() for t in targets]).all(0)
    if int(valid.sum()) < 2:
        return False
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in targets]
    for kept in _splits(rows):
        mine = [(kept & valid).to(t.device) for t in targets]
        ends, starts = (
            [t[m] for t, m in zip(targets, mine, strict=True)],
            [w[m] for w, m in zip(weights, mine, strict=True)],
        )
        gradients = torch.autograd.grad(ends, sources, starts, retain_graph=True, allow_unused=True)
        for gradient in (g.detach().reshape(rows, -1) for g in gradients if g is not None):
            size = torch.nan_to_num(gradient.abs(), nan=0.0, posinf=0.0)
            if bool(size[~kept.to(size.device)].max() > 1e-6 * size.max()):
                raise _mixes()
    return True


def _splits(rows: int) -> Iterator[torch.Tensor]:
    """Yield which of `rows` records to keep, each split both ways round."""
    ranks = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    for bit in range(min(_SPLITS, (rows - 1).bit_length())):
        kept = (ranks >> bit) & 1 == 1
        yield kept
        yield ~kept


def _by_record(output: Any, rows: int) -> list[torch.Tensor]:
    """Return the float tensors of `output` with one row per record, or failing that a fixed number, as (rows, -1)."""
    floats = [t for t in tensors(output) if t.is_floating_point() and t.numel() > 0]
    found = [t for t in floats if len(t) == rows] or [t for t in floats if len(t) % rows == 0]
    return [t.reshape(rows, -1) for t in found]


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    relative = 1e-4 if a.dtype in (torch.float32, torch.float64) else 1e-2
    finite = a[a.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=relative, atol=relative * scale, equal_nan=True)


def _mixes() -> UnsupportedModelError:
    return UnsupportedModelError(
        "the model's output for a record depends on the other records of the batch, so no record has a gradient of "
        "its own",
        hint="Normalise, attend and mix within a record only, never over the batch, which is the first dimension of "
        "all inputs and outputs.",
    )
