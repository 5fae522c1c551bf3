"""What two trips let a coalition learn: the search of two_trips_search.py, beside the formula of the floor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import two_trips_search as play
from two_trips_search import TWO_TRIPS, Found, Sizes

from choral.protocols.errors import SpecError
from choral.protocols.masking.ahead.floor import honest_floor, least_survivors

UNSOUND = [Sizes(4, 0, 3, 2), Sizes(5, 1, 4, 3), Sizes(6, 2, 5, 4)]


def floor_of(sizes: Sizes) -> int:
    return honest_floor(sizes.parties, sizes.corrupt, sizes.threshold, sizes.smallest)


def never_undercut(sizes: Sizes, found: Found) -> bool:
    return found.least is not None and found.least >= floor_of(sizes) and found.sums == 1 and not found.both


def test_no_mixture_of_survivors_undercuts_the_floor_nor_opens_two_sums() -> None:
    every = list(play.every_setup(5))
    assert [
        sizes for sizes in every if not never_undercut(sizes, play.search(TWO_TRIPS, sizes, play.one_roster(sizes)))
    ] == []


def test_nor_does_any_mixture_of_rosters_and_of_packets_that_do_not_arrive() -> None:
    for sizes in play.every_setup(3):
        assert never_undercut(sizes, play.search(TWO_TRIPS, sizes, play.any_rosters(sizes), withheld=True)), sizes
    for sizes in play.every_setup(4):
        assert never_undercut(sizes, play.search(TWO_TRIPS, sizes, play.any_rosters(sizes))), sizes


@pytest.mark.slow
def test_six_parties_of_whom_any_are_corrupt_under_any_rosters() -> None:
    every = list(play.every_setup(6))
    found = {sizes: play.search(TWO_TRIPS, sizes, play.rosters_by_size(sizes)) for sizes in every}
    assert [sizes for sizes in every if not never_undercut(sizes, found[sizes])] == []
    for sizes in play.every_setup(5):  # where rosters that differ only in who is who are gone through too
        assert play.search(TWO_TRIPS, sizes, play.any_rosters(sizes)) == found[sizes], sizes


@pytest.mark.slow
def test_packets_that_do_not_arrive_help_nobody() -> None:
    for sizes in play.every_setup(4):
        whole = play.search(TWO_TRIPS, sizes, play.any_rosters(sizes))
        assert play.search(TWO_TRIPS, sizes, play.any_rosters(sizes), withheld=True) == whole, sizes


def free_combinations(sizes: Sizes, rosters: list[int | None], given: tuple[int, int, int]) -> Any:
    """The projector onto the weights whose combination of uploads is free of unknown masks, by singular values."""
    seeds, keys, pairs = given
    honest = [party for party in range(sizes.honest) if rosters[party] is not None]
    columns: dict[Any, Any] = {}
    for row, party in enumerate(honest):
        unknown = [] if seeds >> party & 1 else [("own", party, 1)]
        for peer in play.members(rosters[party] or 0):
            known = peer >= sizes.honest or pairs & play.pair(party, peer) or (keys >> party | keys >> peer) & 1
            if peer != party and not known:
                unknown.append((play.pair(party, peer), 0, 1 if party < peer else -1))
        for kind, number, sign in unknown:
            columns.setdefault((kind, number), np.zeros(len(honest)))[row] += sign
    masks = np.array([*columns.values()]).T if columns else np.zeros((len(honest), 1))
    left, values, _ = np.linalg.svd(masks)
    null = left[:, int((values > 1e-9).sum()) :]
    return null @ null.T


def test_what_is_learned_is_what_linear_algebra_says() -> None:
    draw = np.random.default_rng(0)
    sizes, learnt = Sizes(5, 1, 3, 3), 0
    for _ in range(400):
        shown = [1 << party | int(draw.integers(32)) | int(draw.choice([0, 31])) for party in range(4)]
        rosters = [None if draw.random() < 0.1 else roster for roster in shown]
        given = (
            int(draw.integers(16) | draw.integers(16)),
            int(draw.integers(16) & draw.integers(16)),
            int(draw.integers(64)),
        )
        found = play.learned(TWO_TRIPS, sizes, rosters, given)
        honest = [party for party in range(4) if rosters[party] is not None]
        unit = np.array([[one >> party & 1 for party in honest] for one in found], float).reshape(
            len(found), len(honest)
        )
        unit /= np.sqrt(unit.sum(axis=1, keepdims=True))
        assert np.allclose(unit.T @ unit, free_combinations(sizes, rosters, given))
        learnt += bool(found)
    assert learnt > 40


@pytest.mark.parametrize("sizes", UNSOUND)
def test_a_threshold_that_is_just_too_low_opens_single_vectors(sizes: Sizes) -> None:
    assert not sizes.sound
    found = play.search(TWO_TRIPS, sizes, play.one_roster(sizes))
    assert found.both  # seed and key of one party: its vector by itself
    assert not play.search(TWO_TRIPS, replace(sizes, threshold=sizes.threshold + 1), play.one_roster(sizes)).both
    with pytest.raises(SpecError, match="one sum at most is opened if 2 t >"):
        floor_of(sizes)


@pytest.mark.parametrize("sizes", UNSOUND)
def test_lasting_keys_open_two_disjoint_sums(sizes: Sizes) -> None:
    disjoint = [
        sums
        for rosters in play.one_roster(sizes)
        for _, sums in play.outcomes(play.STATIC_KEYS, sizes, rosters)
        if len(sums) == 2 and not sums[0] & sums[1]
    ]
    assert any(all(one.bit_count() == 2 for one in sums) for sums in disjoint)


def test_one_mask_per_pair_shows_the_vector_that_is_withheld() -> None:
    sizes = Sizes(4, 0, 3, 3)
    assert floor_of(sizes) == 3
    assert play.search(play.ONE_MASK_PER_PAIR, sizes, play.one_roster(sizes)).least == 1


def test_holders_that_compare_no_rosters_open_single_vectors() -> None:
    """Who is shown a small roster has few masks; holders that were shown everybody give out the keys of these few."""
    sizes = Sizes(5, 0, 3, 3)
    assert floor_of(sizes) == 2
    assert play.search(play.NO_ROSTER_CHECK, sizes, play.one_is_shown_less(sizes)).least == 1
    assert never_undercut(sizes, play.search(TWO_TRIPS, sizes, play.one_is_shown_less(sizes)))


def test_the_floor_of_ten_parties() -> None:
    assert [honest_floor(10, 3, 7, smallest) for smallest in (7, 8, 9, 10)] == [2, 4, 6, 7]
    assert [least_survivors(10, 3, 7, floor) for floor in (2, 3, 5, 7)] == [7, 8, 9, 10]


def test_a_roster_of_fewer_parties_has_no_lower_floor() -> None:
    for parties in range(2, 65):
        for corrupt in range(parties - 1):
            threshold = (parties + corrupt) // 2 + 1
            for smallest in range(max(threshold, corrupt + 2), parties + 1):
                whole = parties - corrupt - (parties - corrupt) * (parties - smallest) // (threshold - corrupt)
                assert honest_floor(parties, corrupt, threshold, smallest) == whole


@pytest.mark.parametrize("sizes", [(4, -1, 3, 3), (4, 0, 2, 3), (4, 0, 3, 2), (4, 0, 3, 5)])
def test_no_floor_is_said_of_what_has_none(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(SpecError):
        honest_floor(*sizes)


def test_where_no_set_of_survivors_has_so_many_honest_vectors() -> None:
    with pytest.raises(SpecError, match="no set of survivors of 4 parties"):
        least_survivors(4, 1, 3, 4)
