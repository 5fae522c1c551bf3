"""One walk over nested batches: tensors in tuples, lists, mappings, named tuples and dataclasses, however deep.

torch's pytree (`torch.utils._pytree`) opens the plain kinds: dict, OrderedDict, defaultdict, list, tuple, deque and
named tuples. Opened here are the kinds that it takes for leaves, or rebuilds as something else: other mappings, such as
Hugging Face's BatchEncoding and ModelOutput, which are copied and filled again; other lists and tuples; dataclasses.
Everything else is a leaf. torch is imported when a batch is walked.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PLAIN = (dict, OrderedDict, defaultdict, list, tuple, deque)

Rebuild = Callable[[list[Any]], Any]


def leaves(batch: Any, *, packed: bool = False) -> list[Any]:
    """Return the leaves of `batch`, from left to right.

    packed: open a PackedSequence, too: its data and its orders, not its batch sizes. Else it is a leaf.
    """
    return _flat(batch, packed)[0]


def mapped(batch: Any, change: Callable[[Any], Any], *, packed: bool = False) -> Any:
    """Return `batch` with `change` applied to each of its :func:`leaves`; what holds them is made anew, of its kind.

    A mapping that cannot be written to becomes a dict.
    """
    found, rebuild = _flat(batch, packed)
    return rebuild([change(leaf) for leaf in found])


def tensors(batch: Any, *, packed: bool = False) -> Iterator[torch.Tensor]:
    """Yield the leaves that are tensors."""
    from torch import Tensor

    yield from (leaf for leaf in leaves(batch, packed=packed) if isinstance(leaf, Tensor))


def map_tensors(batch: Any, change: Callable[[torch.Tensor], torch.Tensor], *, packed: bool = False) -> Any:
    """Return `batch` with `change` applied to its tensors; other leaves are passed on as they are."""
    from torch import Tensor

    return mapped(batch, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, packed=packed)


def _flat(batch: Any, packed: bool) -> tuple[list[Any], Rebuild]:
    """Return the leaves, and what makes a batch of as many others."""
    from torch import Tensor
    from torch.utils import _pytree

    if type(batch) is Tensor:
        return [batch], lambda changed: changed[0]
    outer, spec = _pytree.tree_flatten(batch, is_leaf=lambda node: not _plain(node))
    inner = [_opened(node, packed) for node in outer]

    def rebuild(changed: list[Any]) -> Any:
        nodes, place = [], 0
        for found, remake in inner:
            nodes.append(remake(changed[place : place + len(found)]))
            place += len(found)
        return _pytree.tree_unflatten(nodes, spec)

    return [leaf for found, _ in inner for leaf in found], rebuild


def _plain(node: Any) -> bool:
    """Whether torch opens this kind, and makes the same of it again."""
    return type(node) in _PLAIN or (type(node).__bases__ == (tuple,) and hasattr(node, "_fields"))


def _opened(node: Any, packed: bool) -> tuple[list[Any], Rebuild]:
    """Return the leaves of a node that torch does not open, and what makes it again; a leaf is its own."""
    parts = _parts(node, packed)
    if parts is None:
        return [node], lambda changed: changed[0]
    found, rebuild = _flat(parts[0], packed)
    return found, lambda changed: parts[1](rebuild(changed))


def _parts(node: Any, packed: bool) -> tuple[list[Any], Rebuild] | None:
    """Return what a node holds, and what makes it of other parts; None for a leaf."""
    from torch.nn.utils.rnn import PackedSequence

    if isinstance(node, PackedSequence):  # a tuple whose batch sizes stay on the CPU
        if not packed:
            return None
        held = [node.data, node.sorted_indices, node.unsorted_indices]
        return held, lambda new: type(node)(new[0], node.batch_sizes, *new[1:])
    if isinstance(node, MutableMapping):  # of whatever kind: some are objects whose entries are attributes
        return list(node.values()), lambda new: _filled(node, new)
    if isinstance(node, Mapping):
        return list(node.values()), lambda new: dict(zip(node, new, strict=True))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node) if hasattr(node, field.name)]
        return [getattr(node, name) for name in names], lambda new: _with_fields(node, names, new)
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(node), lambda new: type(node)(*new)
    if isinstance(node, list | tuple):
        return list(node), lambda new: type(node)(new)
    return None


def _filled(node: MutableMapping[Any, Any], values: list[Any]) -> MutableMapping[Any, Any]:
    made = copy.copy(node)
    for key, value in zip(node, values, strict=True):
        made[key] = value
    return made


def _with_fields(node: Any, names: list[str], values: list[Any]) -> Any:
    made = copy.copy(node)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)  # frozen ones, too
    return made
