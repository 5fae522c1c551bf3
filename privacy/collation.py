"""Does a collate function mix the records of a batch, as Mixup does?"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from choral.privacy.errors import UnsupportedLoaderError


def refuse_mixing(collate: Callable[[list[Any]], Any], records: list[Any]) -> None:
    """Raise UnsupportedLoaderError if rows of `collate(records)` change when other records are replaced.

    The records (two or more) are copied first: a collate function may change them. Padding may change in length, at
    either end. Random numbers of Python, NumPy and torch are repeated and then left as they were.
    """
    count = len(records)

    def batch(take: list[int]) -> Any:
        states = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                return collate([copy.deepcopy(records[i]) for i in take])
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    whole = batch(list(range(count)))
    for kept in (list(range(count // 2)), list(range(0, count, 2)), list(range(1, count, 2))):
        rest = sorted(set(range(count)) - set(kept))
        take = list(range(count))
        for place, i in enumerate(rest):
            take[i] = kept[place % len(kept)]
        if not _same(whole, batch(take), kept, count):
            raise UnsupportedLoaderError(
                "collating makes a record's rows depend on the other records of the batch, so one record would change "
                "the gradients of others",
                hint="Do not mix records (Mixup, CutMix, batch statistics); augment each record by itself in "
                "__getitem__, where any randomness is fine.",
            )


def _same(a: Any, b: Any, kept: list[int], count: int) -> bool:
    """Compare the rows `kept` of two batches of `count` records."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor | np.ndarray):
        x, y = torch.as_tensor(a), torch.as_tensor(b)
        if x.ndim == 0 or len(x) != count:
            return True  # no row per record; what a model makes of it is looked at there
        return len(y) == count and _equal_but_for_padding(x[kept], y[kept])
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key], kept, count) for key in a)
    if isinstance(a, Sequence) and not isinstance(a, str | bytes) and len(a) == len(b):
        parts = [isinstance(part, torch.Tensor | np.ndarray) and part.ndim > 0 and len(part) == count for part in a]
        if len(a) == count and not any(parts):  # one item per record
            return all(_equal(a[i], b[i]) for i in kept)
        return all(_same(x, y, kept, count) for x, y in zip(a, b, strict=True))
    return True


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor | np.ndarray):
        return _equal_but_for_padding(torch.as_tensor(a), torch.as_tensor(b))
    return bool(a == b)


def _equal_but_for_padding(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.ndim != b.ndim:
        return False
    sizes = [min(pair) for pair in zip(a.shape, b.shape, strict=True)]
    for right in (False, True):
        x, y = a, b
        for dim, size in enumerate(sizes):
            x, y = (t.narrow(dim, t.shape[dim] - size if right else 0, size) for t in (x, y))
        if torch.allclose(x, y, rtol=1e-5, atol=1e-7, equal_nan=True) if x.is_floating_point() else torch.equal(x, y):
            return True
    return False
