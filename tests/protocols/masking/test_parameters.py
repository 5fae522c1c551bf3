"""(k, t) against a published table, against scipy, and against every possible choice of corrupt and missing parties."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from choral.protocols.errors import SpecError
from choral.protocols.masking import graph, parameters
from choral.protocols.masking.parameters import InfeasibleError, Parameters, choose, harary

HONEST, MALICIOUS = "semi-honest", "malicious"

# google-parfait/federated-compute, fcp/secagg/server/graph_parameter_finder_test.cc (Apache-2.0): parties, corrupt,
# dropouts, CURIOUS_SERVER or SEMI_MALICIOUS_SERVER, degree, threshold. The rows at .1 are from its finder.
PUBLISHED = [
    (100, 0.45, 0.45, HONEST, 92, 46),
    (1000, 0.45, 0.45, HONEST, 822, 417),
    (10000, 0.45, 0.45, HONEST, 3494, 1771),
    (100, 0.33, 0.33, HONEST, 68, 34),
    (1000, 0.33, 0.33, HONEST, 286, 150),
    (10000, 0.33, 0.33, HONEST, 422, 221),
    (100000, 0.33, 0.33, HONEST, 480, 251),
    (1000000, 0.33, 0.33, HONEST, 518, 270),
    (100, 0.3, 0.3, MALICIOUS, 92, 62),
    (1000, 0.3, 0.3, MALICIOUS, 872, 584),
    (100, 0.05, 0.33, HONEST, 28, 6),
    (1000, 0.05, 0.33, HONEST, 72, 24),
    (10000, 0.05, 0.33, HONEST, 86, 29),
    (100000, 0.05, 0.33, HONEST, 96, 32),
    (1000000, 0.05, 0.33, HONEST, 102, 34),
    (100, 0.05, 0.33, MALICIOUS, 72, 39),
    (1000, 0.05, 0.33, MALICIOUS, 398, 223),
    (10000, 0.05, 0.33, MALICIOUS, 746, 420),
    (100000, 0.05, 0.33, MALICIOUS, 882, 496),
    (1000000, 0.05, 0.33, MALICIOUS, 970, 545),
    (100, 0.33, 0.05, HONEST, 34, 29),
    (1000, 0.33, 0.05, HONEST, 78, 60),
    (10000, 0.33, 0.05, HONEST, 92, 70),
    (100000, 0.33, 0.05, HONEST, 102, 77),
    (1000000, 0.33, 0.05, HONEST, 110, 83),
    (100, 0.33, 0.05, MALICIOUS, 42, 37),
    (1000, 0.33, 0.05, MALICIOUS, 132, 109),
    (10000, 0.33, 0.05, MALICIOUS, 178, 146),
    (100000, 0.33, 0.05, MALICIOUS, 196, 160),
    (1000000, 0.33, 0.05, MALICIOUS, 212, 173),
    (100, 0.05, 0.05, HONEST, 12, 6),
    (1000, 0.05, 0.05, HONEST, 30, 17),
    (10000, 0.05, 0.05, HONEST, 34, 20),
    (100000, 0.05, 0.05, HONEST, 36, 21),
    (1000000, 0.05, 0.05, HONEST, 38, 22),
    (100, 0.05, 0.05, MALICIOUS, 16, 11),
    (1000, 0.05, 0.05, MALICIOUS, 52, 37),
    (10000, 0.05, 0.05, MALICIOUS, 62, 44),
    (100000, 0.05, 0.05, MALICIOUS, 68, 48),
    (1000000, 0.05, 0.05, MALICIOUS, 74, 52),
    (100, 0.1, 0.1, HONEST, 22, 11),
    (100, 0.1, 0.1, MALICIOUS, 32, 22),
    (1000, 0.1, 0.1, HONEST, 48, 27),
    (1000, 0.1, 0.1, MALICIOUS, 96, 67),
    (10000, 0.1, 0.1, HONEST, 54, 31),
    (10000, 0.1, 0.1, MALICIOUS, 122, 85),
    (100, 0.33, 0.0, HONEST, 26, 25),
    (1000, 0.33, 0.0, HONEST, 38, 36),
    (1000000, 0.33, 0.0, HONEST, 50, 47),
    (100, 0.33, 0.0, MALICIOUS, 26, 26),
    (1000, 0.33, 0.0, MALICIOUS, 38, 37),
    (1000000, 0.33, 0.0, MALICIOUS, 50, 49),
    (100, 0.0, 0.33, HONEST, 26, 2),
    (1000, 0.0, 0.33, HONEST, 38, 2),
    (1000000, 0.0, 0.33, HONEST, 50, 2),
    (100, 0.0, 0.33, MALICIOUS, 68, 35),
    (1000, 0.0, 0.33, MALICIOUS, 228, 115),
    (1000000, 0.0, 0.33, MALICIOUS, 410, 206),
    (100, 0.0, 0.0, HONEST, 2, 2),
    (1000, 0.0, 0.0, MALICIOUS, 2, 2),
]


@pytest.mark.parametrize(("n", "corrupt", "dropouts", "server", "k", "t"), PUBLISHED)
def test_the_published_table(n: int, corrupt: float, dropouts: float, server: Any, k: int, t: int) -> None:
    found = harary(n, round(corrupt * n), round(dropouts * n), server)
    assert found is not None
    assert (found.neighbours, found.threshold, found.holders) == (k, t, k)
    chosen = choose(n, corrupt=corrupt, dropouts=dropouts, server=server)
    assert chosen == choose(n, corrupt=round(corrupt * n), dropouts=round(dropouts * n), server=server)
    for one in (found, chosen):
        assert one.security_bits > 40
        assert one.correctness_bits > 20
    if server == HONEST:
        assert chosen == found
    else:  # the published finder does not count a ring that a malicious server cuts in two
        assert k <= chosen.neighbours <= 1.15 * k
        assert t <= chosen.threshold <= 1.16 * t


@pytest.mark.parametrize(
    ("corrupt", "dropouts", "server", "k", "t"),
    [(3, 3, HONEST, 8, 4), (0, 3, MALICIOUS, 8, 5), (3, 0, HONEST, 4, 4), (3, 0, MALICIOUS, 4, 4)],
)
def test_the_published_table_at_ten_parties(corrupt: int, dropouts: int, server: Any, k: int, t: int) -> None:
    found = harary(10, corrupt, dropouts, server)
    assert found is not None
    assert (found.neighbours, found.threshold) == (k, t)


def test_where_the_published_finder_forgets_a_check() -> None:
    """At 10 parties, .05 and .33, it gives k = 4, t = 2: it raises t from 1 to 2 after having tested t = 1. Three
    missing parties can then leave one of four neighbours: one round in three fails, not one in 2^20."""
    failing = sum(
        any(sum((p + d) % 10 in gone for d in (1, 2, -1, -2)) > 2 for p in range(10))
        for gone in combinations(range(10), 3)
    )
    assert failing / math.comb(10, 3) > 0.2
    found = harary(10, 0, 3, HONEST)
    assert found is not None
    assert (found.neighbours, found.threshold) == (6, 2)


def cut_in_two(n: int, corrupt: int, k: int, t: int) -> float:
    """The union bound over pairs of disjoint runs of k/2 places that hold t - k/2 corrupt parties each, summed out."""
    half, least = k // 2, t - k // 2
    both = sum(
        hypergeom.pmf(many, n, corrupt, half) * hypergeom.sf(least - 1, n - half, corrupt - many, half)
        for many in range(least, min(half, corrupt) + 1)
    )
    return float(n * (n - k + 1) / 2 * both)


@pytest.mark.parametrize(
    ("n", "fraction", "dropouts", "published"),
    [
        (500, 0.1, 0.1, 36.7),
        (1000, 0.05, 0.05, 39.1),
        (1000, 0.1, 0.1, 36.6),
        (10000, 0.05, 0.05, 34.8),
        (10000, 0.1, 0.1, 34.2),
        (1000, 0.33, 0.0, 33.1),
        (200, 0.1, 0.1, math.inf),
    ],
)
def test_a_malicious_server_cannot_cut_the_ring_in_two(
    n: int, fraction: float, dropouts: float, published: float
) -> None:
    """Bits against that event alone: too few with the published parameters, over 40 with those that are chosen."""
    bad, gone = round(fraction * n), round(dropouts * n)
    table = harary(n, bad, gone, MALICIOUS)
    assert table is not None
    found = cut_in_two(n, bad, table.neighbours, table.threshold)
    assert (-math.log2(found) if found else math.inf) == pytest.approx(published, abs=0.2)
    chosen = choose(n, corrupt=bad, dropouts=gone, server=MALICIOUS)
    cut = cut_in_two(n, bad, chosen.neighbours, chosen.threshold)
    exposed = n * hypergeom(n, bad, chosen.neighbours).sf(2 * chosen.threshold - chosen.neighbours - 1)
    assert cut + exposed <= 2.0**-chosen.security_bits * (1 + 1e-6)
    assert chosen.security_bits > 40
    if cut:  # the closed form gives away little
        bound = parameters._log_split(n, chosen.neighbours, chosen.threshold, bad)
        assert -1e-6 < bound - math.log(cut) < math.log(1.5)


def splittable(n: int, k: int, t: int, corrupt: set[int]) -> bool:
    """Whether two groups of honest parties can exist that each member has t holders in its own group or corrupt: every
    way to put each honest party into the one, the other or neither is tried."""
    honest = [party for party in range(n) if party not in corrupt]
    codes = np.arange(3 ** len(honest))
    group = np.zeros((n, codes.size), np.int8)
    for place, party in enumerate(honest):
        group[party] = codes // 3**place % 3
    possible = (group == 1).any(axis=0) & (group == 2).any(axis=0)
    steps = [step for step in range(-(k // 2), k // 2 + 1) if step]
    for party in honest:
        around = [(party + step) % n for step in steps]
        colluding = len(corrupt.intersection(around))
        for label in (1, 2):
            holders = (group[around] == label).sum(axis=0) + colluding
            possible &= (group[party] != label) | (holders >= t)
    return bool(possible.any())


@pytest.mark.parametrize(
    ("n", "k", "t", "corrupt", "splits"),
    [(12, 4, 3, 2, 2), (10, 6, 5, 4, 0), (12, 8, 6, 4, 1), (13, 6, 5, 4, 4), (10, 4, 3, 2, 1)],
)
def test_whoever_splits_the_honest_holds_two_disjoint_runs(n: int, k: int, t: int, corrupt: int, splits: int) -> None:
    """For every placing of the corrupt (up to rotation) on which nobody has 2t - k corrupt neighbours."""
    half, least, seen = k // 2, t - k // 2, 0
    for places in combinations(range(1, n), corrupt - 1):
        bad = {0, *places}
        rotations = [sorted((party - shift) % n for party in bad) for shift in bad]
        near = [len(bad & {(p + d) % n for d in range(-half, half + 1)}) for p in range(n) if p not in bad]
        if sorted(bad) != min(rotations) or max(near) >= 2 * t - k or not splittable(n, k, t, bad):
            continue
        seen += 1
        runs = [s for s in range(n) if len(bad & {(s + d) % n for d in range(half)}) >= least]
        assert any(half <= (one - other) % n <= n - half for one in runs for other in runs), bad
    assert seen == splits


def slow_oracle(
    n: int, corrupt: int, dropouts: int, server: str, security: float, correctness: float, split: bool = False
) -> Any:
    """The rule from its sentences, with scipy's hypergeometric distribution and exact binomials."""
    event = 2.0 ** -(security + 1)
    bad = corrupt + dropouts
    for k in range(2, n - 1, 2):
        cut = n * (n - k - 1) / 2 * math.comb(n - k, bad - k) / math.comb(n, bad) if bad >= k else 0
        if cut >= event:
            continue
        neighbours, survivors = hypergeom(n, corrupt, k), hypergeom(n, n - dropouts, k)
        for t in range(2, k + 1):
            lost = t if server == HONEST else 2 * t - k
            insecure = n * neighbours.sf(lost - 1) >= event
            if split and server == MALICIOUS:
                insecure |= first_run_at_least(n, corrupt, k, t) >= event
            if not insecure and n * survivors.cdf(t - 1) < 2.0**-correctness:
                return k, t
            if not insecure:
                break
    return None


def first_run_at_least(n: int, corrupt: int, k: int, t: int) -> float:
    """cut_in_two, with the second run as if the first had no more corrupt than it needs."""
    half, least = k // 2, t - k // 2
    if least <= 0:
        return 1.0
    if 2 * least > corrupt:
        return 0.0
    second = hypergeom.sf(least - 1, n - half, corrupt - least, half)
    return float(n * (n - k + 1) / 2 * hypergeom.sf(least - 1, n, corrupt, half) * second)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(5, 250),
    corrupt=st.floats(0, 0.5),
    dropouts=st.floats(0, 0.5),
    server=st.sampled_from([HONEST, MALICIOUS]),
    security=st.sampled_from([8, 20, 40]),
    correctness=st.sampled_from([5, 20]),
    split=st.booleans(),
)
def test_the_smallest_k_and_t_by_scipy(
    n: int, corrupt: float, dropouts: float, server: Any, security: float, correctness: float, split: bool
) -> None:
    bad, gone = int(corrupt * n), int(dropouts * n)
    found = harary(n, bad, gone, server, security, correctness, split=split)
    expected = slow_oracle(n, bad, gone, server, security, correctness, split)
    assert (found and (found.neighbours, found.threshold)) == expected


@pytest.mark.parametrize(
    ("n", "marked", "k"), [(20, 7, 6), (100, 0, 10), (100, 100, 10), (1000, 330, 286), (10**6, 50_000, 74)]
)
def test_tails_by_scipy(n: int, marked: int, k: int) -> None:
    ours = parameters._log_tails(n, marked, k)
    theirs = hypergeom(n, marked, k).logsf(list(range(-1, k + 1)))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == other or math.isclose(mine, other, rel_tol=1e-6, abs_tol=1e-6) or (mine < -600 and other < -600)


def every_choice(n: int, count: int, event: Callable[[set[int]], bool]) -> float:
    chosen = [set(members) for members in combinations(range(n), count)]
    return sum(map(event, chosen)) / len(chosen)


def connected(nodes: set[int], adjacent: list[set[int]]) -> bool:
    if not nodes:
        return True
    frontier = [next(iter(nodes))]
    reached = set(frontier)
    while frontier:
        new = (adjacent[frontier.pop()] & nodes) - reached
        reached |= new
        frontier += new
    return reached == nodes


def true_probabilities(chosen: Parameters) -> tuple[float, float]:
    """Of exposing someone or cutting the graph, and of failing, over every set of corrupt and of missing parties."""
    n, k, t = chosen.parties, chosen.neighbours, chosen.threshold
    adjacent = [set(others) for others in graph.neighbours(n, k, bytes(32))]
    lost = t if chosen.server == HONEST else 2 * t - k
    exposed = every_choice(n, chosen.corrupt, lambda bad: any(len(bad & near) >= lost for near in adjacent))
    cut = every_choice(n, chosen.corrupt + chosen.dropouts, lambda bad: not connected(set(range(n)) - bad, adjacent))
    failed = every_choice(n, chosen.dropouts, lambda gone: any(k - len(gone & near) < t for near in adjacent))
    return exposed + cut, failed


@pytest.mark.parametrize("server", [HONEST, MALICIOUS])
@pytest.mark.parametrize(("n", "corrupt", "dropouts"), [(14, 2, 2), (16, 3, 2), (18, 2, 1), (15, 1, 3)])
def test_stated_probabilities_bound_the_true_ones(n: int, corrupt: int, dropouts: int, server: Any) -> None:
    ran = 0
    for bits in (1, 2, 3, 4, 6):
        chosen = harary(n, corrupt, dropouts, server, bits, bits)
        if chosen is None:
            continue
        ran += 1
        insecure, failed = true_probabilities(chosen)
        rounding = 1 + 1e-9  # where the bad events exclude one another the union bound is exact
        assert insecure <= 2.0**-chosen.security_bits * rounding
        assert failed <= 2.0**-chosen.correctness_bits * rounding
        assert min(chosen.security_bits, chosen.correctness_bits) >= bits
    assert ran >= 3


def test_the_cut_bound_is_not_idle() -> None:
    """On a thin ring the cut is the event that decides."""
    n, bad, k = 16, 4, 2
    adjacent = [set(others) for others in graph.neighbours(n, k, bytes(32))]
    cut = every_choice(n, bad, lambda gone: not connected(set(range(n)) - gone, adjacent))
    bound = math.exp(parameters._log_disconnected(n, k, bad))
    assert 0.5 < cut <= bound


@pytest.mark.parametrize(("n", "k", "bad"), [(9, 2, 2), (9, 4, 4), (12, 4, 7), (100, 10, 30), (1000, 6, 6)])
def test_the_cut_bound_is_the_number_of_pairs_of_gaps_by_the_chance_of_one(n: int, k: int, bad: int) -> None:
    """Two gaps of k/2 places with a place between them on either side; the chance that k given places are all gone."""
    starts = combinations(range(n), 2) if n <= 100 else ()
    pairs = sum(k // 2 < b - a < n - k // 2 for a, b in starts) or n * (n - k - 1) // 2
    chance = math.comb(n - k, bad - k) / math.comb(n, bad)
    assert math.exp(parameters._log_disconnected(n, k, bad)) == pytest.approx(pairs * chance, rel=1e-9)
    assert parameters._log_disconnected(n, k, k - 1) == -math.inf


@pytest.mark.parametrize(("n", "k", "t", "corrupt"), [(9, 4, 3, 2), (12, 4, 4, 4), (100, 10, 7, 20), (30, 5, 4, 6)])
def test_the_split_bound_is_the_number_of_pairs_of_runs_by_the_chance_of_one(
    n: int, k: int, t: int, corrupt: int
) -> None:
    """Two disjoint runs of k/2 places, as a set; the first has enough colluders, the second of the places left."""
    half, enough = k // 2, t - (k - k // 2)
    pairs = sum(half <= b - a <= n - half for a, b in combinations(range(n), 2))
    first = hypergeom(n, corrupt, half).sf(enough - 1)
    second = hypergeom(n - half, corrupt - enough, half).sf(enough - 1)
    assert parameters._log_split(n, k, t, corrupt) == pytest.approx(
        min(0.0, math.log(pairs * first * second)), rel=1e-9
    )
    assert parameters._log_split(n, k, t, 2 * enough - 1) == -math.inf
    assert parameters._log_split(n, k, k - half, corrupt) == 0.0


@pytest.mark.parametrize(
    ("n", "corrupt", "dropouts"), [(70, 21, 0), (200, 180, 0), (300, 30, 15), (1000, 100, 100), (1000, 50, 300)]
)
@pytest.mark.parametrize("server", [HONEST, MALICIOUS])
def test_the_bits_stated_are_those_of_the_graph_by_scipy(n: int, corrupt: int, dropouts: int, server: Any) -> None:
    """Without dropouts t = k, so that all k neighbours of a party would have to collude."""
    found = choose(n, corrupt=corrupt, dropouts=dropouts, server=server)
    k, t = found.neighbours, found.threshold
    assert found.holders == k < n - 1
    if server == MALICIOUS:
        cut, many = parameters._log_split(n, k, t, corrupt), 2 * t - k
    else:
        cut, many = parameters._log_disconnected(n, k, corrupt + dropouts), t
    exposed = n * hypergeom(n, corrupt, k).sf(many - 1)
    stuck = n * hypergeom(n, dropouts, k).sf(k - t)
    bits = (-math.log2(math.exp(cut) + exposed), -math.log2(stuck) if stuck else math.inf)
    assert (found.security_bits, found.correctness_bits) == pytest.approx(bits, rel=1e-6)
    assert parameters.achieved(n, k, t, corrupt=corrupt, dropouts=dropouts, server=server) == pytest.approx(
        bits, rel=1e-6
    )


def test_a_neighbour_opposite_does_not_hold_a_ring_together() -> None:
    """With odd k the last neighbour lies across the ring: gaps of (k - 1) / 2 places count as cuts."""
    n, k, t, corrupt, dropouts = 1000, 21, 12, 20, 450
    cut = parameters._log_disconnected(n, k - 1, corrupt + dropouts)
    exposed = n * hypergeom(n, corrupt, k).sf(t - 1)
    security, _ = parameters.achieved(n, k, t, corrupt=corrupt, dropouts=dropouts, server=HONEST)
    assert security == pytest.approx(max(0.0, -math.log2(math.exp(cut) + exposed)), abs=1e-9)
    assert 0.0 < security < -parameters._log_disconnected(n, k + 1, corrupt + dropouts) / math.log(2) - 1.0


# The complete graph


@pytest.mark.parametrize("n", range(2, 12))
@pytest.mark.parametrize("server", [HONEST, MALICIOUS])
def test_small_cohorts_exhaustively(n: int, server: Any) -> None:
    """Every pair of counts: the threshold is the least safe one, or there is none and choose says so."""
    for corrupt in range(n):
        for dropouts in range(n):
            # Of n holders, colluders answer for both secrets, others for one; t shares of either kind are needed.
            def safe(t: int, corrupt: int = corrupt) -> bool:
                return corrupt < t if server == HONEST else 2 * t > (n - corrupt) + 2 * corrupt

            possible = [t for t in range(2, n - dropouts + 1) if safe(t)] if corrupt <= n - 2 else []
            if not possible:
                with pytest.raises(InfeasibleError):
                    choose(n, corrupt=corrupt, dropouts=dropouts, server=server)
                continue
            chosen = choose(n, corrupt=corrupt, dropouts=dropouts, server=server)
            assert chosen == Parameters(
                parties=n,
                neighbours=n - 1,
                threshold=possible[0],
                holders=n,
                corrupt=corrupt,
                dropouts=dropouts,
                server=server,
                security_bits=math.inf,
                correctness_bits=math.inf,
            )
            assert chosen.complete


@pytest.mark.parametrize("n", range(4, 64))
def test_two_thirds_is_enough_for_fewer_than_a_third_corrupt(n: int) -> None:
    """Bonawitz et al. 2017: floor(2n/3) + 1 for corrupt < n/3; ours is never above it."""
    corrupt = (n - 1) // 3
    t = choose(n, corrupt=corrupt, dropouts=0, server=MALICIOUS).threshold
    assert n + corrupt < 2 * t <= n + corrupt + 2
    assert t <= 2 * n // 3 + 1


def test_fractions_round_up() -> None:
    """5 % of 10 parties is one party: the published finder's floor would plan for nobody."""
    assert choose(10, corrupt=0.05, dropouts=0.05, server=HONEST) == choose(10, corrupt=1, dropouts=1, server=HONEST)
    assert choose(100, corrupt=0.07, dropouts=0.29, server=HONEST).corrupt == 7
    assert choose(100, corrupt=0.07, dropouts=0.29, server=HONEST).dropouts == 29
    assert choose(70, corrupt=0.05, dropouts=0.0, server=HONEST).corrupt == 4
    assert choose(10, corrupt=0.0, dropouts=0.0, server=HONEST).corrupt == 0


def test_complete_below_harary_above() -> None:
    limit = parameters.COMPLETE_UP_TO
    assert choose(limit, corrupt=0.05, dropouts=0.05, server=HONEST).complete
    assert not choose(limit + 1, corrupt=0.05, dropouts=0.05, server=HONEST).complete


def test_complete_where_no_sparser_graph_will_do() -> None:
    chosen = choose(100, corrupt=49, dropouts=25, server=MALICIOUS)
    assert harary(100, 49, 25, MALICIOUS) is None
    assert chosen.complete
    assert (chosen.threshold, chosen.holders) == (75, 100)


@pytest.mark.parametrize(
    ("n", "corrupt", "dropouts", "server", "hint"),
    [
        (10, 5, 5, HONEST, "at most 4 dropouts with 5 corrupt; or at most 4 corrupt with 5 dropouts"),
        (10, 3, 4, MALICIOUS, "at most 3 dropouts with 3 corrupt; or at most 1 corrupt with 4 dropouts"),
        (1000, 0.5, 0.5, HONEST, "at most 499 dropouts with 500 corrupt; or at most 499 corrupt with 500 dropouts"),
        (
            1000,
            0.33,
            0.34,
            MALICIOUS,
            "at most 334 dropouts with 330 corrupt; or at most 319 corrupt with 340 dropouts",
        ),
        (3, 1, 1, MALICIOUS, "at most 0 dropouts with 1 corrupt; or at most 0 corrupt with 1 dropouts"),
    ],
)
def test_infeasible_requests_say_what_is_feasible(n: int, corrupt: Any, dropouts: Any, server: Any, hint: str) -> None:
    with pytest.raises(InfeasibleError) as caught:
        choose(n, corrupt=corrupt, dropouts=dropouts, server=server)
    assert caught.value.hint == hint
    for option in hint.split("; or "):
        words = option.split()
        numbers = {words[3]: int(words[2]), words[6]: int(words[5])}
        choose(n, corrupt=numbers["corrupt"], dropouts=numbers["dropouts"], server=server)


@pytest.mark.parametrize("corrupt", [2, 0.6])
def test_one_honest_party_alone_cannot_be_hidden(corrupt: Any) -> None:
    with pytest.raises(InfeasibleError, match="honest"):
        choose(3, corrupt=corrupt, dropouts=0, server=HONEST)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 1},
        {"n": 1_000_001},
        {"corrupt": -1},
        {"corrupt": -0.1},
        {"corrupt": 1.0},
        {"corrupt": 100},
        {"corrupt": True},
        {"corrupt": "5%"},
        {"corrupt": math.nan},
        {"dropouts": 100},
        {"dropouts": math.inf},
        {"server": "honest"},
        {"security_bits": 0},
        {"security_bits": math.nan},
        {"correctness_bits": -1},
        {"correctness_bits": 1000},
    ],
)
def test_values_out_of_range(wrong: dict[str, Any]) -> None:
    request: dict[str, Any] = {"n": 100, "corrupt": 0.1, "dropouts": 0.1, "server": HONEST, **wrong}
    with pytest.raises(SpecError):
        choose(request.pop("n"), **request)
