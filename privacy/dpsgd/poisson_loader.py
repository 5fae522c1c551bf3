"""Poisson batches from the user's loader: each record of its own chance, and no record twice in a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sized
from fractions import Fraction
from typing import Any

from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    default_collate,
)

from choral.privacy.errors import UnsupportedLoaderError
from choral.privacy.noise.gaussian import Source, poisson_sample
from choral.privacy.record_independence.collation import CheckedCollation

# What a subclass may define anew; whatever else DataLoader has, the private loader would replace by its own.
_HARMLESS = {"__init__", "__setattr__", "__doc__", "__dict__", "__weakref__", "__module__", "__annotations__"}
_HARMLESS |= {"__orig_bases__", "__parameters__", "_DataLoader__initialized"}
_HARMLESS |= {"__firstlineno__", "__static_attributes__"}  # what Python 3.13 gives every class


class PoissonSampler(Sampler[list[int]]):
    """`steps` batches of indices below `size`; each index is in each batch with probability exactly `rate`."""

    def __init__(self, size: int, rate: Fraction, steps: int, source: Source) -> None:
        self.size, self.rate, self.steps, self.source = size, rate, steps, source

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield poisson_sample(self.size, self.rate, self.source).tolist()


class _Chunks(Sampler[list[int]]):
    """The batches of `sampler` in chunks of at most `most` indices, but for the empty ones, which are never fetched.

    `drawn` tells of each chunk, empty or not, how many indices it has and whether it ends its batch.
    """

    def __init__(self, sampler: Sampler[list[int]], most: int | None) -> None:
        self.sampler, self.most = sampler, most
        self.drawn: deque[tuple[int, bool]] = deque()  # of the iterator made last, in order

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        drawn: deque[tuple[int, bool]] = deque()
        self.drawn = drawn

        def chunks() -> Iterator[list[int]]:
            for batch in self.sampler:
                most = self.most or max(len(batch), 1)
                for start in range(0, max(len(batch), 1), most):
                    chunk = batch[start : start + most]
                    drawn.append((len(chunk), start + most >= len(batch)))
                    if chunk:
                        yield chunk

        return chunks()


class _Fetched(Dataset[Any]):
    """A dataset that fetches many records at once, held to fetching each by itself."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._fetch = CheckedCollation(dataset.__getitems__, "the dataset's __getitems__")

    def __getattr__(self, name: str) -> Any:
        if name in ("dataset", "_fetch"):  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Any:
        return self._fetch(indices)


def _by_itself(dataset: Any) -> Any:
    """Return `dataset`, so that what it fetches at once is checked; torch's subsets of plain datasets need not be."""
    inner = dataset
    while type(inner) is Subset:
        inner = inner.dataset
    return _Fetched(dataset) if getattr(inner, "__getitems__", None) else dataset


class PrivateLoader(DataLoader[Any]):
    """The user's loader with the batches of `sampler`. A pass is paid for before its first batch is drawn.

    An empty batch is not shown to the loop: its step, of noise alone, is made by `empty_batch`. A batch of more than
    `max_physical_batch_size` records is shown in chunks. So a pass takes len(loader) steps but may show fewer batches,
    or more. `before_batch` hears of the records in each chunk, and whether it is its batch's first and last;
    `before_place` of every batch's place in its pass.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        sampler: Sampler[list[int]],
        *,
        before_pass: Callable[[], None],
        before_batch: Callable[[int, bool, bool], None],
        empty_batch: Callable[[], None],
        after_pass: Callable[[], None],
        before_place: Callable[[int], None] | None = None,
        max_physical_batch_size: int | None = None,
    ) -> None:
        chunks = _Chunks(sampler, max_physical_batch_size)
        collate = loader.collate_fn
        super().__init__(
            _by_itself(loader.dataset),
            batch_sampler=chunks,
            num_workers=loader.num_workers,
            collate_fn=collate if collate is default_collate else CheckedCollation(collate, "collating"),
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            pin_memory_device=loader.pin_memory_device,
        )
        self.hooks = (before_pass, before_batch, empty_batch, after_pass)
        self._before_place = before_place
        self._chunks = chunks

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        before_pass, before_batch, empty_batch, after_pass = self.hooks
        before_pass()
        batches = super().__iter__()
        place, first = 0, True
        for count, last, batch in self._shown(batches, self._chunks.drawn):
            if first and self._before_place is not None:
                self._before_place(place)
            if count:
                before_batch(count, first, last)
                yield batch
            else:
                empty_batch()
            place, first = place + last, last
        after_pass()

    @staticmethod
    def _shown(batches: Iterator[Any], drawn: deque[tuple[int, bool]]) -> Iterator[tuple[int, bool, Any]]:
        """Yield of each chunk how many records it has, whether it ends its batch, and what was fetched, if anything."""
        for batch in batches:
            while not drawn[0][0]:
                yield (*drawn.popleft(), None)
            yield (*drawn.popleft(), batch)
        while drawn:
            yield (*drawn.popleft(), None)


def _replaced(loader: DataLoader[Any]) -> str:
    """Return the name of something of DataLoader that `loader`, or its class, defines anew; or nothing."""
    kinds = type(loader).__mro__[: type(loader).__mro__.index(DataLoader)]
    names = {name for kind in kinds for name in vars(kind)} - _HARMLESS
    names |= {name for name in vars(loader) if callable(getattr(DataLoader, name, None))}
    return min(names & {*vars(DataLoader), "__next__", "__getattribute__"}, default="")


def refuse_unsupported(loader: Any) -> None:
    """Raise UnsupportedLoaderError unless `loader` draws plain batches, shuffled or in order, from a sized dataset."""
    if isinstance(loader, PrivateLoader):
        raise UnsupportedLoaderError("the loader is already private", hint="Wrap the original loader.")
    if not isinstance(loader, DataLoader):
        raise UnsupportedLoaderError(f"loader is a {type(loader).__name__}, expected a torch.utils.data.DataLoader")
    own = _replaced(loader)
    if own:
        raise UnsupportedLoaderError(
            f"the loader is a {type(loader).__name__} with its own {own}, which the private loader would silently "
            "replace",
            hint="Wrap a plain DataLoader, and do in the loop, or in the dataset for each record by itself, what the "
            "class does to batches.",
        )
    if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
        raise UnsupportedLoaderError(
            "the dataset has no length, so no record has a known chance of being sampled",
            hint="Use a map-style dataset with __len__ and __getitem__.",
        )
    if len(loader.dataset) == 0:
        raise UnsupportedLoaderError("the dataset is empty", hint="Leave out parties without data.")
    if loader.batch_size is None:
        raise UnsupportedLoaderError(
            "the loader has its own batch sampler or no batches; Poisson batches would silently replace them",
            hint="Give DataLoader a batch_size instead.",
        )
    sampler = loader.sampler
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset)
    )
    if not plain:
        raise UnsupportedLoaderError(
            f"the loader's sampler is a {type(sampler).__name__}; Poisson sampling, at one rate for all records, "
            "would silently replace it",
            hint="Use shuffle=True. If classes are uneven, multiply the losses of reduction='none' by public weights "
            "and take .mean(); cross_entropy(weight=...) divides by the batch's weights, which breaks the guarantee.",
        )


def sizes_of(loader: DataLoader[Any], holder: str) -> tuple[int, int]:
    """Return how many records a loader of the data owner `holder` has, and how many a batch takes on average.

    Raises: UnsupportedLoaderError (a batch of more records than there are, which would be averaged over records that
    nobody has; what `refuse_unsupported` does).
    """
    refuse_unsupported(loader)
    records, batch_size = len(loader.dataset), int(loader.batch_size or 0)  # type: ignore[arg-type]
    if batch_size > records:
        raise UnsupportedLoaderError(
            f"{holder}: batches of {batch_size} out of {records} records",
            hint="Take at most as many as there are: batch_size=min(size, len(dataset)), which is all of them in "
            "every step where there are few.",
        )
    return records, batch_size
