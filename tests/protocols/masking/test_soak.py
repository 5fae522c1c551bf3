"""A thousand parties for twenty rounds with random dropouts: exact sums and flat memory."""

from __future__ import annotations

import gc
import resource
import tracemalloc
from typing import Any

import numpy as np
import pytest

from choral.protocols import Masked, SumSpec


def soak(parties: int, rounds: int, length: int, seed: int) -> list[int]:
    """Run the rounds; the traced memory after each."""
    rng = np.random.default_rng(seed)
    names = tuple(f"p{place}" for place in range(parties))
    session: Any = Masked(corrupt=0.05, dropouts=0.05).open(SumSpec(parties=names, length=length, bound=2**20))
    sizes = []
    for _ in range(rounds):
        gone = set(rng.choice(parties, rng.integers(0, parties // 20 + 1), replace=False).tolist())
        summing = session.begin()
        expected = np.zeros(length, np.int64)
        for place, name in enumerate(names):
            if place not in gone:
                vector = rng.integers(-(2**20), 2**20, length, endpoint=True)
                expected += vector
                summing.submit(name, vector)
        result = summing.finish()
        assert len(result.survivors) == parties - len(gone)
        np.testing.assert_array_equal(result.total, expected)
        del summing, result
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0)
    return sizes


def test_a_hundred_parties_for_five_rounds() -> None:
    soak(100, 5, 50, seed=0)


@pytest.mark.slow
def test_a_thousand_parties_for_twenty_rounds() -> None:
    soak(1000, 1, 200, seed=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    soak(1000, 20, 200, seed=2)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 100 * 1024  # KiB: the high-water mark of twenty rounds is that of one


@pytest.mark.slow
def test_traced_memory_is_flat_over_many_rounds() -> None:
    tracemalloc.start()
    sizes = soak(100, 12, 200, seed=3)
    tracemalloc.stop()
    assert max(sizes[2:]) - min(sizes[2:]) < 0.1 * sizes[2]
