"""One training on pooled data by several processes, as torchrun starts them: each takes its share of every batch.

Process r of R gets records r, r + R, ... of each batch that one process would have drawn, and after each backward pass
the gradients become those of the whole batch: sum over r of (records of r / records) times r's gradient of the mean
loss. So steps, clipping of gradients and schedules work as in one process, with the same result up to rounding, given
that the loss is a mean over records and that fit draws no random numbers of its own (dropout: other numbers).

Trust: all processes are one party's, and talk without encryption, as torch.distributed does: keep them on one network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # binds the default group when imported: during a run it would keep its threads until exit
from torch import nn
from torch.utils.data import DataLoader

from choral.errors import ChoralError, ConfigError
from choral.trainers.task.task import TaskError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(minutes=10)
_DRIFT = 1e-4  # of the largest weight


class WorkersError(ChoralError):
    """The processes of a data-parallel run do not work together: one has ended, or their models have drifted apart."""


@dataclass
class Workers:
    """The processes of the run, seen from one of them. share: this one's part of the batch in hand, 0 to 1."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    share: float | None = field(default=None, repr=False)

    @property
    def first(self) -> bool:
        """Whether this process keeps the run's folder."""
        return self.rank == 0

    def split(self, loader: Any) -> Any:
        """A loader of this process's shares. Raises: TaskError for anything but a DataLoader of batches of a dataset
        that is read by number.
        """
        if self.size == 1:
            return loader
        if type(loader) is not DataLoader or loader.batch_sampler is None:
            raise TaskError(
                f"data_parallel cannot divide the batches of a {type(loader).__name__}",
                hint="build must return a torch DataLoader of a map-style dataset, with a batch size",
            )
        return BatchShares(loader, self)

    @contextmanager
    def averaging(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Within: after each backward pass every parameter's gradient is that of the whole batch.

        Gradients that were accumulated before it are equal in all processes, and stay as they are.
        Raises: TaskError for sparse gradients, and for a backward pass before the first batch; WorkersError.
        """
        if self.size == 1:
            yield
            return
        handles = [
            parameter.register_post_accumulate_grad_hook(self._average)  # type: ignore[no-untyped-call]
            for parameter in parameters
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _average(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or gradient.is_sparse:
            raise TaskError("data_parallel knows dense gradients only", hint="use nn.Embedding with sparse=False")
        if self.share is None:
            raise TaskError("fit computed gradients before it took a batch from the loader that it was given")
        gradient.mul_(self.share)
        self._together(dist.all_reduce, gradient)

    @torch.no_grad()
    def agree(self, model: nn.Module) -> None:
        """Give every process the first one's weights. Raises: WorkersError if they differ by more than rounding."""
        if self.size == 1:
            return
        apart = torch.zeros((), device=self.device)
        for tensor in model.state_dict().values():
            first = tensor.clone()
            self._together(dist.broadcast, first, 0)
            difference = (first.double() - tensor.double()).abs().max() if tensor.numel() else torch.zeros(())
            limit = _DRIFT * max(1.0, float(first.double().abs().max())) if tensor.numel() else 1.0
            apart += float(not float(difference) <= limit)
            tensor.copy_(first)
        self._together(dist.all_reduce, apart)
        if apart:
            raise WorkersError(
                "the models of the processes have drifted apart",
                hint="fit must take the same steps in each: no schedule that depends on its own loss, no own shuffling",
            )

    def from_first(self, numbers: torch.Tensor) -> torch.Tensor:
        """The first process's ``numbers``, int64, shape (n,); n may differ between processes."""
        length = torch.tensor([len(numbers)], device=self.device)
        self._together(dist.broadcast, length, 0)
        taken = numbers if self.first else torch.empty(int(length), dtype=torch.int64)
        taken = taken.to(self.device)
        self._together(dist.broadcast, taken, 0)
        return taken.cpu()

    def _together(self, operation: Any, *arguments: Any) -> None:
        try:
            operation(*arguments)
        except RuntimeError as error:
            raise WorkersError(
                f"another process of the run has ended or does not answer ({type(error).__name__})",
                hint="its own error stands in its output",
            ) from error


class BatchShares:
    """A loader of one process's shares of the batches; everything else is the wrapped loader's."""

    def __init__(self, loader: DataLoader[Any], workers: Workers) -> None:
        self._loader, self._workers = loader, workers

    def __iter__(self) -> Iterator[Any]:
        loader, workers = self._loader, self._workers
        batches = self._batches()
        mine = [batch[workers.rank :: workers.size] for batch in batches]
        read = DataLoader(
            loader.dataset,
            # A process without a share reads one record all the same, whose gradient then counts for nothing.
            batch_sampler=[own or batch[:1] for own, batch in zip(mine, batches, strict=True)],
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
            generator=torch.Generator(),  # torch's own generator draws for the order alone, as with one process
        )
        for batch, own, whole in zip(read, mine, batches, strict=True):
            workers.share = len(own) / len(whole)
            yield batch

    def _batches(self) -> list[list[int]]:
        """The record numbers of the epoch's batches as the first process draws them."""
        numbers: DataLoader[Any] = DataLoader(
            range(len(self._loader.dataset)),  # type: ignore[arg-type]
            batch_sampler=self._loader.batch_sampler,
            collate_fn=list,
            generator=self._loader.generator,
        )
        drawn = [list(batch) for batch in numbers]
        sizes = self._workers.from_first(torch.tensor([len(batch) for batch in drawn], dtype=torch.int64)).tolist()
        flat = self._workers.from_first(torch.tensor(list(chain.from_iterable(drawn)), dtype=torch.int64))
        return [piece.tolist() for piece in torch.split(flat, sizes)]

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def own_device(device: torch.device) -> torch.device:
    """The accelerator of this process among those of its machine, as torchrun counts; other devices are shared."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device.type == "cuda" else device


@contextmanager
def workers_of(data_parallel: bool, device: torch.device) -> Iterator[Workers]:
    """The processes that torchrun started, joined for the time of the run; this one alone without ``data_parallel``.

    Raises: ConfigError outside torchrun.
    """
    if not data_parallel:
        yield Workers(device=device)
        return
    if dist.is_initialized():  # the caller's own group
        yield Workers(dist.get_rank(), dist.get_world_size(), device)
        return
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise ConfigError(
            f"data_parallel needs the processes that torchrun starts ({', '.join(missing)} not set)",
            hint="torchrun --nproc-per-node 2 YOUR_SCRIPT.py; or leave data_parallel out",
        )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Workers(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
