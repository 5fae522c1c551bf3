"""Embeddings of what is the same for all records, such as positions: found, and given a row for each record.

GPT's `wpe(torch.arange(T))` and BERT's `position_embeddings(ids of shape (1, T))` have no dimension for records; their
output meets it when it is added to the tokens'. By then the gradients of the records are summed. Expanded to the batch
before, shape (records, T, width), the output keeps a row of gradient for each record, and the sum is what it was.

Which embeddings these are is not read off a shape, which may by chance be the batch's, but found out by running the
model with one record more. That the model computes the same with expanded outputs is tested on the first batch; that no
record's output depends on another record's row of them, by :mod:`choral.privacy.record_independence.batch_mixing`, to
which they are layers like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from choral.privacy.record_independence import batch_mixing, batch_rows
from choral.privacy.record_independence.forward_probes import shaken


@dataclass(frozen=True)
class SharedInput:
    """How inputs of an embedding that are the same for all records look: `dims`, of which the first is one or not."""

    dims: int
    leading: bool

    def fits(self, a: torch.Tensor) -> bool:
        """Return whether an input looks like this."""
        return a.ndim == self.dims and (not self.leading or len(a) == 1)

    def expanded(self, t: torch.Tensor, records: int) -> torch.Tensor:
        """Return input or output `t` with a row for each record."""
        return t.expand(records, *(t.shape[1:] if self.leading else t.shape))


Forward = Callable[..., Any]


def shared_embeddings(
    model: nn.Module, forward: Forward, args: Any, kwargs: Any, rows: int
) -> dict[nn.Module, SharedInput]:
    """Return the embeddings of `model` whose inputs stay as they are when `forward` is given one record more.

    rows: the records in `args` and `kwargs`. Nothing is found in a model that does not run with one record more.
    """
    layers: list[nn.Module] = [m for m in model.modules() if type(m) is nn.Embedding]
    if not layers or not any(len(t) == rows for t in batch_rows.tensors((args, kwargs))):
        return {}
    take = torch.arange(rows)
    before = _inputs(forward, layers, args, kwargs, take, rows)
    after = _inputs(forward, layers, args, kwargs, torch.cat([take, take[:1]]), rows)
    if before is None or after is None:
        return {}
    found: dict[nn.Module, SharedInput] = {}
    for layer in layers:
        kinds = {SharedInput(len(shape), len(shape) > 1 and shape[0] == 1) for shape in before[layer]}
        if before[layer] == after[layer] and len(kinds) == 1:
            found[layer] = kinds.pop()
    return found


def _inputs(
    forward: Forward, layers: list[nn.Module], args: Any, kwargs: Any, take: torch.Tensor, rows: int
) -> dict[nn.Module, list[torch.Size]] | None:
    """Return the shapes that each layer is given when `forward` is given the records `take`; None if it fails."""
    shapes: dict[nn.Module, list[torch.Size]] = {layer: [] for layer in layers}

    def note(layer: nn.Module, given: Any, named: dict[str, Any]) -> None:
        shapes[layer].append(next(iter((*given, *named.values()))).shape)

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        batch_rows.run(forward, args, kwargs, take, rows)
    except Exception:  # whatever it is: the model is then looked at as it is, and refused as before
        return None
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def computes_the_same(
    model: nn.Module, forward: Forward, args: Any, kwargs: Any, rows: int, mended: Callable[[bool], None]
) -> bool:
    """Compare what `forward` returns, `model` in evaluation mode, before `mended(True)` and before `mended(False)`.

    In training mode, dropout behind the embedding draws one mask for all records before, and one for each after.
    """
    take = torch.arange(rows)
    with evaluating(model), shaken(model):  # behind a head that is still zero, anything would be the same
        plain, again = (batch_rows.run(forward, args, kwargs, take, rows) for _ in range(2))
        mended(True)
        try:
            other = batch_rows.run(forward, args, kwargs, take, rows)
        except Exception:  # expanded, it does not fit what the model does with it
            return False
        finally:
            mended(False)
    return not batch_mixing.same(plain, again, rows) or batch_mixing.same(plain, other, rows)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode for a while."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
