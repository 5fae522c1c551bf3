"""Weights to start from: any state dict, as a mapping of tensors or a .safetensors file, checked before it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from choral.errors import ChoralError
from choral.trainers.task.lora import adapter_names

InitialWeights = Mapping[str, torch.Tensor] | str | Path


class InitialWeightsError(ChoralError):
    """The weights to start from are missing, damaged, or not those of the model."""


@dataclass(frozen=True, eq=False)
class Weights:
    """A state dict that was read whole. sha256: of the file, or of a mapping's bytes as a .safetensors file."""

    state: Mapping[str, torch.Tensor]
    source: str
    sha256: str

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state.values())

    @classmethod
    def read(cls, given: InitialWeights) -> Self:
        """Nothing is unpickled: a file must be .safetensors.

        Raises: InitialWeightsError if the file is missing, of another kind or damaged, or if the mapping is not one of
            names to tensors.
        """
        if isinstance(given, str | Path):
            content = _bytes_of(Path(given))
            try:
                return cls(load_safetensors(content), Path(given).name, hashlib.sha256(content).hexdigest())
            except (SafetensorError, ValueError, KeyError) as error:
                raise InitialWeightsError(f"{given} is damaged: {error}", hint="fetch or save it again") from None
        if not isinstance(given, Mapping):
            raise InitialWeightsError(
                f"initial_weights is a {type(given).__name__}; expected a state dict or a path to .safetensors",
                hint="give model.state_dict()",
            )
        for name, tensor in given.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise InitialWeightsError(
                    f"initial_weights[{name!r}] is a {type(tensor).__name__}; expected names to tensors",
                    hint="give the state dict itself, not a checkpoint around it",
                )
        state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in given.items()}
        return cls(state, "mapping", hashlib.sha256(save_safetensors(state)).hexdigest())

    def record(self) -> dict[str, str | int]:
        """What run.json keeps of it. bytes: what every party must have before the first round; not in its traffic."""
        return {"source": self.source, "sha256": self.sha256, "bytes": self.bytes}

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Copy the weights into ``model``, all of them or none.

        Names, shapes and dtypes must be the model's, with two exceptions: of parameters that are tied in the model one
        name is enough (others must agree), and the state dict of a model before :func:`lora` lacks all adapters, which
        then start as ``build`` made them: adding nothing.
        Raises: InitialWeightsError naming the first tensors that are missing, unexpected, of another shape or dtype,
            not finite, or that disagree where the model ties them.
        """
        own = model.state_dict(keep_vars=True)
        state = dict(self.state)
        adapters = adapter_names(model)
        if not adapters & state.keys():
            state |= {name: own[name] for name in adapters}
        for names in _tied(own):
            given = [name for name in names if name in state]
            for name in given[1:]:
                if not torch.equal(state[name], state[given[0]]):
                    raise InitialWeightsError(
                        f"{self.source}: {given[0]!r} and {name!r} differ, but the model ties them"
                    )
            state |= {name: state[given[0]] for name in names if given}
        if missing := sorted(own.keys() - state.keys()):
            raise InitialWeightsError(
                f"{self.source} lacks {_some(missing)} of the model", hint="start from the same architecture"
            )
        if unexpected := sorted(state.keys() - own.keys()):
            raise InitialWeightsError(
                f"{self.source} has {_some(unexpected)}, which the model lacks",
                hint="start from the same architecture; rename or drop tensors before",
            )
        for name, tensor in state.items():
            _check(name, tensor, own[name], self.source)
        for name, tensor in state.items():
            own[name].copy_(tensor)


def _bytes_of(path: Path) -> bytes:
    if path.suffix != ".safetensors":
        raise InitialWeightsError(
            f"{path} is not a .safetensors file, and other kinds may run code when they are read",
            hint="convert it where you trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), ...)",
        )
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InitialWeightsError(f"no such file: {path}", hint="the weights to start from") from None
    except OSError as error:
        raise InitialWeightsError(f"cannot read {path}: {error.strerror}") from None


def _tied(own: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names that are one and the same parameter of the model."""
    by_identity: dict[int, list[str]] = {}
    for name, tensor in own.items():
        by_identity.setdefault(id(tensor), []).append(name)
    return [names for names in by_identity.values() if len(names) > 1]


def _check(name: str, tensor: torch.Tensor, own: torch.Tensor, source: str) -> None:
    if tensor.shape != own.shape:
        raise InitialWeightsError(
            f"{source}: {name!r} has shape {tuple(tensor.shape)}, expected {tuple(own.shape)}",
            hint="start from the same architecture (number of classes, widths)",
        )
    if tensor.dtype != own.dtype:
        raise InitialWeightsError(
            f"{source}: {name!r} is {tensor.dtype}, expected {own.dtype}", hint="convert it, e.g. tensor.float()"
        )
    if not torch.isfinite(tensor).all():
        raise InitialWeightsError(f"{source}: {name!r} holds NaN or infinite numbers", hint="the weights are of no use")


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
