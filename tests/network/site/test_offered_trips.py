"""An offer of a sum in two or three trips: what a site is shown of it, and what it refuses it for."""

from __future__ import annotations

from typing import Any

import pytest
from site_folders import Sites, offer

from choral.network import SiteError
from choral.network.errors import OfferError
from choral.network.site.objections import objections
from choral.network.site.review import review
from choral.network.site.terms import setup_of, sum_of, sum_record
from choral.protocols import Masked
from choral.protocols.masking.ahead.floor import fewest_opened

TEN = tuple(f"p{place}" for place in range(10))


def test_four_trips_are_offered_in_the_words_of_before() -> None:
    """So an offer that was approved keeps its digest."""
    assert "trips" not in sum_record(Masked(corrupt=1))
    assert sum_of(sum_record(Masked(corrupt=1))) == Masked(corrupt=1)
    for trips in (2, 3):
        record = sum_record(Masked(corrupt=1, trips=trips))  # type: ignore[arg-type]
        assert record["trips"] == trips
        assert sum_of(record) == Masked(corrupt=1, trips=trips)  # type: ignore[arg-type]


@pytest.mark.parametrize("trips", [1, 5, "2", 2.0, True, None])
def test_other_trips_are_no_offer(trips: Any) -> None:
    with pytest.raises(OfferError, match="its secure sum cannot be read"):
        sum_of({**sum_record(Masked()), "trips": trips})


def test_noise_is_sized_by_what_may_be_opened_and_not_by_who_is_asked_for() -> None:
    two = setup_of(Masked(corrupt=3, dropouts=3, trips=2), TEN)
    assert (two.min_survivors, fewest_opened(two)) == (7, 5)
    three = setup_of(Masked(corrupt=3, dropouts=3, trips=3), TEN)
    assert (three.min_survivors, fewest_opened(three)) == (7, 7)
    assert fewest_opened(setup_of(Masked(corrupt=3, dropouts=3), TEN)) == 7


def summing(trips: Any, **settings: Any) -> Masked:
    return Masked(**{"corrupt": 1, "min_survivors": 3, "trips": trips} | settings)


@pytest.mark.parametrize("trips", [2, 3])
def test_a_person_is_told_of_the_trips_and_the_floor(trips: Any, sites: Sites) -> None:
    given = offer(summing=summing(trips))
    assert objections(sites.north, given) == []
    shown = dict(review(sites.north, given).rows)["secure sum"]
    assert f"trips {trips}: over all 4 sites, opened for the sum of 3 or more, 1 corrupt" in shown
    assert f"in {trips} trips: this process holds keys and shares of the next round between rounds" in shown
    two = "down to 2 honest sites, and no receipt names who was in the sum"
    assert (two in shown) is (trips == 2)
    assert "trips" not in dict(review(sites.north, offer(summing=summing(4))).rows)["secure sum"]


def test_a_site_says_how_many_trips_it_takes_part_in(sites: Sites) -> None:
    north = sites.settings(("[sum]", "[sum]\ntrips = [3, 4]"))
    (reason,) = objections(north, offer(summing=summing(2)))
    assert reason == "its rounds take 2 trips, which are not among 3, 4"
    assert objections(north, offer(summing=summing(3))) == []
    assert objections(north, offer(summing=summing(4))) == []


def test_a_site_lists_some_trips(sites: Sites) -> None:
    with pytest.raises(SiteError, match=r"sum.trips is empty"):
        sites.settings(("[sum]", "[sum]\ntrips = []"))


def test_the_smallest_sum_that_a_site_asks_for_holds_in_two_trips(sites: Sites) -> None:
    """Three survivors are asked for, as in four trips; a lying coordinator could open a sum over fewer."""
    large = sites.settings(("minimum_cohort = 3", "minimum_cohort = 4"))
    assert "a sum may have 2 honest vectors, this party accepts 3 at least" in objections(
        large, offer(summing=summing(2))
    )
    assert objections(large, offer(summing=summing(2, min_survivors=4, dropouts=0))) == []
    (said,) = objections(large, offer(summing=summing(4)))
    assert "smallest sum of at least 4" in said
    assert objections(large, offer(summing=summing(3)))
