"""Losses are shown, before they go backward, to the wrapped models that they are made of.

torch has no hook for that, so its `backward` is replaced once a model is wrapped. It then serves every model of the
process: most losses are of other models than most observers', which must cost next to nothing.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence, Set
from typing import Any, Protocol

import torch

MOST = 4096  # nodes of a graph that are looked at


class LossObserver(Protocol):
    """Who checks losses before they go backward."""

    @property
    def loss_ends(self) -> Set[Any]:
        """The nodes of which a loss is made that is to be checked; none where no loss is."""
        ...

    def check_loss(self, losses: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor | None]) -> None:
        """Raise UnsupportedModelError if these may not. seeds: the gradients that `backward` was given for them."""
        ...


_observers: weakref.WeakSet[Any] = weakref.WeakSet()
_torchs_backward = torch.autograd.backward


class _Nodes:
    """The nodes of the losses' graphs, walked once for all who ask, and no further than they ask."""

    def __init__(self, losses: Sequence[torch.Tensor]) -> None:
        self._walk = (node for loss in losses for node in nodes_below(loss.grad_fn))
        self._walked: set[Any] = set()

    def meet(self, ends: Set[Any]) -> bool:
        """Return whether any of `ends` is among them."""
        if not ends or not self._walked.isdisjoint(ends):
            return bool(ends)
        for node in self._walk:
            self._walked.add(node)
            if node in ends:
                return True
        return False


@functools.wraps(_torchs_backward)
def _backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
    losses = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    given = args[0] if args else kwargs.get("grad_tensors")
    seeds = list(given) if isinstance(given, Sequence) else [given] * len(losses)
    nodes = _Nodes(losses)
    for observer in list(_observers):
        if nodes.meet(observer.loss_ends):
            observer.check_loss(losses, seeds)
    _torchs_backward(tensors, *args, **kwargs)


def observe_losses(observer: LossObserver) -> None:
    """Let `observer` check every loss made of its ends from now on, before `loss.backward()`, as long as it lives."""
    _observers.add(observer)
    torch.autograd.backward = _backward


def nodes_below(node: Any) -> Iterator[Any]:
    """Yield a node of a graph and what it was made of, each once."""
    seen: set[Any] = set()
    waiting = [node]
    while waiting and len(seen) < MOST:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [child for child, _ in node.next_functions]
