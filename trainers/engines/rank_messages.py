"""What the processes of a run tell each other: orders, results and errors as JSON and tensors, in safetensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import msgspec
import torch
from safetensors.torch import load, save

from choral.errors import ChoralError, ConfigError, DataError
from choral.privacy import BudgetExceededError, UnsupportedModelError
from choral.trainers.algorithms.interface import Done, Failed, Work
from choral.trainers.task.task import DivergedError, TaskError

_WORKS: dict[str, type[Work]] = {kind.__name__: kind for kind in get_args(Work)}
Tensors = Mapping[str, torch.Tensor]


def orders_as_message(orders: list[tuple[str, Work]]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Orders as JSON and tensors; a tensor that several parties share is there once."""
    names: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    described = []
    for party, work in orders:
        order: dict[str, Any] = {"party": party, "kind": type(work).__name__, "numbers": {}, "tensors": {}}
        for part in dataclasses.fields(work):
            value = getattr(work, part.name)
            if isinstance(value, torch.Tensor):
                name = names.setdefault(id(value), f"t{len(names)}")
                tensors[name] = value
                order["tensors"][part.name] = name
            else:
                order["numbers"][part.name] = value
        described.append(order)
    return described, tensors


def work_of(order: dict[str, Any], tensors: Tensors) -> Work:
    parts: dict[str, Any] = {name: tensors[key] for name, key in order["tensors"].items()}
    return _WORKS[order["kind"]](**parts, **order["numbers"])


def bytes_of(done: Done | Failed) -> int:
    return done.vector.nbytes if isinstance(done, Done) else 0


def results_as_message(results: list[tuple[str, Done | Failed]]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Results as JSON and tensors."""
    tensors: dict[str, torch.Tensor] = {}
    said: list[dict[str, Any]] = []
    for place, (party, done) in enumerate(results):
        if isinstance(done, Failed):
            said.append({"party": party, **error_as_message(done.error)})
            continue
        parts = {f"vector {place}": done.vector, f"dual {place}": done.dual}
        tensors |= {name: part for name, part in parts.items() if part is not None}
        said.append({"party": party, "steps": done.steps, "path": done.path})
    return {"done": said}, tensors


def error_as_message(error: Exception) -> dict[str, str]:
    """An error for another process of the same user."""
    kind = type(error).__name__
    known = isinstance(error, ChoralError)
    return {"error": kind, "text": str(error) if known else f"{kind}: {error}", "hint": getattr(error, "hint", "")}


_ERRORS: dict[str, type[ChoralError]] = {
    kind.__name__: kind for kind in (DivergedError, ConfigError, DataError, BudgetExceededError, UnsupportedModelError)
}


def _failed(said: Mapping[str, Any]) -> Failed:
    return Failed(error=_ERRORS.get(said["error"], TaskError)(said["text"], hint=said["hint"]))


def results_of(header: dict[str, Any], tensors: Tensors) -> Iterator[tuple[str, Done | Failed]]:
    for place, said in enumerate(header["done"]):
        if "error" in said:
            yield said["party"], _failed(said)
            continue
        vector, dual = tensors[f"vector {place}"], tensors.get(f"dual {place}")
        yield said["party"], Done(vector=vector, steps=said["steps"], path=said["path"], dual=dual)


def packed(header: dict[str, Any], tensors: Tensors) -> torch.Tensor:
    """A message as bytes: safetensors, with the header in its metadata."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    raw = save(plain, metadata={"header": msgspec.json.encode(header).decode()})
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def unpacked(raw: torch.Tensor) -> tuple[dict[str, Any], Tensors]:
    data = raw.numpy().tobytes()
    size = int.from_bytes(data[:8], "little")  # safetensors: length of the JSON head, the head, the numbers
    head = msgspec.json.decode(data[8 : 8 + size])
    return msgspec.json.decode(head["__metadata__"]["header"]), load(data)
