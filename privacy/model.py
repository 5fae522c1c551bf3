"""Models with per-sample gradients: what is refused, how they are made, and how they are checked.

A wrapped model keeps, for each parameter, the gradient of every record of the batch (`grad_sample`, shape
(batch, *parameter.shape)), computed by Opacus' rules for each kind of layer or by functorch.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import prepare_layer
from opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN, RNNLinear
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.hooks import RemovableHandle

from choral.privacy import mixing
from choral.privacy.errors import UnsupportedModelError

_wrapped: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PerSampleModel]] = weakref.WeakKeyDictionary()


class PerSampleModel(GradSampleModule):  # type: ignore[misc]
    """The user's model, computing per-sample gradients; attributes, methods and `state_dict` are the model's own."""

    def __init__(self, model: nn.Module) -> None:
        self.checked = False  # per-sample gradients against autograd, by the optimizer at the first step
        self.unmixed = False  # records are treated one by one: found out in the first forward of two or more
        self.drawn: int | None = None  # records in the batch that awaits its step
        self.averages: dict[nn.Parameter, torch.Tensor] = {}  # autograd's gradients, until `checked`
        self._seen: list[torch.Tensor] | None = (
            None  # what goes into and out of trainable layers, while they are looked at
        )
        self._guards: list[RemovableHandle] = []
        super().__init__(model, batch_first=True, loss_reduction="mean", strict=True)
        self._guards += [self._guard(p) for p in model.parameters() if p.is_floating_point()]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_module"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the plain model's state, so that a checkpoint does not show the wrapper."""
        return self._module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the plain model's state."""
        return self._module.load_state_dict(*args, **kwargs)

    def add_hooks(
        self,
        *,
        loss_reduction: str = "mean",  # noqa: ARG002 - Opacus passes it; ours is read from the object
        batch_first: bool = True,
        force_functorch: bool = False,
    ) -> None:
        """Attach to every trainable layer: one forward hook, which hooks the output's gradient in turn.

        Unlike Opacus' module backward hooks this leaves in-place activations allowed and does not warn.
        """
        self._module.autograd_grad_sample_hooks = self.autograd_grad_sample_hooks = []
        for module in self.iterate_submodules(self._module):
            if type(module) in (DPRNN, DPLSTM, DPGRU):  # their inner linear layers are hooked
                continue
            if force_functorch or type(module) not in self.GRAD_SAMPLERS:
                prepare_layer(module, batch_first=batch_first)
            self.autograd_grad_sample_hooks.append(module.register_forward_hook(self.capture_activations_hook))
        self.enable_hooks()

    @property
    def guarded(self) -> bool:
        """Whether raw gradients are kept out of `p.grad`: until the wrapper is removed."""
        return bool(self._guards)

    def remove_hooks(self) -> None:
        """Remove everything that wrapping attached to the model."""
        super().remove_hooks()
        while self._guards:
            self._guards.pop().remove()
        self.averages.clear()

    def _guard(self, p: nn.Parameter) -> RemovableHandle:
        frozen = not p.requires_grad  # it may be unfrozen later
        p.requires_grad_(True)
        handle: RemovableHandle = p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            self._take_gradient
        )
        p.requires_grad_(not frozen)
        return handle

    def _take_gradient(self, p: nn.Parameter) -> None:
        """Take the raw gradient out of `p.grad`, where any optimizer would find it."""
        if not self.guarded:
            return
        if not self.checked and p.grad is not None:
            self.averages[p] = self.averages[p] + p.grad if p in self.averages else p.grad
        p.grad = None

    def capture_activations_hook(self, module: nn.Module, forward_input: Any, forward_output: Any) -> None:
        """Keep the layer's input and ask for the gradient of its output."""
        recorded = len(getattr(module, "activations", ()))
        super().capture_activations_hook(module, forward_input, forward_output)
        if len(getattr(module, "activations", ())) == recorded:
            return
        if isinstance(module, nn.GroupNorm) and forward_input[0][:1].numel() == module.num_groups:
            raise UnsupportedModelError(
                f"layer {self.name_of(module)} normalises groups of one value each, which makes every output zero",
                hint="Use fewer groups, or nn.LayerNorm for features without a spatial dimension.",
            )
        if not isinstance(forward_output, torch.Tensor):
            raise UnsupportedModelError(
                f"layer {self.name_of(module)} ({type(module).__name__}) does not return one tensor",
                hint="Let each layer with parameters return one tensor, batch dimension first.",
            )
        if self._seen is not None and not isinstance(module, RNNLinear):  # those sort and drop records as they end
            self._seen += [t for t in (*forward_input, forward_output) if isinstance(t, torch.Tensor)]
        if forward_output.requires_grad:
            forward_output.register_hook(  # type: ignore[no-untyped-call]
                partial(self._capture_gradient, module)
            )

    def _capture_gradient(self, module: nn.Module, gradient: torch.Tensor) -> None:
        self.capture_backprops_hook(module, None, (gradient,), self.loss_reduction, self.batch_first)

    def name_of(self, module: nn.Module) -> str:
        """Return the dotted name of one of the model's layers."""
        return next((name for name, layer in self._module.named_modules() if layer is module and name), "(the model)")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's model; once, on a batch of two or more, check that it treats records one by one."""
        if self.unmixed or not self.training or not torch.is_grad_enabled():
            return self._module(*args, **kwargs)
        rows = mixing.rows_of((args, kwargs), self.drawn)
        if rows < 2:
            return self._module(*args, **kwargs)
        mixing.refuse_by_value(self._module, args, kwargs, rows)
        inputs: list[torch.Tensor] = []

        def watched(t: torch.Tensor) -> torch.Tensor:
            if not t.is_floating_point():
                return t
            inputs.append(t if t.requires_grad else t.detach().requires_grad_())
            return inputs[-1].clone()  # which the model may change in place

        args, kwargs = mixing.changed((args, kwargs), watched)
        self._seen = []
        try:
            output = self._module(*args, **kwargs)
            self.disable_hooks()  # these gradients are for the check alone
            self.unmixed = mixing.refuse_by_gradient(output, self._seen, inputs, rows)
        finally:
            self._seen = None
            self.enable_hooks()
        return output

    def forget(self) -> None:
        """Drop raw gradients and half-finished backward passes, so that each batch starts clean."""
        for module in self._module.modules():
            module.__dict__.pop("activations", None)
            module.__dict__.pop("max_batch_len", None)
        for p in self._module.parameters():
            p.grad = None
            if p.requires_grad:
                p.grad_sample = None
                p._forward_counter = 0
                p.__dict__.pop("_current_grad_sample", None)
        self.averages.clear()


def with_per_sample_gradients(model: nn.Module) -> PerSampleModel:
    """Return `model` wrapped, or its existing wrapper if it was wrapped before.

    Raises: UnsupportedModelError, naming the layer.
    """
    if isinstance(model, PerSampleModel):
        return model
    known = _wrapped.get(model) if isinstance(model, nn.Module) else None
    wrapper = known() if known is not None else None
    if wrapper is not None and hasattr(model, "autograd_grad_sample_hooks"):
        return wrapper
    _refuse_unsupported(model)
    try:
        wrapper = PerSampleModel(model)
    except NotImplementedError as error:  # a trainable layer with buffers
        raise UnsupportedModelError(
            "a trainable layer has buffers, whose values would be published without noise",
            hint="Move the buffers to a layer without parameters and never update them from data.",
        ) from error
    _wrapped[model] = weakref.ref(wrapper)
    return wrapper


def unwrap(model: nn.Module) -> nn.Module:
    """Return the plain module inside a wrapped one, all hooks removed; a plain module comes back as it is."""
    if not isinstance(model, GradSampleModule):
        return model
    plain: nn.Module = model.to_standard_module()
    _wrapped.pop(plain, None)
    return plain


def _refuse_unsupported(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, GradSampleModule) or hasattr(model, "autograd_grad_sample_hooks"):
        raise UnsupportedModelError(
            "the model was already wrapped by Opacus or is a copy of a wrapped model",
            hint="Wrap the plain model; copy models with choral.privacy.unwrap(model) first.",
        )
    for name, layer in model.named_modules():
        kind = type(layer).__name__
        if isinstance(layer, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise UnsupportedModelError(
                f"the model is a {kind}; several processes on one dataset are not accounted for",
                hint="Wrap the plain model in one process, or make each process a party of federate().",
            )
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise UnsupportedModelError(
                f"layer {name or '(the model)'} is a {kind}: it mixes the records of a batch, so no record has a "
                "gradient of its own, and its running statistics would be published without noise",
                hint="Use nn.GroupNorm(min(32, channels), channels); with DP it usually costs no accuracy, while "
                "small noisy batches make BatchNorm worse.",
            )
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
            raise UnsupportedModelError(
                f"layer {name} is a {kind} with running statistics, which would be published without noise",
                hint="Set track_running_stats=False.",
            )
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
            raise UnsupportedModelError(
                f"layer {name or '(the model)'} is a {kind} with sparse gradients; noise makes every gradient dense",
                hint="Set sparse=False.",
            )
        validator = ModuleValidator.VALIDATORS.get(type(layer))
        for error in validator(layer) if validator else ():
            raise UnsupportedModelError(
                f"layer {name or '(the model)'} is a {kind}, which has no per-sample gradients",
                hint=_REPLACEMENTS.get(kind, f"Opacus says: {str(error).splitlines()[0]}"),
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise UnsupportedModelError("the model has no trainable parameter", hint="Check requires_grad.")


_REPLACEMENTS = {
    "LSTM": "Use opacus.layers.DPLSTM, which takes the same arguments and weights.",
    "GRU": "Use opacus.layers.DPGRU, which takes the same arguments and weights.",
    "RNN": "Use opacus.layers.DPRNN, which takes the same arguments and weights.",
    "MultiheadAttention": "Use opacus.layers.DPMultiheadAttention, which takes the same arguments.",
}
