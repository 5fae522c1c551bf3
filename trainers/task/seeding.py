"""Random numbers of the user's functions: torch's, numpy's and Python's, by (seed, round, purpose).

    with seeded(seed, number, party):        # the three generators that everybody shares
        reseed(found, seed, number, party)   # those that a loader, a dataset or a function has of its own
        fit(model, optimizer, loader)

So a round depends on nothing that was drawn before it, and a run that was killed goes on exactly. All of this decides
initial weights, the order of data and what the user's own code draws. It is public: noise, keys and masks come from the
operating system, whose sources (``secrets``, ``random.SystemRandom``) are not touched here.

**Where records are sampled in secret the seed is None**, and so nobody's. Numbers are drawn row by row: a record that
is drawn moves the rows of those after it, and with them their dropout masks. Known masks would show in the others'
part of a sum who was drawn, and amplification by sampling rests on that being unknown. Masks that nobody knows are
the same for each row, whichever that is, and tell nothing.
"""

from __future__ import annotations

import functools
import hashlib
import random
import secrets
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

Generator = torch.Generator | np.random.Generator | np.random.RandomState | np.random.BitGenerator | random.Random
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
_PLAIN = (str, bytes, int, float, complex, type(None), torch.Tensor, np.ndarray, types.ModuleType)
_FOREIGN = ("torch", "numpy", "random", "choral", "builtins", "scipy", "pandas", "sklearn", "transformers", "functools")
_MOST = 64  # entries of a container that are looked at: a table of records is not
_OBJECTS = 4096


class _Caller:
    """Where the generators were before they were first seeded: torch's, and numpy's and Python's."""

    def __init__(self) -> None:
        self._torch: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        self._others: tuple[Any, Any] | None = None

    def note_torch(self) -> None:
        if self._torch is None:
            devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
            self._torch = torch.get_rng_state(), devices

    def note_others(self) -> None:
        if self._others is None:
            self._others = random.getstate(), np.random.get_state()

    def put_back(self) -> None:
        if self._torch is not None:
            torch.set_rng_state(self._torch[0])
            if self._torch[1]:
                torch.cuda.set_rng_state_all(self._torch[1])
        if self._others is not None:
            random.setstate(self._others[0])
            np.random.set_state(self._others[1])


_caller: ContextVar[_Caller | None] = ContextVar("_caller", default=None)


def seed_of(seed: int | None, round_number: int, purpose: str) -> int:
    """The seed of one purpose in one round: 63 bits, from SHA-256; of None another each time, that nobody knows."""
    if seed is None:
        return secrets.randbits(63)
    digest = hashlib.sha256(f"{seed}|{round_number}|{purpose}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def seeded(seed: int | None, round_number: int, purpose: str) -> AbstractContextManager[None]:
    """torch's, numpy's and Python's generators seeded from (seed, round, purpose), and put back afterwards."""
    return seeded_by(seed_of(seed, round_number, purpose), secret=seed is None)


@contextmanager
def seeded_by(number: int, *, secret: bool = False) -> Iterator[None]:
    """The same, of what :func:`seed_of` gave. secret: it is nobody's, and numpy has all of its bits."""
    with _PutBack() as caller:
        caller.note_torch()
        caller.note_others()
        _seed_torch(number)
        np.random.seed([number & 0xFFFF_FFFF, number >> 32] if secret else number & 0xFFFF_FFFF)
        random.seed(number)
        yield


@contextmanager
def torch_seeded(seed: int, round_number: int, purpose: str) -> Iterator[None]:
    """torch's alone, for code that is known to draw from no other."""
    with _PutBack() as caller:
        caller.note_torch()
        _seed_torch(seed_of(seed, round_number, purpose))
        yield


@contextmanager
def caller_keeps_generators() -> Iterator[None]:
    """Put the generators back afterwards, those that were seeded. Around many parties, as it takes a tenth of a small
    one's time; `seeded` directly within leaves it to this.
    """
    caller = _Caller()
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)
        caller.put_back()


class _PutBack:
    """Afterwards the generators are where they were, unless that is left to whoever keeps them for many parties."""

    def __enter__(self) -> _Caller:
        self._outer = _caller.get()
        self._token = _caller.set(None)  # one within this one puts back what is seeded here
        self._caller = self._outer or _Caller()
        return self._caller

    def __exit__(self, *_: object) -> None:
        _caller.reset(self._token)
        if self._outer is None:
            self._caller.put_back()


@functools.cache
def _accelerated() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _seed_torch(number: int) -> None:
    # torch.manual_seed also notes the stack for accelerators that are not there, at a tenth of a small party's time.
    (torch.manual_seed if _accelerated() else torch.default_generator.manual_seed)(number)


def luck() -> tuple[torch.Tensor, Any, Any]:
    """Where the three generators are, for `drawn_since`."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def drawn_since(before: tuple[torch.Tensor, Any, Any]) -> bool:
    """Whether any of the three generators has moved."""
    now = luck()
    numbers = all(np.array_equal(was, found) for was, found in zip(before[1], now[1], strict=True))
    return not (torch.equal(before[0], now[0]) and numbers and before[2] == now[2])


def reseed(generators: Iterable[Generator], seed: int | None, round_number: int, purpose: str) -> None:
    """Seed generators of the user's own, each with a number of its own place among them."""
    for place, generator in enumerate(generators):
        number = seed_of(seed, round_number, f"{purpose}|generator {place}")
        if isinstance(generator, torch.Generator):
            generator.manual_seed(number)
        elif isinstance(generator, random.Random):
            generator.seed(number)
        elif isinstance(generator, np.random.RandomState):  # which also keeps every second normal number
            state = dict(generator.get_state(legacy=False))
            kind: Any = type(generator._bit_generator)
            generator.set_state(state | {"state": kind(number).state["state"], "has_gauss": 0, "gauss": 0.0})
        else:
            bits: Any = generator if isinstance(generator, np.random.BitGenerator) else generator.bit_generator
            bits.state = type(bits)(number).state


def generators_of(*roots: Any) -> list[Generator]:
    """The generators that these objects and functions hold: in attributes, containers, closures, and the globals that
    a function names; always in the same order. Those of the operating system, of libraries' modules and of this package
    are not looked for.
    """
    found: list[Generator] = []
    seen: set[int] = set()
    waiting = list(reversed(roots))
    while waiting and len(seen) < _OBJECTS:
        thing = waiting.pop()
        if isinstance(thing, _PLAIN) or id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, _GENERATORS):
            if not isinstance(thing, random.SystemRandom) and thing not in (_shared_python, torch.default_generator):
                found.append(thing)
            continue
        waiting += reversed([part for part in _parts(thing) if not isinstance(part, _PLAIN)])
    return found


_shared_python = random.seed.__self__  # type: ignore[attr-defined]


def _parts(thing: Any) -> Iterator[Any]:
    """What an object holds, as far as it is the user's."""
    if isinstance(thing, Mapping):
        yield from list(thing.values())[:_MOST]
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from list(thing)[:_MOST]
    elif isinstance(thing, functools.partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, types.MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, types.FunctionType):
        if not _foreign(thing.__module__):
            yield from _named_by(thing)
    elif isinstance(thing, type):
        if not _foreign(thing.__module__):
            yield from (part for part in vars(thing).values() if isinstance(part, types.FunctionType | staticmethod))
    elif isinstance(thing, staticmethod | classmethod):
        yield thing.__func__
    elif not type(thing).__module__.startswith(("choral.privacy", "choral.protocols")):  # noise, keys
        for name, value in list(getattr(thing, "__dict__", {}).items()):
            if name not in ("_iterator", "_parameters", "_buffers"):
                yield value
        yield from (getattr(thing, name, None) for name in getattr(type(thing), "__slots__", ()))
        kind: Any = type(thing)
        yield from _own_kinds(kind)


@functools.lru_cache(256)
def _own_kinds(kind: type) -> tuple[type, ...]:
    """The user's among a class and those that it is derived from."""
    return tuple(each for each in kind.__mro__ if not _foreign(each.__module__))


def _named_by(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from (function.__defaults__, function.__kwdefaults__)
    codes, place = [function.__code__], 0
    while place < len(codes):
        codes += [constant for constant in codes[place].co_consts if isinstance(constant, types.CodeType)]
        place += 1
    for name in dict.fromkeys(name for code in codes for name in code.co_names):
        if name in function.__globals__:
            yield function.__globals__[name]


def _foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _FOREIGN


def forget_workers(loader: Any) -> None:
    """End worker processes that outlive a pass, so that their generators begin anew, as in a run that is resumed."""
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader._iterator = None
