"""The per-sample gradients of one layer, from its input and the gradient of its output: whichever way is cheapest.

Linear layers, embeddings, convolutions with whatever padding, layer and group normalisation. With x^ what a
normalisation makes of its input before weight and bias, these are

    sum_t g_it x^_it    and    sum_t g_it.                                                                          (1)
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn
from torch.nn import functional as F

from choral.privacy.per_sample.convolution_gradients import convolution_weight
from choral.privacy.per_sample.ghost_norms import Dense, Outer, PerSample, Sparse, keeps_factors, single, written

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BOTH = ("weight", "bias")


def follows(layer: nn.Module) -> bool:
    """Return whether :func:`per_sample` knows this layer."""
    if type(layer) is nn.Embedding:
        return not layer.scale_grad_by_freq and not layer.sparse and layer.max_norm is None
    return type(layer) in (nn.Linear, nn.LayerNorm, nn.GroupNorm, *CONVOLUTIONS)


def per_sample(
    layer: nn.Module, a: torch.Tensor, g: torch.Tensor, names: Collection[str] = BOTH
) -> dict[str, PerSample]:
    """Return the per-sample gradients of a layer's weight and bias, of those in `names`.

    layer: one that `follows` is true of. a: its input, a record per row. g: the gradient of the mean of the records'
    losses in its output.
    """
    scale, a, g = float(len(a)), single(a), single(g)
    if isinstance(layer, nn.Embedding):
        return {"weight": _embedding(layer, a, g, scale)}
    if isinstance(layer, nn.LayerNorm | nn.GroupNorm):
        rows = _layer_norm(layer, a, g) if isinstance(layer, nn.LayerNorm) else _group_norm(layer, a, g)
        return {name: Dense(row, scale) for name, row in zip(BOTH, rows, strict=True) if name in names}
    found: dict[str, PerSample] = {}
    if isinstance(layer, nn.Linear):
        a, g = a.reshape(len(a), -1, a.shape[-1]), g.reshape(len(g), -1, g.shape[-1])
        if "weight" in names:
            found["weight"] = _linear_weight(a, g, scale)
        if "bias" in names:
            found["bias"] = Dense(g.sum(1) if g.shape[1] > 1 else g[:, 0], scale)
        return found
    if "weight" in names:
        found["weight"] = convolution_weight(layer, a, g, scale)
    if "bias" in names:
        found["bias"] = Dense(g.flatten(2).sum(2), scale)
    return found


def _linear_weight(a: torch.Tensor, g: torch.Tensor, scale: float) -> PerSample:
    sizes = a.shape[1], a.shape[2], g.shape[2]

    def factors(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return a[part], g[part]

    if keeps_factors(len(a), sizes):
        return Outer(factors, len(a), sizes, scale)
    return written(factors, len(a), 1, sizes, scale)


def _layer_norm(layer: nn.LayerNorm, a: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (1) for weight and bias, shape (records, numel)."""
    whole, shape = (
        F.layer_norm(a, layer.normalized_shape, eps=layer.eps),
        (len(a), -1, math.prod(layer.normalized_shape)),
    )
    g = g.reshape(shape)
    return whole.reshape(shape).mul_(g).sum(1), g.sum(1)


def _group_norm(layer: nn.GroupNorm, a: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (1) for weight and bias, shape (records, channels)."""
    whole, shape = F.group_norm(a, layer.num_groups, eps=layer.eps), (*a.shape[:2], -1)
    g = g.reshape(shape)
    return whole.reshape(shape).mul_(g).sum(2), g.sum(2)


def _embedding(layer: nn.Embedding, tokens: torch.Tensor, g: torch.Tensor, scale: float) -> PerSample:
    """Return those of the table; padding has none."""
    height, records = layer.num_embeddings, len(tokens)
    place = tokens.reshape(records, -1) + height * torch.arange(records, device=tokens.device)[:, None]
    g = g.reshape(-1, g.shape[-1])
    used, inverse = torch.unique(place, return_inverse=True)
    values = torch.zeros(len(used), g.shape[1], dtype=g.dtype, device=g.device)
    values.index_add_(0, inverse.reshape(-1), g)  # (5) of ghost_norms
    if layer.padding_idx is not None:
        real = used % height != layer.padding_idx
        used, values = used[real], values[real]
    return Sparse(used // height, used % height, values, records, height, scale)
