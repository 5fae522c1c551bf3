"""Budgets over calls, rounds, runs and processes."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import warm_python
from torch.utils.data import DataLoader, Dataset

from choral.errors import ConfigError
from choral.privacy import (
    BudgetExceededError,
    CorrelatedPrivacy,
    Ledger,
    LedgerError,
    PoissonSampledGaussian,
    Privacy,
    PrivacyEngine,
    PrivacyError,
    UnsupportedLoaderError,
    UnsupportedModelError,
)
from choral.privacy.accounting import record_level

PRIVACY = Privacy(epsilon=3.0, delta=1e-3)


def sgd(model: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_an_ordinary_loop_spends_what_was_promised(problem: Any, loop: Callable[..., int]) -> None:
    privacy = Privacy(epsilon=3.0, delta=1e-3, max_grad_norm=0.7, epochs=4)
    model = problem.model()
    before = [p.detach().clone() for p in model.parameters()]
    loop(*privacy.wrap(model, sgd(model), problem.loader()), epochs=4)
    spent = privacy.spent()
    assert 2.99 < spent.epsilon <= 3.0
    assert (spent.delta, spent.unit, spent.neighbours) == (1e-3, "record", "zero out one record")
    assert (spent.steps, spent.sample_rate) == (40, 0.1)
    assert "PLD" in spent.accountant
    event = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=spent.noise_multiplier, steps=40)
    assert spent.epsilon == record_level.epsilon([event], 1e-3)
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert json.loads(msgspec.json.encode(spent.to_json())) == dataclasses.asdict(spent)


def test_two_runs_with_one_seed_give_different_weights(problem: Any, loop: Callable[..., int]) -> None:
    """Opacus without secure mode replays its noise from torch.manual_seed."""

    def trained() -> torch.Tensor:
        torch.manual_seed(0)
        model, optimizer, loader = problem.wrapped(
            batch_size=200
        )  # every record in every batch: only the noise differs
        loop(model, optimizer, loader)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    assert not torch.equal(trained(), trained())


def test_passes_beyond_the_plan_are_refused(problem: Any, loop: Callable[..., int]) -> None:
    model, optimizer, loader = problem.wrapped(Privacy(epsilon=5.0, delta=1e-3, epochs=9), passes=2)
    loop(model, optimizer, loader, epochs=2)
    with pytest.raises(BudgetExceededError, match="planned for 2 passes") as caught:
        loop(model, optimizer, loader)
    assert "Privacy(epochs=...)" in caught.value.hint


def test_too_many_passes_in_one_call_are_refused_in_the_first_call(problem: Any, loop: Callable[..., int]) -> None:
    """Rounds of one pass each, and a loop that makes two: not to be found out after half of the rounds."""
    engine = PrivacyEngine(PRIVACY, holder="a", ledger=Ledger(), passes=10)
    model = problem.model()
    wrapped = engine.wrap(model, sgd(model), problem.loader())
    loop(*wrapped)
    with pytest.raises(BudgetExceededError, match="planned for 1 passes over the data by one call") as caught:
        loop(*wrapped)
    assert "Privacy(epochs=...)" in caught.value.hint
    assert len(engine.ledger.events) == 1
    loop(*engine.wrap(model, sgd(model), problem.loader()))  # the next round


def test_a_batch_that_is_not_stepped_stops_training(problem: Any) -> None:
    model, optimizer, loader = problem.wrapped()
    before = [p.detach().clone() for p in model.parameters()]

    def skipping() -> None:
        for x, y in loader:
            loss = torch.nn.functional.cross_entropy(model(x), y)
            if loss.item() < 100.0:
                continue
            optimizer.step()

    with pytest.raises(PrivacyError, match="never stepped") as caught:
        skipping()
    assert "whatever its loss" in caught.value.hint
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_last_batch_that_is_not_stepped_stops_training(make_problem: Any) -> None:
    _, _, loader = make_problem(n=50, batch_size=50).wrapped()
    with pytest.raises(PrivacyError, match="never stepped"):
        for _ in loader:
            pass


def test_a_batch_whose_step_was_refused_cannot_be_passed_over(problem: Any) -> None:
    model, optimizer, loader = problem.wrapped()
    refused = []

    def forgiving() -> None:
        for x, y in loader:
            torch.nn.functional.cross_entropy(model(x), y).backward()
            try:
                optimizer.step(lambda: 0.0)  # refused: a closure would evaluate the loss again
            except PrivacyError as error:
                refused.append(error)

    with pytest.raises(PrivacyError, match="never stepped"):
        forgiving()
    assert len(refused) == 1


@pytest.mark.parametrize("again", ["same loader", "next round"])
def test_after_a_break_before_the_step_there_is_no_next_pass(
    problem: Any, loop: Callable[..., int], again: str
) -> None:
    privacy = Privacy(epsilon=5.0, delta=1e-3, epochs=3)
    engine = PrivacyEngine(privacy, holder="a", ledger=Ledger(), passes=9)
    model = problem.model()
    private, optimizer, loader = engine.wrap(model, sgd(model), problem.loader())
    for x, y in loader:  # a break after the step is fine: the whole pass is paid for
        torch.nn.functional.cross_entropy(private(x), y).backward()
        optimizer.step()
        break
    for _ in loader:
        break
    if again == "next round":
        private, optimizer, loader = engine.wrap(model, sgd(model), problem.loader())
    with pytest.raises(PrivacyError, match="never stepped"):
        loop(private, optimizer, loader)
    assert len(engine.ledger.events) == 2


class Remembers(torch.nn.Module):
    """Begins to write its input into a buffer at a later step."""

    def __init__(self, first: int, behind_torch: bool) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(6))
        self.calls, self.first, self.behind_torch = 0, first, behind_torch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += torch.is_grad_enabled()
        if self.calls >= self.first:
            memory = self.memory.numpy() if self.behind_torch else self.memory
            memory += x.detach().mean(0).numpy() if self.behind_torch else x.detach().mean(0)
        return x


@pytest.mark.parametrize(
    ("first", "behind_torch", "steps"), [(1, False, 0), (5, False, 4), (5, True, 10), (12, False, 11)]
)
def test_buffers_are_compared_after_the_first_step_too(
    problem: Any, first: int, behind_torch: bool, steps: int
) -> None:
    """A change that torch notices is found before that step is released, any other at the end of the pass."""
    model = torch.nn.Sequential(Remembers(first, behind_torch), torch.nn.Linear(6, 3))
    private, optimizer, loader = problem.wrapped(
        Privacy(epsilon=5.0, delta=1e-3, epochs=2), model, passes=2, batch_size=20
    )
    done = []

    def train() -> None:
        for _ in range(2):
            for x, y in loader:
                torch.nn.functional.cross_entropy(private(x), y).backward()
                optimizer.step()
                done.append(len(x))

    with pytest.raises(UnsupportedModelError, match=r"buffer 0\.memory changes"):
        train()
    assert len(done) == steps


def test_a_buffer_may_be_set_between_passes(problem: Any, loop: Callable[..., int]) -> None:
    """As schedules of a temperature are: what the loop does between passes, it does without the batches."""
    model = torch.nn.Sequential(Remembers(10**9, False), torch.nn.Linear(6, 3))
    private, optimizer, loader = problem.wrapped(
        Privacy(epsilon=5.0, delta=1e-3, epochs=2), model, passes=2, batch_size=20
    )
    loop(private, optimizer, loader)
    with torch.no_grad():
        model[0].memory += 1.0
    loop(private, optimizer, loader)


def test_rounds_with_one_resident_model(problem: Any, make_problem: Any, loop: Callable[..., int]) -> None:
    """Two parties take turns on one model, each with its own optimizer, loader, rate and ledger."""
    model = problem.model()
    parties = {"a": problem, "b": make_problem(n=90, batch_size=30)}
    engines = {name: PrivacyEngine(PRIVACY, holder=name, ledger=Ledger(), passes=3) for name in parties}
    for _ in range(3):
        for name, party in parties.items():
            private, optimizer, loader = engines[name].wrap(model, sgd(model), party.loader())
            loop(private, optimizer, loader)
    for name, rate in (("a", 0.1), ("b", 1 / 3)):
        assert engines[name].ledger.holder == name
        assert engines[name].spent().sample_rate == pytest.approx(rate)
        assert 2.99 < engines[name].spent().epsilon <= 3.0
    with pytest.raises(BudgetExceededError, match="a: the budget was planned"):
        loop(*engines["a"].wrap(model, sgd(model), problem.loader()))
    assert PrivacyEngine.unwrap(private) is model


def test_wrapping_again_is_cheap(problem: Any) -> None:
    engine = PrivacyEngine(PRIVACY, holder="a", ledger=Ledger(), passes=100)
    model, loader = problem.model(), problem.loader()
    engine.wrap(model, sgd(model), loader)
    optimizers = [sgd(model) for _ in range(50)]
    started = time.perf_counter()
    for optimizer in optimizers:
        engine.wrap(model, optimizer, loader)
    assert (time.perf_counter() - started) / 50 < 0.002


def test_a_resumed_run_gets_what_is_left(problem: Any, loop: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    model = problem.model()
    privacy = dataclasses.replace(PRIVACY, epochs=6)
    first = PrivacyEngine(privacy, holder="a", ledger=Ledger(path), passes=10)
    loop(*first.wrap(model, sgd(model), problem.loader()), epochs=4)
    second = PrivacyEngine(privacy, holder="a", ledger=Ledger(path, holder="a"), passes=6)  # another process, say
    loop(*second.wrap(model, sgd(model), problem.loader()), epochs=6)
    assert 2.99 < second.spent().epsilon <= 3.0
    assert second.noise_multiplier == pytest.approx(first.noise_multiplier, rel=0.01)
    with pytest.raises(BudgetExceededError, match=r"is spent|too little"):
        PrivacyEngine(PRIVACY, holder="a", ledger=Ledger(path), passes=1).wrap(model, sgd(model), problem.loader())


def test_the_ledger_is_written_before_the_first_batch(problem: Any, tmp_path: Path) -> None:
    """kill -9 in the first step: the pass is on the ledger."""
    path = tmp_path / "a.jsonl"
    code = f"""
import os, signal, torch
from torch.utils.data import DataLoader, TensorDataset
from choral.privacy import Privacy
model = torch.nn.Linear(6, 1)
loader = DataLoader(TensorDataset(torch.randn(200, 6)), batch_size=20)
_, _, loader = Privacy(epsilon=3.0, delta=1e-3, ledger={str(path)!r}).wrap(
    model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
for batch in loader:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert warm_python.run(["-c", code], check=False).returncode == -9
    assert [event.steps for event in Ledger(path).events] == [10]


def test_two_engines_on_one_ledger_cannot_spend_the_same_budget(problem: Any, loop: Callable[..., int]) -> None:
    ledger = Ledger()
    model = problem.model()
    engines = [PrivacyEngine(PRIVACY, holder="a", ledger=ledger, passes=2) for _ in range(2)]
    wrapped = [engine.wrap(model, sgd(model), problem.loader()) for engine in engines]
    loop(*wrapped[0])
    with pytest.raises(LedgerError, match="somebody else has spent"):
        loop(*wrapped[1])
    assert ledger.epsilon(1e-3) < 3.0


def test_wrapping_twice_shares_one_budget(problem: Any, loop: Callable[..., int]) -> None:
    privacy = Privacy(epsilon=3.0, delta=1e-3)
    model = problem.model()
    loop(*privacy.wrap(model, sgd(model), problem.loader()))
    with pytest.raises(BudgetExceededError):
        privacy.wrap(model, sgd(model), problem.loader())


def test_a_foreign_ledger_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.jsonl")
    ledger.bind("a", 1e-3)
    ledger.append(PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=1.0, steps=1), after=0)
    with pytest.raises(LedgerError, match="belongs to 'a'"):
        PrivacyEngine(PRIVACY, holder="b", ledger=Ledger(tmp_path / "a.jsonl"), passes=1)


def test_damage_to_the_ledger_during_training_stops_it(problem: Any, loop: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    model = problem.model()
    engine = PrivacyEngine(dataclasses.replace(PRIVACY, epochs=3), holder="a", ledger=Ledger(path), passes=3)
    wrapped = engine.wrap(model, sgd(model), problem.loader())
    loop(*wrapped)
    path.write_text(path.read_text().replace('"steps":10', '"steps":1'))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(LedgerError):
        loop(*wrapped)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("n", "batch_size", "drop_last", "rate", "steps"),
    [
        (930, 10, False, 10 / 930, 93),  # Opacus took int(1/q) = 92
        (101, 100, False, 100 / 101, 2),
        (101, 100, True, 100 / 101, 1),
        (50, 50, False, 1.0, 1),
        (50, 50, True, 1.0, 1),
        (7, 2, False, 2 / 7, 4),
    ],
)
def test_rate_and_steps(make_problem: Any, n: int, batch_size: int, drop_last: bool, rate: float, steps: int) -> None:
    problem = make_problem(n=n, batch_size=batch_size)
    _, optimizer, loader = problem.wrapped(drop_last=drop_last)
    assert float(loader.batch_sampler.sampler.rate) == pytest.approx(rate)
    assert len(loader) == steps
    assert optimizer.expected_batch_size == batch_size


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", [Privacy, CorrelatedPrivacy])
def test_batches_of_more_records_than_there_are_are_refused_before_anything_is_spent(
    make_problem: Any, tmp_path: Path, drop_last: bool, kind: type[Privacy]
) -> None:
    privacy = kind(epsilon=5.0, delta=1e-3, ledger=tmp_path / "a.jsonl")
    problem = make_problem(n=50, batch_size=51)
    model = problem.model()
    with pytest.raises(UnsupportedLoaderError, match="batches of 51 out of 50 records") as refused:
        privacy.wrap(model, sgd(model), problem.loader(drop_last=drop_last))
    assert "min(size, len(dataset))" in str(refused.value.hint)
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("change", [1, -1])
def test_a_dataset_that_grows_or_shrinks_ends_the_training_before_the_next_pass(
    problem: Any, loop: Callable[..., int], change: int
) -> None:
    class Growing(Dataset[Any]):
        size = 199

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, i: int) -> Any:
            return problem.dataset[i]

    records, model, ledger = Growing(), problem.model(), Ledger()
    engine = PrivacyEngine(dataclasses.replace(PRIVACY, epochs=3), holder="a", ledger=ledger, passes=3)
    wrapped = engine.wrap(model, sgd(model), DataLoader(records, batch_size=20, shuffle=True))
    loop(*wrapped)
    loop(*wrapped)
    records.size += change
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UnsupportedLoaderError, match=f"{records.size} records .* calibrated for 199"):
        loop(*wrapped)
    assert len(ledger.events) == 2
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_delta_at_or_above_one_over_n_is_refused(make_problem: Any) -> None:
    problem = make_problem(n=200)
    with pytest.raises(ConfigError, match="below 1/n"):
        problem.wrapped(Privacy(epsilon=1.0, delta=1 / 200))
    problem.wrapped(Privacy(epsilon=1.0, delta=1 / 201))


def test_another_dataset_under_the_same_engine_is_refused(problem: Any, make_problem: Any) -> None:
    engine = PrivacyEngine(PRIVACY, holder="a", ledger=Ledger(), passes=2)
    model = problem.model()
    engine.wrap(model, sgd(model), problem.loader())
    with pytest.raises(UnsupportedLoaderError, match="calibrated for"):
        engine.wrap(model, sgd(model), make_problem(n=201).loader())


def test_unsuitable_optimizers_are_refused(problem: Any) -> None:
    engine = PrivacyEngine(PRIVACY, holder="a", ledger=Ledger(), passes=2)
    model = problem.model()
    with pytest.raises(PrivacyError, match="LBFGS"):
        engine.wrap(model, torch.optim.LBFGS(model.parameters()), problem.loader())
    with pytest.raises(UnsupportedModelError, match="not the model's"):
        engine.wrap(model, sgd(problem.model()), problem.loader())
    _, optimizer, _ = engine.wrap(model, sgd(model), problem.loader())
    with pytest.raises(PrivacyError, match="already private"):
        engine.wrap(model, optimizer, problem.loader())


def test_an_optimizer_cannot_step_on_another_wraps_batches(problem: Any) -> None:
    engine = PrivacyEngine(PRIVACY, holder="a", ledger=Ledger(), passes=2)
    model = problem.model()
    private, old, _ = engine.wrap(model, sgd(model), problem.loader())
    _, _, loader = engine.wrap(model, sgd(model), problem.loader())
    x, y = next(iter(loader))
    torch.nn.functional.cross_entropy(private(x), y).backward()
    with pytest.raises(BudgetExceededError, match="without a fresh batch"):
        old.step()


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": math.nan},
        {"epochs": 0},
        {"epochs": 1.5},
    ],
)
def test_bad_promises_are_refused_at_once(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Privacy(**{"epsilon": 1.0, "delta": 1e-5, **bad})


def test_a_promise_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRIVACY.epsilon = 9.0  # type: ignore[misc]


def test_nothing_is_spent_before_training(problem: Any) -> None:
    spent = Privacy(epsilon=1.0, delta=1e-3).spent()
    assert (spent.epsilon, spent.steps) == (0.0, 0)


def test_logistic_regression_on_digits_beats_the_majority_class(loop: Callable[..., int]) -> None:
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    model = torch.nn.Linear(64, 10)
    privacy = Privacy(epsilon=8.0, delta=1e-5, epochs=10)
    loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=128, shuffle=True)
    loop(*privacy.wrap(model, torch.optim.SGD(model.parameters(), lr=2.0), loader), epochs=10)
    accuracy = float((model(x[1400:]).argmax(1) == y[1400:]).float().mean())
    assert privacy.spent().epsilon <= 8.0
    assert accuracy > 0.7  # the majority class has 0.11; typical is 0.85
