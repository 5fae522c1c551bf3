"""Every engine does what the resident trainer does with the user's loop, or leaves it to that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_arguments import federate
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from choral import Privacy
from choral.errors import ConfigError
from choral.privacy import Ledger, PrivacyEngine
from choral.trainers import DivergedError, Epochs
from choral.trainers.algorithms.interface import Done, Failed, Gradient, Train
from choral.trainers.engines import Cohort, Direct, Fastest, fastest
from choral.trainers.engines.direct import planned
from choral.trainers.local_steps.resident_model import Resident, refuse_diverged
from choral.trainers.task.arithmetic import Arithmetic
from choral.trainers.task.task import TaskError

CPU = Arithmetic(torch.device("cpu"))

SIZES = [23, 10, 9, 41, 30, 17, 8]  # whole batches, short last batches, one batch, fewer than a batch
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3)),
    "cnn": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
    "no bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3, bias=False)),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"momentum": 0.5, "nesterov": True},
]


def resident(
    model: Callable[[], nn.Module],
    fit: Any,
    *,
    targets: Callable[[int, torch.Generator], torch.Tensor] | None = None,
    loader: dict[str, Any] | None = None,
    sizes: list[int] = SIZES,
    **options: Any,
) -> Resident:
    generator = torch.Generator().manual_seed(5)
    made = targets or (lambda n, generator: torch.randint(3, (n,), generator=generator))
    parties = {
        f"party-{k}": TensorDataset(torch.randn(n, 1, 6, 6, generator=generator), made(n, generator))
        for k, n in enumerate(sizes)
    }

    def build(dataset: Any) -> Any:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), **({"lr": 0.1 + len(dataset) / 1000} | options))
        return net, optimizer, DataLoader(dataset, **({"batch_size": 10, "shuffle": True} | (loader or {})))

    return Resident(build=build, fit=fit, datasets=parties, privacy_engines={}, seed=3, arithmetic=CPU)


def results(trainer: Any, work: Any, *, round_number: int = 2) -> dict[str, Done]:
    weights = torch.full((trainer.length,), 0.05) * torch.linspace(-1, 1, trainer.length)
    parties = getattr(trainer, "resident", trainer).datasets
    return dict(trainer.do([(party, work) for party in parties], weights, round_number))


def assert_alike(found: dict[str, Done], expected: dict[str, Done], *, tolerance: float = 2e-6) -> None:
    assert list(found) == list(expected)
    for party, done in found.items():
        torch.testing.assert_close(done.vector, expected[party].vector, rtol=0, atol=tolerance)
        assert (done.steps, done.path) == (expected[party].steps, expected[party].path)


WORKS = {
    "plain": lambda length: Train(),
    "corrected": lambda length: Train(pull=0.3, shift=torch.linspace(-0.1, 0.1, length)),
}


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_engines_agree_with_the_users_loop(model: str, options: dict[str, Any], work: str) -> None:
    fit = Epochs(epochs=2)
    # The same loop as an opaque function: through the loader and torch's own optimizer.
    usual = resident(MODELS[model], lambda m, o, x: fit(m, o, x), **options)
    known = resident(MODELS[model], fit, **options)
    order = WORKS[work](usual.length)
    expected = results(usual, order)
    direct = results(Direct(known), order)
    assert_alike(direct, expected)
    if not Direct(known).closed_form:
        assert all(torch.equal(direct[party].vector, expected[party].vector) for party in expected)
    assert_alike(results(Cohort(known), order), expected)
    assert_alike(results(Cohort(known, at_once=3), order), expected)
    assert_alike(results(Fastest(known), order), expected)


def test_corrections_and_seeds_matter() -> None:
    known = resident(MODELS["mlp"], Epochs())
    plain = results(Cohort(known), Train())
    assert (results(Cohort(known), Train(pull=0.3))["party-0"].vector - plain["party-0"].vector).abs().max() > 1e-4
    assert (results(Cohort(known), Train(), round_number=3)["party-0"].vector != plain["party-0"].vector).any()


@pytest.mark.parametrize("loader", [{"shuffle": False}, {"drop_last": True, "batch_size": 8}, {"batch_size": 64}])
def test_loaders_of_other_kinds(loader: dict[str, Any]) -> None:
    fit = Epochs()
    expected = results(resident(MODELS["mlp"], lambda m, o, x: fit(m, o, x), loader=loader), Train())
    known = resident(MODELS["mlp"], fit, loader=loader)
    assert planned(known, "party-0", Train(), 1) is not None
    assert_alike(results(Direct(known), Train()), expected)
    assert_alike(results(Cohort(known), Train()), expected)


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (F.mse_loss, lambda n, g: torch.randn(n, 3, generator=g)),
        (F.binary_cross_entropy_with_logits, lambda n, g: torch.randint(2, (n, 3), generator=g).float()),
        (F.l1_loss, lambda n, g: torch.randn(n, 3, generator=g)),
        (F.cross_entropy, lambda n, g: torch.softmax(torch.randn(n, 3, generator=g), dim=1)),
    ],
)
def test_criteria(criterion: Any, targets: Any) -> None:
    fit = Epochs(criterion=criterion)
    expected = results(resident(MODELS["linear"], lambda m, o, x: fit(m, o, x), targets=targets), Train())
    known = resident(MODELS["linear"], fit, targets=targets)
    assert_alike(results(Direct(known), Train()), expected)
    assert_alike(results(Cohort(known), Train()), expected)


def test_labels_to_be_ignored_are_not_written_down() -> None:
    def targets(n: int, generator: torch.Generator) -> torch.Tensor:
        labels = torch.randint(3, (n,), generator=generator)
        return labels.where(torch.arange(n) % 4 > 0, -100)

    fit = Epochs()
    expected = results(resident(MODELS["linear"], lambda m, o, x: fit(m, o, x), targets=targets), Train())
    assert_alike(results(Direct(resident(MODELS["linear"], fit, targets=targets)), Train()), expected)


def test_what_is_not_known_in_full_runs_as_it_is() -> None:
    class Mine(DataLoader[Any]):
        pass

    def first(known: Resident, **replaced: Any) -> Any:
        seat = known.seat("party-0")
        for name, value in replaced.items():
            setattr(seat, name, value)
        return planned(known, "party-0", Train(), 1)

    def fresh() -> Resident:
        return resident(MODELS["mlp"], Epochs())

    data = fresh().datasets["party-0"]
    assert first(fresh()) is not None
    for loader in (
        Mine(data, batch_size=10),
        DataLoader(data, batch_size=10, sampler=WeightedRandomSampler([1.0] * len(data), len(data))),
        DataLoader(data, batch_size=10, collate_fn=lambda items: torch.utils.data.default_collate(items)),
        DataLoader(data, batch_size=10, shuffle=True, generator=torch.Generator()),
        DataLoader(data, batch_size=10, num_workers=1),
        DataLoader(Subset(data, range(20)), batch_size=10),
        DataLoader(data, batch_size=None),
    ):
        assert first(fresh(), loader=loader) is None
    known = fresh()
    assert first(known, optimizer=torch.optim.Adam(known.model.parameters())) is None
    assert first(known, plan=None, optimizer=torch.optim.SGD(list(known.model.parameters())[1:], lr=0.1)) is None
    assert planned(resident(MODELS["mlp"], lambda m, o, x: None), "party-0", Train(), 1) is None
    assert planned(fresh(), "party-0", Gradient(), 1) is None


def test_private_parties_are_left_to_their_privacy_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    known = resident(MODELS["mlp"], Epochs(), sizes=[size for size in SIZES if size >= 10])  # the size of a batch
    known.privacy_engines = {
        party: PrivacyEngine(Privacy(epsilon=3.0, delta=1e-3), holder=party, ledger=Ledger(), passes=1)
        for party in known.datasets
    }
    results(Cohort(known), Train())
    assert known.privacy_engines["party-0"].spent().steps == 3  # of its 23 records in batches of 10
    # A party with less than a batch is refused by its privacy_engine, and drops out.
    paid = {party for party, privacy_engine in known.privacy_engines.items() if privacy_engine.spent().steps}
    assert paid == {party for party, dataset in known.datasets.items() if len(dataset) >= 10}


@pytest.mark.parametrize("engine", [lambda known: known, Direct, Cohort])
def test_no_party_of_a_private_run_trains_without_its_privacy_engine(engine: Any) -> None:
    known = resident(MODELS["mlp"], Epochs())
    known.privacy_engines = {
        "party-0": PrivacyEngine(Privacy(epsilon=3.0, delta=1e-3), holder="party-0", ledger=Ledger(), passes=1)
    }
    with pytest.raises(TaskError, match="'party-1' has no privacy engine here"):
        results(engine(known), Train())


def test_models_that_draw_random_numbers_take_turns() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    fit = Epochs()
    expected = results(resident(model, lambda m, o, x: fit(m, o, x)), Train())
    cohort = Cohort(resident(model, fit))
    found = results(cohort, Train())
    assert not cohort.stackable
    assert all(torch.equal(found[party].vector, expected[party].vector) for party in expected)


@pytest.mark.parametrize("engine", [Direct, Cohort])
def test_divergence_names_the_party(engine: Any) -> None:
    known = resident(MODELS["mlp"], Epochs())
    known.datasets["party-3"].tensors[0][0] = float("inf")
    made = results(engine(known), Train())
    failed = {party: done.error for party, done in made.items() if isinstance(done, Failed)}
    assert list(failed) == ["party-3"]
    assert isinstance(failed["party-3"], DivergedError)
    assert "party-3" in str(failed["party-3"])


@pytest.mark.parametrize(("cheap", "expected"), [(Direct, Direct), (Cohort, Cohort)])
def test_the_faster_one_is_chosen_once(cheap: type, expected: type, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def seconds(trainer: Any, *_: Any, **__: Any) -> float:
        asked.append(type(trainer))
        return 1.0 if isinstance(trainer, cheap) else 2.0

    monkeypatch.setattr(fastest, "_seconds", seconds)
    trainer = Fastest(resident(MODELS["mlp"], Epochs()))
    results(trainer, Train())
    results(trainer, Train())
    assert isinstance(trainer.chosen, expected)
    assert asked == [Direct, Cohort]


def test_federate_gives_the_same_with_any_engine(job: Callable[..., dict[str, Any]]) -> None:
    usual = federate(**job())
    for engine in (None, Direct, Cohort):
        run = federate(**job(fit=Epochs()), engine=engine)
        for name, tensor in usual.state.items():
            torch.testing.assert_close(run.state[name], tensor, rtol=0, atol=1e-6)


def test_epochs_are_checked_and_have_the_loss_of_each_record() -> None:
    with pytest.raises(ConfigError, match="epochs is 0"):
        Epochs(epochs=0)
    outputs, targets = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    losses = Epochs(criterion=F.mse_loss).loss(nn.Identity(), (outputs, targets))
    torch.testing.assert_close(losses.mean(), F.mse_loss(outputs, targets))
    assert losses.shape == (4,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_seen_and_a_large_sum_is_none(bad: float) -> None:
    refuse_diverged(torch.full((1000,), 3e38), "north", 1)  # their sum is infinite
    for place in (0, 500, 999):
        vector = torch.zeros(1000)
        vector[place] = bad
        vector[place - 1] = -bad
        with pytest.raises(DivergedError, match="'north' diverged in round 1"):
            refuse_diverged(vector, "north", 1)
