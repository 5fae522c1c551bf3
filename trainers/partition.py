"""Splits of one dataset among parties: unequal and non-IID, as data is in the world."""

from __future__ import annotations

import torch
from numpy.random import Generator, default_rng

from choral.errors import ConfigError, DataError

_TRIES = 100


def dirichlet_split(
    labels: torch.Tensor, *, parties: int, alpha: float, seed: int, min_records: int = 10
) -> list[torch.Tensor]:
    """Indices per party; each label's records are dealt out in proportions drawn from Dirichlet(alpha, ..., alpha).

    Small alpha: few labels and very unequal sizes per party; large alpha: alike. Draws in which some party has fewer
    than ``min_records`` are repeated (Li, Diao, Chen, He 2022, arXiv 2102.02079, section IV).

    labels: integers, shape (n,). Returns ``parties`` disjoint index tensors that cover 0..n-1.
    Raises: ConfigError for parties < 1, alpha <= 0 or min_records < 1; DataError if no draw gives every party its
    ``min_records``.
    """
    if parties < 1 or not alpha > 0 or min_records < 1:
        raise ConfigError(
            f"expected parties >= 1, alpha > 0, min_records >= 1; got {parties}, {alpha:g} and {min_records}",
            hint="see [split] in examples/digits.toml",
        )
    random = default_rng(seed)
    for _ in range(_TRIES):
        shares = _deal(labels, parties, alpha, random)
        if min(len(share) for share in shares) >= min_records:
            return shares
    raise DataError(
        f"no Dirichlet({alpha:g}) split of {len(labels)} records gives each of {parties} parties {min_records} or more",
        hint="raise split.alpha, or use fewer parties",
    )


def _deal(labels: torch.Tensor, parties: int, alpha: float, random: Generator) -> list[torch.Tensor]:
    shares: list[list[torch.Tensor]] = [[] for _ in range(parties)]
    for label in torch.unique(labels):
        records = torch.nonzero(labels == label).flatten()
        records = records[torch.from_numpy(random.permutation(len(records)))]
        cuts = (torch.from_numpy(random.dirichlet([alpha] * parties)).cumsum(0)[:-1] * len(records)).long()
        for share, piece in zip(shares, records.tensor_split(cuts), strict=True):
            share.append(piece)
    return [torch.cat(share).sort().values for share in shares]
