"""What each record's gradient is multiplied with before it is summed: at most one, so that its norm is at most C."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from choral.privacy.dpsgd.clip_settings import AdaptiveClip, ClippingNorm, PerLayerClip

# Norms are of float32 blocks, summed in float64; clipping this much below them keeps their rounding, at most
# 2^-24 * ghost_norms.BLOCK / 2 of the norm, inside the sensitivity.
_MARGIN = 1e-4


def clip_factors(
    setting: ClippingNorm, bound: float, norms: Sequence[torch.Tensor], names: Sequence[str]
) -> tuple[list[torch.Tensor], float, torch.Tensor]:
    """Return each record's factor min(1, C / norm) for each parameter, shape (batch,), float64; the sum of the
    records' answers for adaptive clipping, +1 for a norm of at most C, else -1; and which gradients are not finite:
    factor and answer of those records are 0.

    bound: C. norms: of each parameter, shape (batch,). names: the parameters', dotted; for PerLayerClip alone.
    """
    per_parameter = torch.stack([n.to(norms[0].device) for n in norms])
    whole = torch.linalg.vector_norm(per_parameter, dim=0)
    gone = ~torch.isfinite(whole)
    if isinstance(setting, PerLayerClip):
        return [f.masked_fill_(gone, 0.0) for f in _layer_factors(setting, per_parameter, names)], 0.0, gone
    answers = 0.0
    if isinstance(setting, AdaptiveClip):
        answers = float(torch.where(whole <= bound, 1.0, -1.0).masked_fill_(gone, 0.0).sum())
    factors = (bound / whole.mul_(1.0 + _MARGIN)).clamp_(max=1.0).masked_fill_(gone, 0.0)
    return [factors] * len(norms), answers, gone


def _layer_factors(setting: PerLayerClip, per_parameter: torch.Tensor, names: Sequence[str]) -> list[torch.Tensor]:
    """Return the same for each parameter, from the norms of its layer, shape (parameters, batch)."""
    layers = [setting.layer(name) for name in names]
    factors = {}
    for layer, bound in setting.bounds(names).items():
        mine = [i for i, other in enumerate(layers) if other == layer]
        norms = torch.linalg.vector_norm(per_parameter[mine], dim=0)
        factors[layer] = (bound / (norms * (1.0 + _MARGIN))).clamp(max=1.0)
    return [factors[layer] for layer in layers]
