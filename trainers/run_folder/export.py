"""A trained model as one file for inference elsewhere: a torch.export program (.pt2), or ONNX (.onnx).

The file is written only once it has been read back and its outputs agree with the model's. It holds the weights and
the computation: not the example inputs, whose values are used for that check alone, and no path of this machine.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from choral.errors import ChoralError, ConfigError
from choral.trainers.task.initial_weights import Weights
from choral.trainers.task.lora import merged

_RELATIVE = 1e-4  # of the largest output: what other orders of summing in float32 may change

Inference = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


class ExportError(ChoralError):
    """The model cannot be written in this format, or what was written does not compute the same."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The file, and the largest absolute difference of its outputs from the model's, over ``batches`` records."""

    path: Path
    max_difference: float
    batches: tuple[int, ...]


def export(
    model: nn.Module, state: Mapping[str, torch.Tensor], example_inputs: Sequence[torch.Tensor], path: str | Path
) -> Exported:
    """Write ``model`` with the weights ``state`` to ``path``, for batches of any number of records.

    model: of the run's architecture; copied. LoRA factors are merged into their weights; dropout is off.
    example_inputs: the tensors that ``forward`` takes, each of shape (n, ...) with the same n >= 1.
    path: ``.pt2``, to load by ``torch.export.load``, or ``.onnx`` (needs the extra ``choral[onnx]``); a new file.
    Raises: ConfigError for another ending, inputs of other kinds, a file that is there, a missing extra;
        InitialWeightsError if the weights are not the model's; ExportError if the model cannot be traced or exported,
        or if the outputs of the file differ by more than 1e-4 of the largest, for one record, two, or all of the
        example inputs.
    """
    path = Path(path)
    inputs = _checked(example_inputs)
    kind = {".pt2": _write_program, ".onnx": _write_onnx}.get(path.suffix)
    if kind is None:
        raise ConfigError(f"{path.name!r} is of no known format", hint="end its name in .pt2 or .onnx")
    if path.exists():
        raise ConfigError(f"{path} is there already", hint="choose another name")
    if path.suffix == ".onnx":
        _need("onnx", "onnxscript", "onnxruntime")
    ready = _ready(model, state)
    program = _traced(ready, inputs)
    draft = path.with_name(f".{path.stem}.draft{path.suffix}")
    try:
        with _quiet():
            infer = kind(program, draft)
            difference, batches = _compare(ready, infer, inputs, path.name)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return Exported(path=path, max_difference=difference, batches=batches)


def _checked(example_inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    if not inputs or not all(isinstance(tensor, torch.Tensor) and tensor.ndim for tensor in inputs):
        raise ConfigError(
            "example inputs must be the tensors that the model's forward takes, each of shape (n, ...)",
            hint="e.g. (images,), or (tokens, mask)",
        )
    if len(sizes := {len(tensor) for tensor in inputs}) != 1 or not max(sizes):
        raise ConfigError(f"example inputs hold {sorted(sizes)} records; expected one number, at least 1")
    return tuple(tensor.detach().cpu() for tensor in inputs)


def _ready(model: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    whole = copy.deepcopy(model).cpu()
    Weights.read(state).load_into(whole)
    return merged(whole).eval().requires_grad_(False)


def _traced(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    """The computation, from stand-ins: a program file keeps the inputs that it was traced with."""
    stand_ins = tuple(torch.zeros(2, *tensor.shape[1:], dtype=tensor.dtype) for tensor in inputs)
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet():
            program = torch.export.export(model, stand_ins, dynamic_shapes=_by_argument(model, len(inputs), batch))
    except Exception as error:  # torch raises many kinds for code that it cannot trace
        cause = str(error).strip().splitlines()
        raise ExportError(
            f"torch.export cannot trace the model: {cause[0] if cause else type(error).__name__}",
            hint="forward must not depend on values of its inputs, or fix the number of records",
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _by_argument(model: nn.Module, count: int, batch: Any) -> Any:
    """One entry per argument of forward; one tuple where it takes them as ``*args``."""
    each = tuple({0: batch} for _ in range(count))
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    return (each,) if kinds and kinds[0] is inspect.Parameter.VAR_POSITIONAL else each


def _write_program(program: torch.export.ExportedProgram, path: Path) -> Inference:
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    return lambda inputs: _tensors(loaded(*inputs))


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> Inference:
    import onnxruntime

    try:
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:  # operators without a translation, in many kinds
        raise ExportError(f"ONNX cannot express the model: {str(error).strip().splitlines()[0]}") from error
    if exported is None:
        raise ExportError("ONNX cannot express the model")
    exported.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    if len(names) != len(program.graph_signature.user_inputs):
        raise ExportError(f"the ONNX graph takes {names}: an input of the model is not used")

    def infer(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        fed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, fed)]

    return infer


def _compare(
    model: nn.Module, infer: Inference, inputs: tuple[torch.Tensor, ...], name: str
) -> tuple[float, tuple[int, ...]]:
    largest, records = 0.0, len(inputs[0])
    batches = tuple(sorted({1, min(2, records), records}))
    for count in batches:
        part = [tensor[:count] for tensor in inputs]
        with torch.no_grad():
            want = _tensors(model(*part))
        got = infer(part)
        if [tensor.shape for tensor in got] != [tensor.shape for tensor in want]:
            raise ExportError(f"{name} gives outputs of other shapes than the model for {count} records")
        for ours, theirs in zip(want, got, strict=True):
            difference = float((ours.double() - theirs.double()).abs().max()) if ours.numel() else 0.0
            scale = max(1.0, float(ours.double().abs().max())) if ours.numel() else 1.0
            if not (math.isfinite(difference) and difference <= _RELATIVE * scale):
                raise ExportError(
                    f"{name} differs from the model by {difference:.3g} for {count} records",
                    hint="nothing was written; forward must not draw random numbers in eval mode",
                )
            largest = max(largest, difference)
    return largest, batches


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"ONNX needs {', '.join(missing)}", hint='pip install "choral[onnx]"; or export to .pt2')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on their own use of torch, which nobody here can act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
