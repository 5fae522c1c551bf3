"""Vectors of parties under the real masked sum: what is opened, and that nothing is where too few are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Subset

from choral.privacy import Ledger, Privacy, SharesParty, SharesPlan, SharesTerms, plan_shares, refuse_weak_sum
from choral.protocols import Masked, SumSpec, TooFewSurvivorsError

NAMES = ("a", "b", "c", "d", "e")
LENGTH = 83


@pytest.fixture
def plan() -> SharesPlan:
    terms = SharesTerms(
        records=200, batch_size=20, steps=3, parties=5, min_survivors=4, length=LENGTH, most_records=40, declared=True
    )
    return plan_shares(Privacy(8.0, 1e-4, noise="distributed"), terms)


@pytest.fixture
def vectors(plan: SharesPlan, problem: Any, loop: Callable[..., int]) -> dict[str, np.ndarray]:
    found = {}
    for place, name in enumerate(NAMES):
        party = SharesParty(Privacy(8.0, 1e-4, noise="distributed"), plan, holder=name, ledger=Ledger())
        records = Subset(problem.dataset, range(40 * place, 40 * place + 40))
        loop(*party.wrap(problem.model(), DataLoader(records)))
        found[name] = party.take()
    return found


def test_the_masked_sum_opens_the_sum_of_the_survivors(plan: SharesPlan, vectors: dict[str, np.ndarray]) -> None:
    sums = Masked(corrupt=1, dropouts=1, min_survivors=4)
    refuse_weak_sum(plan, parties=5, min_survivors=4, corrupt=1)
    spec = SumSpec(parties=NAMES, length=LENGTH, bound=plan.bound)
    assert spec.modulus_bits == plan.bits
    session = sums.open(spec)
    for missing in (None, "c"):
        summing = session.begin()
        for name in NAMES:
            if name != missing:
                summing.submit(name, vectors[name])
        total = summing.finish().total
        assert np.array_equal(total, sum(vectors[name] for name in NAMES if name != missing))
        assert np.abs(plan.mean(total)).max() < plan.terms.most_records


def test_two_of_five_dropped_out_and_nothing_is_opened(plan: SharesPlan, vectors: dict[str, np.ndarray]) -> None:
    session = Masked(corrupt=1, dropouts=1, min_survivors=4).open(
        SumSpec(parties=NAMES, length=LENGTH, bound=plan.bound)
    )
    summing = session.begin()
    for name in NAMES[:3]:
        summing.submit(name, vectors[name])
    with pytest.raises(TooFewSurvivorsError):
        summing.finish()
