"""Does a model treat the records of a batch one by one? Found out on real batches, in the mode it trains in.

If a record's output depends on other records, then so does its gradient, and clipping no longer bounds what one
record changes. Two tests look for such a dependence, for several splits of the batch into kept and other records
(up to 16 records every pair of them is split; above, four random splits, each way round):

- by value: with the other records replaced by copies of kept ones, and the random numbers the same, what goes into and
  out of every trainable layer, and the model's outputs, must not change for the kept ones. Sees what no gradient passes
  through. The same batch must give the same twice, and no plain attribute of the model may follow the records.
- by gradient, on a few records: what comes out of the model and goes into and out of each trainable layer for kept ones
  must have no gradient in the other records' rows of float inputs and of those layers.

Both are made with the weights as they are and with all of them moved away from zero, and answer for which points, of
those that are compared, they could have failed: where a record's own row changes with the record. What was not such a
point is looked at again once its rows differ. Nothing is said about a dependence that starts later at such a point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from choral.privacy.errors import UnsupportedModelError
from choral.privacy.record_independence import module_state
from choral.privacy.record_independence.batch_rows import changed, few, same_random_numbers, splits, taken, tensors
from choral.privacy.record_independence.forward_probes import Point, moved, reseed, shaken, sketch, watched
from choral.privacy.record_independence.unsupported_calls import refuse_bent

_Found = TypeVar("_Found")

_SEEDS = 16  # random numbers with which they are looked at


class PointSketch(NamedTuple):
    """Sketches of a point's tensors, side by side, and their shapes, which may follow the longest record."""

    sketch: torch.Tensor
    shapes: tuple[torch.Size, ...]


@dataclass(frozen=True)
class CheckedForward:
    """What is looked at: `forward` of `args` and `kwargs`, with `rows` records, and the trainable `layers` in it."""

    model: nn.Module
    layers: Mapping[str, nn.Module]
    forward: Callable[..., Any]
    args: Any
    kwargs: Any
    rows: int
    step: bool = False  # `forward` returns a loss
    tell: Callable[[int], None] = lambda _: None  # is told how many records come next

    def look(self, take: torch.Tensor, seed: int | None = None, *, graph: bool = False) -> dict[Point, PointSketch]:
        """Return what is compared, for the records `take`; of other random numbers if there is a `seed`."""
        found: dict[Point, PointSketch] = {}

        def see(point: Point, t: torch.Tensor) -> None:
            old, seen = found.get(point), sketch(t, self.rows)
            found[point] = PointSketch(
                torch.cat([old.sketch, seen], 1) if old else seen, (*(old.shapes if old else ()), t.shape)
            )

        self.tell(self.rows)
        with watched(self.layers, self.rows, see), same_random_numbers((self.args, self.kwargs), self.model):
            if seed is not None:
                reseed(seed, self.model)
            with torch.set_grad_enabled(graph):
                output = self.forward(*taken(self.args, take, self.rows), **taken(self.kwargs, take, self.rows))
        for place, t in enumerate(_by_record(output, self.rows)):
            found["", "out", place, 0] = PointSketch(sketch(t, self.rows), ())  # which may have no other shape
        return found

    def moved(self) -> CheckedForward:
        """Return the same with float inputs that are in general position."""

        def change(t: torch.Tensor) -> torch.Tensor:
            return moved(t) if len(t) == self.rows else t

        return replace(self, args=changed(self.args, change), kwargs=changed(self.kwargs, change))


def same(a: Any, b: Any, rows: int) -> bool:
    """Return whether two outputs of a model for `rows` records, or two losses, are equal, but for rounding."""
    x, y = ([t] if isinstance(t, torch.Tensor) and t.ndim == 0 else _by_record(t, rows) for t in (a, b))
    return len(x) == len(y) and all(map(_close, x, y))


def refuse_mixing(subject: CheckedForward) -> tuple[set[Point], set[Point]]:
    """Raise UnsupportedModelError if a record notices which others are there.

    Returns the points at which that could have been seen, and all points that were compared. Both tests, with the
    weights as they are and moved; see above. Random numbers and attributes are left as they were.
    """
    before = module_state.kept(subject.model)
    try:
        could, seen = _refuse_by_value(subject)
        with shaken(subject.model):
            could |= (_in_general(subject, _refuse_by_value) or _refuse_by_value(subject))[0]
            _in_general(subject, _refuse_by_few_gradients)
            _in_general(subject, _refuse_by_chance)
        return could, seen
    finally:
        module_state.take_away(subject.model, before)


def refuse_again(subject: CheckedForward) -> None:
    """Look once more, at some records alone, and by value: raise UnsupportedModelError if they mix by now."""
    before = module_state.kept(subject.model)
    try:
        with shaken(subject.model):
            _refuse_by_chance(subject, _SEEDS // 2)
    finally:
        module_state.take_away(subject.model, before)


def _in_general(subject: CheckedForward, test: Callable[[CheckedForward], _Found]) -> _Found | None:
    """Return what `test` finds of the moved inputs, of a model; nothing where the model does not take them."""
    if subject.step:
        return test(subject)
    try:
        return test(subject.moved())
    except UnsupportedModelError:
        raise
    except Exception:  # whatever it is: the inputs as they are were looked at, and are looked at again
        return None


def _refuse_by_value(subject: CheckedForward) -> tuple[set[Point], set[Point]]:
    """Put other records in place of some; raise UnsupportedModelError if the rest notice, or anything is kept."""
    rows, model = subject.rows, subject.model
    as_it_is, before = torch.arange(rows), module_state.kept(model)
    whole, after = subject.look(as_it_is), module_state.kept(model)
    module_state.put_back(before, counts_only=True)
    again = subject.look(as_it_is)
    module_state.take_away(model, before)
    if whole.keys() != again.keys() or not all(_close(whole[point].sketch, again[point].sketch) for point in whole):
        raise UnsupportedModelError(
            "the same batch, with the same random numbers, gives something else the second time: the model keeps "
            "something of the batches that it has seen, or its randomness cannot be repeated",
            hint="Keep nothing of the records between forward passes (memory banks, running means); draw random "
            "numbers from torch's, numpy's or Python's own generators.",
        )
    could: set[Point] = set()
    for kept in splits(rows):
        other = subject.look(_replaced(kept))
        _refuse_followers(after, module_state.kept(model))
        module_state.take_away(model, before)
        for point in whole.keys() & other.keys():
            if whole[point].shapes != other[point].shapes:
                continue
            a, b = whole[point].sketch, other[point].sketch
            here = kept.to(a.device)
            if not _close(a[here], b[here]):
                raise _mixes()
            if point not in could:
                numbers = ~here & (a.isfinite() & b.isfinite()).all(1)
                if not _close(a[numbers], b[numbers]):
                    could.add(point)
    return could, set(whole)


def _replaced(kept: torch.Tensor) -> torch.Tensor:
    """Return all records, those that are not `kept` replaced by copies of kept ones."""
    (mine,) = torch.nonzero(kept, as_tuple=True)
    take = torch.arange(len(kept))
    take[~kept] = mine[torch.arange(len(kept) - len(mine)) % len(mine)]
    return take


def _refuse_by_chance(subject: CheckedForward, seeds: int = _SEEDS) -> None:
    """Look at some records by value, with a graph as in training, and with other random numbers each time.

    A model that mixes by chance (mixup within it) may not do so with the random numbers of one pass. Nothing is found
    in a model that takes none but whole batches.
    """
    take = few(subject.args, subject.kwargs, subject.rows)
    args, kwargs = taken((subject.args, subject.kwargs), take, subject.rows)
    part, each = replace(subject, args=args, kwargs=kwargs, rows=len(take)), list(splits(len(take)))
    counts = module_state.kept(subject.model)
    for seed in range(seeds):
        kept = each[seed % len(each)]
        try:
            whole = part.look(torch.arange(len(take)), seed, graph=True)
            module_state.put_back(counts, counts_only=True)
            other = part.look(_replaced(kept), seed, graph=True)
            module_state.put_back(counts, counts_only=True)
        except Exception:  # whatever it is: the batch as it is was looked at
            return
        for point in whole.keys() & other.keys():
            if whole[point].shapes == other[point].shapes:
                a, b = whole[point].sketch, other[point].sketch
                if not _close(a[kept.to(a.device)], b[kept.to(b.device)]):
                    raise _mixes()


def _refuse_followers(
    after: dict[str, module_state.SavedAttribute], after_others: dict[str, module_state.SavedAttribute]
) -> None:
    for name in module_state.differing(after, after_others):
        raise UnsupportedModelError(
            f"attribute {name} of the model holds something of the records after a forward pass, which other batches "
            "could use, and a copy of the model would publish",
            hint="Keep nothing of the records in the model: no memory bank, no class centres, no statistics, no last "
            "outputs. Return what the loop needs; log with self.log.",
        )


def _refuse_by_few_gradients(subject: CheckedForward) -> None:
    """Look at the gradients of some records, which differ if any do; raise UnsupportedModelError if they mix."""
    take = few(subject.args, subject.kwargs, subject.rows)
    try:
        _refuse_by_gradients(subject, take)
    except UnsupportedModelError:
        raise
    except Exception:  # a model that takes none but whole batches
        _refuse_by_gradients(subject, torch.arange(subject.rows))


def _refuse_by_gradients(subject: CheckedForward, take: torch.Tensor) -> None:
    inputs: list[torch.Tensor] = []
    layers: list[torch.Tensor] = []

    def source(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point() or subject.step:
            return t
        inputs.append(t.requires_grad_())
        return inputs[-1].clone()  # which the model may change in place

    subject.tell(len(take))
    part = changed(taken((subject.args, subject.kwargs), take, subject.rows), source)
    with (
        same_random_numbers(part, subject.model),
        watched(subject.layers, len(take), lambda _, t: layers.append(t) if t.is_floating_point() else None),
    ):
        output = subject.forward(*part[0], **part[1])
    refuse_by_gradient(output, layers, inputs, len(take), layers_only=subject.step)


def varying(
    points: set[Point], layers: Mapping[str, nn.Module], forward: Callable[[], Any], rows: int
) -> tuple[Any, set[Point]]:
    """Return what `forward` returns, and at which of `points` the rows of its records differed."""
    found: set[Point] = set()

    def see(point: Point, t: torch.Tensor) -> None:
        if point in points and point not in found:
            each = t.detach().reshape(rows, -1)
            if not _close(each, each[:1].expand_as(each)):
                found.add(point)

    names = {name for name, *_ in points}
    with watched({name: layer for name, layer in layers.items() if name in names}, rows, see):
        output = forward()
    for place, t in enumerate(_by_record(output, rows)):
        see(("", "out", place, 0), t)
    return output, found


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

    def backward(kept: torch.Tensor, factor: float = 1.0) -> tuple[torch.Tensor | None, ...]:
        mine = [(kept & valid).to(t.device) for t in targets]
        ends, starts = (
            [t[m] for t, m in zip(targets, mine, strict=True)],
            [factor * w[m] for w, m in zip(weights, mine, strict=True)],
        )
        return torch.autograd.grad(ends, sources, starts, retain_graph=True, allow_unused=True)

    for place, kept in enumerate(splits(rows)):
        gradients = backward(kept)
        if place == 0:
            refuse_bent(gradients, backward(~kept), backward(torch.ones_like(kept), 2.0))
        for gradient in (g.detach().reshape(rows, -1) for g in gradients if g is not None):
            size = torch.nan_to_num(gradient.abs(), nan=0.0, posinf=0.0)
            if bool(size[~kept.to(size.device)].max() > 1e-6 * size.max()):
                raise _mixes()
    return True


def _by_record(output: Any, rows: int) -> list[torch.Tensor]:
    """Return the float tensors of `output` with one row per record, or failing that a fixed number, as (rows, -1)."""
    floats = [t for t in tensors(output) if t.is_floating_point() and t.numel() > 0]
    found = [t for t in floats if len(t) == rows] or [t for t in floats if len(t) % rows == 0]
    return [t.reshape(rows, -1) for t in found]


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if torch.equal(a, b):  # as nearly all are
        return True
    if not a.is_floating_point():
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
