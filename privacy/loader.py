"""Poisson batches from the user's loader: each record of its own chance, and no record twice in a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sized
from fractions import Fraction
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler, default_collate

from choral.privacy.collation import refuse_mixing
from choral.privacy.errors import UnsupportedLoaderError
from choral.privacy.noise import Source, poisson_sample

_CHECKED_BATCHES = 4  # of each loader and worker


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
    """The batches of `sampler` in chunks of at most `most` indices; `lasts` tells of each whether it ends its batch."""

    def __init__(self, sampler: Sampler[list[int]], most: int | None) -> None:
        self.sampler, self.most = sampler, most
        self.lasts: deque[bool] = deque()  # of the iterator made last, in order

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        lasts: deque[bool] = deque()
        self.lasts = lasts

        def chunks() -> Iterator[list[int]]:
            for batch in self.sampler:
                most = self.most or max(len(batch), 1)
                for start in range(0, max(len(batch), 1), most):
                    lasts.append(start + most >= len(batch))
                    yield batch[start : start + most]

        return chunks()


class _Collate:
    """The user's collate function, with the number of records beside the batch and nothing for an empty one.

    The first batches are also put together with copies of some records in the place of others, under the same random
    numbers: if a kept record's rows change, collating mixes records (Mixup, CutMix, normalisation over the batch).
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate
        self.unchecked = 0 if collate is default_collate else _CHECKED_BATCHES

    def __call__(self, records: list[Any]) -> tuple[int, Any]:
        if self.unchecked and len(records) > 1:
            self.unchecked -= 1
            refuse_mixing(self.collate, records)
        return len(records), (self.collate(records) if records else None)


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
        super().__init__(
            loader.dataset,
            batch_sampler=chunks,
            num_workers=loader.num_workers,
            collate_fn=_Collate(loader.collate_fn),
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )
        self.hooks = (before_pass, before_batch, empty_batch, after_pass)
        self._before_place = before_place
        self._chunks = chunks

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        before_pass, before_batch, empty_batch, after_pass = self.hooks
        before_pass()
        batches = super().__iter__()
        lasts = self._chunks.lasts  # of this pass
        place, first = 0, True
        for count, batch in batches:
            last = lasts.popleft()
            if first and self._before_place is not None:
                self._before_place(place)
            if count:
                before_batch(count, first, last)
                yield batch
            else:
                empty_batch()
            place, first = place + last, last
        after_pass()


def refuse_unsupported(loader: Any) -> None:
    """Raise UnsupportedLoaderError unless `loader` draws plain batches, shuffled or in order, from a sized dataset."""
    if isinstance(loader, PrivateLoader):
        raise UnsupportedLoaderError("the loader is already private", hint="Wrap the original loader.")
    if not isinstance(loader, DataLoader):
        raise UnsupportedLoaderError(f"loader is a {type(loader).__name__}, expected a torch.utils.data.DataLoader")
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
