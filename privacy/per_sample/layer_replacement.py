"""Layers that have no per-sample gradients: refused by name, or replaced by ones that have.

The substitutes have the same parameters, take the same arguments and give the same results, but for the last kind.

`nn.LSTM`, `nn.GRU` and `nn.RNN`, and their cells, become those of :mod:`choral.privacy.per_sample.recurrent_layers`.
`nn.MultiheadAttention` becomes :class:`Attention`: Opacus' takes neither the causal hint, nor a mask with
`batch_first=True`, nor the float padding masks that `nn.TransformerEncoderLayer` makes. `nn.BatchNorm*` becomes
`nn.GroupNorm`, which gives other results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.weight_norm import WeightNorm

from choral.errors import ConfigError
from choral.privacy.errors import UnsupportedModelError
from choral.privacy.per_sample.recurrent_layers import Recurrent, RecurrentCell


def replace_layers(model: nn.Module) -> nn.Module:
    """Replace, within `model`, the layers that `Privacy.wrap` refuses and that have a substitute; return the model.

    Of a model that is itself such a layer the substitute is returned. Parameters stay the very same objects, so an
    optimizer may be made before or after, and `state_dict` keeps its names: what was trained privately is loaded into
    the plain model as it is, and the other way round.

    - `nn.LSTM`, `nn.GRU`, `nn.RNN`: equal results, bidirectional, stacked, with dropout and packed sequences, too.
      Not with `proj_size`. A Python loop over time: about three times slower.
    - `nn.LSTMCell`, `nn.GRUCell`, `nn.RNNCell`: equal results, with a state or without.
    - `nn.MultiheadAttention`, also inside `nn.TransformerEncoderLayer` and its kin: equal results. Not with `kdim`,
      `vdim`, `add_bias_kv` or `add_zero_attn`. Layers around it still need `batch_first=True`.
    - `nn.BatchNorm*`: `nn.GroupNorm` with the same weights, and **other** results: a network trained with BatchNorm
      must be trained on. With differential privacy it usually costs no accuracy against BatchNorm, which small noisy
      batches make worse. The running statistics are dropped, and are missing in `state_dict`.

    Raises: UnsupportedModelError, naming the layer and what in it cannot be replaced; nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, GradSampleModule) or hasattr(model, "autograd_grad_sample_hooks"):
        raise UnsupportedModelError("the model is wrapped already", hint="Replace layers before wrap().")
    made: dict[nn.Module, nn.Module] = {}
    for name, layer in model.named_modules():  # each once, however often it is used
        make = _SUBSTITUTES.get(type(layer))
        if make is None and isinstance(layer, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention | _BatchNorm):
            raise _cannot(name, layer, "is not torch's own class", "Use torch's class, or put layers in its place.")
        if make is not None:
            _refuse_hooks(name, layer)
            made[layer] = make(name, layer).train(layer.training)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in made:
                parent._modules[name] = made[child]
    return made.get(model, model)


def refuse_unsupported(model: nn.Module) -> None:
    """Raise UnsupportedModelError, naming the layer, if `model` holds one whose gradients no record has of its own."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, GradSampleModule) or hasattr(model, "autograd_grad_sample_hooks"):
        raise UnsupportedModelError(
            "the model was already wrapped by Opacus or is a copy of a wrapped model",
            hint="Wrap the plain model; copy models with choral.privacy.unwrap(model) first.",
        )
    for name, layer in model.named_modules():
        _refuse_mixing_or_sparse(name or "(the model)", layer)
        _refuse_without_gradients(name or "(the model)", layer)
    if not any(p.requires_grad for p in model.parameters()):
        raise UnsupportedModelError("the model has no trainable parameter", hint="Check requires_grad.")


def _refuse_mixing_or_sparse(name: str, layer: nn.Module) -> None:
    """Refuse a layer that mixes records, keeps statistics of them, or has no dense parameters of its own."""
    kind = type(layer).__name__
    if isinstance(layer, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UnsupportedModelError(
            f"the model is a {kind}; several processes on one dataset are not accounted for",
            hint="Wrap the plain model in one process, or make each process a party of federate().",
        )
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        raise UnsupportedModelError(
            f"layer {name} is a {kind}: it mixes the records of a batch, so no record has a "
            "gradient of its own, and its running statistics would be published without noise",
            hint="Call choral.privacy.replace_layers(model) before wrap(), or use nn.GroupNorm; with DP it usually "
            "costs no accuracy, while small noisy batches make BatchNorm worse.",
        )
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
        raise UnsupportedModelError(
            f"layer {name} is a {kind} with running statistics, which would be published without noise",
            hint="Set track_running_stats=False.",
        )
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
        raise UnsupportedModelError(
            f"layer {name} is a {kind} with sparse gradients; noise makes every gradient dense",
            hint="Set sparse=False.",
        )
    if any(nn.parameter.is_lazy(p) for p in layer._parameters.values() if p is not None):
        raise UnsupportedModelError(
            f"layer {name} is a {kind} whose parameters have no shape yet",
            hint="Call the model on one made-up record before wrap().",
        )
    if any(isinstance(hook, WeightNorm) for hook in layer._forward_pre_hooks.values()):
        raise UnsupportedModelError(
            f"layer {name} is a {kind} with torch.nn.utils.weight_norm, whose weight is made outside its forward",
            hint="Use torch.nn.utils.parametrizations.weight_norm.",
        )


def _refuse_without_gradients(name: str, layer: nn.Module) -> None:
    """Refuse a layer that has no per-sample gradients, or rewrites its parameters."""
    kind = type(layer).__name__
    validator = ModuleValidator.VALIDATORS.get(type(layer))
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None:
        raise UnsupportedModelError(
            f"layer {name} is a {kind} with max_norm, which rewrites the rows that a batch uses, without noise",
            hint="Leave max_norm out.",
        )
    for unsupported, instead in _INSTEAD.items():
        if isinstance(layer, unsupported) and any(p.requires_grad for p in layer.parameters()):
            raise UnsupportedModelError(f"layer {name} is a {kind}, which has no per-sample gradients", hint=instead)
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention):
        raise UnsupportedModelError(
            f"layer {name} is a {kind}, which has no per-sample gradients",
            hint="Call choral.privacy.replace_layers(model) before wrap(): same parameters, same results.",
        )
    for error in validator(layer) if validator else ():
        raise UnsupportedModelError(
            f"layer {name} is a {kind}, which has no per-sample gradients",
            hint=f"Opacus says: {str(error).splitlines()[0]}",
        )


class Attention(nn.Module):
    """An `nn.MultiheadAttention` out of linear layers, with its parameters, arguments and results.

    query: shape (records, L, embed_dim); key, value: (records, S, embed_dim); or, without `batch_first`, the first two
    dimensions exchanged. attn_mask: (L, S) or (records * heads, L, S); key_padding_mask: (records, S); both boolean
    (true: left out) or floats to be added. Returns the output, and the weights or None.
    """

    _qkv_same_embed_dim = False  # keeps torch's transformer layers from their fused path, which calls no layer

    def __init__(self, plain: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.batch_first = plain.embed_dim, plain.num_heads, plain.batch_first
        self.dropout = nn.Dropout(plain.dropout)
        self.in_proj = _linear(plain.in_proj_weight, plain.in_proj_bias)
        self.out_proj = _linear(plain.out_proj.weight, plain.out_proj.bias)
        self.register_state_dict_post_hook(_save_packed_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_load_packed_names)  # type: ignore[no-untyped-call]

    @property
    def in_proj_weight(self) -> torch.Tensor:
        """Query, key and value rows, shape (3 embed_dim, embed_dim)."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> torch.Tensor | None:
        """The same rows' bias, shape (3 embed_dim,)."""
        return self.in_proj.bias

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend. Raises: ConfigError (no batch dimension; the causal hint without the mask it hints at)."""
        if query.ndim != 3:
            raise ConfigError(f"query has shape {tuple(query.shape)}, expected three dimensions, one of them records")
        if is_causal and attn_mask is None:
            raise ConfigError("is_causal is a hint about attn_mask, which is missing", hint="Pass attn_mask as well.")
        q, k, v = self._projected(query, key, value)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if attn_mask is not None:
            mask = _added(attn_mask, scores.dtype)
            scores = scores + (mask if mask.ndim == 2 else mask.view(len(scores), self.num_heads, *mask.shape[1:]))
        if key_padding_mask is not None:
            scores = scores + _added(key_padding_mask, scores.dtype)[:, None, None]
        weights = self.dropout(torch.softmax(scores, -1))
        output = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        output = output if self.batch_first else output.transpose(0, 1)
        if not need_weights:
            return output, None
        return output, weights.mean(1) if average_attn_weights else weights

    def _projected(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """Return queries, keys and values by head, shape (records, heads, positions, embed_dim / heads)."""
        found: dict[int, torch.Tensor] = {}
        for t in (query, key, value):  # once for what is given twice
            if id(t) not in found:
                found[id(t)] = self.in_proj(t if self.batch_first else t.transpose(0, 1))
        rows = [found[id(t)].chunk(3, -1)[place] for place, t in enumerate((query, key, value))]
        return [t.view(*t.shape[:2], self.num_heads, -1).transpose(1, 2) for t in rows]


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """Return a linear layer of these very parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask to be added to the scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype is torch.bool else mask


def _save_packed_names(_: Attention, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for kind in ("weight", "bias"):
        if f"{prefix}in_proj.{kind}" in state:
            state[f"{prefix}in_proj_{kind}"] = state.pop(f"{prefix}in_proj.{kind}")


def _load_packed_names(_: Attention, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for kind in ("weight", "bias"):
        if f"{prefix}in_proj_{kind}" in state:
            state[f"{prefix}in_proj.{kind}"] = state.pop(f"{prefix}in_proj_{kind}")


def _recurrent(name: str, plain: nn.RNNBase) -> nn.Module:
    if plain.proj_size:
        raise _cannot(name, plain, "has proj_size", "Use a linear layer after it instead.")
    return Recurrent(plain)


def _attention(name: str, plain: nn.MultiheadAttention) -> nn.Module:
    if not plain._qkv_same_embed_dim:
        raise _cannot(name, plain, "has kdim or vdim", "Bring keys and values to embed_dim by linear layers before it.")
    if plain.bias_k is not None or plain.add_zero_attn:
        raise _cannot(name, plain, "has add_bias_kv or add_zero_attn", "Leave them out.")
    return Attention(plain)


def _group_norm(_: str, plain: _BatchNorm) -> nn.Module:
    """Return groups of two channels or more, at most 32 of them; one group where there may be no positions."""
    channels = plain.num_features
    most = 1 if isinstance(plain, nn.BatchNorm1d) else min(32, channels // 2)
    groups = next((n for n in range(most, 1, -1) if channels % n == 0), 1)
    layer = nn.GroupNorm(groups, channels, eps=plain.eps, affine=False)
    layer.affine = plain.affine
    if plain.affine:
        layer.weight, layer.bias = plain.weight, plain.bias
    return layer


def _refuse_hooks(name: str, layer: nn.Module) -> None:
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise _cannot(name, layer, "has hooks, which would be lost", "Remove them, weight_norm's and such included.")


def _cannot(name: str, layer: nn.Module, why: str, hint: str) -> UnsupportedModelError:
    kind = type(layer).__name__
    return UnsupportedModelError(f"layer {name or '(the model)'}, a {kind}, {why}: it cannot be replaced", hint=hint)


_INSTEAD: dict[type[nn.Module], str] = {
    nn.EmbeddingBag: "Use nn.Embedding and .mean(1), .sum(1) or .amax(1) of its output, with a mask for padding.",
    nn.Bilinear: "Use an nn.Linear of the outer product, (x[:, :, None] * y[:, None, :]).flatten(1), of the same size.",
    nn.AdaptiveLogSoftmaxWithLoss: "It gives each cluster the records of its labels alone: use an nn.Linear instead.",
}
_SUBSTITUTES: dict[type[nn.Module], Callable[[str, Any], nn.Module]] = {
    **dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), _recurrent),
    **dict.fromkeys((nn.LSTMCell, nn.GRUCell, nn.RNNCell), lambda _, plain: RecurrentCell(plain)),
    nn.MultiheadAttention: _attention,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _group_norm),
}
