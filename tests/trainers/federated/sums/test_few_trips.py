"""Training over masked sums in two and three trips: the same model, what a run says of itself, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flat_arguments import federate

import choral
from choral import ClientPrivacy, Homomorphic, Masked
from choral.errors import ConfigError
from choral.jobs.settings import Arm, Settings, SumSettings
from choral.jobs.training import secure_sum_of
from choral.network.site.offer import OfferError
from choral.network.site.terms import sum_of, sum_record
from choral.protocols import Grouped, SpecError
from choral.trainers import Participation
from choral.trainers.federated.record_shares.checks import fewest_survivors

TEN = tuple(f"p{place}" for place in range(10))


@pytest.mark.parametrize("trips", [2, 3])
def test_a_model_is_the_same_bit_by_bit(trips: Any, job: Any, tmp_path: Path) -> None:
    runs = [
        federate(**job(dropout_rate=0.2, rounds=4), secure_sum=Masked(trips=few), out=tmp_path / str(few))
        for few in (4, trips)
    ]
    four, few = runs
    assert [entry.survivors for entry in four.history] == [entry.survivors for entry in few.history]
    assert min(entry.survivors for entry in few.history[1:]) < 3  # whoever drops out is back in the next round
    assert all(torch.equal(four.state[name], few.state[name]) for name in four.state)
    stated = few.info.secure_sum
    assert stated is not None
    assert (stated["trips"], stated["honest_floor"]) == (trips, 2)
    assert (tmp_path / str(trips) / "receipts").exists() is (trips == 3)
    assert (tmp_path / "4" / "receipts").exists()
    if trips == 2:
        found = choral.audit(few)
        assert found.verdict == "holds"
        found.save(tmp_path / "audit.html")
        assert "one sum over at least 2 of the others" in (tmp_path / "audit.html").read_text()


def test_noise_is_sized_by_the_fewest_that_a_lying_server_can_leave_in_a_sum() -> None:
    """Seven are asked for either way: in two trips two of them and the three that may be corrupt are sure to be in."""
    everyone = Participation()
    four, two = (Masked(corrupt=3, dropouts=3, trips=trips) for trips in (4, 2))
    assert fewest_survivors(four, everyone, TEN) == 7
    assert fewest_survivors(two, everyone, TEN) == 5
    assert fewest_survivors(Masked(corrupt=3, dropouts=2, min_survivors=7, trips=2), everyone, TEN) == 7


def test_client_level_noise_asks_for_as_many(job: Any, parties: Any) -> None:
    ten = dict.fromkeys(TEN, parties["north"])
    privacy = ClientPrivacy(8.0, 1e-3, clip=1.0, noise="distributed", min_survivors=7, colluders=3)
    given = job(parties=ten, rounds=1)
    with pytest.raises(ConfigError, match="may open sums of 5 clients, but the noise is sized for 7"):
        federate(**given, privacy=privacy, secure_sum=Masked(corrupt=3, dropouts=3, trips=2))
    run = federate(**given, privacy=privacy, secure_sum=Masked(corrupt=3, dropouts=2, min_survivors=7, trips=2))
    stated = run.info.secure_sum
    assert stated is not None
    assert (stated["min_survivors"], stated["asked_survivors"], stated["honest_floor"]) == (7, 8, 4)


@pytest.mark.parametrize("trips", [2, 3])
def test_what_few_trips_are_refused_for(trips: Any, job: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"a sum in {trips} trips with a transcript"):
        federate(**job(), secure_sum=Masked(trips=trips), transcript="messages", out=tmp_path / "run")
    with pytest.raises(SpecError, match="groups with sums in two or three trips"):
        Grouped(sums=Masked(corrupt=1, trips=trips), robust="median", group=5)
    with pytest.raises(OfferError, match="sums in two or three trips are for rehearsals"):
        sum_record(Masked(trips=trips))
    with pytest.raises(OfferError, match="sums in two or three trips are for rehearsals"):
        sum_of({**sum_record(Masked()), "trips": trips})
    assert sum_of(sum_record(Masked(corrupt=1))) == Masked(corrupt=1)


def test_trips_in_a_settings_file() -> None:
    def made(**given: Any) -> Any:
        return secure_sum_of(Settings(secure_sum=SumSettings(**given)), Arm())

    assert made(trips=2, corrupt=1) == Masked(corrupt=1, trips=2)
    with pytest.raises(ConfigError, match=r"secure_sum.trips = 2 is for masked sums"):
        made(kind="homomorphic", trips=2)
    assert made(kind="homomorphic") == Homomorphic()
