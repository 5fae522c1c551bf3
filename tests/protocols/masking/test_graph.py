"""Graphs: regular, symmetric, unbiased, and the same for everybody who knows the seed."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from choral.protocols.errors import SpecError
from choral.protocols.masking import graph

SEED = bytes(range(32))


def seed_of(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "big")).digest()


@given(n=st.integers(2, 60), k=st.integers(2, 60), seed=st.binary(min_size=32, max_size=32))
def test_regular_symmetric_and_local(n: int, k: int, seed: bytes) -> None:
    if k < n - 1 and k % 2 and n % 2:
        with pytest.raises(SpecError, match="even"):
            graph.neighbours(n, k, seed)
        return
    found = graph.neighbours(n, k, seed)
    assert len(found) == n
    for party, others in enumerate(found):
        assert len(others) == min(k, n - 1)
        assert list(others) == sorted(set(others))
        assert party not in others
        assert all(0 <= other < n and party in found[other] for other in others)
        assert graph.neighbours_of(party, n, k, seed) == others


def independent_ring(n: int, seed: bytes) -> list[int]:
    """The documented shuffle, written again from the documentation."""
    words = hashlib.shake_256(b"choral/graph/1" + seed).digest(8 * 10 * n)
    position = 0
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        while True:
            word = int.from_bytes(words[position : position + 8], "little")
            position += 8
            if word < 2**64 // (i + 1) * (i + 1):
                break
        order[i], order[word % (i + 1)] = order[word % (i + 1)], order[i]
    return order


@pytest.mark.parametrize(("n", "k"), [(10, 4), (11, 6), (12, 5), (700, 30)])
def test_the_documented_stream_and_circulant(n: int, k: int) -> None:
    ring = independent_ring(n, SEED)
    place = {party: position for position, party in enumerate(ring)}
    found = graph.neighbours(n, k, SEED)
    for a in range(n):
        for b in range(a):
            distance = abs(place[a] - place[b])
            distance = min(distance, n - distance)
            joined = distance <= k // 2 or (k % 2 == 1 and distance == n // 2)
            assert (b in found[a]) == joined


def test_the_stream_goes_past_its_first_read() -> None:
    ring = graph.ring_of(3000, 4, SEED)
    assert ring == tuple(independent_ring(3000, SEED))


def test_a_golden_graph() -> None:
    """Two versions of this program must agree on the graph: a change here is a change of protocol."""
    golden = [(6, 7), (2, 3), (1, 5), (1, 4), (3, 7), (2, 6), (0, 5), (0, 4)]
    assert graph.neighbours(8, 2, bytes(32)) == golden


def test_every_order_is_equally_likely() -> None:
    """24 orders of 4, 12,000 seeds: chi-square with 23 degrees of freedom, false alarm 1e-6 at 73.7.

    A shuffle that draws j below n each time (the usual mistake) scores about 3,000.
    """
    draws = 12_000
    rings = (graph.ring_of(4, 2, seed_of(number)) for number in range(draws))
    counts = Counter(tuple(ring) for ring in rings if ring is not None)
    expected = draws / 24
    assert sum((counts[order] - expected) ** 2 / expected for order in permutations(range(4))) < 73.7


def test_words_that_would_bias_are_skipped() -> None:
    words = iter([2**64 - 1, 2**64 - 1, 5])  # 2^64 = 1 mod 3: the top word alone would favour 0
    assert graph._below(3, words) == 2
    assert next(words, None) is None


def test_connected() -> None:
    for number in range(50):
        found = graph.neighbours(40, 2, seed_of(number))
        reached, frontier = {0}, [0]
        while frontier:
            new = set(found[frontier.pop()]) - reached
            reached |= new
            frontier += new
        assert len(reached) == 40


def test_other_seeds_give_other_graphs() -> None:
    assert len({tuple(graph.neighbours(30, 4, seed_of(number))) for number in range(100)}) == 100


@pytest.mark.parametrize(
    ("n", "k", "seed"), [(1, 1, SEED), (0, 2, SEED), (10, 1, SEED), (10, 0, SEED), (10, -2, SEED), (10, 4, bytes(31))]
)
def test_refusals(n: int, k: int, seed: bytes) -> None:
    with pytest.raises(SpecError):
        graph.neighbours(n, k, seed)
    with pytest.raises(SpecError):
        graph.neighbours_of(0, n, k, seed)


def test_two_parties_are_each_other_s_only_neighbour_and_three_need_two_each() -> None:
    assert graph.neighbours(2, 1, SEED) == [(1,), (0,)]
    with pytest.raises(SpecError, match="at least 2 neighbours per party, got 1"):
        graph.neighbours(3, 1, SEED)


@pytest.mark.parametrize("party", [-1, 10])
def test_unknown_parties(party: int) -> None:
    with pytest.raises(SpecError):
        graph.neighbours_of(party, 10, 4, SEED)
    with pytest.raises(SpecError):
        graph.neighbours_of(party, 10, 9, SEED)
