"""The rows of a batch: which tensors have one for each record, and the batch with other records in some of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from choral import nested
from choral.privacy.errors import UnsupportedModelError
from choral.privacy.record_independence import forward_probes

_SPLITS = 4
_FEW = 8  # records whose gradients are looked at


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors with a first dimension in `value`, whatever they are nested in."""
    yield from (t for t in nested.tensors(value) if t.ndim > 0)


def changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return `value` with `change` applied to each of its :func:`tensors`."""
    return nested.map_tensors(value, lambda t: change(t) if t.ndim > 0 else t)


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


def same_random_numbers(value: Any, model: nn.Module | None = None) -> AbstractContextManager[None]:
    """Leave random numbers as they were, also on the GPUs that hold the tensors in `value`; see forward_probes."""
    return forward_probes.same_random_numbers(
        sorted({t.device.index for t in tensors(value) if t.device.type == "cuda"}), model
    )


def run(
    forward: Callable[..., Any], args: Any, kwargs: Any, take: torch.Tensor, rows: int, *, graph: bool = False
) -> Any:
    """Return what `forward` makes of the records `take`; random numbers stay as they were.

    rows: how many records `args` and `kwargs` hold. graph: with a graph for gradients, as in training.
    """
    model = forward if isinstance(forward, nn.Module) else None
    with same_random_numbers((args, kwargs), model), torch.set_grad_enabled(graph):
        return forward(*taken(args, take, rows), **taken(kwargs, take, rows))


def taken(value: Any, take: torch.Tensor, rows: int) -> Any:
    """Return copies of the tensors in `value`, of the records `take` where they have one row for each."""

    def picked(t: torch.Tensor) -> torch.Tensor:
        return t.detach()[take.to(t.device)] if len(t) == rows else t.detach().clone()

    return changed(value, picked)


def few(args: Any, kwargs: Any, rows: int) -> torch.Tensor:
    """Return which records to look at where not all can be: the first, and those that differ from it before others."""
    differs = torch.zeros(rows, dtype=torch.bool)
    for t in tensors((args, kwargs)):
        if len(t) == rows and t.numel() > 0:
            differs |= (t != t[:1]).reshape(rows, -1).any(1).cpu()
    order = torch.argsort((~differs[1:]).int(), stable=True) + 1
    return torch.cat([torch.zeros(1, dtype=torch.int64), order])[:_FEW].sort().values


def splits(rows: int) -> Iterator[torch.Tensor]:
    """Yield which of `rows` records to keep, each split both ways round."""
    ranks = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    for bit in range(min(_SPLITS, (rows - 1).bit_length())):
        kept = (ranks >> bit) & 1 == 1
        yield kept
        yield ~kept
