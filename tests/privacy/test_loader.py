"""Poisson batches: the true rate, independence of seeds, and everything that is refused."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from scipy import stats
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from choral.privacy import BudgetExceededError, Privacy, UnsupportedLoaderError
from choral.privacy.loader import PoissonSampler, PrivateLoader, refuse_unsupported
from choral.privacy.noise import os_stream

DATA = TensorDataset(torch.arange(100.0)[:, None], torch.arange(100))


def private(loader: DataLoader[Any], rate: Fraction, steps: int) -> tuple[PrivateLoader, list[Any]]:
    """A private loader that writes down what it does."""
    log: list[Any] = []
    return (
        PrivateLoader(
            loader,
            PoissonSampler(len(loader.dataset), rate, steps, os_stream),  # type: ignore[arg-type]
            before_pass=lambda: log.append("pass"),
            before_batch=log.append,
            empty_batch=lambda: log.append("empty"),
        ),
        log,
    )


def test_each_pass_is_announced_once_and_each_batch_or_empty_step_in_order() -> None:
    loader, log = private(DataLoader(DATA, batch_size=1), Fraction(1, 100), 200)
    seen = [len(x) for x, _ in loader]
    assert len(loader) == 200
    assert log[0] == "pass"
    assert len(log) == 201
    assert [size for size in log[1:] if size != "empty"] == seen
    assert 30 < log.count("empty") < 120  # each with probability e^-1: outside with probability < 1e-9


def test_two_runs_under_the_same_seed_draw_different_batches() -> None:
    def drawn() -> list[list[int]]:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        loader, _ = private(DataLoader(DATA, batch_size=50, shuffle=True, generator=generator), Fraction(1, 2), 3)
        return [y.tolist() for _, y in loader]

    assert drawn() != drawn()


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_collate_and_structure_are_kept(workers: int) -> None:
    loader, log = private(DataLoader(DATA, batch_size=1, num_workers=workers, collate_fn=_as_dict), Fraction(1, 50), 60)
    batches = list(loader)
    assert all(set(batch) == {"x", "y"} and len(batch["y"]) > 0 for batch in batches)
    assert len(batches) + log.count("empty") == 60
    assert [len(batch["y"]) for batch in batches] == [size for size in log[1:] if size != "empty"]


def _as_dict(records: list[Any]) -> dict[str, Any]:
    return {"x": torch.stack([r[0] for r in records]), "y": [int(r[1]) for r in records]}


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(100)


class Unsized(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("loader", "why"),
    [
        (DataLoader(Stream(), batch_size=10), "no length"),
        (DataLoader(Unsized(), batch_size=10, sampler=SequentialSampler(range(9))), "no length"),
        (DataLoader(DATA, batch_size=10, sampler=WeightedRandomSampler([1.0] * 100, 128)), "WeightedRandomSampler"),
        (DataLoader(DATA, batch_size=10, sampler=RandomSampler(DATA, replacement=True)), "RandomSampler"),
        (DataLoader(DATA, batch_size=10, sampler=RandomSampler(DATA, num_samples=50)), "RandomSampler"),
        (DataLoader(DATA, batch_size=10, sampler=list(range(50))), "list"),
        (DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 10, False)), "batch sampler"),
        (DataLoader(DATA, batch_size=None), "batch sampler or no batches"),
        (DataLoader(Subset(DATA, []), batch_size=10), "empty"),
        ([(torch.zeros(1), 0)], "expected a torch"),
    ],
)
def test_refused(loader: Any, why: str) -> None:
    with pytest.raises(UnsupportedLoaderError, match=why):
        refuse_unsupported(loader)


def test_shuffled_and_ordered_loaders_are_fine() -> None:
    for shuffle in (True, False):
        refuse_unsupported(DataLoader(DATA, batch_size=10, shuffle=shuffle))


def test_a_private_loader_is_not_wrapped_again(problem: Any) -> None:
    _, _, loader = problem.wrapped()
    with pytest.raises(UnsupportedLoaderError, match="already private"):
        refuse_unsupported(loader)


def test_rate_is_batch_over_records_not_one_over_batches(make_problem: Any) -> None:
    """Opacus: n = 101, B = 100 gave q = 1/2 and an expected batch of 50."""
    problem = make_problem(n=101, batch_size=100)
    privacy = Privacy(epsilon=5.0, delta=1e-3, epochs=50)
    model = problem.model()
    _, optimizer, loader = privacy.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader())
    assert loader.batch_sampler.rate == Fraction(100, 101)
    assert optimizer.expected_batch_size == 100
    drawn = sum(len(x) for _ in range(50) for x, _ in loader)
    assert stats.binomtest(drawn, 101 * 100, 100 / 101).pvalue > 1e-7
    assert privacy.spent().sample_rate == 100 / 101


def test_a_pass_is_paid_for_when_its_first_batch_is_drawn(problem: Any) -> None:
    privacy = Privacy(epsilon=5.0, delta=1e-3)
    model = problem.model()
    _, _, loader = privacy.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader())
    assert privacy.spent().steps == 0
    next(iter(loader))
    assert privacy.spent().steps == len(loader) == 10
    with pytest.raises(BudgetExceededError):
        next(iter(loader))
