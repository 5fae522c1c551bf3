from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from flat_arguments import centralize, federate
from torch import nn
from torch.utils.data import TensorDataset

from choral import ClientPrivacy, Homomorphic, Masked, Plain, Privacy
from choral.audits import audit
from choral.errors import ConfigError, DataError
from choral.trainers import DANE, GD, FedNova, RunInfo, Scaffold, VirtualParties
from choral.trainers.federated.participation import Dropouts, Participation
from choral.trainers.local_steps.logistic_regression import ClosedForm
from choral.trainers.local_steps.resident_model import Resident, Seating
from choral.trainers.run_folder.run import Run
from choral.trainers.task.arithmetic import Arithmetic

MILLION = 1_000_000


def repeated(cohort, lost=0.0):
    """Cohorts that two runs have alike."""
    return Participation(cohort=cohort, draw="seed", dropouts=Dropouts(vector=lost))


class Made:
    """Makes parties of `size` records by number, and remembers which."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self.numbers: list[int] = []

    def __call__(self, number: int) -> TensorDataset:
        self.numbers.append(number)
        points = torch.randn(self.size, 5, generator=torch.Generator().manual_seed(number))
        return TensorDataset(points, torch.arange(self.size) % 2)


def listed(parties: VirtualParties) -> dict[str, TensorDataset]:
    return {parties.name_of(number): parties[parties.name_of(number)] for number in range(len(parties))}


def same(run: Run, other: Run) -> bool:
    return all(torch.equal(run.state[name], other.state[name]) for name in run.state)


class TestAMillion:
    """Iterating raises (`test_is_not_listed`), so that a run that ends has not."""

    def test_five_rounds_of_a_hundred(self, job, tmp_path):
        made = Made()
        parties = VirtualParties(MILLION, made, 8)
        federate(**job(parties=parties, cohort=2, rounds=1))  # what is imported at first use is not the run's
        made.numbers.clear()
        tracemalloc.start()
        run = federate(**job(parties=parties, cohort=100, rounds=5, out=tmp_path / "run"))
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        assert peak < 8  # MiB; 4 were seen, and a million names alone are 60
        assert len(made.numbers) <= 5 * 100 + 1
        assert len(set(made.numbers)) > 490  # of 500 draws of a million, .1 are expected to be double
        assert max(made.numbers) > 900_000
        assert [entry.survivors for entry in run.history[1:]] == [100] * 5
        assert (tmp_path / "run" / "run.json").stat().st_size < 10_000

        info = Run.load(tmp_path / "run").info
        assert info == run.info
        assert (info.parties, info.raw_bytes) == ({}, {})
        assert (info.party_count, info.total_examples) == (MILLION, 8 * MILLION)

        found = audit(tmp_path / "run")
        assert found.participation.parties == MILLION
        assert found.participation.realised == 500

    def test_a_masked_round_of_twenty(self, job):
        made = Made()
        run = federate(
            **job(
                parties=VirtualParties(MILLION, made, 8),
                participation=repeated(20),
                rounds=1,
                secure_sum=Masked(min_survivors=12, corrupt=2),
            )
        )
        assert len(made.numbers) <= 21
        assert run.info.secure_sum["parties"] == 20
        plain = federate(**job(parties=VirtualParties(MILLION, made, 8), participation=repeated(20), rounds=1))
        assert same(plain, run)

    def test_client_privacy_counts_the_million(self, job, tmp_path):
        parties = VirtualParties(MILLION, Made(), 8)
        privacy = ClientPrivacy(epsilon=8.0, delta=1e-7, clip=1.0, min_survivors=12)
        settings = {"cohort": 20, "rounds": 1, "secure_sum": Masked(min_survivors=12, corrupt=2)}
        run = federate(**job(parties=parties, privacy=privacy, out=tmp_path / "run", **settings))
        assert list(run.info.spent) == ["clients"]
        # The modulus has room for the cohort, so the million costs no noise.
        alone = job(parties={f"p{k:02d}": Made()(k) for k in range(20)}, privacy=privacy, **settings)
        assert federate(**alone).info.spent["clients"].noise_multiplier == run.info.spent["clients"].noise_multiplier
        checks = {check.name: check for check in audit(tmp_path / "run").checks}
        delta = checks["Delta is below 1/n for every data owner"]
        assert (delta.verdict, "1,000,000 clients" in delta.finding) == ("holds", True)
        loose = ClientPrivacy(epsilon=8.0, delta=1e-5, clip=1.0, min_survivors=12)
        with pytest.raises(ConfigError, match="1000000 clients"):
            federate(**job(parties=parties, privacy=loose, **settings))


@pytest.mark.parametrize("secure_sum", [None, Masked(min_survivors=4, corrupt=1)])
def test_work_does_not_grow_with_the_number_of_parties(job, secure_sum):
    """Counted, not timed: of a thousand parties and of a million as many are made, sized and named."""

    class Counted(VirtualParties):
        named = 0

        def name_of(self, number):
            self.named += 1
            return super().name_of(number)

    def work(count):
        made, sized = Made(), []
        parties = Counted(count, made, lambda number: (sized.append(number), 8)[1], total=8 * count, largest=8)
        federate(**job(parties=parties, participation=repeated(6), rounds=4, secure_sum=secure_sum))
        return len(made.numbers), len(sized), parties.named

    few, many = work(1_000), work(MILLION)
    assert many[0] <= 4 * 6 + 1
    # With 24 draws of a thousand a party may come twice, and is then made once: so at most a little fewer.
    assert all(small <= large <= small + 10 for small, large in zip(few, many, strict=True))


def test_the_closed_form_keeps_as_many_as_have_a_seat():
    def make(number):
        made.append(number)
        return TensorDataset(Made(4)(number).tensors[0], torch.arange(4) % 2)

    made = []
    resident = Resident(
        build=lambda dataset: (model := nn.Linear(5, 1), torch.optim.SGD(model.parameters(), lr=0.1), [dataset[:]]),
        fit=lambda *_: None,
        datasets=VirtualParties(9, make, 4),
        privacy_engines={},
        seed=0,
        arithmetic=Arithmetic(torch.device("cpu")),
        seating=Seating("party-0000000", 2),
    )
    trainer = ClosedForm(resident, rate=0.1, batch_size=2)
    made.clear()
    for number in (1, 2, 1, 3, 1, 2):  # 3 takes the place of 2, and 2 comes back
        trainer.block(f"party-{number:07d}")
    assert made == [1, 2, 3, 2]
    assert len(trainer._made) == 2


def test_a_transcript_is_of_each_cohort(job, tmp_path):
    parties = VirtualParties(MILLION, Made(), 8)
    settings = {"cohort": 6, "rounds": 2, "secure_sum": Masked(min_survivors=4, corrupt=1), "transcript": "rehearsal"}
    federate(**job(parties=parties, out=tmp_path, **settings))
    report = audit(tmp_path)
    assert report.transcript is not None
    assert (report.transcript.sessions, report.transcript.uploads) == (
        1 + 2,
        2 * 6,
    )  # the first is opened to see whether it can be
    assert {check.verdict for check in report.checks} == {"holds"}


def test_a_homomorphic_round(job):
    parties, sums = VirtualParties(300, Made(), 8), (Homomorphic(corrupt=1), Plain())
    assert same(
        *(federate(**job(parties=parties, participation=repeated(4), rounds=2, secure_sum=kind)) for kind in sums)
    )


@pytest.mark.parametrize("algorithm", [None, GD(), FedNova(), DANE(solver="svrg", mu=1.0)])
@pytest.mark.parametrize("dropout_rate", [0.0, 0.2])
def test_trains_what_a_dict_trains(job, algorithm, dropout_rate):
    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    made = Made()
    virtual = VirtualParties(30, made, 8)
    settings = {"participation": repeated(6, dropout_rate), "algorithm": algorithm, "loss": loss}
    run = federate(**job(parties=virtual, **settings))
    assert len(made.numbers) <= 3 * 6 + 1
    assert same(run, federate(**job(parties=listed(virtual), **settings)))


def test_an_interrupted_run_goes_on(job, tmp_path):
    class Stop(Exception):
        pass

    def stop(entry):
        if entry.round == 2:
            raise Stop

    settings = {"parties": VirtualParties(500, Made(), 8), "participation": repeated(6), "rounds": 4}
    with pytest.raises(Stop):
        federate(**job(out=tmp_path, on_round=stop, **settings))
    resumed = federate(**job(out=tmp_path, resume=True, **settings))
    assert same(resumed, federate(**job(**settings)))
    with pytest.raises(ConfigError, match="cannot resume: population"):
        federate(**job(out=tmp_path, resume=True, **settings | {"parties": VirtualParties(501, Made(), 8)}))


def test_seats_are_given_up_from_the_longest_idle(job):
    made, base = Made(), job()
    resident = Resident(
        build=base["build"],
        fit=base["fit"],
        datasets=VirtualParties(9, made, 8),
        privacy_engines={},
        seed=0,
        arithmetic=Arithmetic(torch.device("cpu")),
        seating=Seating("party-0000000", 2),
    )
    made.numbers.clear()
    for number in (1, 2, 1, 3, 1, 2):  # 3 takes the seat of 2, and 2 comes back
        resident.seat(f"party-{number:07d}")
    assert made.numbers == [1, 2, 3, 2]


def test_sizes_that_differ(job):
    def make(number):
        return Made(2 + number % 5)(number)

    parties = VirtualParties(100, make, lambda number: np.int64(2 + number % 5), total=400, largest=6)
    settings = {"participation": repeated(10), "rounds": 2}
    run = federate(**job(parties=parties, **settings))
    assert same(run, federate(**job(parties=listed(parties), **settings)))
    assert run.info.population.quantiles == {"0.05": 2.0, "0.5": 4.0, "0.95": 6.0}
    assert (run.info.population.sampled, run.info.population.largest) == (100, 6)


def test_is_not_listed(job):
    made = Made()
    parties = VirtualParties(MILLION, made, 8)
    for touch in (iter, list, dict, lambda it: next(iter(it.values())), lambda it: {**it}):
        with pytest.raises(ConfigError, match="touch every one"):
            touch(parties)
    with pytest.raises(ConfigError, match="touch every one"):
        centralize(**job(parties=parties))
    assert not made.numbers
    assert len(parties) == MILLION
    assert "party-0000042" in parties
    for name in ("party-42", "party-1000000", "party--000001", "north", "party-", "party-" + "9" * 5000, 7):
        assert name not in parties
    with pytest.raises(KeyError):
        parties["party-1000000"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "need a cohort"),
        ({"cohort": 101}, "cohort of 2 to 100"),
        ({"cohort": 5, "privacy": Privacy(epsilon=8.0, delta=1e-5)}, "ledger and a budget for every party"),
        ({"cohort": 5, "algorithm": Scaffold()}, "needs every party"),
    ],
)
def test_refuses_what_needs_everybody(job, tmp_path, settings, message):
    made = Made()
    with pytest.raises(ConfigError, match=message):
        federate(**job(parties=VirtualParties(100, made, 8), out=tmp_path / "run", **settings))
    assert not made.numbers
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"count": 1},
        {"count": 1e6},
        {"count": True, "examples": True},
        {"examples": 8.0},
        {"examples": 0},
        {"examples": -8},
        {"total": 800},
        {"total": 800, "largest": 8},
        {"examples": lambda number: 8},
        {"examples": lambda number: 8, "total": 800},
        {"examples": lambda number: 8, "total": 99, "largest": 8},
        {"examples": lambda number: 8, "total": 801, "largest": 8},
    ],
)
def test_refuses_counts_that_cannot_be(arguments):
    with pytest.raises(ConfigError):
        VirtualParties(**{"count": 100, "make": Made(), "examples": 8} | arguments)


@pytest.mark.parametrize(
    ("make", "examples", "message"),
    [
        (Made(7), 8, "has 7 records, but is said to have 8"),
        (Made(0), 8, "has no records"),
        (lambda number: iter(()), 8, "without a length"),
        (Made(1), 1, "has 1 class"),
        (Made(9), lambda number: 9, "said to have 9 records, expected 1 to 8"),
        (Made(8), lambda number: 8.0, "said to have 8.0 records"),
    ],
)
def test_each_party_is_checked_when_it_is_made(job, make, examples, message):
    declared = {} if isinstance(examples, int) else {"total": 800, "largest": 8}
    with pytest.raises(DataError, match=message):
        federate(**job(parties=VirtualParties(100, make, examples, **declared), cohort=5))


def test_one_false_party_among_many_is_found_when_drawn(job):
    """Number 0, of which the model is made, tells the truth."""
    counter = itertools.count()

    def make(number):
        return Made(8 if next(counter) == 0 else 9)(number)

    with pytest.raises(DataError, match="has 9 records, but is said to have 8"):
        federate(**job(parties=VirtualParties(100, make, 8), cohort=5))


def test_a_listed_run_counts_its_parties():
    info = RunInfo(kind="federated", rounds=1, seed=0, device="cpu", parties={"a": 3, "b": 4}, parameters=1)
    assert (info.party_count, info.total_examples) == (2, 7)
