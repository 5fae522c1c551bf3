"""Is the loss of a batch the mean over its records of a loss of each record alone?

What computes the loss itself from a batch (a training step, rather than a model) is held to more, in evaluation mode:
for each split, the loss must be the mean of the two parts' losses, weighted by their sizes, and so must the gradients
at the outputs of the layers. Sums over records, means over the tokens of a batch and weights that are divided by their
sum are not, and neither are losses that mix records. Records whose losses are all equal show nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from choral.privacy.errors import UnsupportedModelError
from choral.privacy.record_independence import module_state
from choral.privacy.record_independence.batch_mixing import CheckedForward
from choral.privacy.record_independence.batch_rows import few, run, same_random_numbers, splits, taken
from choral.privacy.record_independence.forward_probes import Point, shaken, watched

_RELATIVE = 1e-4  # rounding of a float32 loss


def refuse_inseparable(subject: CheckedForward) -> bool:
    """Raise UnsupportedModelError unless the loss of a batch is the mean over its records of a loss of each alone.

    subject: a step, which returns a batch's loss, of a model in evaluation mode now. It is looked at with the weights
    as they are and moved away from zero. Returns False if the losses of all records are equal, and so nothing is
    proved; of a loss that is random nothing can be, and True is returned.
    """
    before = module_state.kept(subject.model)
    try:
        could = _refuse_by_losses(subject)
        with shaken(subject.model):
            moved_could = _refuse_by_losses(subject)
            if moved_could is not None:
                _refuse_by_shares(subject)
        return bool(could or moved_could or could is None)
    finally:
        module_state.take_away(subject.model, before)


def _seeded(subject: CheckedForward, batch: Any, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    loss: torch.Tensor = subject.forward(batch)
    return loss


def _refuse_by_losses(subject: CheckedForward) -> bool | None:
    """Compare losses. Returns whether they could have differed; None if they are random."""
    rows, (batch,) = subject.rows, subject.args

    def loss(take: torch.Tensor, seed: int = 0) -> float:
        with same_random_numbers(batch, subject.model):
            return float(run(lambda part: _seeded(subject, part, seed), (batch,), {}, take, rows))

    whole, could = loss(torch.arange(rows)), False
    if not math.isfinite(whole):
        return False
    if abs(whole - loss(torch.arange(rows), seed=1)) > _RELATIVE * abs(whole):
        return None
    for kept in splits(rows):
        mine, others = (loss(torch.nonzero(part)[:, 0]) for part in (kept, ~kept))
        share = int(kept.sum()) / rows
        shares = (share * mine, (1.0 - share) * others)
        size = sum(map(abs, (*shares, whole)))  # of a part without a finite loss nothing is within a share of it
        if not (math.isfinite(size) and abs(sum(shares) - whole) <= _RELATIVE * size + 1e-7):
            raise _inseparable()
        could = could or abs(mine - others) > 10 * _RELATIVE * abs(whole) + 1e-6
    return could


def _refuse_by_shares(subject: CheckedForward) -> None:
    """Compare the gradients at the layers' outputs of some records' mean loss with those of parts of them."""
    (batch,) = subject.args
    chosen = few(batch, {}, subject.rows)

    def gradients(take: torch.Tensor) -> dict[Point, torch.Tensor]:
        outs: dict[Point, torch.Tensor] = {}

        def see(point: Point, t: torch.Tensor) -> None:
            if point[1] == "out" and t.requires_grad and t.is_floating_point():
                outs[point] = t

        part = taken(batch, take, subject.rows)
        with same_random_numbers(batch, subject.model), watched(subject.layers, len(take), see), torch.enable_grad():
            loss = _seeded(subject, part)
        if not (loss.requires_grad and outs):
            return {}
        found = torch.autograd.grad(loss, list(outs.values()), allow_unused=True)
        return {
            point: g.detach().reshape(len(g), -1) * len(take)
            for point, g in zip(outs, found, strict=True)
            if g is not None
        }

    whole = gradients(chosen)
    for kept in splits(len(chosen)):
        part = gradients(chosen[kept])
        for point in whole.keys() & part.keys():
            mine, alone = whole[point][kept.to(whole[point].device)], part[point]
            if mine.shape != alone.shape:
                continue
            numbers = (mine.isfinite() & alone.isfinite()).all(1)
            scale = max(
                (float(g[g.isfinite()].abs().max()) for g in (whole[point], alone) if bool(numbers.any())), default=0.0
            )
            if bool(((mine - alone)[numbers].abs() > 10 * _RELATIVE * scale + 1e-9).any()):
                raise _inseparable()


def _inseparable() -> UnsupportedModelError:
    return UnsupportedModelError(
        "the loss of a batch is not the mean over its records of a loss of each record alone, so one record "
        "changes the gradients of others",
        hint="Take means, not sums, over records; average over tokens within a record first; do not divide by "
        "what depends on the batch, as class weights and ignore_index do; mix no records.",
    )
