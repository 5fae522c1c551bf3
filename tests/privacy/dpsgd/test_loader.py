"""Poisson batches: the true rate, independence of seeds, and everything that is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.utils.rnn import pad_sequence
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
    default_collate,
)

from choral.privacy import BudgetExceededError, Privacy, UnsupportedLoaderError
from choral.privacy.dpsgd.poisson_loader import PoissonSampler, PrivateLoader, refuse_unsupported
from choral.privacy.noise.gaussian import os_stream

DATA = TensorDataset(torch.arange(100.0)[:, None], torch.arange(100))


def private(loader: DataLoader[Any], rate: Fraction, steps: int) -> tuple[PrivateLoader, list[Any]]:
    """A private loader that writes down what it does."""
    log: list[Any] = []
    return (
        PrivateLoader(
            loader,
            PoissonSampler(len(loader.dataset), rate, steps, os_stream),  # type: ignore[arg-type]
            before_pass=lambda: log.append("pass"),
            before_batch=lambda count, first, last: log.append(count),
            empty_batch=lambda: log.append("empty"),
            after_pass=lambda: log.append("end"),
        ),
        log,
    )


def test_each_pass_is_announced_once_and_each_batch_or_empty_step_in_order() -> None:
    loader, log = private(DataLoader(DATA, batch_size=1), Fraction(1, 100), 200)
    seen = [len(x) for x, _ in loader]
    assert len(loader) == 200
    assert log[0] == "pass"
    assert log.pop() == "end"
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
    assert [len(batch["y"]) for batch in batches] == [size for size in log[1:-1] if size != "empty"]


def _as_dict(records: list[Any]) -> dict[str, Any]:
    return {"x": torch.stack([r[0] for r in records]), "y": [int(r[1]) for r in records]}


def _mixup(records: list[Any]) -> Any:
    x, y = default_collate(records)
    share, partner = random.random(), torch.randperm(len(x))
    return share * x + (1 - share) * x[partner], y


def _cutmix_in_numpy(records: list[Any]) -> Any:
    batch = _as_dict(records)
    batch["x"] = 0.5 * batch["x"] + 0.5 * batch["x"][np.random.permutation(len(batch["x"]))]
    return batch


def _normalised(records: list[Any]) -> Any:
    x, y = default_collate(records)
    return {"inputs": [x - x.mean(0), y]}


def _neighbours(records: list[Any]) -> Any:
    x, y = default_collate(records)
    return x.clone().add_(x.flip(0)), y


def _mixed_list(records: list[Any]) -> Any:
    return [r[0] + records[0][0] for r in records], [int(r[1]) for r in records]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("collate", [_mixup, _cutmix_in_numpy, _normalised, _neighbours, _mixed_list])
def test_collate_functions_that_mix_records_are_refused(collate: Any, workers: int) -> None:
    if workers and collate is not _mixup:
        return
    loader, _ = private(DataLoader(DATA, batch_size=1, collate_fn=collate, num_workers=workers), Fraction(1, 2), 8)
    with pytest.raises(UnsupportedLoaderError, match="depend on the other records"):
        list(loader)


def _padded(records: list[Any]) -> Any:
    """As for text: popped labels, padding to the longest, on the left or on the right."""
    rows = [r[0].expand(1 + int(r[1]) % 7) for r in records]
    left = pad_sequence([row.flip(0) for row in rows], batch_first=True).flip(1)
    return {"ids": pad_sequence(rows, batch_first=True, padding_value=-1.0), "left": left, "n": [len(r) for r in rows]}


def _popping(records: list[dict[str, Any]]) -> Any:
    labels = [r.pop("label") for r in records]
    return {**default_collate(records), "labels": torch.tensor(labels)}


def _noisy(records: list[Any]) -> Any:
    """Random augmentation of each record by itself, in one go."""
    x, y = default_collate(records)
    return x + torch.randn_like(x) + torch.from_numpy(np.random.randn(len(x), 1)), y, random.random()


@pytest.mark.parametrize("collate", [_padded, _noisy, _as_dict, lambda records: records])
def test_collate_functions_that_do_not_mix_are_kept(collate: Any) -> None:
    loader, _ = private(DataLoader(DATA, batch_size=1, collate_fn=collate), Fraction(1, 2), 8)
    assert len(list(loader)) == 8


def test_records_are_not_used_up_by_the_check_of_the_collate_function() -> None:
    records = [{"label": i, "x": torch.ones(2) * i} for i in range(20)]
    loader, _ = private(DataLoader(records, batch_size=1, collate_fn=_popping), Fraction(1, 2), 1)  # type: ignore[arg-type]
    (batch,) = loader
    assert batch["labels"].tolist() == batch["x"][:, 0].tolist()


def test_the_hint_for_uneven_classes_keeps_the_guarantee() -> None:
    """A weighted mean divides by the batch's weights, so that one record changes the others' gradients."""
    with pytest.raises(UnsupportedLoaderError) as caught:
        refuse_unsupported(DataLoader(DATA, batch_size=10, sampler=WeightedRandomSampler([1.0] * 100, 128)))
    assert "reduction='none'" in caught.value.hint
    weights, scores, labels = torch.tensor([1.0, 20.0]), torch.zeros(3, 2), torch.tensor([0, 0, 1])

    def first_records_gradient(loss: Any, rows: int) -> torch.Tensor:
        leaf = scores[:rows].clone().requires_grad_()
        loss(leaf, labels[:rows]).backward()
        return leaf.grad[0] * rows  # type: ignore[index]

    def refused(s: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(s, y, weight=weights)

    def hinted(s: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.cross_entropy(s, y, reduction="none") * weights[y]).mean()

    torch.testing.assert_close(first_records_gradient(hinted, 2), first_records_gradient(hinted, 3))
    assert not torch.allclose(first_records_gradient(refused, 2), first_records_gradient(refused, 3))


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
    assert loader.batch_sampler.sampler.rate == Fraction(100, 101)
    assert optimizer.expected_batch_size == 100
    drawn = sum(len(indices) for _ in range(50) for indices in loader.batch_sampler)
    assert stats.binomtest(drawn, 101 * 100, 100 / 101).pvalue > 1e-7
    next(iter(loader))
    assert privacy.spent().sample_rate == 100 / 101


def test_a_pass_is_paid_for_when_its_first_batch_is_drawn(problem: Any) -> None:
    privacy = Privacy(epsilon=5.0, delta=1e-3)
    model = problem.model()
    private, optimizer, loader = privacy.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader())
    assert privacy.spent().steps == 0
    x, y = next(iter(loader))
    torch.nn.functional.cross_entropy(private(x), y).backward()
    optimizer.step()
    assert privacy.spent().steps == len(loader) == 10
    with pytest.raises(BudgetExceededError):
        next(iter(loader))
