from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from flat_arguments import federate
from scipy import stats

from choral import ClientPrivacy, Masked
from choral.errors import ConfigError
from choral.trainers import RunFolderError
from choral.trainers.federated.participation import (
    DAY,
    ONCE_A_DAY,
    Availability,
    Clock,
    Device,
    Participation,
    available,
    fixed_cohort,
    lost_at,
    poisson_cohort,
    stream,
)


def test_streams_repeat_and_differ():
    draw = [
        stream(*arguments).random() for arguments in [(1, 2, "a"), (1, 2, "a"), (1, 3, "a"), (2, 2, "a"), (1, 2, "b")]
    ]
    assert draw[0] == draw[1]
    assert len(set(draw)) == 4


def test_every_cohort_is_equally_likely():
    """All 20 sets of 3 of 6, 20,000 draws: chi-square, false alarm 1e-6."""
    random = stream(0, 0, "test")
    counts = dict.fromkeys(itertools.combinations(range(6), 3), 0)
    for _ in range(20_000):
        counts[tuple(fixed_cohort(6, 3, random).tolist())] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-6


def test_poisson_is_independent_per_party():
    """All 8 subsets of 3 parties at rate .3 against their product law: chi-square, false alarm 1e-6."""
    random = stream(0, 1, "test")
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(20_000):
        key = tuple(poisson_cohort(3, 0.3, random).tolist())
        counts[key] = counts.get(key, 0) + 1
    subsets = [subset for size in range(4) for subset in itertools.combinations(range(3), size)]
    expected = [20_000 * 0.3 ** len(subset) * 0.7 ** (3 - len(subset)) for subset in subsets]
    assert stats.chisquare([counts[subset] for subset in subsets], expected).pvalue > 1e-6


def test_a_cohort_of_a_billion_costs_its_own_size():
    tracemalloc.start()
    cohort = fixed_cohort(10**9, 100, stream(0, 0, "large"))
    poisson = poisson_cohort(10**9, 1e-7, stream(0, 0, "large"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    assert len(np.unique(cohort)) == 100
    assert 40 < len(poisson) < 170  # Poisson(100): six standard deviations
    assert cohort.max() > 10**8


def test_whole_and_single_cohorts():
    assert fixed_cohort(5, 5, stream(0, 0, "x")).tolist() == [0, 1, 2, 3, 4]
    assert len(fixed_cohort(5, 1, stream(0, 0, "x"))) == 1
    assert poisson_cohort(5, 1.0, stream(0, 0, "x")).tolist() == [0, 1, 2, 3, 4]
    assert len(poisson_cohort(2, 1e-12, stream(0, 0, "x"))) == 0


def test_availability_over_the_day():
    hours = Availability(peak=0.8, trough=0.2, hour=2.0)
    zones = np.array([0.0, 6.0, 12.0])
    assert hours.chance(2 * 3600, zones) == pytest.approx([0.8, 0.5, 0.2])
    assert hours.chance(20 * 3600, zones) == pytest.approx([0.5, 0.8, 0.5])  # six hours ahead it is two o'clock
    assert hours.chance(2 * 3600 + 5 * DAY, zones) == pytest.approx([0.8, 0.5, 0.2])
    there = available(np.repeat([0.8, 0.2, 0.0, 1.0], 10_000), stream(0, 0, "there")).reshape(4, -1).mean(axis=1)
    assert there == pytest.approx([0.8, 0.2, 0, 1], abs=0.025)  # five standard errors or more


def test_stragglers():
    examples = np.array([10, 1000])
    even = Device(start=5, per_example=0.01).draw(examples, stream(0, 0, "time"))
    assert even == pytest.approx([5.1, 15.0])
    assert Participation(deadline=10.0).late(even).tolist() == [False, True]
    assert not Participation().late(even).any()
    spread = Device(start=1, spread=0.5).draw(np.zeros(20_000, int), stream(0, 1, "time"))
    # Late after exp(.5): one standard deviation above the median, .1587; standard error .0026.
    late = Participation(deadline=math.exp(0.5)).late(spread)
    assert late.mean() == pytest.approx(stats.norm.sf(1), abs=0.015)


def test_losses_at_any_step():
    """Step s: (1 - .1)(1 - .2).. before it, times its own chance; 20,000 draws, chi-square, false alarm 1e-6."""
    lost = lost_at(20_000, (0.1, 0.2, 0.5), stream(0, 0, "lost"))
    expected = 20_000 * np.array([0.1, 0.9 * 0.2, 0.9 * 0.8 * 0.5, 0.9 * 0.8 * 0.5])
    assert stats.chisquare(np.bincount(lost, minlength=4), expected).pvalue > 1e-6
    assert (lost_at(5, (0, 0), stream(0, 0, "lost")) == 2).all()
    assert (lost_at(5, (0, 1), stream(0, 0, "lost")) == 1).all()


def test_clock():
    assert (ONCE_A_DAY.first, ONCE_A_DAY.next(7200, 60)) == (7200, 7200 + DAY)
    assert ONCE_A_DAY.next(7200, DAY) == 7200 + DAY
    assert ONCE_A_DAY.next(7200, 1.5 * DAY) == 7200 + 2 * DAY  # a night is missed
    assert Clock().next(5, 7) == 12


@pytest.mark.parametrize(
    "call",
    [
        lambda: fixed_cohort(5, 0, stream(0, 0, "x")),
        lambda: fixed_cohort(5, 6, stream(0, 0, "x")),
        lambda: poisson_cohort(0, 0.5, stream(0, 0, "x")),
        lambda: poisson_cohort(5, 0.0, stream(0, 0, "x")),
        lambda: poisson_cohort(5, math.nan, stream(0, 0, "x")),
        lambda: Availability(peak=0.2, trough=0.3),
        lambda: Availability(hour=24),
        lambda: Device(start=-1),
        lambda: Participation(deadline=math.nan),
        lambda: Participation(draw="Seed"),
        lambda: Participation(draw=None),
        lambda: lost_at(1, (1.5,), stream(0, 0, "x")),
        lambda: Clock(period=math.inf),
    ],
)
def test_refusals(call):
    with pytest.raises(ConfigError):
        call()


class TestCohorts:
    """In whole runs. Who took part is read from what was trained."""

    def many(self, job, trained, count=20, **more):
        from torch.utils.data import TensorDataset

        base = job()
        data = base["parties"]["north"]
        parties = {f"party-{number:02d}": TensorDataset(*data.tensors) for number in range(count)}
        owner = {id(dataset): name for name, dataset in parties.items()}

        def fit(model, optimizer, loader):
            trained.append(owner[id(loader.dataset)])
            base["fit"](model, optimizer, loader)

        return federate(**job(parties=parties, fit=fit, **more))

    def test_each_round_asks_another_cohort(self, job):
        trained: list[str] = []
        rule = Participation(cohort=4, draw="seed")
        run = self.many(job, trained, participation=rule, rounds=5)
        rounds = [tuple(trained[at : at + 4]) for at in range(0, 20, 4)]
        assert all(len(set(asked)) == 4 for asked in rounds)
        assert len(set(rounds)) == 5
        assert [entry.survivors for entry in run.history[1:]] == [4] * 5
        again: list[str] = []
        self.many(job, again, participation=rule, rounds=5)
        assert again == trained
        assert run.info.participation["cohort"] == 4

    def test_the_masked_sum_is_over_the_cohort_and_exact(self, job):
        rule = Participation(cohort=5, draw="seed")
        plain = self.many(job, [], participation=rule, rounds=2)
        masked = self.many(job, [], participation=rule, rounds=2, secure_sum=Masked(min_survivors=3))
        assert all(torch.equal(plain.state[name], masked.state[name]) for name in plain.state)
        stated = masked.info.secure_sum
        assert (stated["parties"], stated["directory"], stated["cohort"], stated["corrupt"]) == (5, 20, "chosen", 2)
        assert "may have put every one that colludes into it" in stated["trust"]

    def test_who_is_asked_does_not_follow_from_the_seed(self, job, tmp_path):
        """Two runs with one seed ask others; a run that is resumed asks those whom it would have asked.

        The cohorts of three rounds, 4 of 20 each, are alike by chance once in 4845^3.
        """
        asked = []
        for _ in range(2):
            asked.append([])
            self.many(job, asked[-1], cohort=4, rounds=3)
        assert asked[0] != asked[1]

        class Stop(Exception):
            pass

        def stop(entry):
            if entry.round == 1:
                raise Stop

        for last in ("one", "two"):
            with pytest.raises(Stop):
                self.many(job, [], cohort=4, rounds=3, out=tmp_path / last, on_round=stop)
        assert (tmp_path / "one" / "cohorts.secret").stat().st_mode & 0o077 == 0
        (tmp_path / "two").joinpath("cohorts.secret").write_bytes((tmp_path / "one" / "cohorts.secret").read_bytes())
        ends = [[], []]
        for end, last in zip(ends, ("one", "two"), strict=True):
            self.many(job, end, cohort=4, rounds=3, out=tmp_path / last, resume=True)
        assert ends[0] == ends[1]  # by the secret in the folder alone, whatever is drawn elsewhere
        (tmp_path / "one" / "cohorts.secret").unlink()
        with pytest.raises(RunFolderError, match="is missing"):
            self.many(job, [], cohort=4, rounds=3, out=tmp_path / "one", resume=True)

    def test_all_is_as_without(self, job):
        whole, cohort = self.many(job, []), self.many(job, [], cohort=20)
        assert all(torch.equal(whole.state[name], cohort.state[name]) for name in whole.state)

    def test_client_level_privacy_gains_nothing(self, job):
        """A cohort of 6 of 20 is charged like a federation of 6 alone, not less by a factor that grows with 20."""
        privacy = ClientPrivacy(epsilon=8.0, delta=1e-3, clip=1.0, min_survivors=4)
        settings = {"rounds": 3, "privacy": privacy, "secure_sum": Masked(min_survivors=4)}
        cohort = self.many(job, [], cohort=6, **settings).spent.epsilon
        alone = self.many(job, [], count=6, **settings).spent.epsilon
        assert cohort == pytest.approx(alone, rel=2e-3)  # noise is calibrated to within .1 %

    @pytest.mark.parametrize("cohort", [0, 1, 21, -3])
    def test_refuses_sizes(self, job, cohort):
        with pytest.raises(ConfigError, match="cohort of 2 to 20"):
            self.many(job, [], cohort=cohort)

    def test_refuses_algorithms_that_need_everybody(self, job):
        from choral.trainers.algorithms import Scaffold

        with pytest.raises(ConfigError, match="needs every party"):
            self.many(job, [], cohort=4, algorithm=Scaffold())
