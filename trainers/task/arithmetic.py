"""How a model is computed while ``fit`` trains it: in bfloat16 where torch.autocast allows that, or compiled.

bf16: each call of the model runs under torch.autocast, and what it returns is float32 again (as Hugging Face Accelerate
does it). Losses, gradients, clipping, weights and updates are float32, and bfloat16 needs no loss scaling.
``backward()`` is outside autocast, as torch recommends. With record-level privacy the first batches are compared with
autograd in float32, and the norms of the per-sample gradients that are clipped and released are computed in float32 and
float64 (choral.privacy.full_precision), so the sensitivity is what the noise is for. Evaluation is float32.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, get_args

import torch
from torch import nn

from choral.doors import worded
from choral.errors import ConfigError
from choral.trainers.task import arguments
from choral.trainers.task.device_batches import mapped
from choral.trainers.task.task import TaskError

Precision = Literal["float32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """seed: decides initial weights, data order and rehearsed dropouts: torch's, numpy's and Python's generators, and
    those that loader, dataset and functions have of their own, are seeded anew for each round and party. It never
    reaches noise, sampling for privacy, keys or masks.
    device: "cpu", "cuda", "mps" or "auto"; the model and the batches that ``fit`` sees are on it.
    precision: "bf16" computes the model's calls in ``fit`` under torch.autocast; weights and updates stay float32.
    compile: compile the model (torch.compile), where the parties take turns. Neither with an algorithm that reads
        gradients of records; not both with record-level privacy. See docs/engines.md.
    engine: who computes at the parties, as a function of the resident trainer: ``Direct``, ``Cohort``, or the default
        ``Fastest`` of ``choral.trainers.engines``. They differ from the resident trainer only where fit is an `Epochs`.

    Raises: ConfigError for a value of another type, or a seed below 0.
    """

    seed: int = 0
    device: str = "cpu"
    precision: Precision = "float32"
    compile: bool = False
    engine: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", arguments.whole_number(self.seed, "seed", 0, "any whole number from 0"))
        arguments.instance(self.device, "device", str, '"cpu", "cuda", "mps" or "auto"')
        arguments.flag(self.compile, "compile")
        arguments.optional_function(self.engine, "engine", "resident")


def resolve_device(name: str) -> torch.device:
    """``auto`` takes CUDA, else MPS, else the CPU. Raises: TaskError if the named device is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind in ("cuda", "mps") if there[kind]), "cpu")
    kind = name.partition(":")[0]
    if not there.get(kind, False):
        raise TaskError(
            f"device {name!r} is not available here",
            hint=worded(command="use --device auto or cpu", python="use device='auto' or 'cpu'"),
        )
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a process per device
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return torch.device(name)


class Arithmetic:
    """Of one run. device: where the model is. precision, compile: as :func:`choral.trainers.federated.federate` takes
    them.

    Raises: ConfigError if the device has no bfloat16, or torch.compile does not work here.
    """

    def __init__(self, device: torch.device, precision: Precision = "float32", *, compile: bool = False) -> None:
        self.device, self.precision, self.compile = device, precision, compile
        if precision == "bf16":
            _probe_bf16(device)
        if compile:
            _probe_compiler(device.type)
        self._forward: Callable[..., Any] = torch.compile(_forward) if compile else _forward

    @property
    def plain(self) -> bool:
        return self.precision == "float32" and not self.compile

    def over(self, model: nn.Module, party: str, *, private: bool = False) -> AbstractContextManager[None]:
        """Within: ``model(...)`` is computed so. private: batches may be empty, and then there is no call.

        Raises: TaskError for a model whose forward was replaced, or if it was never called, so that nothing was
            computed as asked.
        """
        return nullcontext() if self.plain else self._over(model, party, private)

    @contextmanager
    def _over(self, model: nn.Module, party: str, private: bool) -> Iterator[None]:
        if "forward" in vars(model):
            raise TaskError(
                f"the model's forward at party {party!r} was replaced by another, around which precision and compile"
                " cannot be set",
                hint="define forward in the model's class, or leave precision and compile out",
            )
        called = False

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # of a deep copy too, if fit makes one
            nonlocal called
            called = True
            with self.reduced():
                outputs = self._forward(module, *args, **kwargs)
            return self.returned(outputs)

        model.forward = MethodType(forward, model)
        try:
            yield
        finally:
            del model.forward
        if not called and not private:
            raise TaskError(
                f"fit at party {party!r} never called the model, so precision and compile had no effect",
                hint="call model(...) rather than its parts, or leave precision and compile out",
            )

    def reduced(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def returned(self, outputs: Any) -> Any:
        """What the model gives back: float32 where it was reduced."""
        return mapped(outputs, _widened) if self.precision == "bf16" else outputs


def check_arithmetic(precision: str, compile: bool, *, private: bool, reads_records: bool) -> None:
    """private: with record-level privacy. reads_records: the algorithm takes gradients of records, without ``fit``.

    Raises: ConfigError for a precision that would need loss scaling, and for what does not go together.
    """
    if precision not in get_args(Precision):
        raise ConfigError(
            f"expected precision {' or '.join(map(repr, get_args(Precision)))}, got {precision!r}",
            hint="float16 needs loss scaling, which skips steps by what the gradients are; bf16 does not",
        )
    if private and compile:
        raise ConfigError(
            "compile with record-level privacy: compiled layers run past the hooks that take per-sample gradients",
            hint="leave compile out for private runs",
        )
    if reads_records and (compile or precision != "float32"):
        raise ConfigError(
            f"{'compile' if compile else 'precision'} with an algorithm that reads gradients instead of calling fit:"
            " differences of nearly equal gradients would be lost in bfloat16, and nothing would be compiled",
            hint="use FedAvg, FedProx, SCAFFOLD, FedAdam, FedYogi or FedNova; or leave it out",
        )


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _probe_bf16(device: torch.device) -> None:
    there = torch.amp.is_autocast_available(device.type)
    if there and device.type == "cuda":
        with torch.cuda.device(device):
            there = torch.cuda.is_bf16_supported(including_emulation=False)
    if not there:
        raise ConfigError(f"device {device} has no bfloat16 arithmetic of its own", hint='leave out precision="bf16"')


@functools.cache  # of what works; an error is looked for again
def _probe_compiler(kind: str) -> None:
    def tried(numbers: torch.Tensor) -> torch.Tensor:
        return (numbers.sin() + 1.0).sum()

    try:
        torch.compile(tried)(torch.ones(8, device=kind))
    except Exception as error:  # many kinds: no compiler, one that fails, no Triton, no Python headers
        cause = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ConfigError(
            f"torch.compile does not work here ({type(error).__name__}: {cause[:200]})",
            hint="install a C++ compiler such as g++ (on a GPU also Triton), or leave compile out",
        ) from None
