"""The sum of clipped gradients of a step, in pieces: one vector of all parameters would be fresh memory each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn

from choral.privacy.errors import PrivacyError
from choral.privacy.per_sample.ghost_norms import PerSample

_PIECE = 1 << 17  # numbers of small parameters that are added up as one piece


@dataclass(frozen=True)
class ClippedSum:
    """Clipped gradients of the chunks of a batch so far, without noise."""

    params: list[nn.Parameter]
    pieces: list[torch.Tensor]  # flat, float64, of the parameters of each of `in_pieces`
    within: float  # how many norms were at most C, less how many were longer

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise PrivacyError("clipped gradients without noise may be neither copied nor written to a file")

    def add(self, more: ClippedSum) -> ClippedSum:
        """Return the sum with another chunk's, in place of this one's. Raises: PrivacyError (other parameters)."""
        if [id(p) for p in self.params] != [id(p) for p in more.params]:
            raise PrivacyError(
                "parameters were frozen or unfrozen between chunks of one batch", hint="Do so when optimizer.stepped."
            )
        pieces = [mine.add_(piece) for mine, piece in zip(self.pieces, more.pieces, strict=True)]
        return ClippedSum(self.params, pieces, self.within + more.within)


def in_pieces(sizes: Sequence[int]) -> list[slice]:
    """Return which parameters of so many numbers are added up as one piece: small ones together, large ones alone."""
    pieces, first, length = [], 0, 0
    for i, size in enumerate(sizes):
        if i > first and length + size > _PIECE:
            pieces.append(slice(first, i))
            first, length = i, 0
        length += size
    return [*pieces, slice(first, len(sizes))]


def clipped_sum(samples: list[PerSample], factors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """Return the sum over records of factor times gradient, in pieces, in each parameters one after the other, float64.

    `samples` is emptied: what a parameter's gradients are made of is let go as soon as they are summed.
    """
    pieces: list[torch.Tensor] = []
    for group in reversed(in_pieces(sizes)):
        parts = [samples.pop().weighted_sum(factor) for factor in reversed(factors[group])]
        home = (pieces or parts)[0].device
        parts = [part.to(home) for part in reversed(parts)]
        pieces.append(parts[0] if len(parts) == 1 else torch.cat(parts))
    return pieces[::-1]
