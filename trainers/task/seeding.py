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
from contextlib import contextmanager
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
    """Where numpy's and Python's generators were before they were first seeded."""

    def __init__(self) -> None:
        self._found: tuple[Any, Any] | None = None

    def note(self) -> None:
        if self._found is None:
            self._found = random.getstate(), np.random.get_state()

    def put_back(self) -> None:
        if self._found is not None:
            random.setstate(self._found[0])
            np.random.set_state(self._found[1])


_caller: ContextVar[_Caller | None] = ContextVar("_caller", default=None)


def seed_of(seed: int | None, round_number: int, purpose: str) -> int:
    """The seed of one purpose in one round: 63 bits, from SHA-256; of None another each time, that nobody knows."""
    if seed is None:
        return secrets.randbits(63)
    digest = hashlib.sha256(f"{seed}|{round_number}|{purpose}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


@contextmanager
def seeded(seed: int | None, round_number: int, purpose: str) -> Iterator[None]:
    """torch's, numpy's and Python's generators seeded from (seed, round, purpose), and put back afterwards."""
    number, outer = seed_of(seed, round_number, purpose), _caller.get()
    caller = outer or _Caller()
    with _torch_seeded(number):
        caller.note()
        token = _caller.set(None)  # one within this one puts back what is seeded here
        try:
            np.random.seed(number & 0xFFFF_FFFF if seed is not None else [number & 0xFFFF_FFFF, number >> 32])
            random.seed(number)
            yield
        finally:
            _caller.reset(token)
            if outer is None:
                caller.put_back()


@contextmanager
def torch_seeded(seed: int, round_number: int, purpose: str) -> Iterator[None]:
    """torch's alone, for code that is known to draw from no other."""
    with _torch_seeded(seed_of(seed, round_number, purpose)):
        yield


@contextmanager
def caller_keeps_generators() -> Iterator[None]:
    """Put numpy's and Python's generators back afterwards, if they were seeded. Around many parties, as it takes a
    tenth of a small one's time; `seeded` directly within leaves it to this.
    """
    caller = _Caller()
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)
        caller.put_back()


@contextmanager
def _torch_seeded(number: int) -> Iterator[None]:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(number)
            yield
        return
    # torch.manual_seed also notes the stack for accelerators that are not there, at a tenth of a small party's time.
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        torch.set_rng_state(before)


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
        waiting += reversed(list(_parts(thing)))
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
        yield from (kind for kind in type(thing).__mro__ if not _foreign(kind.__module__))


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
