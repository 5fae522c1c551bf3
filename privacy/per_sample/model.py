"""Models with per-sample gradients: what is refused, how they are made, and how they are checked.

A wrapped model keeps, for each parameter, what gives the gradient of every record of the batch. For the common kinds
of layers that is the layer's input and the gradient of its output, or what
:mod:`choral.privacy.per_sample.layer_gradients` makes of them at once; torch is kept from computing the gradients of
their parameters, once they have been compared in a batch that gave them one. For all other layers it is `grad_sample`,
shape (batch, *parameter.shape), by Opacus or functorch.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence, Set
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import prepare_layer
from opacus.layers.dp_rnn import DPRNNBase
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from choral.privacy.errors import PrivacyError, UnsupportedModelError
from choral.privacy.full_precision import full_precision
from choral.privacy.per_sample import ghost_norms, layer_gradients
from choral.privacy.per_sample.layer_replacement import refuse_unsupported
from choral.privacy.per_sample.layer_use import LayerCall, LayerUse, OutputTap, trainable
from choral.privacy.record_independence.forward_checks import CheckedModule
from choral.privacy.record_independence.loss_observers import observe_losses
from choral.privacy.record_independence.unsupported_calls import (
    refuse_anomaly_detection,
    refuse_inputs,
    refuse_reentrant,
)

_OPACUS_RULES: dict[type[nn.Module], Any] = {
    kind: GradSampleModule.GRAD_SAMPLERS[kind]
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)
}

_NOTES = (bool, int, type(None))  # what the wrapper notes of a batch

_wrapped: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PerSampleModel]] = weakref.WeakKeyDictionary()


class PerSampleModel(CheckedModule):
    """The user's model, computing per-sample gradients; attributes, methods and `state_dict` are the model's own."""

    def __init__(self, model: nn.Module) -> None:
        self.averages: dict[nn.Parameter, torch.Tensor] = {}  # autograd's gradients, until they are compared
        self.uses: dict[nn.Parameter, list[LayerUse]] = {}  # of the followed layers' parameters, by backward passes
        self.astray: set[nn.Parameter] = set()  # those that got a gradient from elsewhere, too
        self.attached: set[nn.Parameter] = set()  # of layers of which something was trained when they were wrapped
        self._ready = False  # attributes may be passed on
        self._unfollowed: set[nn.Parameter] = set()  # of layers with Opacus' hooks
        self._spared: list[nn.Parameter] = []  # of the layer whose forward runs
        self._anchor = torch.zeros((), requires_grad=True)
        self._gradient_hooks: list[RemovableHandle] = []
        super().__init__(model)
        self._gradient_hooks += [self._hide_gradient(p) for p in model.parameters() if p.is_floating_point()]
        self.attached.update(p for layer in self.iterate_submodules(model) for p in layer.parameters())
        self._ready = True
        observe_losses(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_module"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what the plain model has, and the wrapper has not, on the model: its forward would not see it here."""
        if type(value) in _NOTES and name in self.__dict__:  # as at each step; torch's own way takes ten times as long
            self.__dict__[name] = value
            return
        own = not self.__dict__.get("_ready") or name in self.__dict__ or hasattr(type(self), name)
        if own or not hasattr(self._module, name):
            super().__setattr__(name, value)
        else:
            setattr(self._module, name, value)

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
        """Attach to every trainable layer forward hooks, which hook the output's gradient in turn.

        Unlike Opacus' module backward hooks this leaves in-place activations allowed and does not warn.
        """
        handles: list[RemovableHandle] = []
        self._module.autograd_grad_sample_hooks = self.autograd_grad_sample_hooks = handles
        for module in self._module.modules():
            if isinstance(module, DPRNNBase):
                handles.append(module.register_forward_pre_hook(self._refuse_sorted))
        for module in self.iterate_submodules(self._module):
            if self._follows(module):
                handles += [
                    module.register_forward_pre_hook(self._before_layer),
                    module.register_forward_hook(self._after_layer, prepend=True, with_kwargs=True, always_call=True),
                ]
                continue
            self._unfollowed.update(module.parameters())
            if force_functorch or type(module) not in self.GRAD_SAMPLERS:
                prepare_layer(module, batch_first=batch_first)
            handles.append(module.register_forward_hook(self.capture_activations_hook))
        self.enable_hooks()

    def iterate_submodules(self, module: nn.Module) -> Iterable[nn.Module]:
        """Yield the layers to attach to: of a module whose own parameters are all its children's, those children.

        So it is with Hugging Face's heads, which hold their decoder's bias, and with Opacus' recurrent layers.
        """
        own = {id(p) for p in trainable(module)}
        if own and own <= {id(p) for child in module.children() for p in child.parameters()}:
            for child in module.children():
                yield from self.iterate_submodules(child)
        else:
            yield from super().iterate_submodules(module)

    def _follows(self, module: nn.Module) -> bool:
        """Return whether the gradients of this layer's parameters are made here, and not by Opacus' hooks."""
        known = (
            layer_gradients.follows(module) and self.GRAD_SAMPLERS.get(type(module)) is _OPACUS_RULES[type(module)]
        )  # a rule that somebody registered instead comes first
        own = {name for name, p in module._parameters.items() if p is not None}
        return known and own <= {"weight", "bias"} and not any(True for _ in module.children())

    def _before_layer(self, module: nn.Module, _args: Any) -> None:
        """Spare torch the gradients of the layer's parameters, once they have been compared."""
        refuse_reentrant(module)
        if self._watches(module):
            for p in trainable(module):
                if p in self.compared:
                    p.requires_grad_(False)
                    self._spared.append(p)

    def _after_layer(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> torch.Tensor | None:
        """Keep the layer's input and ask for the gradient of its output."""
        while self._spared:
            self._spared.pop().requires_grad_(True)
        given = (*args, *kwargs.values())
        if not isinstance(output, torch.Tensor) or not (self._watches(module) or self._expanding) or not given:
            return None
        a, result = given[0], None
        if self.shared and module in self.shared:
            a, output = self._for_each_record(module, a, output)
            result = output
        if not self._watches(module):
            return result
        self._refuse_single_values(module, a)
        use = LayerCall(module, a.detach(), a._version, trainable(module), self._batch, self._inside)
        if output.requires_grad:
            output.register_hook(partial(self._hear, use))
        else:
            result = OutputTap.apply(output, self._anchor, partial(self._hear, use))  # type: ignore[no-untyped-call]
        self._ends.add((output if result is None else result).grad_fn)
        return result

    def _for_each_record(
        self, module: nn.Module, a: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input and output of an embedding of what is the same for all records, with a row for each."""
        kind, records = (self.shared or {})[module], self._records or self.drawn
        if records is None or not kind.fits(a):
            raise UnsupportedModelError(
                f"layer {self.name_of(module)} was given the same for all records at first, and now {tuple(a.shape)}",
                hint="Give it one row per record, always.",
            )
        return kind.expanded(a, records), kind.expanded(output, records).clone()

    def _hear(self, use: LayerCall, gradient: torch.Tensor) -> None:
        """Take in the gradient of the output of a layer, in a backward pass."""
        with full_precision():
            self._take_in(use, gradient)

    def _take_in(self, use: LayerCall, gradient: torch.Tensor) -> None:
        if not self.hooks_enabled:
            return
        refuse_anomaly_detection()
        layer, a = use.layer, use.a
        if a is None:
            raise PrivacyError(
                "a second backward pass through a graph that was not kept", hint="Compute the loss anew."
            )
        self._note_use(layer, use.batch, inside=use.inside)
        if torch.is_grad_enabled():
            raise UnsupportedModelError(
                "a backward pass with create_graph=True: gradients of gradients have no per-sample gradients",
                hint="Leave out gradient penalties, or compute them for each record by finite differences.",
            )
        if a._version != use.version:
            raise UnsupportedModelError(
                f"the input of layer {self.name_of(layer)} was changed in place after the layer had used it",
                hint="Use the variant that is not in place, or clone before.",
            )
        own = {name: p for name, p in layer._parameters.items() if p is not None and any(p is q for q in use.trainable)}
        found = layer_gradients.per_sample(layer, a, gradient.detach(), own)
        pass_ = torch._C._current_graph_task_id()
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            use.a = None  # its memory serves the rest of this pass
        for name, p in own.items():
            self.uses.setdefault(p, []).append(LayerUse(found[name], pass_))

    def _watches(self, module: nn.Module) -> bool:
        return self.hooks_enabled and module.training and torch.is_grad_enabled()

    @property
    def hides_gradients(self) -> bool:
        """Whether raw gradients are kept out of `p.grad`: until the wrapper is removed."""
        return bool(self._gradient_hooks)

    def remove_hooks(self) -> None:
        """Remove everything that wrapping attached to the model."""
        super().remove_hooks()
        while self._gradient_hooks:
            self._gradient_hooks.pop().remove()
        self.averages.clear()

    def _hide_gradient(self, p: nn.Parameter) -> RemovableHandle:
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise UnsupportedModelError(
                f"a parameter of shape {tuple(p.shape)} has a hook that runs when its gradient is ready, and would be "
                "given the raw one",
                hint="Remove register_post_accumulate_grad_hook, as of an optimizer that steps during backward().",
            )
        frozen = not p.requires_grad  # it may be unfrozen later
        p.requires_grad_(True)
        handle: RemovableHandle = p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            self._take_gradient
        )
        p.requires_grad_(not frozen)
        return handle

    def _take_gradient(self, p: nn.Parameter) -> None:
        """Take the raw gradient out of `p.grad`, where any optimizer would find it."""
        if not self.hides_gradients:
            return
        if p not in self.compared and p.grad is not None:
            self.averages[p] = self.averages[p] + p.grad if p in self.averages else p.grad
        elif p not in self._unfollowed:
            self.astray.add(p)
        p.grad = None

    def capture_activations_hook(self, module: nn.Module, forward_input: Any, forward_output: Any) -> None:
        """Keep the layer's input and ask for the gradient of its output."""
        refuse_reentrant(module)
        if self._watches(module) and trainable(module):
            refuse_inputs(self.name_of(module), module, forward_input)
        recorded = len(getattr(module, "activations", ()))
        super().capture_activations_hook(module, forward_input, forward_output)
        if len(getattr(module, "activations", ())) == recorded:
            return
        if not isinstance(forward_output, torch.Tensor):
            raise UnsupportedModelError(
                f"layer {self.name_of(module)} ({type(module).__name__}) does not return one tensor",
                hint="Let each layer with parameters return one tensor, batch dimension first.",
            )
        self._ends.add(forward_output.grad_fn)
        if forward_output.requires_grad:
            forward_output.register_hook(  # type: ignore[no-untyped-call]
                partial(self._capture_gradient, module, self._batch, self._inside)
            )

    def _capture_gradient(self, module: nn.Module, batch: int, inside: bool, gradient: torch.Tensor) -> None:
        refuse_anomaly_detection()
        if self.hooks_enabled:
            self._note_use(module, batch, inside=inside)
        try:
            with full_precision():
                self.capture_backprops_hook(module, None, (gradient,), self.loss_reduction, self.batch_first)
        except RuntimeError as error:  # of functorch, which runs the module once more for each record
            raise UnsupportedModelError(
                f"layer {self.name_of(module)} ({type(module).__name__}) has parameters whose per-sample gradients "
                f"cannot be computed: {str(error).splitlines()[0]}",
                hint="Keep parameters in torch's own layers, learned positions and class tokens in an nn.Embedding; "
                "no dropout or other randomness in a module that has parameters of its own beside layers.",
            ) from error

    def _refuse_sorted(self, module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], PackedSequence) and args[0].sorted_indices is not None and module.training:
            raise UnsupportedModelError(
                f"layer {self.name_of(module)}, of Opacus, keeps the gradients of a packed sequence in the order of "
                "lengths, and so mixes those of different records",
                hint="Use torch's layer and choral.privacy.replace_layers(model), or pack with enforce_sorted=True.",
            )

    def _refuse_single_values(self, module: nn.Module, given: torch.Tensor) -> None:
        if isinstance(module, nn.GroupNorm) and given[:1].numel() == module.num_groups:
            raise UnsupportedModelError(
                f"layer {self.name_of(module)} normalises groups of one value each, which makes every output zero",
                hint="Use fewer groups, or nn.LayerNorm for features without a spatial dimension.",
            )

    @property
    def loss_ends(self) -> Set[Any]:
        """The nodes that made the outputs of model and layers, where a loss of them is to be looked at."""
        looks = self.hides_gradients and self.hooks_enabled and (self.drawn or 0) > 1 and not self._separable
        return self._ends if looks else frozenset()

    def check_loss(self, losses: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor | None]) -> None:
        """Refuse a loss that is seen not to be a mean over the records of the batch just drawn."""
        own = {*self._module.parameters(), self._anchor}
        with self._unheard():
            self._losses.look(losses, self._ends, self.drawn or 0, seeds, own)

    def parts(self, p: nn.Parameter) -> list[ghost_norms.PerSample]:
        """Return the per-sample gradients of `p` from each of its uses. Raises: PrivacyError (two backward passes)."""
        uses = self.uses.get(p, [])
        samples = getattr(p, "grad_sample", None)
        if isinstance(samples, list) or len({use.backward for use in uses}) > 1:
            raise PrivacyError(
                "two backward passes before one step: gradient accumulation is not accounted for",
                hint="Step after each backward pass, with a batch size of all that you would add up; "
                "Privacy(max_physical_batch_size=...) then shows it in chunks, and makes one noisy step of them.",
            )
        parts = [use.gradients for use in uses]
        if samples is not None:
            flat = samples.reshape(len(samples), p.numel())
            parts.append(ghost_norms.Dense(flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat))
        return parts

    def left_out(self, p: nn.Parameter) -> bool:
        """Return whether a loss made nothing of `p`, as of a layer that was skipped: no use of it would be missed.

        Autograd's gradient of a parameter that was compared is heard wherever it comes from, but for Opacus' layers.
        """
        missed = p in self.averages or p in self.astray or p in self._unfollowed
        return bool(self.uses) and p in self.compared and not missed

    def per_sample(self, p: nn.Parameter) -> torch.Tensor:
        """Return the gradients of `p` for each record of the batch, shape (records, *p.shape); not private."""
        return ghost_norms.added(self.parts(p)).dense().reshape(-1, *p.shape)

    def forget(self) -> None:
        """Drop raw gradients and half-finished backward passes, so that each batch starts clean."""
        for module in self._module.modules():
            module.__dict__.pop("activations", None)
            module.__dict__.pop("max_batch_len", None)
            for p in module._parameters.values():
                if p is not None:
                    p.grad = None
                    if p.requires_grad:
                        p.grad_sample = None
                        p._forward_counter = 0
                        p.__dict__.pop("_current_grad_sample", None)
        self.averages.clear()
        self.uses.clear()
        self.astray.clear()
        self._ends.clear()
        self._records = None


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
    refuse_unsupported(model)
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
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(model, GradSampleModule):
        return model
    plain: nn.Module = model.to_standard_module()
    _wrapped.pop(plain, None)
    return plain
