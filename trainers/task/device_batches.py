"""Batches from one device to another: copied ahead of their turn, where that can be done safely."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from choral import nested


class OnDevice:
    """A loader whose batches arrive on ``device``; everything else is the wrapped loader's.

    On CUDA the batches of a torch DataLoader are pinned, and the next one is read and copied while the model trains on
    the one before. Other loaders are read batch by batch: a private loader counts what it has shown before each step,
    and a share of a batch in data-parallel training says how much it weighs.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self._loader, self._device = loader, device

    @classmethod
    def wrap(cls, loader: Any, device: torch.device) -> Any:
        return loader if device.type == "cpu" else cls(loader, device)

    def __iter__(self) -> Iterator[Any]:
        if reads_ahead(self._loader, self._device):
            yield from ahead(self._loader, Copies(self._device))
            return
        for batch in self._loader:
            yield moved_to(batch, self._device)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def reads_ahead(loader: Any, device: torch.device) -> bool:
    """Only on CUDA, and only of torch's own DataLoader: subclasses, such as a private one, may count what they show."""
    return device.type == "cuda" and type(loader) is DataLoader


def ahead(batches: Iterable[Any], start: Callable[[Any], Callable[[], Any]]) -> Iterator[Any]:
    """Each batch when the next one has been started. start: begins a copy, and returns what waits for it."""
    waiting: Callable[[], Any] | None = None
    for batch in batches:
        started = start(batch)
        if waiting is not None:
            yield waiting()
        waiting = started
    if waiting is not None:
        yield waiting()


class Copies:
    """Copies to a CUDA device on a stream of their own, from pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batch: Any) -> Callable[[], Any]:
        """Begin to copy ``batch``; the function that is returned makes the present stream wait for the copy."""
        if any(tensor.device.type != "cpu" for tensor in tensors_of(batch)):  # made on the present stream: stay there
            return lambda: moved_to(batch, self._device)
        with torch.cuda.stream(self._stream):
            copied = moved_to(mapped(batch, _pinned), self._device)
            done = self._stream.record_event()

        def waited() -> Any:
            now = torch.cuda.current_stream(self._device)
            now.wait_event(done)
            for tensor in tensors_of(copied):
                tensor.record_stream(now)  # or its memory would be given to the next copy too early
            return copied

        return waited


def moved_to(batch: Any, device: torch.device) -> Any:
    """``batch`` with its tensors on ``device``, whatever they are nested in."""
    return mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def mapped(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``batch`` with each of its tensors changed, whatever they are nested in."""
    return nested.map_tensors(batch, change, packed=True)


def tensors_of(batch: Any) -> list[torch.Tensor]:
    """The tensors of ``batch``, whatever they are nested in."""
    return list(nested.tensors(batch, packed=True))


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory() if tensor.layout is torch.strided else tensor
