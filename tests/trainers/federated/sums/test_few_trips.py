"""Training over masked sums in two and three trips: the same model, what a run says of itself, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from flat_arguments import federate

import choral
from choral import ClientPrivacy, Homomorphic, Masked, Plain
from choral.errors import ConfigError
from choral.jobs.settings import Arm, Settings, SumSettings
from choral.jobs.training import secure_sum_of
from choral.privacy import ClientPrivacyEngine, Ledger
from choral.protocols import Grouped, SpecError, SumSpec
from choral.protocols.interface import SumResult
from choral.protocols.masking.ahead.floor import fewest_opened
from choral.trainers import Participation
from choral.trainers.federated.codec import ClientCodec
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


EIGHT = TEN[:8]
LOW = {"corrupt": 1, "dropouts": 3, "min_survivors": 3}
"""Two honest vectors at least in two trips, of eight that are reported."""


def noisy(job: Any, parties: Any, out: Path, **changes: Any) -> choral.Run:
    promise = ClientPrivacy(8.0, 1e-3, clip=1.0, min_survivors=3, colluders=1)
    eight = dict.fromkeys(EIGHT, parties["north"])
    return federate(**job(parties=eight, rounds=2), out=out, **{"privacy": promise} | changes)


def noise_was_counted(run: Any) -> tuple[str, str]:
    (check,) = (each for each in choral.audit(run).checks if each.name == "Noise was counted by who survived")
    return check.verdict, check.finding


def test_survivors_whom_nobody_confirmed_are_not_counted_on(job: Any, parties: Any, tmp_path: Path) -> None:
    """In two trips the ledger keeps what the floor costs; in three it is settled by who survived, as in four."""
    two, three = (noisy(job, parties, tmp_path / str(few), secure_sum=Masked(trips=few, **LOW)) for few in (2, 3))
    stated = two.info.secure_sum
    assert stated is not None
    assert (stated["min_survivors"], stated["honest_floor"]) == (3, 2)
    assert [entry.survivors for entry in two.history if entry.round] == [8, 8]
    ledgers = [Ledger(tmp_path / few / "ledger" / "clients.jsonl") for few in "23"]
    assert [(each.shares, each.settles) for each in ledgers[0].releases] == [(2, False), (2, False)]
    assert [(each.shares, each.settles) for each in ledgers[1].releases] == [(2, False), (7, True)] * 2
    assert two.spent.epsilon > 1.5 * three.spent.epsilon
    assert noise_was_counted(two)[0] == "holds"
    assert "than are in it for certain, in two trips" in noise_was_counted(two)[1]
    report = choral.audit(two)
    assert report.participation is not None
    assert report.participation.epsilon_realised == pytest.approx(two.spent.epsilon)
    report.save(tmp_path / "audit.html")
    assert "the fewest that a sum in two trips may hold" in (tmp_path / "audit.html").read_text()
    assert noise_was_counted(three)[0] == "holds"
    # A program that settles by who is said to have survived, and says that it took two trips:
    edited = replace(three, info=msgspec.structs.replace(three.info, secure_sum=stated))
    verdict, finding = noise_was_counted(edited)
    assert verdict == "violated"
    assert "charged for 7 noise shares, 2 are in it for certain, in two trips (2 sums in all)" in finding


def test_more_than_the_noise_is_sized_for_is_counted_where_the_sum_is_sure_of_it() -> None:
    """Seven are asked for, of eight; six are sure to be in; two of their shares the colluders may know."""
    summing = Masked(trips=2, corrupt=2, dropouts=1, min_survivors=6)
    promise, ledger = ClientPrivacy(8.0, 1e-3, clip=1.0, min_survivors=4, colluders=2), Ledger(None)
    engine = ClientPrivacyEngine(promise, clients=8, length=3, rounds=2, ledger=ledger)
    codec = ClientCodec(EIGHT, engine)
    session = summing.open(codec.spec)
    sure = session.statement["min_survivors"]
    assert 4 < sure < 8
    codec.check(session)
    codec.begin(EIGHT, lambda: bytes(32))
    none = np.zeros(codec.spec.length, np.int64)
    codec.decode(SumResult(total=none, survivors=EIGHT, bytes_up={}, bytes_down={}))
    assert [(each.shares, each.settles) for each in ledger.releases] == [(2, False), (sure - 2, True)]


def test_noise_counts_on_no_more_colluders_than_the_sum_withstands() -> None:
    """One colluder of the noise against none of the sum: in two trips as in four; not where it does not matter."""
    three, four = {"corrupt": 0, "dropouts": 3, "min_survivors": 4}, {"corrupt": 1, "dropouts": 2, "min_survivors": 4}
    promises = {noise: ClientPrivacy(8.0, 1e-3, clip=1.0, noise=noise) for noise in ("local", "central")}  # type: ignore[arg-type]
    promises["distributed"] = ClientPrivacy(8.0, 1e-3, clip=1.0, min_survivors=4, colluders=1)
    for noise, promise in promises.items():
        codec = ClientCodec(EIGHT, ClientPrivacyEngine(promise, clients=8, length=3, rounds=1, ledger=Ledger(None)))
        for trips in (2, 4):
            codec.check(Masked(trips=trips, **four).open(codec.spec))  # type: ignore[arg-type]
            weak = Masked(trips=trips, **three).open(codec.spec)  # type: ignore[arg-type]
            if noise != "distributed":
                codec.check(weak)
                continue
            with pytest.raises(ConfigError, match="withstands 0 corrupt clients, but the noise 1 colluders"):
                codec.check(weak)
        codec.check(Plain().open(codec.spec))
    with pytest.raises(ConfigError, match="withstands 0 corrupt clients"):
        codec.check(Homomorphic(key="shared", min_survivors=4).open(codec.spec))  # any one party opens all of them


@pytest.mark.parametrize("trips", [2, 3])
def test_what_few_trips_are_refused_for(trips: Any) -> None:
    with pytest.raises(SpecError, match="groups with sums in two or three trips"):
        Grouped(sums=Masked(corrupt=1, trips=trips), robust="median", group=5)


@pytest.mark.parametrize(("before", "now"), [(4, 2), (2, 4), (3, 4)])
def test_a_run_is_resumed_in_as_many_trips(before: Any, now: Any, job: Any, parties: Any, tmp_path: Path) -> None:
    """With the same smallest sum; only whether the survivors of one are confirmed differs."""
    five = dict.fromkeys(TEN[:5], parties["north"])
    sums = {few: Masked(corrupt=1, dropouts=1, min_survivors=4, trips=few) for few in (before, now)}
    run = federate(**job(parties=five, rounds=1), secure_sum=sums[before], out=tmp_path / "run")
    stated = run.info.secure_sum
    assert stated is not None
    assert stated["min_survivors"] == 4
    again = job(parties=five, rounds=2)
    with pytest.raises(ConfigError, match=f"trips was {before}, now it is {now}"):
        federate(**again, secure_sum=sums[now], out=tmp_path / "run", resume=True)
    assert len(federate(**again, secure_sum=sums[before], out=tmp_path / "run", resume=True).history) == 3


def test_rosters_of_another_size_are_promised_no_less(job: Any, parties: Any) -> None:
    """A seventh party brings a second dropout, and the floor falls: said before anything is trained, not in a round."""
    ten = dict.fromkeys(TEN, parties["north"])
    rule = Participation(cohort=9, least=6)
    given = job(parties=ten, rounds=1)
    specs = (SumSpec(parties=TEN[:n], length=1, bound=1) for n in (6, 9))
    few, many = (Masked(corrupt=1, trips=2).setup(spec, session=bytes(16)) for spec in specs)
    assert (few.floor, many.floor) == (4, 5)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="promises min_survivors = 5 over 6 parties, and 4 over 7") as error:
        federate(**given, participation=rule, secure_sum=Masked(corrupt=1, trips=2))
    assert error.value.hint == "give it min_survivors=4, for both, or dropouts as a count"
    federate(**given, participation=rule, secure_sum=Masked(corrupt=1, dropouts=1, trips=2))


def test_a_smallest_sum_that_is_asked_for_is_what_rosters_of_every_size_are_promised(job: Any, parties: Any) -> None:
    """At worst five of six are in a sum, and four of seven: four are asked for and stated, and four there are."""
    ten = dict.fromkeys(TEN, parties["north"])
    summing = Masked(corrupt=1, dropouts=1, min_survivors=4, trips=2)
    specs = (SumSpec(parties=TEN[:n], length=1, bound=1, directory=10) for n in (6, 7))
    assert [fewest_opened(summing.setup(spec, session=bytes(16))) for spec in specs] == [5, 4]
    run = federate(**job(parties=ten, rounds=1), participation=Participation(cohort=9, least=6), secure_sum=summing)
    stated = run.info.secure_sum or {}
    assert (stated["min_survivors"], stated["honest_floor"]) == (4, 3)
    assert "one sum over at least 3 of the others" in stated["trust"]


def test_trips_in_a_settings_file() -> None:
    def made(**given: Any) -> Any:
        return secure_sum_of(Settings(secure_sum=SumSettings(**given)), Arm())

    assert made(trips=2, corrupt=1) == Masked(corrupt=1, trips=2)
    with pytest.raises(ConfigError, match=r"secure_sum.trips = 2 is for masked sums"):
        made(kind="homomorphic", trips=2)
    assert made(kind="homomorphic") == Homomorphic()
