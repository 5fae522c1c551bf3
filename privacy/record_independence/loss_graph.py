"""Is the loss of a plain loop the mean over records of a loss of each? Read off its graph, before it goes backward.

The gradient of record i is taken to be B times what reaches its row, for B records in the batch. That is its own only
if the loss is the mean of the records' losses. From the loss down to the model's outputs, where the graph is torch's
own, these are refused:

- class weights and labels that are ignored, in a mean that is divided by the weights or the labels kept;
- sums over records that are not divided by their number, or by what depends on the batch;
- means over parts of records (tokens) of which records have unequal numbers;
- what is no sum over records at all: a root, a logarithm or a square of their mean, a deviation, a maximum, a product
  of records with records.

It is a look at the graph, not a proof: constants that were computed from the batch stand in it like any others.
:mod:`choral.privacy.record_independence.joined_records` takes its second derivatives,
:mod:`choral.privacy.record_independence.unwrapped_parameters` looks for what is trained beside the model. `check_step`
tries the loss itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from choral.privacy.errors import UnsupportedModelError
from choral.privacy.record_independence.joined_records import breaks, crosses
from choral.privacy.record_independence.loss_observers import MOST, nodes_below
from choral.privacy.record_independence.unwrapped_parameters import LEAF as _LEAF
from choral.privacy.record_independence.unwrapped_parameters import refuse_stranger, refuse_strangers

_NLL = ("NllLossBackward0", "NllLoss2DBackward0")
_REDUCED = {
    *(*_NLL, "MseLossBackward0", "SmoothL1LossBackward0", "HuberLossBackward0", "BinaryCrossEntropyBackward0"),
    *("BinaryCrossEntropyWithLogitsBackward0", "SoftMarginLossBackward0", "MultiMarginLossBackward0"),
    *("MultilabelMarginLossBackward0", "KlDivBackward0"),
}
_SUMS, _MEANS = ("SumBackward0", "SumBackward1"), ("MeanBackward0", "MeanBackward1")
_BENT = {
    *("Sqrt", "Rsqrt", "Log", "Log2", "Log10", "Log1P", "Exp", "Expm1", "Pow", "Sigmoid", "Tanh", "Softplus", "Abs"),
    *("LogSigmoid", "Relu", "Clamp", "Reciprocal", "Square", "Sin", "Cos", "Erf", "Gelu", "Silu", "Elu"),
}
_OVER_ALL = {
    *("Std", "Var", "StdMean", "VarMean", "LinalgVectorNorm", "Norm", "Logsumexp", "Max", "Min", "Amax", "Amin"),
    *("Median", "Topk", "Sort", "Prod", "Cumsum", "Softmax", "LogSoftmax", "Kthvalue", "Aminmax"),
}
_GATHERING = ("IndexBackward0", "MaskedSelectBackward0", "IndexSelectBackward0")


@dataclass(frozen=True)
class _Above:
    """What lies between the loss and a node: factors, whether it is bent, and whether records are already joined."""

    factors: tuple[float, ...] = ()
    unknown: bool = False  # factors include one that is not known
    bent: str = ""  # by what function
    joined: str = ""  # by what


class LossGraphCheck:
    """The losses of one training: `look` at each. What changed from batch to batch is remembered."""

    def __init__(self) -> None:
        self._factors: dict[str, tuple[int, float]] = {}
        self._divided: dict[str, tuple[float, ...]] = {}
        self._looks = 0
        self._kinds: set[frozenset[str]] = set()  # of graphs, by the names of their nodes
        self._square: dict[str, set[int]] = {}  # nodes of a row and a column for each record, in batches of which sizes

    def look(
        self,
        losses: Sequence[torch.Tensor],
        ends: set[Any],
        rows: int,
        seeds: Sequence[torch.Tensor | None] | None = None,
        own: Set[torch.Tensor] = frozenset(),
    ) -> None:
        """Raise UnsupportedModelError if the graph of a loss shows that it is no mean over `rows` records.

        ends: the nodes that made the outputs of the model and of its layers, below which nothing is looked at. seeds:
        the gradients given for the losses. own: what the model trains.
        """
        pairs = [
            (loss, seed)
            for loss, seed in zip(losses, seeds or [None] * len(losses), strict=False)
            if any(node in ends for node in nodes_below(loss.grad_fn))
        ]
        seen: set[Any] = set()
        edges: dict[tuple[Any, int], None] = {}  # in the order in which they are found
        waiting: list[tuple[Any, int, _Above]]
        waiting = [(loss.grad_fn, loss.output_nr, self._seeded(loss, seed, rows)) for loss, seed in pairs]
        while waiting and len(seen) < MOST:
            node, output, above = waiting.pop()
            if node in ends and node is not None:
                edges[node, output] = None
            if node is None or node in ends or (node, above) in seen:
                continue
            seen.add((node, above))
            if node.name() == _LEAF:
                refuse_stranger(node.variable, own, rows)
            below = self._judged(node, above, rows)
            waiting += [(child, number, below) for child, number in node.next_functions]
        self._refuse_square([node for node, _ in seen], rows)
        kind = frozenset(node.name() for node, _ in seen)
        self._looks += 1
        if edges and (self._looks & (self._looks - 1) == 0 or kind not in self._kinds):
            self._kinds.add(kind)
            refuse_strangers([loss for loss, _ in pairs], own)
            if crosses(pairs, list(edges), rows) or breaks({node: None for node, _ in seen}, list(edges), rows):
                raise _refused("what several records give together")

    def _seeded(self, loss: torch.Tensor, seed: torch.Tensor | None, rows: int) -> _Above:
        """Judge the gradient that `backward` was given for a loss."""
        if seed is None:
            return _Above()
        factor = float(seed.reshape(-1)[0]) if seed.numel() else 1.0
        if bool((seed != factor).any()) or (loss.numel() == 1 and factor != 1.0):
            raise _refused("more than loss.backward() is given: backward(gradient) weighs the records")
        if loss.numel() == 1:
            return _Above()
        above = _Above(factors=(factor,))
        if not _divides(factor, rows):
            self._refuse_sum("backward", above, rows)
        return replace(above, joined="sum")

    def _refuse_square(self, nodes: Sequence[Any], rows: int) -> None:
        """Refuse what has a row and a column for each record, in batches of three sizes: that is no chance."""
        found = {node.name() for node in nodes if sum(size == rows for size in _shape(node)) > 1}
        self._square = {name: self._square.get(name, set()) | {rows} for name in found}
        if any(len(sizes) > 2 for sizes in self._square.values()):
            raise _refused("a comparison of each record with each")

    def _judged(self, node: Any, above: _Above, rows: int) -> _Above:
        """Refuse what `node` makes of the records; return what lies above its children."""
        name = node.name()
        plain = name.rstrip("0123456789").removesuffix("Backward")
        if _scalar(node) and not above.joined:
            if name in ("MulBackward0", "MulBackward1", "DivBackward0", "DivBackward1"):
                return _scaled(node, above, divides=name[0] == "D")
            if plain in _BENT:
                return replace(above, bent=plain.lower())
        if plain in _OVER_ALL and _joins(node, rows):
            raise _refused(f"a {plain.lower()} over the records of the batch")
        if _between(node, plain, rows):
            raise _refused("a product, or distances, of the records with one another")
        if plain in ("Dot", "Mv", "Mm"):
            above = self._weighted(node, plain, above, rows)
        if name in _GATHERING and above.joined == "mean":
            self._refuse_uneven(node, plain, rows)
        if name in _REDUCED and node._saved_reduction != 0:
            if name in _NLL:
                _refuse_weights(node)
            return self._joined(node, above, rows, mean=node._saved_reduction == 1)
        if name in (*_SUMS, *_MEANS) and _joins(node, rows):
            return self._joined(node, above, rows, mean=name in _MEANS)
        if above.joined and plain in _BENT:
            return replace(above, bent=plain.lower())
        return above

    def _joined(self, node: Any, above: _Above, rows: int, *, mean: bool) -> _Above:
        """Judge a reduction over records by what lies above it."""
        if above.bent and (_scalar(node) or above.joined):
            raise _refused(f"a {above.bent} of a {'mean' if mean else 'sum'} over the records of the batch")
        shape = _child_shape(node)
        count = _numel(shape[:1] + shape[2:]) if node.name() in _NLL else _numel(shape)
        if mean and above.unknown and not above.joined:
            self._refuse_changed(node, above)
        if mean and count % rows and any(part in _GATHERING for part in _names_below(node)):
            raise _refused(f"a mean over {count} parts of the {rows} records, of which some have more than others")
        if not mean and not above.joined and not any(_divides(f, rows) for f in above.factors):
            self._refuse_sum(node.name(), above, rows)
        return replace(above, joined=above.joined or ("mean" if mean else "sum"))

    def _weighted(self, node: Any, plain: str, above: _Above, rows: int) -> _Above:
        """Judge a product with a constant that adds up the records, each times a weight."""
        constant = _weights(node, plain, rows)
        if constant is None:
            return above
        factor = float(constant.reshape(-1)[0])
        if bool((constant != factor).any()):
            raise _refused("a sum over the records of the batch, times weights that may depend on it")
        if not above.joined and not any(_divides(f, rows) for f in (*above.factors, factor)):
            self._refuse_sum(node.name(), replace(above, factors=(*above.factors, factor)), rows)
        return replace(above, joined=above.joined or "sum")

    def _refuse_sum(self, name: str, above: _Above, rows: int) -> None:
        if not above.factors and not above.unknown:
            raise _refused("a sum over the records of the batch")
        if above.unknown:
            raise _refused("a sum over the records of the batch, divided by something that depends on it")
        scale, key = functools.reduce(float.__mul__, above.factors, 1.0), f"{name} {len(above.factors)}"
        before = self._factors.get(key, (rows, scale))
        self._factors[key] = (rows, scale)
        if abs(scale * rows - before[1] * before[0]) > 1e-4 * abs(scale * rows):
            raise _refused("a sum over the records of the batch that is not divided by their number")

    def _refuse_changed(self, node: Any, above: _Above) -> None:
        key = f"{node.name()} {len(above.factors)}"
        if self._divided.setdefault(key, above.factors) != above.factors:
            raise _refused("a mean over the records of the batch, divided by something that depends on it")

    def _refuse_uneven(self, node: Any, plain: str, rows: int) -> None:
        counts = _picked(node, plain, rows)
        if counts is not None and int(counts.min()) != int(counts.max()):
            raise _refused("a mean over parts of the records, of which some have more than others")


def _between(node: Any, plain: str, rows: int) -> bool:
    """Return whether a node multiplies or compares what was made of each record with what was made of each."""
    square = _shape(node) in ((rows, rows), (1, rows, rows))
    return square and plain in ("Mm", "Bmm", "Cdist", "EuclideanDist") and None not in _children(node)


def _scaled(node: Any, above: _Above, *, divides: bool) -> _Above:
    """Add the factor of a multiplication or division of a scalar by a number."""
    if sum(child is not None for child in _children(node)) > 1:
        return replace(above, bent="product")
    other = node._saved_other if _children(node)[0] is not None else getattr(node, "_saved_self", None)
    if not isinstance(other, int | float) and (not isinstance(other, torch.Tensor) or other.numel() != 1):
        return replace(above, unknown=True)
    factor = float(other)
    if divides:
        factor = 1.0 / factor if factor else float("inf")
    # A number of Python's is saved in 64 bits; what a loss computes of a batch in fewer, or as a count.
    computed = divides and isinstance(other, torch.Tensor) and other.dtype not in (torch.float64, torch.int64)
    return replace(above, factors=(*above.factors, factor), unknown=above.unknown or computed)


def _divides(factor: float, rows: int) -> bool:
    """Return whether a factor is one over a multiple of the number of records."""
    times = 1.0 / abs(factor) / rows if factor else 0.0
    return round(times) >= 1 and abs(times - round(times)) < 1e-4 * times


def _refuse_weights(node: Any) -> None:
    weight, ignored = node._saved_weight, _signed(node._saved_ignore_index)
    if node._saved_reduction != 1:
        return
    if weight is not None and bool((weight != weight.reshape(-1)[0]).any()):
        raise _refused("a mean with class weights, which is divided by the weights of the batch")
    if bool((node._saved_target == ignored).any()):
        raise _refused(f"a mean over the labels that are not {ignored}, which is divided by their number in the batch")


def _weights(node: Any, plain: str, rows: int) -> torch.Tensor | None:
    """Return the constant by which a product adds up what was made of each record; None if it does not."""
    children = _children(node)
    if sum(child is not None for child in children) != 1:
        return None
    first = children[0] is not None
    shape = _child_shape(node)
    if plain == "Dot":
        constant = node._saved_tensor if first else node._saved_self
        return constant if shape and shape[0] % rows == 0 else None
    over_records = shape[0] == rows and not first  # constant @ records
    if plain == "Mm" and first:  # records.T @ constant
        over_records = shape[1] == rows and shape[0] % rows != 0
    if not over_records:
        return None
    saved = ("_saved_vec" if first else "_saved_self") if plain == "Mv" else ("_saved_mat2" if first else "_saved_self")
    constant = getattr(node, saved, None)
    return constant if isinstance(constant, torch.Tensor) else None


def _signed(number: int) -> int:
    """Return a number that torch saves for a node as if it had no sign."""
    return number - 2**64 if number >= 2**63 else number


def _picked(node: Any, plain: str, rows: int) -> torch.Tensor | None:
    """Return how many parts of each record were picked out; None if that is not seen."""
    shape = _child_shape(node)
    if not shape or shape[0] % rows:
        return None
    if plain == "MaskedSelect":
        mask: torch.Tensor = node._saved_mask
        return mask.expand(shape).reshape(rows, -1).sum(1)
    if plain == "IndexSelect":
        first = node._saved_index if node._saved_dim == 0 else None
    else:
        first = next(iter(node._saved_indices), None)
    if first is not None and first.dtype in (torch.bool, torch.uint8):
        return first.reshape(rows, -1).sum(1) if len(first) % rows == 0 else None
    if first is None:
        return None
    of = torch.div(first.reshape(-1) % shape[0], shape[0] // rows, rounding_mode="floor")
    return torch.bincount(of.cpu(), minlength=rows)


def _joins(node: Any, rows: int) -> bool:
    """Return whether a reduction goes over the first dimension, of so many records or a multiple (their tokens)."""
    shape, stacked = _child_shape(node), next((c for c in _children(node) if c is not None), None)
    if stacked is None or _numel(shape) <= 1 or shape[1:2] == (rows,):  # the batch may be the second dimension
        return False
    if (
        stacked.name() in ("StackBackward0", "CatBackward0")
        and len(shape) == 1
        and all(c is None or _numel(_shape(c)) == 1 for c in _children(stacked))
    ):
        return False  # several losses, not several records
    dims = getattr(node, "_saved_dim", None)
    if dims is None or dims == ():
        gathered = any(name in _GATHERING for name in _names_below(node))
        return shape[0] % rows == 0 or _numel(shape) >= rows or gathered
    listed = dims if isinstance(dims, tuple) else (dims,)
    over_first = any(_signed(d) % len(shape) == 0 for d in listed)
    return over_first and (shape[0] == rows or (len(shape) == 1 and shape[0] % rows == 0))


def _names_below(node: Any) -> Iterator[str]:
    """Yield the names of what a reduction is made of, down to the first branches."""
    for _ in range(64):
        node = next((child for child in _children(node) if child is not None), None)
        if node is None:
            return
        yield node.name()


def _children(node: Any) -> list[Any]:
    return [child for child, _ in node.next_functions]


def _shape(node: Any) -> tuple[int, ...]:
    metadata = getattr(node, "_input_metadata", ())
    return tuple(metadata[0].shape) if metadata else ()


def _child_shape(node: Any) -> tuple[int, ...]:
    child = next((c for c in _children(node) if c is not None), None)
    return _shape(child) if child is not None else ()


def _scalar(node: Any) -> bool:
    return _numel(_shape(node)) == 1


def _numel(shape: tuple[int, ...]) -> int:
    return functools.reduce(int.__mul__, map(int, shape), 1)


def _refused(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the loss is made of {what}, so one record changes the gradients of others",
        hint="Compute one loss for each record, from its own outputs alone, with reduction='none' (a mean over its own "
        "tokens, times public weights), then take .mean() over all records.",
    )
