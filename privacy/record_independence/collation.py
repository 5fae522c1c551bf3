"""Does what makes a batch mix its records, as Mixup does? Held to that on every batch, under repeated random numbers.

Mixing by chance shows in some batches only, so each batch is made twice: as drawn, and with copies of some records in
the place of others. Under the same random numbers the rows of the records kept must be the same.

Where random numbers depend on the records (a random crop draws as many as it likes), a replaced record shifts those of
all that follow, and rows differ although nothing was mixed. Two tests tell this from mixing: the last record shifts
nobody's random numbers; and what follows a record changes with how many numbers it draws, which two of several
replacements of equal size have in common, while mixing shows their contents.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import random
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from choral.privacy.errors import UnsupportedLoaderError

_FIRST = 4  # batches of which both halves are replaced in turn
_ALONE, _REPLACEMENTS = 3, 16  # records replaced one at a time, and by how many others
_REACH, _WIDTH = 4, 32  # how deep, and how wide, generators are looked for
_DEPTH = 8  # of what is compared

Make = Callable[[list[Any]], Any]


class CheckedCollation:
    """`make`, from records or indices to a batch, held to treating them one by one. `name` says what it is.

    Raises, when called: UnsupportedLoaderError.
    """

    def __init__(self, make: Make, name: str) -> None:
        self.make, self.name, self._made = make, name, 0
        self._sources: list[Any] = []

    def __call__(self, given: list[Any]) -> Any:
        if len(given) < 2:
            return self.make(given)
        self._made += 1
        kept = _half(len(given), self._made)
        halves = [kept, sorted(set(range(len(given))) - set(kept))]
        if self._made > _FIRST:
            return _checked(self.make, self.name, given, halves[:1], self._sources)
        self._sources = list(_generators(self.make))
        return _checked(self.make, self.name, given, halves, self._sources)


def _half(count: int, number: int) -> list[int]:
    """Return a random half of `count` places; leaves all generators alone."""
    return sorted(random.Random(number).sample(range(count), count // 2))  # noqa: S311 - any half will do


def _checked(make: Make, name: str, given: list[Any], halves: list[list[int]], sources: list[Any]) -> Any:
    """Return `make(given)`; raise UnsupportedLoaderError if rows of `halves` depend on the others."""
    everyone = list(range(len(given)))
    start = _states(sources)

    def run(take: list[int]) -> tuple[Any, list[Any]]:
        _restore(sources, start)
        try:
            copies = [_copied(given[i]) for i in take]
        except TypeError as error:
            raise UnsupportedLoaderError(
                f"a record, a {type(given[0]).__name__}, cannot be copied, so it is not seen whether {name} mixes them",
                hint="Give records as tensors, arrays, numbers, strings, or containers of them.",
            ) from error
        return make(copies), _states(sources)

    whole, end = run(everyone)
    for kept in halves:
        take = [i if i in set(kept) else kept[i % len(kept)] for i in everyone]
        other, _ = run(take)
        if not _same(whole, other, kept, len(given)):
            _tell_apart(run, name, whole, start, end, [_size(record) for record in given])
            break
    _restore(sources, end)
    return whole


def _copied(record: Any) -> Any:
    """Return a deep copy of a record, which a function may change; of the usual kinds sooner than `deepcopy` does."""
    if type(record) in (int, float, str, bool, bytes, type(None)):
        return record
    if type(record) is torch.Tensor and not record.requires_grad:
        return record.clone()
    if type(record) is np.ndarray and record.dtype.kind != "O":
        return record.copy()
    if type(record) in (tuple, list):
        return type(record)(map(_copied, record))
    if type(record) is dict:
        return {key: _copied(part) for key, part in record.items()}
    return copy.deepcopy(record)


def _tell_apart(
    run: Callable[[list[int]], tuple[Any, list[Any]]],
    name: str,
    whole: Any,
    start: list[Any],
    end: list[Any],
    sizes: list[Any],
) -> None:
    """Raise UnsupportedLoaderError unless shifted random numbers alone explain that rows were different."""
    count, everyone = len(sizes), list(range(len(sizes)))
    if not _same(whole, run(everyone)[0], everyone, count):
        raise UnsupportedLoaderError(
            f"{name} gives another batch each time, so it is not seen whether it mixes records",
            hint="Draw random numbers from torch, numpy or random, or augment each record by itself in __getitem__.",
        )
    if _frozen(start) == _frozen(end):  # no random numbers
        raise _mixes(name)
    some = random.Random(count).sample(everyone, min(_ALONE, count))  # noqa: S311 - any will do
    for last in some:
        order = [i for i in everyone if i != last]
        whole, end = run([*order, last])
        for other in some:
            batch, drawn = run([*order, other])
            if _frozen(drawn) == _frozen(end) and not _same(whole, batch, everyone[:-1], count):
                raise _mixes(name)
    suspects = [_suspect(run, sizes, place) for place in some if place != everyone[-1]]
    if suspects and all(suspects):
        raise _mixes(name)


def _suspect(run: Callable[[list[int]], tuple[Any, list[Any]]], sizes: list[Any], place: int) -> bool:
    """Return whether the other rows are different for each record of the same size that is put into `place`."""
    everyone = list(range(len(sizes)))
    kept = everyone[:place] + everyone[place + 1 :]
    found: list[Any] = []
    for other in [i for i in everyone if sizes[i] == sizes[place]][:_REPLACEMENTS]:
        batch, _ = run([i if i != place else other for i in everyone])
        if any(_same(batch, before, kept, len(sizes)) for before in found):
            return False
        found.append(batch)
    return len(found) >= _ALONE


def _size(value: Any) -> Any:
    """Return shapes and lengths in a record, all the way down."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return [_size(part) for part in value.values()]
    if isinstance(value, str | bytes):
        return len(value)
    return [_size(part) for part in value] if isinstance(value, Sequence) else ()


def _mixes(name: str) -> UnsupportedLoaderError:
    return UnsupportedLoaderError(
        f"{name} makes a record's rows depend on the other records of the batch, so one record would change the "
        "gradients of others",
        hint="Do not mix records (Mixup, CutMix, batch statistics); augment each record by itself in __getitem__, "
        "from its own data and random numbers alone.",
    )


def _same(a: Any, b: Any, kept: list[int], count: int, depth: int = _DEPTH) -> bool:
    """Compare the rows `kept` of two batches of `count` records."""
    if type(a) is not type(b):
        return False
    if depth == 0:
        return True
    if isinstance(a, PackedSequence):
        return _same(pad_packed_sequence(a, True), pad_packed_sequence(b, True), kept, count)
    if isinstance(a, torch.Tensor | np.ndarray):
        return _same_rows(_dense(a), _dense(b), kept, count)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key], kept, count, depth - 1) for key in a)
    if isinstance(a, Sequence) and not isinstance(a, str | bytes):
        if len(a) == count == len(b) and all(_equal(a[i], b[i]) for i in kept):
            return True  # one item per record
        if len(a) != len(b) or (len(a) == count and not any(_has_rows(part, count) for part in a)):
            return False
        return all(_same(x, y, kept, count, depth - 1) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return _equal(a, b)
    x, y = _attributes(a), _attributes(b)
    return len(x) == len(y) and all(_same(*pair, kept, count, depth - 1) for pair in zip(x, y, strict=True))


def _same_rows(a: torch.Tensor, b: torch.Tensor, kept: list[int], count: int) -> bool:
    """The same of tensors: of rows, of columns if the batch is the second dimension, or of what records share."""
    if a.ndim != b.ndim:
        return False
    for dim in range(min(a.ndim, 2 if a.ndim > 2 else 1)):
        if a.shape[dim] == count:
            rows = torch.tensor(kept)
            return b.shape[dim] == count and _equal_but_for_padding(
                *(t.index_select(dim, rows.to(t.device)).movedim(dim, 0) for t in (a, b))
            )
    # No row per record. A length or a count may change; a mean of features must not.
    return not a.is_floating_point() or a.shape != b.shape or _equal_but_for_padding(a, b)


def _has_rows(part: Any, count: int) -> bool:
    return isinstance(part, torch.Tensor | np.ndarray) and part.ndim > 0 and len(part) == count


def _equal(a: Any, b: Any, depth: int = _DEPTH) -> bool:
    """Compare what two batches hold of one record."""
    if type(a) is not type(b):
        return False
    if depth == 0:
        return True
    if isinstance(a, PackedSequence):
        return _equal(pad_packed_sequence(a, True), pad_packed_sequence(b, True))
    if isinstance(a, torch.Tensor | np.ndarray):
        return _equal_but_for_padding(_dense(a), _dense(b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key], depth - 1) for key in a)
    if isinstance(a, Sequence) and not isinstance(a, str | bytes):
        return len(a) == len(b) and all(_equal(x, y, depth - 1) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return bool(a == b or math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7) or (a != a and b != b))
    x, y = _attributes(a), _attributes(b)
    by_identity = all("__eq__" not in vars(kind) for kind in type(a).__mro__[:-1])
    if by_identity or (x and dataclasses.is_dataclass(a)):
        return len(x) == len(y) and all(_equal(*pair, depth - 1) for pair in zip(x, y, strict=True))
    return bool(a == b)


def _attributes(value: Any) -> list[Any]:
    """Return what an object of somebody's class holds, in the order of names."""
    if isinstance(value, int | str | bytes | type | types.FunctionType | types.ModuleType) or value is None:
        return []
    slots = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
    return [found[name] for name in sorted(found)]


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _dense(value: Any) -> torch.Tensor:
    """Return a tensor or array as a plain tensor; of letters or objects, as numbers that tell them apart."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":
            return torch.tensor([hash(str(item)) for item in value.reshape(-1)]).reshape(value.shape)
        return torch.as_tensor(value.astype(np.int64) if value.dtype.kind == "u" else value.copy())
    given: torch.Tensor = value
    if given.is_nested:
        given = torch.nested.to_padded_tensor(given, 0.0)
    return given if given.layout is torch.strided else given.to_dense()


def _equal_but_for_padding(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.ndim != b.ndim or a.dtype != b.dtype:
        return False
    sizes = [min(pair) for pair in zip(a.shape, b.shape, strict=True)]
    for right in (False, True) if a.shape != b.shape else (False,):
        x, y = a, b
        for dim, size in enumerate(sizes):
            x, y = (t.narrow(dim, t.shape[dim] - size if right else 0, size) for t in (x, y))
        if torch.equal(x, y):  # far faster
            return True
        inexact = a.is_floating_point() or a.is_complex()
        if inexact and torch.allclose(x, y, rtol=1e-5, atol=1e-7, equal_nan=True):
            return True
    return False


def _generators(make: Any) -> Iterator[Any]:
    """Yield the random number generators that `make` holds: in attributes, closures, defaults, globals it names."""
    seen, level = {id(make)}, [make]
    for _ in range(_REACH):
        level = [part for value in level for part in _held(value) if not (id(part) in seen or seen.add(id(part)))]  # type: ignore[func-returns-value]
        yield from (v for v in level if isinstance(v, random.Random | np.random.Generator | np.random.RandomState))
        yield from (v for v in level if isinstance(v, torch.Generator))


def _held(value: Any) -> list[Any]:
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        named = [value.__globals__[name] for name in _named(value.__code__) if name in value.__globals__]
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        return [*named, *cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, Mapping):
        return list(value.values())[:_WIDTH]
    if isinstance(value, list | tuple):
        return list(value[:_WIDTH])
    if isinstance(value, torch.Tensor | np.ndarray | type | types.ModuleType | str | bytes | int | float):
        return []
    of_class = [v for kind in type(value).__mro__ for v in vars(kind).values() if kind.__module__ != "builtins"]
    return [*getattr(value, "__dict__", {}).values(), *of_class]


def _named(code: types.CodeType) -> set[str]:
    """Return the names that a function looks up, functions and comprehensions within it included."""
    inner = [_named(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*inner)


def _states(sources: list[Any]) -> list[Any]:
    """Return where the global generators of Python, NumPy and torch are, and those of `sources`."""
    return [random.getstate(), np.random.get_state(), torch.get_rng_state(), *map(_state, sources)]


def _state(source: Any) -> Any:
    if isinstance(source, np.random.Generator):
        return source.bit_generator.state
    return source.getstate() if isinstance(source, random.Random) else source.get_state()


def _restore(sources: list[Any], states: list[Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    for source, state in zip(sources, states[3:], strict=True):
        if isinstance(source, np.random.Generator):
            source.bit_generator.state = state
        elif isinstance(source, random.Random):
            source.setstate(state)
        else:
            source.set_state(state)


def _frozen(state: Any) -> Any:
    """Return a state of generators in a form that `==` compares exactly."""
    if isinstance(state, torch.Tensor | np.ndarray):
        return np.asarray(state).tobytes()
    if isinstance(state, dict):
        return {key: _frozen(part) for key, part in state.items()}
    return [_frozen(part) for part in state] if isinstance(state, list | tuple) else state
