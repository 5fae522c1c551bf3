"""Splits of one dataset among parties: unequal and non-IID, as data is in the world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
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


def key_split(keys: Sequence[str] | np.ndarray[Any, Any], *, min_records: int = 1) -> dict[str, torch.Tensor]:
    """Indices per key, in the order of the names: whoever the records belong to is the party.

    Parties with fewer than ``min_records`` are left out.
    Raises: ConfigError for min_records < 1; DataError if no party is left.
    """
    if min_records < 1:
        raise ConfigError(f"expected min_records >= 1, got {min_records}", hint="1 keeps every party")
    names, owners = np.unique(np.asarray(keys), return_inverse=True)
    order = np.argsort(owners, kind="stable")
    pieces = np.split(order, np.cumsum(np.bincount(owners, minlength=len(names)))[:-1]) if len(names) else []
    kept = {
        str(name): torch.from_numpy(piece)
        for name, piece in zip(names, pieces, strict=True)
        if len(piece) >= min_records
    }
    if not kept:
        raise DataError(
            f"none of {len(names)} parties has {min_records} records", hint="lower split.min_records, or check the key"
        )
    return kept


def shard_split(labels: torch.Tensor, *, parties: int, seed: int, shards: int = 2) -> list[torch.Tensor]:
    """Records sorted by label, cut into ``parties * shards`` equal shards, ``shards`` dealt to each party at random.

    The pathological split of McMahan et al. 2017, arXiv 1602.05629, section 3. With two shards a party has two labels,
    and one more for each shard that goes over from one label to the next, as happens where labels are unequal.
    labels: integers, shape (n,). Returns disjoint index tensors that cover 0..n-1.
    Raises: ConfigError for parties or shards < 1; DataError for fewer records than shards.
    """
    if parties < 1 or shards < 1:
        raise ConfigError(
            f"expected parties >= 1 and shards >= 1, got {parties} and {shards}", hint="2 shards is usual"
        )
    if len(labels) < parties * shards:
        raise DataError(
            f"{len(labels)} records cannot be cut into {parties} x {shards} shards", hint="use fewer parties"
        )
    random = default_rng(seed)
    shuffled = torch.from_numpy(random.permutation(len(labels)))
    pieces = shuffled[torch.sort(labels[shuffled], stable=True).indices].tensor_split(parties * shards)
    dealt = random.permutation(parties * shards).reshape(parties, shards)
    return [torch.cat([pieces[shard] for shard in hand]).sort().values for hand in dealt]


def iid_split(records: int, *, parties: int, seed: int) -> list[torch.Tensor]:
    """Records dealt out at random in shares whose sizes differ by at most one; disjoint, covering 0..records-1.

    Raises: ConfigError for parties < 1; DataError for fewer records than parties.
    """
    if parties < 1:
        raise ConfigError(f"expected parties >= 1, got {parties}", hint="at least 2 to federate")
    if records < parties:
        raise DataError(f"{records} records are too few for {parties} parties", hint="use fewer parties")
    shares = torch.from_numpy(default_rng(seed).permutation(records)).tensor_split(parties)
    return [share.sort().values for share in shares]


def split_alike(
    labels: torch.Tensor, trained: torch.Tensor, shares: Sequence[torch.Tensor], *, seed: int
) -> list[torch.Tensor]:
    """Other records dealt out as ``shares`` deals out the trained ones: each label's in the same proportions.

    labels: of the records to deal, integers, shape (n,); trained: of those that ``shares`` indexes, shape (m,). A label
    that was not trained on is dealt in proportion to the sizes of the shares. Which record of a label goes to whom is
    random. Returns one index tensor per share; disjoint, covering 0..n-1; it may be empty.
    """
    random = default_rng((seed, 1))
    dealt: list[list[torch.Tensor]] = [[] for _ in shares]
    for label in torch.unique(labels):
        records = torch.nonzero(labels == label).flatten()
        records = records[torch.from_numpy(random.permutation(len(records)))]
        counts = torch.tensor([int((trained[share] == label).sum()) for share in shares], dtype=torch.float64)
        if not counts.sum():
            counts = torch.tensor([len(share) for share in shares], dtype=torch.float64)
        cuts = (counts.cumsum(0)[:-1] / counts.sum() * len(records)).round().long()
        for hand, piece in zip(dealt, records.tensor_split(cuts), strict=True):
            hand.append(piece)
    return [torch.cat(hand).sort().values for hand in dealt]


def reshuffled(shares: Sequence[torch.Tensor], *, seed: int) -> list[torch.Tensor]:
    """The same records dealt out again at random, each party getting as many as it had.

    What is left is unequal but IID, so that the difference to the original is the cost of non-IID data alone
    (FSVRGR in Konecny et al. 2016, arXiv 1610.02527, section 4). Raises: DataError for no records.
    """
    if not shares or not sum(map(len, shares)):
        raise DataError("no records to deal out again", hint="give the shares of a split")
    pool = torch.cat(list(shares))
    pool = pool[torch.from_numpy(default_rng(seed).permutation(len(pool)))]
    ends = torch.tensor([len(share) for share in shares]).cumsum(0)[:-1]
    return [piece.sort().values for piece in pool.tensor_split(ends)]
