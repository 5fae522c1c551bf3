"""Does a loss join records? Told by its second derivatives, whatever it is made of.

A loss that is a sum over records of a loss of each record alone has gradient rows of which each depends on that
record's outputs only: the derivative of record i's row by record j's outputs is zero for i != j, in floating point,
too, since nothing flows there. Batch statistics, products and distances of records, and whatever else is smooth and not
linear in records together has others. It is seen through functions of the user's own and through hooks, as far as torch
can go backward through them twice. Where a loss is broken, as by a hinge or an absolute value, second derivatives are
zero all the same: there each number before the break must have been made of one record's outputs.

Not seen: constants that were computed from the batch (detached tensors, weights from its labels), which are no part of
the graph; and what has no second derivative in torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from choral.privacy.record_independence.batch_rows import splits

_BROKEN = {
    *("Relu", "LeakyRelu", "Prelu", "Abs", "Clamp", "ClampMin", "ClampMax", "Hardtanh", "Threshold", "Hardsigmoid"),
    *("Maximum", "Minimum", "Fmax", "Fmin", "SmoothL1Loss", "HuberLoss", "Norm", "LinalgVectorNorm", "Hardshrink"),
}
_TRIED = 8  # numbers before a break that are looked at

Loss = tuple[torch.Tensor, torch.Tensor | None]  # with the gradient that `backward` was given for it


def crosses(losses: Sequence[Loss], edges: Sequence[tuple[Any, int]], rows: int) -> bool:
    """Return whether the gradient at some records' rows depends on other records' rows.

    edges: what the loss is made of, nodes of the graph with the number of their output. The graph is kept.
    """
    ends = [GradientEdge(node, number) for node, number in edges]  # type: ignore[call-arg, unused-ignore]
    try:
        return _crosses(losses, ends, rows)
    except RuntimeError:  # something in it has no second derivative
        return False


def breaks(nodes: Iterable[Any], edges: Sequence[tuple[Any, int]], rows: int) -> bool:
    """Return whether, before one of those of `nodes` that break a loss, a number was made of several records' outputs.

    edges: as for :func:`crosses`. The graph is kept.
    """
    broken = [n for n in nodes if n.name().rstrip("0123456789").removesuffix("Backward") in _BROKEN]
    ends = [GradientEdge(node, number) for node, number in edges]  # type: ignore[call-arg, unused-ignore]
    return any(_breaks(node, ends, rows) for node in broken)


def _breaks(node: Any, ends: Sequence[GradientEdge], rows: int) -> bool:
    before = [
        (n, number, torch.Size(n._input_metadata[number].shape)) for n, number in node.next_functions if n is not None
    ]
    before = [(n, number, shape) for n, number, shape in before if shape == before[0][2]]
    if not before or before[0][2].numel() == 0:
        return False
    starts = [GradientEdge(n, number) for n, number, _ in before]  # type: ignore[call-arg, unused-ignore]
    for place in torch.randperm(before[0][2].numel(), generator=torch.Generator().manual_seed(0))[:_TRIED]:
        one = [_one(n, number, int(place)) for n, number, _ in before]
        try:
            found = torch.autograd.grad(starts, ends, one, retain_graph=True, allow_unused=True)
        except RuntimeError:
            return False
        touched = torch.zeros(rows, dtype=torch.bool)
        for g in found:
            if g is not None and g.dim() > 0 and len(g) > 0 and len(g) % rows == 0:
                size = torch.nan_to_num(g.detach().abs().reshape(rows, -1), nan=0.0, posinf=0.0).amax(1)
                touched |= (size > 1e-6 * size.max()).cpu()
        if int(touched.sum()) > 1:
            return True
    return False


def _one(node: Any, number: int, place: int) -> torch.Tensor:
    """Return zeros with a one in a place, as the gradient of an output of a node."""
    of = node._input_metadata[number]
    zeros = torch.zeros(of.shape, dtype=of.dtype, device=of.device)
    zeros.view(-1)[place] = 1
    return zeros


def _crosses(losses: Sequence[Loss], ends: Sequence[GradientEdge], rows: int) -> bool:
    seeds = [torch.ones_like(loss) if seed is None else seed for loss, seed in losses]
    first = torch.autograd.grad([loss for loss, _ in losses], ends, seeds, create_graph=True, allow_unused=True)
    by_rows = [g is not None and g.dim() > 0 and len(g) == rows for g in first]
    if not any(by_rows):  # tokens in the place of records
        by_rows = [g is not None and g.dim() > 0 and len(g) > 0 and len(g) % rows == 0 for g in first]
    used = [(g, end) for g, end, by in zip(first, ends, by_rows, strict=True) if by]
    bent = [g for g, _ in used if g.requires_grad]
    if not bent:
        return False
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(g.shape, generator=generator).to(g.device, g.dtype) for g in bent]
    for place, kept in enumerate(splits(rows)):
        if place % 2:  # the same the other way round: second derivatives are symmetric, but for a Function's
            continue
        masks = [kept.repeat_interleave(len(g) // rows).to(g.device) for g in bent]
        starts = [w * m.reshape(-1, *[1] * (w.dim() - 1)) for w, m in zip(weights, masks, strict=True)]
        second = torch.autograd.grad(bent, [end for _, end in used], starts, retain_graph=True, allow_unused=True)
        for given in (g.detach() for g in second if g is not None):
            # what is not finite may be one record's own
            size = torch.nan_to_num(given.abs().reshape(rows, -1), nan=0.0, posinf=0.0).amax(1)
            if bool(size[~kept.to(size.device)].max() > 1e-6 * size.max()):
                return True
    return False
