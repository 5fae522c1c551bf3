"""`federate` with a `Participation`: who is selected, who answers in time, who drops out where, what is recorded."""

from __future__ import annotations

import itertools
import json
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from flat_arguments import federate
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from choral import ClientPrivacy, Homomorphic, Masked, Plain, Privacy
from choral.audits import audit
from choral.errors import ConfigError
from choral.protocols.errors import TooFewSurvivorsError
from choral.protocols.interface import STEPS, SumSpec
from choral.trainers import (
    DANE,
    FSVRG,
    ONCE_A_DAY,
    Availability,
    Clock,
    CoCoA,
    Device,
    Dropouts,
    Participation,
    Run,
    Scaffold,
    VirtualParties,
)
from choral.trainers.federated.participation import DAY, stream

HALF = Availability(peak=0.5, trough=0.5)


def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


repeated = partial(Participation, draw="seed")
"""Cohorts that two runs have alike."""


@pytest.fixture
def many(job):
    """A task of twelve parties of 8 to 19 records."""

    def make(count=12, **changed: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(3)
        parties = {
            f"p{k:02d}": TensorDataset(torch.randn(8 + k, 5, generator=generator), torch.arange(8 + k) % 2)
            for k in range(count)
        }
        return job(parties=parties, loss=loss, **changed)

    return make


def rounds_of(run: Run) -> list[dict[str, Any]]:
    """The history without what the machine's clock and meters say."""
    return [msgspec.to_builtins(entry) | {"seconds": 0.0, "joules": None, "times": None} for entry in run.history]


def same(run: Run, other: Run) -> bool:
    return all(torch.equal(run.state[name], other.state[name]) for name in run.state)


class TestWhoIsAsked:
    def test_over_a_day_the_mean_is_the_cosines_mean(self):
        """24 hours of 2,000 parties: a mean of .5 with a standard error below .0023; false alarm 1e-8 at .013."""
        rule = Participation(availability=Availability(peak=0.8, trough=0.2, hour=3.0))
        asked = [len(rule.select(2_000, hour * 3600.0, stream(1, hour, "t"), 1)) / 2_000 for hour in range(24)]
        assert np.mean(asked) == pytest.approx(0.5, abs=0.013)
        expected = [0.5 + 0.3 * np.cos(2 * np.pi * (hour - 3) / 24) for hour in range(24)]
        assert asked == pytest.approx(expected, abs=0.063)  # 24 of 5.7 standard errors: 3e-7

    def test_round_the_world_it_is_always_somebodys_night(self):
        zones = tuple(float(hour) for hour in range(24))
        rule = Participation(availability=Availability(peak=1.0, trough=0.0, zones=zones))
        for hour in (2.0, 9.0, 14.0):
            asked = len(rule.select(4_000, hour * 3600, stream(2, int(hour), "t"), 2)) / 4_000
            assert asked == pytest.approx(0.5, abs=0.05)  # six standard errors

    def test_a_partys_zone_is_its_own_and_each_equally_likely(self):
        """False alarm 1e-6."""
        hours = Availability(zones=(-8.0, 0.0, 5.5))
        found = [hours.zone_of(7, party) for party in range(6_000)]
        assert found == [hours.zone_of(7, party) for party in range(6_000)]
        assert found != [hours.zone_of(8, party) for party in range(6_000)]
        assert stats.chisquare([found.count(zone) for zone in hours.zones]).pvalue > 1e-6

    def test_every_cohort_of_those_available_is_equally_likely(self):
        """All 15 pairs of 6 parties of which half are there: chi-square, false alarm 1e-6."""
        rule = repeated(cohort=2, availability=HALF)
        counts = dict.fromkeys(itertools.combinations(range(6), 2), 0)
        short = 0
        for number in range(6_000):
            asked = tuple(rule.select(6, 0.0, stream(0, number, "t"), 0).tolist())
            if len(asked) == 2:
                counts[asked] += 1
            else:
                short += 1
        assert stats.chisquare(list(counts.values())).pvalue > 1e-6
        expected = stats.binom.cdf(1, 6, 0.5) * 6_000
        assert abs(short - expected) < 6 * expected**0.5

    def test_of_many_they_are_drawn_without_a_list_and_uniformly(self):
        """Ten bins of a million parties, 4,000 drawn: chi-square, false alarm 1e-6. None twice in a round."""
        rule = repeated(cohort=40, availability=Availability(peak=0.3, trough=0.3))
        rounds = [rule.select(1_000_000, 0.0, stream(4, number, "t"), 4) for number in range(100)]
        assert all(len(np.unique(asked)) == 40 for asked in rounds)
        bins = np.bincount(np.concatenate(rounds) // 100_000, minlength=10)
        assert stats.chisquare(bins).pvalue > 1e-6
        small = [
            rule.select(5_100, 0.0, stream(5, number, "t"), 4) for number in range(200)
        ]  # 5,000 at most are looked at
        assert all(len(np.unique(asked)) == 40 for asked in small)
        assert stats.chisquare(np.bincount(np.concatenate(small) // 510, minlength=10)).pvalue > 1e-6

    def test_a_million_that_sleep_are_not_all_woken(self, monkeypatch):
        looked: list[int] = []
        real = Availability.zone_of
        monkeypatch.setattr(
            Availability, "zone_of", lambda self, seed, party: (looked.append(party), real(self, seed, party))[1]
        )
        nobody = repeated(cohort=10, availability=Availability(peak=0.0, trough=0.0))
        assert len(nobody.select(1_000_000, 0.0, stream(0, 0, "t"), 0)) == 0
        assert len(looked) == len(set(looked)) < 1_000 + 100 * 10 + 20

    def test_poisson_thinned_by_availability(self):
        """All 8 subsets of 3 parties at .6 x .5 against their product law: chi-square, false alarm 1e-6."""
        rule, counts = repeated(rate=0.6, availability=HALF), {}
        for number in range(8_000):
            key = tuple(rule.select(3, 0.0, stream(0, number, "t"), 0).tolist())
            counts[key] = counts.get(key, 0) + 1
        subsets = [subset for size in range(4) for subset in itertools.combinations(range(3), size)]
        expected = [8_000 * 0.3 ** len(subset) * 0.7 ** (3 - len(subset)) for subset in subsets]
        assert stats.chisquare([counts.get(subset, 0) for subset in subsets], expected).pvalue > 1e-6

    def test_federate_asks_them(self, many):
        hours = Availability(peak=0.9, trough=0.1)
        rule = Participation(
            draw="seed", cohort=4, least=2, availability=hours, clock=Clock(period=6 * 3600), patience=6
        )
        trained: list[str] = []
        base = many()
        owner = {id(dataset): name for name, dataset in base["parties"].items()}

        def fit(model, optimizer, loader):
            trained.append(owner[id(loader.dataset)])
            base["fit"](model, optimizer, loader)

        run = federate(**base | {"fit": fit, "rounds": 6}, participation=rule)
        expected = [
            rule.select(12, 6 * 3600.0 * (number - 1), stream(0, number, "cohort"), 0).tolist()
            for number in range(1, 7)
        ]
        assert trained == [f"p{k:02d}" for asked in expected if len(asked) >= 2 for k in asked]
        assert {len(asked) for asked in expected} != {4}
        assert [entry.selected for entry in run.history[1:]] == [len(asked) for asked in expected]
        assert run.info.participation["availability"]["peak"] == 0.9

    def test_a_million_once_a_day(self, job):
        made: list[int] = []

        def make(number):
            made.append(number)
            return TensorDataset(
                torch.randn(8, 5, generator=torch.Generator().manual_seed(number)), torch.arange(8) % 2
            )

        rule = Participation(
            draw="seed",
            rate=2e-5,
            least=2,
            availability=Availability(peak=0.5, trough=0.5, zones=(-8.0, 0.0, 8.0)),
            clock=ONCE_A_DAY,
        )
        parties = VirtualParties(1_000_000, make, 8)
        run = federate(**job(parties=parties, rounds=4), participation=rule)
        asked = [entry.selected for entry in run.history[1:]]
        assert len(made) <= sum(asked) + 1
        assert 10 < sum(asked) < 90  # Poisson of mean 40: seven standard deviations
        assert [entry.simulated_start for entry in run.history[1:]] == [2 * 3600 + day * DAY for day in range(4)]


class TestTime:
    def test_who_is_late_is_not_in_the_sum(self, many):
        rule = Participation(device=Device(start=10.0, per_example=1.0, spread=0.5), deadline=25.0)
        run = federate(**many(rounds=4), participation=rule)
        sizes = np.arange(8, 20)
        for entry in run.history[1:]:
            luck = stream(0, entry.round, "devices").standard_normal(12)
            seconds = (10.0 + sizes) * np.exp(0.5 * luck)
            assert entry.survivors == (seconds <= 25.0).sum() < 12
            assert entry.simulated_seconds == 25.0
        starts = [entry.simulated_start for entry in run.history[1:]]
        assert starts == [0.0, 25.0, 50.0, 75.0]

    def test_without_a_deadline_the_slowest_is_waited_for(self, many):
        run = federate(**many(rounds=2), participation=Participation(device=Device(start=10.0, per_example=1.0)))
        assert [entry.simulated_seconds for entry in run.history[1:]] == [29.0, 29.0]
        assert [entry.survivors for entry in run.history[1:]] == [12, 12]

    def test_a_round_longer_than_a_day_skips_one(self, many):
        rule = Participation(device=Device(start=1.5 * DAY), clock=ONCE_A_DAY)
        run = federate(**many(), participation=rule)
        assert [entry.simulated_start for entry in run.history[1:]] == [2 * 3600 + day * DAY for day in (0, 2, 4)]

    def test_a_tiny_period_costs_no_time(self):
        assert Clock(period=1e-9).next(0.0, 1e9) >= 1e9

    def test_without_time_none_is_recorded(self, many):
        run = federate(**many(rounds=1), participation=repeated(cohort=5))
        assert (run.history[1].simulated_start, run.history[1].simulated_seconds) == (None, None)
        assert (run.history[1].selected, run.history[1].failed) == (5, "")


SUMS = {
    "plain": Plain(),
    "masked": Masked(min_survivors=5, corrupt=1, dropouts=5, server="semi-honest"),
    "split": Homomorphic(min_survivors=5, corrupt=1, dropouts=5, server="semi-honest"),
    "shared": Homomorphic(key="shared", min_survivors=5),
}


class TestLossAtEachStep:
    @pytest.mark.parametrize("step", STEPS)
    def test_each_sum_loses_the_same_and_says_the_same(self, many, step):
        """Before its vector a party is missing, after it it counts; the sums of all kinds agree to the bit."""
        rule = Participation(dropouts=Dropouts(**{step: 0.15}))
        runs = {name: federate(**many(rounds=3), participation=rule, secure_sum=kind) for name, kind in SUMS.items()}
        after = step in ("confirmation", "unmasking")
        for entry in runs["plain"].history[1:]:
            lost = len(rule.dropouts.draw([f"p{k:02d}" for k in range(12)], stream(0, entry.round, "dropouts 0")))
            assert entry.survivors == (12 if after else 12 - lost)
        survivors = [entry.survivors for entry in runs["plain"].history[1:]]
        assert (min(survivors) == 12) == after
        for run in runs.values():
            assert same(runs["plain"], run)
            assert [entry.survivors for entry in run.history[1:]] == survivors

    def test_the_first_step_drawn_is_where_it_goes(self):
        """20,000 parties, chances .2 at three steps: .2, .16 and .128 of all; false alarm 1e-6."""
        names = [str(k) for k in range(20_000)]
        lost = list(Dropouts(keys=0.2, vector=0.2, unmasking=0.2).draw(names, stream(0, 0, "t")).values())
        counts = [lost.count(step) for step in ("keys", "vector", "unmasking")] + [20_000 - len(lost)]
        assert stats.chisquare(counts, [4000, 3200, 2560, 10240]).pvalue > 1e-6

    def test_who_is_lost_in_one_sum_does_not_come_to_the_next(self, many):
        """DANE has two sums a round; what is lost after its vector counts in the first and not in the second."""
        rule = Participation(dropouts=Dropouts(unmasking=0.2))
        run = federate(**many(rounds=3), participation=rule, algorithm=DANE(solver="svrg", mu=1.0))
        names = [f"p{k:02d}" for k in range(12)]
        expected = [12 - len(rule.dropouts.draw(names, stream(0, number, "dropouts 0"))) for number in (1, 2, 3)]
        assert [entry.survivors for entry in run.history[1:]] == expected
        assert min(expected) < 12


class TestRoundsThatFail:
    SUM = Masked(min_survivors=5, corrupt=1, dropouts=0)

    def patient(self, patience: int) -> Participation:
        hours = Availability(peak=0.55, trough=0.55)
        return Participation(
            draw="seed", cohort=6, least=5, availability=hours, clock=ONCE_A_DAY, deadline=60.0, patience=patience
        )

    def test_are_recorded_and_gone_over(self, many, tmp_path):
        run = federate(
            **many(count=8, rounds=12), participation=self.patient(12), secure_sum=self.SUM, out=tmp_path / "run"
        )
        failed = [entry for entry in run.history[1:] if entry.failed]
        assert 0 < len(failed) < 12
        for entry in failed:
            assert entry.selected < 5
            assert entry.survivors == entry.bytes_up == 0
            assert "parties needed are left" in entry.failed
            assert entry.metrics == run.history[entry.round - 1].metrics
            assert entry.simulated_seconds == 60.0
        for entry in run.history[1:]:
            assert entry.failed or entry.survivors == entry.selected >= 5
            assert entry.simulated_start == 2 * 3600 + (entry.round - 1) * DAY
        assert Run.load(tmp_path / "run").history == run.history
        report = audit(tmp_path / "run")
        assert report.participation.completed == 12 - len(failed)
        assert report.participation.fewest >= 5
        assert report.verdict != "violated"
        said = next(check.finding for check in report.checks if "fewer parties than claimed" in check.name)
        assert f"{len(failed)} more rounds had too few and opened no sum" in said

    def test_patience_ends(self, many, tmp_path):
        with pytest.raises(TooFewSurvivorsError):
            federate(**many(count=8, rounds=40), participation=self.patient(0), secure_sum=self.SUM, out=tmp_path / "0")
        ended = len(Run.load(tmp_path / "0").history)
        with pytest.raises(TooFewSurvivorsError):
            federate(**many(count=8, rounds=99), participation=self.patient(1), secure_sum=self.SUM, out=tmp_path / "1")
        history = Run.load(tmp_path / "1").history
        assert len(history) > ended
        assert history[-1].failed  # and the one after it was one too many
        assert not any(one.failed and other.failed for one, other in itertools.pairwise(history))

    @pytest.mark.parametrize("secure_sum", [None, Masked(min_survivors=3, corrupt=1, dropouts=1)])
    def test_a_resumed_run_is_the_run(self, many, tmp_path, secure_sum):
        class Stop(Exception):
            pass

        rule = Participation(
            draw="seed",
            cohort=6,
            least=4,
            availability=Availability(peak=0.9, trough=0.2, zones=(0.0, 6.0)),
            device=Device(start=5.0, per_example=1.0, spread=0.3),
            deadline=25.0,
            dropouts=Dropouts(keys=0.05, unmasking=0.05),
            clock=Clock(first=3600.0, period=5 * 3600.0),
            patience=9,
        )
        settings = many(rounds=10) | {"participation": rule, "secure_sum": secure_sum}
        whole = federate(**settings)
        for last in (3, 7):

            def stop(entry, last=last):
                if entry.round == last:
                    raise Stop

            with pytest.raises(Stop):
                federate(**settings, out=tmp_path / "run", resume=last > 3, on_round=stop)
        resumed = federate(**settings, out=tmp_path / "run", resume=True)
        assert rounds_of(resumed) == rounds_of(whole)
        assert same(resumed, whole)
        with pytest.raises(ConfigError, match="cannot resume: participation"):
            federate(**settings | {"participation": repeated(cohort=6)}, out=tmp_path / "run", resume=True)

    @pytest.mark.parametrize(("least", "failing"), [(None, {7, 8, 9}), (8, {7})])
    def test_least_is_what_the_sum_is_recorded_for(self, many, least, failing):
        """By default no round begins with less than the cohort; where it may, the record says what fewer can keep."""
        hours = Availability(peak=0.75, trough=0.75)
        rule = repeated(cohort=10, least=least, availability=hours, patience=30)
        run = federate(**many(rounds=12), participation=rule, secure_sum=Masked(corrupt=3))
        failed = {entry.selected for entry in run.history[1:] if entry.failed}
        assert failed
        assert failed <= failing | set(range(7))
        assert all(entry.survivors >= (least or 10) for entry in run.history[1:] if not entry.failed)
        alone = Masked(corrupt=3).setup(
            SumSpec(parties=tuple("abcdefghij"[: least or 10]), length=1, bound=1), session=bytes(16)
        )
        assert run.info.secure_sum["min_survivors"] == alone.min_survivors
        assert run.info.secure_sum["corrupt"] == alone.corrupt
        assert (run.info.secure_sum["cohort"], run.info.secure_sum["directory"]) == ("chosen", len(run.info.parties))

    def test_a_sum_that_promises_less_over_more_parties_is_refused_before_anything_is_trained(self, many, tmp_path):
        """Over 50 parties all hold shares, and 31 must be left; over 100 each has 32 neighbours, and 22 would do."""
        rule, out = repeated(cohort=100, least=50), tmp_path / "run"
        with pytest.raises(ConfigError, match="min_survivors = 31 over 50 parties, and 22 over 100") as refused:
            federate(**many(count=110), participation=rule, secure_sum=Masked(min_survivors=4), out=out)
        assert not (out / "history.jsonl").exists()
        assert "min_survivors=31, for both" in refused.value.hint

    def test_those_who_may_collude_are_counted_among_all_and_not_in_the_cohort(self, many):
        """A tenth of 20 is two, in a cohort of 10 and in one of 12."""
        rule = repeated(cohort=12, least=10)
        told = federate(**many(count=20, rounds=2), participation=rule, secure_sum=Masked(min_survivors=8))
        assert told.info.secure_sum["corrupt"] == 2


class TestPrivacy:
    """A server that chooses who takes part knows it: nothing is gained by sampling."""

    PROMISE = ClientPrivacy(epsilon=20.0, delta=1e-3, clip=1.0, min_survivors=4)

    @pytest.mark.parametrize(
        "rule",
        [
            repeated(cohort=6),
            repeated(rate=0.9),
            repeated(cohort=6, availability=Availability(peak=0.95, trough=0.9), clock=ONCE_A_DAY),
        ],
    )
    def test_each_round_is_charged_as_if_all_took_part(self, many, rule, tmp_path):
        masked = Masked(min_survivors=4, corrupt=1, dropouts=0)
        settings = many(rounds=3) | {"privacy": self.PROMISE, "secure_sum": masked}
        run = federate(**settings, participation=rule, out=tmp_path / "run")
        assert not any(entry.failed for entry in run.history)
        spent = run.info.spent["clients"]
        assert (spent.steps, spent.sample_rate) == (3, 1.0)
        # A round's charge is that of its survivors' noise, without amplification: six alone cost what six of twelve do.
        if rule.rate is None:
            alone = federate(**many(count=6, rounds=3) | {"privacy": self.PROMISE, "secure_sum": masked})
            assert spent.epsilon == pytest.approx(alone.info.spent["clients"].epsilon, rel=5e-3)

    def test_a_round_that_fails_after_vectors_were_sent_is_charged(self, many):
        """Nobody helps to unmask, so nothing was learnt; the noise was drawn, and is paid for."""
        rule = Participation(dropouts=Dropouts(unmasking=0.9), patience=3)
        masked = Masked(min_survivors=8, corrupt=1, dropouts=2)
        privacy = ClientPrivacy(epsilon=20.0, delta=1e-3, clip=1.0, min_survivors=8)
        run = federate(**many(rounds=3), participation=rule, secure_sum=masked, privacy=privacy)
        assert all("helped to unmask" in entry.failed for entry in run.history[1:])
        assert run.info.spent["clients"].steps == 3

    def test_a_round_that_fails_before_costs_nothing(self, many):
        rule = Participation(dropouts=Dropouts(keys=0.9), patience=3)
        masked = Masked(min_survivors=8, corrupt=1, dropouts=2)
        privacy = ClientPrivacy(epsilon=20.0, delta=1e-3, clip=1.0, min_survivors=8)
        run = federate(**many(rounds=2), participation=rule, secure_sum=masked, privacy=privacy)
        assert all("advertised keys" in entry.failed for entry in run.history[1:])
        assert run.info.spent["clients"].steps == 0

    def test_record_level_ledgers_charge_those_who_trained(self, many, tmp_path):
        base = many(rounds=3)

        def build(dataset):
            model, optimizer, _ = base["build"](dataset)
            return model, optimizer, DataLoader(dataset, batch_size=4)

        privacy = Privacy(epsilon=8.0, delta=1e-3)
        run = federate(
            **base | {"build": build}, privacy=privacy, participation=repeated(cohort=5), out=tmp_path / "run"
        )
        asked = [repeated(cohort=5).select(12, 0.0, stream(0, number, "cohort"), 0).tolist() for number in (1, 2, 3)]
        for k in range(12):
            times = sum(k in chosen for chosen in asked)
            assert run.info.spent[f"p{k:02d}"].steps == times * -(-(8 + k) // 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: repeated(cohort=5, rate=0.5), "not both"),
        (lambda: repeated(rate=0.0), "rate <= 1"),
        (lambda: repeated(rate=float("nan")), "rate <= 1"),
        (lambda: Participation(deadline=0.0), "deadline > 0"),
        (lambda: Participation(deadline=float("nan")), "deadline > 0"),
        (lambda: Participation(patience=-1), "patience >= 0"),
        (lambda: Dropouts(vector=1.0), "chances in"),
        (lambda: Dropouts(keys=float("nan")), "chances in"),
        (lambda: Device(start=-1.0), "start, per_example"),
        (lambda: Device(spread=float("inf")), "start, per_example"),
        (lambda: Availability(zones=()), "zones"),
        (lambda: Availability(zones=(float("nan"),)), "zones"),
        (lambda: Availability(peak=0.2, trough=0.3), "trough <= peak"),
    ],
)
def test_refuses_numbers_that_cannot_be(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_refuses_what_does_not_go_together(many):
    for settings, message in (
        ({"participation": repeated(rate=0.5), "algorithm": Scaffold()}, "needs every party"),
        ({"participation": Participation(availability=HALF), "algorithm": CoCoA()}, "needs every party"),
        ({"participation": repeated(cohort=13)}, "cohort of 2 to 12"),
        ({"participation": repeated(cohort=6, least=7)}, "least of 2 to 6"),
        ({"participation": repeated(rate=0.5, least=1)}, "least of 2 to 6"),
    ):
        with pytest.raises(ConfigError, match=message):
            federate(**many(), **settings)


@pytest.mark.parametrize("algorithm", [DANE(solver="svrg", step=0.1), FSVRG(scaled=False, step=0.1)])
def test_several_sums_and_patience_are_refused_where_a_sum_hides_vectors(many, algorithm):
    """The first sum of a failed round, less that of the next over one party fewer, is that party's gradient."""
    masked = Masked(min_survivors=6, corrupt=1, dropouts=2)
    job = many(rounds=1) | {"algorithm": algorithm, "participation": Participation(patience=1)}
    with pytest.raises(ConfigError, match="several sums in a round"):
        federate(**job, secure_sum=masked)
    privacy = ClientPrivacy(epsilon=20.0, delta=1e-3, min_survivors=6)
    assert federate(**job, secure_sum=masked, privacy=privacy).info.spent["clients"].steps == 2
    assert len(federate(**job, secure_sum=Plain()).history) == 2
    assert len(federate(**job | {"participation": Participation()}, secure_sum=masked).history) == 2


def test_the_record_is_json_and_none_by_default(many):
    assert Participation().record() is None
    plain = repeated(cohort=4, availability=Availability(zones=(1.0, 2.0))).record()
    assert json.loads(json.dumps(plain)) == plain
    assert federate(**many(rounds=1)).info.participation is None


@pytest.mark.parametrize("cohort", [None, 8])
def test_a_transcript_of_rounds_that_fail_holds(many, tmp_path, cohort):
    """Keys, vectors and confirmations of a sum that was given up are on the wire, and no sum of it in the history."""
    rule = Participation(
        draw="seed", cohort=cohort, dropouts=Dropouts(keys=0.03, vector=0.03, unmasking=0.2), patience=9
    )
    masked = Masked(min_survivors=6, corrupt=1, dropouts=1)
    settings = many(count=9, rounds=6) | {"secure_sum": masked, "transcript": "rehearsal", "out": tmp_path}
    run = federate(**settings, participation=rule)
    reasons = {entry.failed.split(":")[0] for entry in run.history[1:] if entry.failed}
    assert "too few helped to unmask" in reasons
    assert any(not entry.failed for entry in run.history[1:])
    report = audit(tmp_path)
    assert report.transcript is not None
    assert [check for check in report.checks if check.verdict == "violated"] == []
