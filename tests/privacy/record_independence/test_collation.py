"""What makes a batch treats its records one by one: collate functions and datasets that fetch many records at once."""

from __future__ import annotations

import functools
import os
import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, StackDataset, Subset, TensorDataset, default_collate

from choral.privacy import Privacy, UnsupportedLoaderError
from choral.privacy.dpsgd.poisson_loader import PoissonSampler, PrivateLoader, refuse_unsupported
from choral.privacy.noise.gaussian import os_stream
from choral.privacy.record_independence.collation import CheckedCollation

DATA = TensorDataset(torch.arange(100.0)[:, None] + torch.tensor([0.25, 0.5]), torch.arange(100))


def private(loader: DataLoader[Any], *, batch: int = 20, steps: int = 30) -> tuple[PrivateLoader, list[Any]]:
    """A private loader that writes down what it draws."""
    log: list[Any] = []
    size = len(loader.dataset)  # type: ignore[arg-type]
    made = PrivateLoader(
        loader,
        PoissonSampler(size, Fraction(batch, size), steps, os_stream),
        before_pass=lambda: None,
        before_batch=lambda count, first, last: log.append(count),
        empty_batch=lambda: log.append(0),
        after_pass=lambda: None,
    )
    return made, log


class ByChance:
    """Mixup in a share of the batches, with partners from `partner`, a generator of its own or Python's."""

    def __init__(self, chance: float, partner: str, own: bool) -> None:
        self.chance, self.partner, self.own = chance, partner, np.random.default_rng(1) if own else None

    def __call__(self, records: list[Any]) -> Any:
        x, y = default_collate(records)
        if (self.own.random() if self.own else random.random()) < self.chance:
            if self.partner == "before":  # each with the one before it, the first with none
                x = torch.cat([x[:1], 0.7 * x[1:] + 0.3 * x[:-1]])
            else:
                x = 0.7 * x + 0.3 * (x[torch.randperm(len(x))] if self.partner == "any" else x.flip(0))
        return x, y


@pytest.mark.parametrize("own", [False, True], ids=["global numbers", "its own"])
@pytest.mark.parametrize("partner", ["any", "mirrored", "before"])
@pytest.mark.parametrize("chance", [0.5, 0.2, 0.1])
def test_a_collate_function_that_mixes_by_chance_is_refused_in_a_pass(chance: float, partner: str, own: bool) -> None:
    """Of 200 batches none mixes with probability 7e-10; four checked batches let 25 of 30 passes through at .1."""
    random.seed(3)
    for _ in range(3):
        loader, _ = private(DataLoader(DATA, batch_size=1, collate_fn=ByChance(chance, partner, own)), steps=200)
        with pytest.raises(UnsupportedLoaderError, match="depend on the other records"):
            list(loader)


def masked(records: list[Any]) -> Any:
    """As for masked language models: padded to the longest, masked by random numbers for every place."""
    rows = pad_sequence([r[0][:1].expand(1 + int(r[1]) % 9) for r in records], batch_first=True)
    return {"ids": rows.masked_fill(torch.bernoulli(torch.full(rows.shape, 0.15)).bool(), -1.0), "y": len(records)}


def cropped(records: list[Any]) -> Any:
    """Each record draws as many random numbers as it likes."""
    rows = []
    for x, y in records:
        long = x[:1].repeat(2 + int(y) % 50)
        start = random.randint(0, len(long) - 2)
        rows.append(long[start : start + 2] + (random.gauss(0, 1) if int(y) % 3 else 0.0))
    return torch.stack(rows)


OWN, TORCHS = random.Random(5), torch.Generator().manual_seed(1)


def by_own_generators(records: list[Any]) -> Any:
    x, y = default_collate(records)
    return x + torch.tensor([[OWN.random()] for _ in records]) + torch.rand(len(x), 1, generator=TORCHS), y


class Jitter:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __call__(self, records: list[Any]) -> Any:
        return self.batch(records)

    def batch(self, records: list[Any]) -> Any:
        return default_collate([(x + float(self.rng.normal()), y) for x, y in records])


@dataclass
class Batch:
    x: torch.Tensor
    names: list[str]
    inner: Any = None


def objects(records: list[Any]) -> Any:
    return Batch(torch.stack([r[0] for r in records]), [str(int(r[1])) for r in records], {"longest": len(records)})


def packed(records: list[Any]) -> Any:
    return pack_sequence([r[0][:1].expand(1 + int(r[1]) % 5, 1) for r in records], enforce_sorted=False)


def of_records(records: list[Any]) -> Any:
    """Not put together: tensors as long as there are records, sometimes."""
    return [{"x": r[0][:1].expand(20), "y": int(r[1])} for r in records], [r[0][:1].expand(20) for r in records]


HONEST = [masked, cropped, by_own_generators, Jitter(), objects, packed, of_records, functools.partial(masked)]


@pytest.mark.parametrize("collate", HONEST, ids=lambda f: getattr(f, "__name__", type(f).__name__))
def test_random_augmentation_of_each_record_by_itself_passes(collate: Any) -> None:
    loader, log = private(DataLoader(DATA, batch_size=1, collate_fn=collate), steps=150)
    assert len(list(loader)) == sum(map(bool, log)) > 140


def test_the_random_numbers_are_those_of_a_loop_without_the_check() -> None:
    def drawn(collate: Any) -> list[Any]:
        random.seed(1)
        TORCHS.manual_seed(1)
        OWN.seed(2)
        torch.manual_seed(3)
        records = [DATA[i] for i in range(20)]
        return [collate(records) for _ in range(8)]

    for collate in (cropped, by_own_generators):
        for want, got in zip(drawn(collate), drawn(CheckedCollation(collate, "collating")), strict=True):
            torch.testing.assert_close(got, want)


def unrepeatable(records: list[Any]) -> Any:
    x, y = default_collate(records)
    return x + torch.tensor([[int.from_bytes(os.urandom(2))] for _ in records]), y


def test_random_numbers_that_cannot_be_repeated_are_refused_by_name() -> None:
    loader, _ = private(DataLoader(DATA, batch_size=1, collate_fn=unrepeatable))
    with pytest.raises(UnsupportedLoaderError, match="another batch each time") as caught:
        list(loader)
    assert "__getitem__" in caught.value.hint


def mixed_object(records: list[Any]) -> Any:
    batch = objects(records)
    batch.inner = {"centred": batch.x - batch.x.mean(0)}
    return batch


def second_dimension(records: list[Any]) -> Any:
    x = torch.stack([r[0] for r in records], 1)[:, :, None]  # features, records, 1
    return x + x.flip(1)


def shared_statistic(records: list[Any]) -> Any:
    x, y = default_collate(records)
    return {"x": x, "y": y, "mean": x.mean(0)}


def statistic_as_a_number(records: list[Any]) -> Any:
    x, y = default_collate(records)
    return x, y, float(x.mean())


def mixed_records(records: list[Any]) -> Any:
    return [{"x": r[0] + records[-1][0]} for r in records]


@pytest.mark.parametrize(
    "collate", [mixed_object, second_dimension, shared_statistic, statistic_as_a_number, mixed_records]
)
def test_mixing_is_seen_in_whatever_a_batch_is(collate: Any) -> None:
    loader, _ = private(DataLoader(DATA, batch_size=1, collate_fn=collate), steps=8)
    with pytest.raises(UnsupportedLoaderError, match="depend on the other records"):
        list(loader)


class AtOnce(Dataset[Any]):
    """Records that are fetched together, as by Hugging Face's datasets; `mix` makes of their stack what it likes."""

    def __init__(self, mix: Any = lambda x: x, *, as_records: bool = True) -> None:
        self.mix, self.as_records, self.fetched = mix, as_records, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return 100

    def __getitem__(self, i: int) -> Any:
        return DATA[i]

    def __getitems__(self, indices: list[int]) -> Any:
        self.fetched.append(len(indices))
        x = self.mix(torch.stack([DATA[i][0] for i in indices]))
        y = torch.tensor([int(DATA[i][1]) for i in indices])
        return list(zip(x, y, strict=True)) if self.as_records else (x, y)


def normalised(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(0)) / (x.std(0, correction=0) + 1e-5)


def mixed_at_times(x: torch.Tensor) -> torch.Tensor:
    return x if random.random() > 0.2 else 0.5 * x + 0.5 * x.roll(1, 0)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("mix", [normalised, mixed_at_times])
@pytest.mark.parametrize("form", ["records", "batch", "subset", "subset of a subset", "stack"])
def test_a_dataset_that_mixes_what_it_fetches_at_once_is_refused(form: str, mix: Any, workers: int) -> None:
    if workers and (form, mix) != ("records", normalised):
        return
    random.seed(1)
    dataset: Any = AtOnce(mix, as_records=form != "batch")
    settings = {"collate_fn": _as_it_is} if form == "batch" else {}
    if form.startswith("subset"):
        dataset = Subset(dataset, range(60))
    if form == "subset of a subset":
        dataset = Subset(dataset, range(40))
    if form == "stack":
        dataset = StackDataset(dataset, DATA)
    loader, _ = private(DataLoader(dataset, batch_size=1, num_workers=workers, **settings), steps=80)
    with pytest.raises(UnsupportedLoaderError, match="__getitems__ makes a record's rows depend"):
        list(loader)


def _as_it_is(batch: Any) -> Any:
    return batch


@pytest.mark.parametrize("as_records", [True, False], ids=["records", "a batch"])
def test_a_dataset_that_fetches_at_once_without_mixing_is_kept(as_records: bool) -> None:
    dataset = AtOnce(as_records=as_records)
    collate = {} if as_records else {"collate_fn": _as_it_is}
    loader, log = private(DataLoader(dataset, batch_size=1, **collate))  # type: ignore[arg-type]
    batches = list(loader)
    assert [len(y) for _, y in batches] == [count for count in log if count]  # records, not what holds them
    assert all(torch.equal(x[:, 0], y + 0.25) for x, y in batches)
    assert loader.dataset.fetched  # the dataset's own attributes are there
    assert len(loader.dataset) == 100


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fetch", ["at once", "one by one", "collated"])
def test_an_empty_batch_is_never_fetched_nor_collated(fetch: str, workers: int) -> None:
    """A stack of no records raises, in the middle of a pass that is paid for."""
    dataset: Any = AtOnce() if fetch == "at once" else DATA
    collate = {"collate_fn": _stacked} if fetch == "collated" else {}
    loader, log = private(DataLoader(dataset, batch_size=1, num_workers=workers, **collate), batch=1, steps=120)
    sizes = [len(y) for _, y in loader]
    assert len(log) == 120
    assert [count for count in log if count] == sizes
    assert 20 < log.count(0) < 80  # each with probability e^-1: outside with probability < 1e-5


def _stacked(records: list[Any]) -> Any:
    return torch.stack([r[0] for r in records]), torch.stack([r[1] for r in records])


def test_training_on_such_a_dataset_pays_and_steps_as_usual(problem: Any, loop: Any) -> None:
    class Rows(TensorDataset):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return list(zip(*(t[indices] for t in self.tensors), strict=True))

    problem.dataset = Rows(problem.x, problem.y)
    privacy, model = Privacy(epsilon=5.0, delta=1e-3, max_physical_batch_size=7), problem.model()
    loop(*privacy.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader()))
    assert privacy.spent().steps == 10


class Uncopied:
    def __deepcopy__(self, _: Any) -> Any:
        raise TypeError("no copy")


def test_records_that_cannot_be_copied_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedLoaderError, match="a Uncopied, cannot be copied"):
        CheckedCollation(len, "collating")([Uncopied(), Uncopied()])


def move(batches: Any) -> Any:
    yield from ((x * 2, y) for x, y in batches)


class OwnIter(DataLoader[Any]):
    def __iter__(self) -> Any:
        return move(super().__iter__())


class Inherited(OwnIter):
    pass


class OwnIterator(DataLoader[Any]):
    def _get_iterator(self) -> Any:
        return move(super()._get_iterator())


class OwnLength(DataLoader[Any]):
    def __len__(self) -> int:
        return 3


class OwnIndices(DataLoader[Any]):
    @property
    def _index_sampler(self) -> Any:
        return [[0, 1]] * 3


class Settings(DataLoader[Any]):
    """Sets itself up, and has more to say: nothing of it would be lost."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset, batch_size=20, shuffle=True)

    def describe(self) -> str:
        return "twenty"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (OwnIter, "__iter__"),
        (Inherited, "__iter__"),
        (OwnIterator, "_get_iterator"),
        (OwnLength, "__len__"),
        (OwnIndices, "_index_sampler"),
    ],
)
def test_a_loader_whose_own_methods_would_be_replaced_is_refused_by_name(kind: Any, name: str) -> None:
    with pytest.raises(UnsupportedLoaderError, match=f"{kind.__name__} with its own {name}") as caught:
        refuse_unsupported(kind(DATA, batch_size=20))
    assert "plain DataLoader" in caught.value.hint


def test_a_method_put_into_one_loader_is_seen_too() -> None:
    loader = DataLoader(DATA, batch_size=20)
    plain = loader._get_iterator
    loader._get_iterator = lambda: move(plain())  # type: ignore[method-assign,return-value]
    with pytest.raises(UnsupportedLoaderError, match="its own _get_iterator"):
        refuse_unsupported(loader)


def test_a_subclass_that_only_sets_itself_up_is_kept() -> None:
    refuse_unsupported(Settings(DATA))
