"""Who masks with whom: the complete graph, or a k-regular Harary graph on a random ring (Bell et al. 2020).

The parties are placed on a ring in an order drawn from a public seed, and each is joined to the k/2 next on either
side (for odd k, n even, to the one opposite as well). With the ring random and unknown to the adversary when it
chose whom to corrupt, few of a party's neighbours are corrupt. So the seed must not be the server's alone to choose.

The order is a Fisher-Yates shuffle of 0 .. n-1: for i = n-1, ..., 1 swap positions i and j, with j uniform in 0 .. i.
The draws come from the 8-byte little-endian words of SHAKE-256("choral/graph/1" | seed), taken one after another;
a word w gives j = w mod (i+1) unless w >= floor(2^64 / (i+1)) (i+1), when the next word is tried: no modulo bias.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from choral.protocols.errors import SpecError

SEED_BYTES = 32
_LABEL = b"choral/graph/1"
_WORD_BYTES = 8


def neighbours(n: int, k: int, seed: bytes) -> list[tuple[int, ...]]:
    """Each party's neighbours, ascending; party p is q's neighbour exactly when q is p's.

    n >= 2 parties; k >= n - 1 gives the complete graph, k < n - 1 a k-regular one. seed: 32 public bytes.
    Raises: SpecError for n < 2, k < 1, odd k with odd n (no such graph), k = 1 (pairs alone cannot hide a sum), or
    another seed length.
    """
    ring = ring_of(n, k, seed)
    if ring is None:
        everyone = range(n)
        return [tuple(other for other in everyone if other != party) for party in everyone]
    steps = _steps(n, k)
    found: list[tuple[int, ...]] = [()] * n
    for position, party in enumerate(ring):
        found[party] = tuple(sorted(ring[(position + step) % n] for step in steps))
    return found


def neighbours_of(party: int, n: int, k: int, seed: bytes) -> tuple[int, ...]:
    """``neighbours(n, k, seed)[party]``, without building the others'. Raises SpecError unless 0 <= party < n too."""
    return around(party, n, k, ring_of(n, k, seed))


def around(party: int, n: int, k: int, ring: Sequence[int] | None) -> tuple[int, ...]:
    """``neighbours_of`` with the ring of that graph at hand. Raises: SpecError unless 0 <= party < n."""
    if not 0 <= party < n:
        raise SpecError(f"expected a party from 0 to {n - 1}, got {party}")
    if ring is None:
        return tuple(other for other in range(n) if other != party)
    position = ring.index(party)
    return tuple(sorted(ring[(position + step) % n] for step in _steps(n, k)))


def ring_of(n: int, k: int, seed: bytes) -> tuple[int, ...] | None:
    """The parties in ring order, or None for the complete graph. Raises: SpecError as :func:`neighbours` does."""
    if n < 2:
        raise SpecError(f"expected at least 2 parties, got {n}")
    if k < 1 or (k == 1 and n > 2):
        raise SpecError(f"expected at least 2 neighbours per party, got {k}")
    if len(seed) != SEED_BYTES:
        raise SpecError(f"expected a graph seed of {SEED_BYTES} bytes, got {len(seed)}")
    if k >= n - 1:
        return None
    if k % 2 and n % 2:
        raise SpecError(f"no graph has {n} parties with {k} neighbours each: one of the two numbers must be even")
    order = list(range(n))
    words = _words(seed)
    for last in range(n - 1, 0, -1):  # Knuth, The Art of Computer Programming 2, section 3.4.2, algorithm P
        chosen = _below(last + 1, words)
        order[last], order[chosen] = order[chosen], order[last]
    return tuple(order)


def _steps(n: int, k: int) -> tuple[int, ...]:
    # The Harary graph: places i and j are joined if (i - j) mod n is one of -k/2 .. -1, 1 .. k/2; for odd k also n/2.
    half = tuple(step for distance in range(1, k // 2 + 1) for step in (distance, -distance))
    return (*half, n // 2) if k % 2 else half


def _below(bound: int, words: Iterator[int]) -> int:
    """Uniform in 0 .. bound - 1."""
    limit = 2**64 - 2**64 % bound  # floor(2^64 / bound) bound: each remainder stands for as many words
    while (word := next(words)) >= limit:
        pass
    return word % bound


def _words(seed: bytes) -> Iterator[int]:
    shake = hashlib.shake_256(_LABEL + seed)
    produced = 0
    length = 4096
    while True:
        stream = shake.digest(length)  # hashlib gives prefixes only: doubling keeps the work linear
        for start in range(produced, length, _WORD_BYTES):
            yield int.from_bytes(stream[start : start + _WORD_BYTES], "little")
        produced, length = length, 2 * length
