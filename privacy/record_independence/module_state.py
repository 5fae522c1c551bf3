"""What a model keeps in plain attributes between forward passes: tensors, arrays, numbers, and lists of them.

Parameters move by noisy steps, and buffers may not change. A tensor in a plain attribute is neither: a memory bank of
earlier outputs, or class centres that follow the batches, bring records of one batch into the loss of another, where no
clipping bounds them. Looked at are modules, and objects in their attributes, containers included.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

_OTHERS = {"torch", "lightning", "pytorch_lightning", "transformers", "opacus", "choral", "builtins"}
_NOT_ITS_OWN = set(nn.Module().__dict__) | {"activations", "max_batch_len", "autograd_grad_sample_hooks"}
_DEPTH = 3
_LARGE = 1 << 24  # numbers of a tensor that is still copied
_LONG = 1 << 12  # parts of a container, without tensors, that is still copied


@dataclass(frozen=True)
class SavedAttribute:
    """One attribute: whose, and what it held."""

    owner: dict[str, Any]
    name: str
    value: Any
    copy: Any


def kept(model: nn.Module) -> dict[str, SavedAttribute]:
    """Return what the model's plain attributes hold now, by dotted name."""
    found: dict[str, SavedAttribute] = {}
    for path, module in model.named_modules():
        _collect(found, path, module.__dict__, _NOT_ITS_OWN, {id(module)})
    return found


def _collect(
    found: dict[str, SavedAttribute], path: str, owner: dict[str, Any], skipped: set[str], seen: set[int]
) -> None:
    for name, value in list(owner.items()):
        if name in skipped or isinstance(value, nn.Module | nn.Parameter | type) or id(value) in seen:
            continue
        dotted = f"{path}.{name}" if path else name
        found[dotted] = SavedAttribute(owner, name, value, _copied(value))
        if _ours(value) and len(seen) < _DEPTH:
            _collect(found, dotted, vars(value), set(), seen | {id(value)})


def _ours(value: Any) -> bool:
    """Return whether an object is of a class of the user's, with attributes."""
    return hasattr(value, "__dict__") and not callable(value) and type(value).__module__.split(".")[0] not in _OTHERS


def marks(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return what shows that an attribute was put, filled or written to; cheap, and nothing is copied."""
    found: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        found[path] = (len(module.__dict__),)
        for name, value in module.__dict__.items():
            if name in _NOT_ITS_OWN or isinstance(value, nn.Parameter | tuple | int | float | str | type(None)):
                continue
            if isinstance(value, torch.Tensor):
                found[f"{path}.{name}"] = (id(value), value._version)
            elif isinstance(value, list | dict | collections.deque):
                parts = value.values() if isinstance(value, dict) else value
                found[f"{path}.{name}"] = (
                    id(value),
                    len(value),
                    *(p._version for p in parts if isinstance(p, torch.Tensor)),
                    *(id(p) for p in parts if isinstance(p, torch.Tensor)),
                )
    return found


def put_back(before: dict[str, SavedAttribute], *, counts_only: bool = False) -> None:
    """Let the attributes hold again what they held; `counts_only`: whole numbers alone, such as steps done."""
    for part in before.values():
        if counts_only and not isinstance(part.value, int):
            continue
        _restore(part.value, part.copy)
        part.owner[part.name] = part.value


def take_away(model: nn.Module, before: dict[str, SavedAttribute]) -> None:
    """Remove the attributes that were not there, and put the others back."""
    for name, part in kept(model).items():
        if name not in before:
            part.owner.pop(part.name, None)
    put_back(before)


def differing(a: dict[str, SavedAttribute], b: dict[str, SavedAttribute]) -> list[str]:
    """Return the names of attributes whose tensors, but for single numbers, are not the same."""
    names = dict.fromkeys((*a, *b))
    return [n for n in names if not _equal(*(list(_rows(side[n].copy)) if n in side else [] for side in (a, b)))]


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if value.numel() <= _LARGE else _digest(value.detach())
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, list | tuple | dict | collections.deque) and len(value) > _LONG and not _tensors_in(value):
        return None
    if isinstance(value, dict):
        return {key: (part, _copied(part)) for key, part in value.items()}
    if isinstance(value, list | tuple | collections.deque):
        return [(part, _copied(part)) for part in value]
    return None


def _digest(value: torch.Tensor) -> torch.Tensor:
    """Return two numbers for a tensor too large to be copied; it is not put back."""
    flat = (torch.view_as_real(value) if value.is_complex() else value).flatten()
    return torch.stack([flat.sum(dtype=torch.float64), flat[::2].sum(dtype=torch.float64)])


def _tensors_in(values: Any) -> bool:
    first = next(iter(values.values() if isinstance(values, dict) else values), None)
    return isinstance(first, torch.Tensor | np.ndarray)


def _restore(value: Any, copy: Any) -> None:
    if copy is None:
        return
    if isinstance(value, torch.Tensor):
        if value.shape == copy.shape and not torch.equal(value, copy):
            value.data.copy_(copy)
    elif isinstance(value, np.ndarray):
        value[...] = copy
    elif isinstance(value, dict):
        for part, old in copy.values():
            _restore(part, old)
        value.clear()
        value.update({key: part for key, (part, _) in copy.items()})
    elif isinstance(value, list | tuple | collections.deque):
        for part, old in copy:
            _restore(part, old)
        if not isinstance(value, tuple):
            value.clear()
            value.extend(part for part, _ in copy)


def _rows(copy: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors and arrays of one dimension or more in a copy."""
    if isinstance(copy, torch.Tensor):
        if copy.ndim > 0:
            yield copy
    elif isinstance(copy, np.ndarray):
        if copy.ndim > 0 and copy.dtype.kind in "biuf":
            yield torch.from_numpy(copy)
    elif isinstance(copy, dict):
        for _, part in copy.values():
            yield from _rows(part)
    elif isinstance(copy, list):
        for _, part in copy:
            yield from _rows(part)


def _equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(_real(x), _real(y).to(x.device), rtol=1e-4, atol=1e-6, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def _real(t: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(t) if t.is_complex() else t).double()
