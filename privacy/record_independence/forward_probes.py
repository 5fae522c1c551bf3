"""What is looked at in a forward pass, and how a look is made one that could fail.

A check that compares zeros with zeros has shown nothing: behind a head that is still zero, everything is the same
whatever the records are. So what goes into and out of every trainable layer is compared, not the outputs alone; each of
these *points* is held to have been looked at only in a batch in which it changed with its own record; and models are
looked at a second time with all trainable parameters, and float inputs, moved away from where they are: :func:`shaken`.
"""

from __future__ import annotations

import collections
import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from choral import nested

_COLUMNS = 256  # numbers kept of each record at a point
_CALLS = 4  # of a layer in one pass, which are points of their own; later ones count with the last
_SHAKE = 0.1  # of a parameter's or an input's size
_NO_GENERATORS = {bool, int, float, str, dict, collections.OrderedDict, set, tuple, list, type(None)}

Point = tuple[str, str, int, int]  # layer ("" for the model), "in" or "out", which tensor, in which call
See = Callable[[Point, torch.Tensor], None]


@contextmanager
def watched(layers: Mapping[str, nn.Module], rows: int, see: See) -> Iterator[None]:
    """Show what goes into and out of `layers` in forward passes, tensors with `rows` rows alone."""
    calls: collections.Counter[str] = collections.Counter()

    def show(name: str, side: str, values: Any) -> None:
        found = [t for t in nested.tensors(values, packed=True) if t.ndim > 0 and len(t) == rows and t.numel() > 0]
        for place, t in enumerate(found):
            see((name, side, place, min(calls[name], _CALLS)), t)

    def before(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: show(name, "in", (*args, *kwargs.values()))

    def after(name: str) -> Callable[..., None]:
        def shown(_layer: nn.Module, _args: Any, output: Any) -> None:
            show(name, "out", output)
            calls[name] += 1

        return shown

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(after(name)).remove)
        yield


def sketch(t: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a copy of `t` of few columns, shape (rows, at most 256): more are added up with random signs.

    Two rows that differ differ here, too, but for chance and rounding; integers are added exactly.
    """
    t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    flat = t.reshape(rows, -1)
    flat = flat.to(torch.float32 if flat.dtype in (torch.float16, torch.bfloat16) else flat.dtype)
    flat = flat if flat.is_floating_point() else flat.long()
    width = flat.shape[1]
    if width <= _COLUMNS:
        return flat.clone()
    signs = torch.randint(2, (width,), generator=torch.Generator().manual_seed(width), dtype=torch.int8)
    flat = torch.nn.functional.pad(flat * (2 * signs - 1).to(flat.device, flat.dtype), (0, -width % _COLUMNS))
    return flat.view(rows, -1, _COLUMNS).sum(1)


@contextmanager
def shaken(model: nn.Module) -> Iterator[None]:
    """Move each trainable parameter by about a tenth of its size, and of what is usual for its shape, for a while.

    What stands behind a zero is seen then: a head, a gate, a low-rank update that are still zero let nothing through.
    """
    generator = torch.Generator().manual_seed(0)
    plain = [(p, p.data) for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    try:
        for p, data in plain:
            fan = max(p[0].numel(), 1) if p.ndim > 1 else 1
            size = _SHAKE * (_size(data) + 1.0 / math.sqrt(fan))
            p.data = data + size * _away_from_zero(data, generator)
        yield
    finally:
        for p, data in plain:
            p.data = data  # the same memory as before


def moved(t: torch.Tensor) -> torch.Tensor:
    """Return a float input, each number moved by about a tenth of their size."""
    if not t.is_floating_point() or t.numel() == 0:
        return t
    size = _size(t[t.isfinite()]) or 1.0
    return t.detach() + _SHAKE * size * _away_from_zero(t, torch.Generator().manual_seed(t.numel()))


def _size(t: torch.Tensor) -> float:
    return float(t.double().square().mean().sqrt()) if t.numel() else 0.0


def _away_from_zero(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return numbers from -1.5 to -0.5 or from 0.5 to 1.5."""
    drawn = 2.0 * torch.rand(like.shape, generator=generator) - 1.0
    return (drawn + 0.5 * torch.where(drawn < 0, -1.0, 1.0)).to(like.device, like.dtype)


def reseed(seed: int, model: nn.Module) -> None:
    """Let random numbers, of the same generators as below, go on from `seed`."""
    # torch.manual_seed also notes the stack, for good, for each kind of accelerator that is not there: most of a look.
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    (torch.manual_seed if accelerated else torch.default_generator.manual_seed)(seed)
    random.seed(seed)
    np.random.seed(seed)
    for value in _generators(model):
        if isinstance(value, torch.Generator):
            value.manual_seed(seed)
        elif isinstance(value, random.Random):
            value.seed(seed)
        else:
            value.random(seed + 1)


def _generators(model: nn.Module) -> list[Any]:
    """Those that the model's modules keep. What most attributes are is told first: isinstance is slow for torch's."""
    kept = (value for m in model.modules() for value in m.__dict__.values() if type(value) not in _NO_GENERATORS)
    return [value for value in kept if isinstance(value, torch.Generator | random.Random | np.random.Generator)]


@contextmanager
def same_random_numbers(devices: list[int], model: nn.Module | None = None) -> Iterator[None]:
    """Leave random numbers as they were: torch's, Python's, numpy's, and those of generators that `model` keeps."""
    python, old = random.getstate(), np.random.get_state()
    restore: list[Callable[[], Any]] = []
    for g in _generators(model) if model else ():
        if isinstance(g, torch.Generator):
            restore.append(partial(g.set_state, g.get_state()))
        elif isinstance(g, random.Random):
            restore.append(partial(g.setstate, g.getstate()))
        else:
            restore.append(partial(setattr, g.bit_generator, "state", g.bit_generator.state))
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(old)
            for put_back in restore:
                put_back()
