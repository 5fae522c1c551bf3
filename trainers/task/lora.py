"""LoRA: train, send and protect small factors in the place of whole weight matrices.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: LoRA: Low-Rank Adaptation of Large Language Models, 2021
(arXiv 2106.09685). W x becomes W x + (alpha / rank) B A x with W frozen (section 4.1); A starts random, B zero, so that
training starts from the model as it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn

from choral.errors import ConfigError


class LoraLinear(nn.Module):
    """A frozen linear layer (in, out) plus two trainable ones: ``lora_a`` (in, rank) and ``lora_b`` (rank, out).

    ``weight`` and ``bias`` keep their names, so the state dict of the model before fits; the factors are plain
    ``nn.Linear`` layers, for which the private step has per-sample gradients.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = base.in_features, base.out_features, alpha / rank
        self.weight, self.bias = base.weight, base.bias
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_a = nn.Linear(base.in_features, rank, bias=False, **like)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False, **like)
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.lora_b(self.lora_a(x))
        return nn.functional.linear(x, self.weight, self.bias) + self.scale * added

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        plain = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        plain.weight.copy_(self.weight + self.scale * self.lora_b.weight @ self.lora_a.weight)
        if self.bias is not None:
            plain.bias.copy_(self.bias)
        return plain


def lora(model: nn.Module, *, rank: int = 8, targets: Sequence[str] = (), alpha: float | None = None) -> nn.Module:
    """Freeze ``model`` and give its linear layers trainable factors of the given rank, in place; returns ``model``.

    Call it in ``build``, before the optimizer is made. What else is to be trained (a new head) gets
    ``requires_grad_(True)`` afterwards.
    targets: names of layers, whole ("encoder.0.query") or their last parts ("query"); by default every ``nn.Linear``.
    alpha: the update is scaled by alpha / rank; by default 1.
    Raises: ConfigError for a rank or alpha out of range, a target that is not an ``nn.Linear`` or is not there, a
        weight that is shared with another layer, or a model that has such factors already.
    """
    if adapter_names(model):
        raise ConfigError("the model has LoRA factors already", hint="call lora once, or merged(model) before")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"expected alpha > 0, got {alpha}", hint="leave it out for a scale of 1")
    chosen = _chosen(model, targets)
    uses = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    for name, layer in chosen.items():
        if not 1 <= rank <= min(layer.in_features, layer.out_features):
            raise ConfigError(
                f"expected 1 <= rank <= {min(layer.in_features, layer.out_features)} for {name!r}, got {rank}",
                hint="4 to 16 is common",
            )
        if uses.count(id(layer.weight)) > 1:
            raise ConfigError(f"the weight of {name!r} is shared with another layer", hint="leave it out of targets")
    model.requires_grad_(False)
    for name, layer in chosen.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], LoraLinear(layer, rank, rank if alpha is None else alpha))
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its fused inference path reads linear1.weight and never calls the layer; this flag is torch's way off it.
            parent.activation_relu_or_gelu = 0
    return model


def merged(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose factors are added to their weights: plain layers, equal outputs up to rounding."""
    plain = copy.deepcopy(model)
    if isinstance(plain, LoraLinear):
        return plain.merged()
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, LoraLinear):
            setattr(plain.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer.merged())
    return plain


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the factors' parameters."""
    return {
        f"{name}.{factor}.weight" if name else f"{factor}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLinear)
        for factor in ("lora_a", "lora_b")
    }


def _chosen(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    # By type: subclasses such as the output projection of nn.MultiheadAttention are not called, their weight is read.
    linear = {name: layer for name, layer in model.named_modules() if name and type(layer) is nn.Linear}
    if isinstance(targets, str):
        raise ConfigError(f"targets is a string, expected names: [{targets!r}]")
    if not targets:
        if not linear:
            raise ConfigError("the model has no nn.Linear layer inside to adapt", hint="freeze layers instead")
        return linear
    chosen: dict[str, nn.Linear] = {}
    for target in targets:
        found = {name: layer for name, layer in linear.items() if name == target or name.endswith(f".{target}")}
        if not found:
            raise ConfigError(
                f"no nn.Linear layer is named {target!r}", hint=f"there are {', '.join(list(linear)[:8])}"
            )
        chosen |= found
    return chosen
