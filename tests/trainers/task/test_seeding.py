"""What the seed decides: every generator that the user's functions draw from, and nothing that is secret."""

from __future__ import annotations

import random
import shutil
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flat_arguments import centralize, federate
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from choral import ClientPrivacy, Privacy
from choral.protocols import Masked
from choral.trainers import TaskError
from choral.trainers.engines import Cohort, Direct
from choral.trainers.task.seeding import generators_of, reseed

_GLOBAL = np.random.default_rng(3)


def _noisy_fit(draw):
    """The usual loop, its weights moved a little by what is drawn in each step."""

    def fit(model, optimizer, loader):
        for batch, target in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch + 0.3 * draw()), target)
            loss.backward()
            optimizer.step()

    return fit


SHARED = {
    "torch": lambda: torch.randn(()).item(),
    "numpy": lambda: np.random.normal(),
    "python": lambda: random.gauss(0.0, 1.0),
}


class Shifted(Dataset[Any]):
    """Records moved a little by a generator of the dataset's own."""

    def __init__(self, dataset, generator):
        self.dataset, self.generator = dataset, generator

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        point, label = self.dataset[index]
        kind = self.generator
        if isinstance(kind, torch.Generator):
            drawn = torch.randn((), generator=kind).item()
        else:
            drawn = kind.gauss(0.0, 1.0) if isinstance(kind, random.Random) else float(kind.normal())
        return point + drawn, label


OWN = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "numpy": lambda: np.random.default_rng(1),
    "numpy of old": lambda: np.random.RandomState(1),
    "python": lambda: random.Random(1),
}


def _jobs(job, parties):
    """Tasks whose training draws from one generator each."""
    for name, draw in SHARED.items():
        yield f"shared {name}", lambda draw=draw: job(fit=_noisy_fit(draw))

    def loader_of(**options):
        def build(dataset):
            model = nn.Linear(5, 2)
            given = {key: value() for key, value in options.items()}
            return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10, **given)

        return build

    yield "loader's", lambda: job(build=loader_of(shuffle=lambda: True, generator=lambda: torch.Generator()))

    def sampled(dataset):
        model = nn.Linear(5, 2)
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(5))
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10, sampler=sampler)

    yield "sampler's", lambda: job(build=sampled)
    for name, make in OWN.items():
        yield (
            f"dataset's {name}",
            lambda make=make: job(parties={party: Shifted(data, make()) for party, data in parties.items()}),
        )

    def by_closure():
        generator = np.random.default_rng(8)
        return job(fit=_noisy_fit(lambda: generator.normal()))

    yield "closure's", by_closure
    yield "global", lambda: job(fit=_noisy_fit(lambda: _GLOBAL.normal()))

    def dropping():
        class Noisy(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.random = nn.Linear(5, 2), np.random.default_rng(4)

            def forward(self, points):
                return self.layer(points + 0.3 * float(self.random.normal()))

        def build(dataset):
            model = Noisy()
            return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10)

        return job(build=build, evaluate=lambda model: 0.5)

    yield "model's", dropping


NAMES = [f"shared {name}" for name in SHARED] + ["loader's", "sampler's"]
NAMES += [f"dataset's {name}" for name in OWN] + ["closure's", "global", "model's"]


@pytest.fixture(params=NAMES)
def drawing(request, job, parties):
    made = dict(_jobs(job, parties))
    return made[request.param]


class Killed(Exception):
    """The process ends here."""


def _one_by_one(resident):
    return resident


def _same(one, other):
    return all(torch.equal(one.state[name], other.state[name]) for name in one.state)


@pytest.mark.parametrize("train", [federate, partial(federate, engine=_one_by_one), centralize])
def test_a_run_killed_after_any_round_goes_on_to_the_same_weights(drawing, train, tmp_path):
    whole = train(**drawing())
    other = train(**drawing() | {"seed": 1})
    assert not _same(whole, other)
    for last in (1, 2):

        def kill(entry, last=last):
            if entry.round == last:
                raise Killed

        out = tmp_path / str(last)
        with pytest.raises(Killed):
            train(**drawing(), out=out, on_round=kill)
        np.random.seed(99)
        random.seed(99)
        torch.manual_seed(99)
        assert _same(train(**drawing(), out=out, resume=True), whole)


@pytest.mark.parametrize("engine", [Direct, Cohort])
def test_a_model_that_draws_from_numpy_trains_alike_with_every_engine(job, engine):
    from choral.trainers import Epochs

    class Noisy(nn.Linear):
        def forward(self, points):
            return super().forward(points + 0.3 * np.random.normal())

    def build(dataset):
        model = Noisy(5, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10, shuffle=True)

    options = {"build": build, "fit": Epochs(), "evaluate": lambda model: 0.5}
    one, other = (federate(**job(**options), engine=made) for made in (_one_by_one, engine))
    assert all(torch.equal(one.state[name], other.state[name]) for name in one.state)


def test_workers_that_outlive_a_pass_begin_anew_in_each_round(job, tmp_path):
    class Drawn(Dataset[Any]):
        def __len__(self):
            return 24

        def __getitem__(self, index):
            return torch.full((5,), random.random()) + index, index % 2

    def build(dataset):
        model = nn.Linear(5, 2)
        loader = DataLoader(dataset, batch_size=12, num_workers=1, persistent_workers=True)
        return model, torch.optim.SGD(model.parameters(), lr=0.01), loader

    def copied(entry):
        if entry.round == 1:
            shutil.copytree(tmp_path / "run", tmp_path / "killed")

    options = job(build=build, parties={"north": Drawn(), "south": Drawn()}, rounds=2, min_classes=1)
    whole = federate(**options, out=tmp_path / "run", on_round=copied)
    assert _same(federate(**options, out=tmp_path / "killed", resume=True), whole)


def test_the_caller_keeps_all_three_generators(job):
    np.random.seed(5)
    random.seed(5)
    torch.manual_seed(5)
    federate(**job(rounds=1, fit=_noisy_fit(SHARED["numpy"])))
    centralize(**job(rounds=1, fit=_noisy_fit(SHARED["python"])))
    drawn = (np.random.normal(), random.random(), torch.rand(()).item())
    np.random.seed(5)
    random.seed(5)
    torch.manual_seed(5)
    assert drawn == (np.random.normal(), random.random(), torch.rand(()).item())


def test_the_seed_reaches_no_noise(job):
    """Also where the loop draws from all three generators itself, and holds the promise in its closure."""
    privacy = Privacy(epsilon=5.0, delta=1e-3, max_grad_norm=1.0)

    def fit(model, optimizer, loader):
        assert privacy.epsilon == 5.0
        np.random.normal(), random.random(), torch.rand(())
        for batch, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()

    one, other = (federate(**job(rounds=1, fit=fit), privacy=privacy) for _ in range(2))
    assert not torch.equal(one.state["weight"], other.state["weight"])
    clients = ClientPrivacy(epsilon=50.0, delta=1e-3, min_survivors=2, colluders=0, clip=1.0)
    one, other = (federate(**job(rounds=1), privacy=clients, secure_sum=Masked(min_survivors=2)) for _ in range(2))
    assert not torch.equal(one.state["weight"], other.state["weight"])


def test_sources_of_secrets_and_of_this_package_are_left_alone():
    from choral.privacy import Ledger, PrivacyEngine

    privacy_engine = PrivacyEngine(
        Privacy(epsilon=5.0, delta=1e-3, max_grad_norm=1.0), holder="data", ledger=Ledger(None), passes=1
    )
    privacy_engine.hidden = np.random.default_rng(1)
    secret = random.SystemRandom()

    def fit():
        return privacy_engine, secret, np.random.default_rng, torch.default_generator, random.random

    assert generators_of(fit) == []


def test_each_generator_gets_a_number_of_its_own():
    pair = [np.random.default_rng(1), np.random.default_rng(1), np.random.RandomState(1)]
    pair[2].normal()  # the second number of a pair is kept
    reseed(pair, 0, 1, "north")
    first = [generator.normal() for generator in pair]
    reseed(pair, 0, 1, "north")
    assert [generator.normal() for generator in pair] == first
    assert len(set(first)) == 3


@pytest.mark.parametrize("train", [federate, centralize])
def test_an_evaluation_that_changes_the_model_is_refused(job, train):
    def evaluate(model):
        model.weight.data.zero_()
        return 0.5

    with pytest.raises(TaskError, match="evaluate changed 'weight'"):
        train(**job(evaluate=evaluate))
