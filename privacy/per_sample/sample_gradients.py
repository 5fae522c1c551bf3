"""The per-sample gradients of a step: complete, of the records that were drawn, and equal on average to autograd's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from choral.privacy.errors import UnsupportedModelError
from choral.privacy.per_sample import ghost_norms

if TYPE_CHECKING:
    from choral.privacy.per_sample.model import PerSampleModel

_COMPARED = 4  # records whose norms are compared with those of their gradients, written down


def parameter_name(model: PerSampleModel, p: torch.Tensor) -> str:
    """Return the dotted name of a parameter in the user's model."""
    return next((name for name, q in model._module.named_parameters() if q is p), "(not in the model)")


def gradients_of(model: PerSampleModel, p: nn.Parameter, drawn: int) -> ghost_norms.PerSample:
    """Return the per-sample gradients of `p`, of `drawn` records.

    Raises: UnsupportedModelError if they are missing, of other records, or not all of its gradient; PrivacyError (two
    backward passes).
    """
    parts = model.parts(p)
    if not parts and p not in model.attached:
        raise UnsupportedModelError(
            f"parameter {parameter_name(model, p)} was frozen, with its whole layer, when the model was wrapped, "
            "and is trained now",
            hint="Unfreeze it before wrap(), or in mid-training after unwrap(model), and wrap again on the same "
            "ledger.",
        )
    if not parts and model.left_out(p):
        return ghost_norms.Dense(torch.zeros((), device=p.device).expand(drawn, p.numel()))
    if not parts:
        raise UnsupportedModelError(
            f"parameter {parameter_name(model, p)} received no per-sample gradient: it took no part in the loss, is "
            "used outside its own layer's forward, or the model was in eval mode",
            hint="Call model.train(); freeze unused parameters and leave them out of the optimizer.",
        )
    for part in parts:
        if part.records != drawn:
            raise UnsupportedModelError(
                f"parameter {parameter_name(model, p)} has gradients for {part.records} samples, but {drawn} records "
                "were drawn",
                hint="Each layer's input needs one row per record, in its first dimension (batch_first=True): do "
                "not drop, repeat or merge records.",
            )
    if p in model.astray:
        raise UnsupportedModelError(
            f"parameter {parameter_name(model, p)} received a gradient from outside its own layer's forward in "
            "train mode",
            hint="Use weights through their layers only: call layer(x), not a function of layer.weight. An L2 term "
            "is the optimizer's weight_decay; it needs no gradients of the loss.",
        )
    return ghost_norms.added(parts)


def compare_with_autograd(
    model: PerSampleModel, params: Sequence[nn.Parameter], samples: Sequence[ghost_norms.PerSample]
) -> None:
    """Compare per-sample gradients with autograd, of each parameter until both were there to be compared.

    Raises: UnsupportedModelError where they differ.
    """
    for p, g in zip(params, samples, strict=True):
        if p in model.compared:
            continue
        if p not in model.averages:
            raise UnsupportedModelError(
                f"parameter {parameter_name(model, p)} received no gradient from autograd to compare with",
                hint="Call loss.backward() on a loss of the wrapped model's own parameters.",
            )
        norms, average = g.norms(), g.weighted_sum(torch.full((g.records,), 1.0 / g.records, dtype=torch.float64))
        expected = model.averages.pop(p).reshape(-1).to(average.device, torch.float64)
        size = float(torch.linalg.vector_norm(expected))
        difference = float(torch.linalg.vector_norm(average.sub_(expected)))
        few = g.dense(_COMPARED)
        astray = (ghost_norms.norms(few).to(norms.device) - norms[: len(few)]).abs()
        scale = float(norms.mean())
        if not (difference <= 1e-3 * scale + 1e-7 and float(astray.max()) <= 1e-3 * scale + 1e-7):
            raise UnsupportedModelError(
                f"parameter {parameter_name(model, p)}: its per-sample gradients do not average to autograd's gradient",
                hint="The layer is used in a way that per-sample gradients do not follow, such as sharing it "
                "across records, a scaled loss, an L2 term in the loss (use the optimizer's weight_decay), or "
                "backward() under autocast. Nothing was released.",
            )
        if size > 1e-2 * scale and scale > 1e-4:  # or else they agreed for want of anything to differ in
            model.compared.add(p)
