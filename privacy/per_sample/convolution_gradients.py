"""The per-sample gradients of a convolution's weight: written down by torch's own kernels, or kept as factors.

What a position of the output sees, its channels times the kernel's places, is the row a_it of a linear layer
(:mod:`choral.privacy.per_sample.ghost_norms`), so that everything there holds of convolutions. Two things are cheaper
than to unfold the images into such rows, which copies each value as often as the kernel has places:

- A convolution of `m` groups over one image of all the channels of `m` records is the same as one convolution over each
  record, and torch's gradient of its weight is the gradients of the m records, one after the other.
- Where there are few positions, Gram matrices of what the positions see are sums of those of the pixels:

    <a_it, a_is> = sum over places k of the kernel of <x_i,t+k , x_i,s+k>,  x_iq the channels of a pixel.           (1)

Measured on a CPU (`python benchmarks/dp_step.py`): by groups about as fast as the gradient of the whole batch, and two
to three times as fast as unfolded, but where an image has few positions and the kernel many numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from choral.privacy.per_sample.ghost_norms import (
    FLOAT32_POSITIONS,
    Dense,
    Joined,
    Outer,
    PerSample,
    gram,
    keeps_factors,
    written,
)

_GROUPED = 5 << 16  # numbers of gradients made by one grouped convolution: they stay in the cache
_POSITIONS, _KERNEL = 32, 1 << 14  # by groups from so many positions on, or up to so many numbers of a gradient
_CHANNELS = 8  # and from so many channels on


def convolution_weight(layer: Any, a: torch.Tensor, g: torch.Tensor, scale: float) -> PerSample:
    """Return the per-sample gradients of the weight of an nn.Conv1d, 2d or 3d, times `scale`.

    a: its input, shape (records, channels, ...). g: the gradient of its output.
    """
    groups, kernel, records = layer.groups, math.prod(layer.kernel_size), len(a)
    positions, d, p = g[0, 0].numel(), a.shape[1] // groups * kernel, g.shape[1] // groups
    factors = groups == 1 and keeps_factors(records, (positions, d, p))
    few = positions < _POSITIONS and d * p > _KERNEL
    if not factors and not few and d >= _CHANNELS * kernel and a.device.type == "cpu" and a.dtype is torch.float32:
        return Joined([Dense(rows, scale) for rows in _grouped(layer, a, g)])
    a, g = _padded(layer, a), g.flatten(2)

    def unfolded(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return _unfolded(layer, a[part], groups), g[part].reshape(-1, p, positions).mT

    if not factors:
        return written(unfolded, records, groups, (positions, d, p), scale)

    def grams(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return _pixel_grams(layer, a[part]), gram(g[part].mT)

    fewer = math.prod(a.shape[2:]) ** 2 < positions**2 * kernel and 1 < positions <= FLOAT32_POSITIONS
    return Outer(unfolded, records, (positions, d, p), scale, grams if fewer else None)


def _grouped(layer: Any, a: torch.Tensor, g: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the gradients of the weight by convolutions of as many groups as records go into one, a record per row."""
    shape, padding = layer.weight.shape, layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        a, padding = _padded(layer, a), [0] * len(layer.kernel_size)
    size = layer.weight.numel()
    step = max(1, _GROUPED // size)
    for start in range(0, len(a), step):
        some, theirs = a[start : start + step], g[start : start + step]
        _, found, _ = torch.ops.aten.convolution_backward(
            theirs.reshape(1, -1, *theirs.shape[2:]),
            some.reshape(1, -1, *some.shape[2:]),
            a.new_empty(len(some) * shape[0], *shape[1:]),  # of which only the shape is looked at
            None,
            layer.stride,
            padding,
            layer.dilation,
            False,  # not transposed
            [0] * len(layer.kernel_size),
            len(some) * layer.groups,
            [False, True, False],  # the weight's alone
        )
        yield found.view(-1, size)


def _pixel_grams(layer: Any, a: torch.Tensor) -> torch.Tensor:
    """Return (1), once `a` is padded, shape (records, positions, positions), float64."""
    records, sizes = len(a), a.shape[2:]
    between = gram(a.flatten(2).mT).view(records, *sizes, *sizes)
    terms = []
    for offset in itertools.product(*map(range, layer.kernel_size)):
        index = [
            slice(k * dilation, k * dilation + size - dilation * (kernel - 1), stride)
            for k, kernel, size, stride, dilation in zip(
                offset, layer.kernel_size, sizes, layer.stride, layer.dilation, strict=True
            )
        ]
        terms.append(between[(slice(None), *index, *index)])
    total = torch.stack(terms).sum(0)
    return total.reshape(records, math.isqrt(total[0].numel()), -1)


def _padded(layer: Any, a: torch.Tensor) -> torch.Tensor:
    if layer.padding_mode != "zeros":
        return F.pad(a, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    if isinstance(layer.padding, str):  # "same" may pad the two sides differently
        sides = layer._reversed_padding_repeated_twice
    else:
        sides = [n for n in reversed(layer.padding) for _ in range(2)]
    return F.pad(a, sides) if any(sides) else a


def _unfolded(layer: Any, a: torch.Tensor, groups: int) -> torch.Tensor:
    """Return what each position of the output sees, shape (records * groups, positions, channels/group * kernel).

    Positions are innermost in memory: the copy is then of whole rows of the image.
    """
    for dim, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        a = a.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    records, channels, *rest = a.shape  # and positions, kernel: of as many dimensions each
    dims = len(rest) // 2
    places, kernels = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    a = a.view(records, groups, channels // groups, *rest).permute(0, 1, 2, *kernels, *places)
    return a.reshape(records * groups, -1, math.prod(rest[:dims])).mT
