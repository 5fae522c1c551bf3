"""Models with per-sample gradients: what is refused, how they are made, and how they are checked.

A wrapped model keeps, for each parameter, what gives the gradient of every record of the batch. For the common kinds
of layers that is the layer's input and the gradient of its output, or what :mod:`choral.privacy.ghost` or Opacus' rule
makes of them at once; torch is kept from computing the gradients of their parameters, once they have been compared in a
batch that gave them one. For all other layers it is `grad_sample`, shape (batch, *parameter.shape), by Opacus or
functorch.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import prepare_layer
from opacus.layers.dp_rnn import DPRNNBase
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from choral.privacy import ghost, mixing, positions
from choral.privacy.backward import refuse_anomaly_detection, refuse_inputs, refuse_reentrant
from choral.privacy.errors import PrivacyError, UnsupportedModelError
from choral.privacy.layers import refuse_unsupported
from choral.privacy.precision import full_precision
from choral.privacy.watching import Point

_OPACUS_RULES: dict[type[nn.Module], Any] = {
    kind: GradSampleModule.GRAD_SAMPLERS[kind] for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
}
_BY_OPACUS_RULE = (nn.LayerNorm, nn.GroupNorm)  # whose input is one tensor

_PAIRS = 8  # batches of two records that show as much as one of more
_TRIES = 3  # times that a point whose rows differ is looked at again, where it shows nothing all the same

_wrapped: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PerSampleModel]] = weakref.WeakKeyDictionary()


class PerSampleModel(GradSampleModule):  # type: ignore[misc]
    """The user's model, computing per-sample gradients; attributes, methods and `state_dict` are the model's own."""

    def __init__(self, model: nn.Module) -> None:
        self.compared: set[nn.Parameter] = set()  # per-sample gradients with autograd's, where there was one
        self.unmixed = False  # records are treated one by one: found out in a drawn batch in which it could be seen
        self.open: set[Point] = set()  # where it could not be seen yet
        self.looked = False  # it was looked for in the batch that awaits its step
        self.drawn: int | None = None  # records in the batch that awaits its step
        self.averages: dict[nn.Parameter, torch.Tensor] = {}  # autograd's gradients, until they are compared
        self.shared: dict[nn.Module, positions.Shared] | None = None  # embeddings of what is the same for all records
        self.outside: set[str] = set()  # layers that a loss uses outside the forward pass that is looked at
        self._placed = False  # `shared` is of a batch that was drawn
        self._separable = False  # a training step's loss: found out likewise
        self._step_looked = False  # a whole training step was looked at, so layers may be used outside `forward`
        self._woken: Counter[Point] = Counter()  # how often each of `open` was looked at again
        self._pairs = 0  # batches of two that were looked at
        self._mode: object = None  # what is trained, and which layers are in training mode
        self._batch = 0  # batches drawn
        self._inside = False  # the forward pass that is looked at runs
        self._trying = False  # a whole training step, whose loss is looked at
        self._called = False  # and which calls the model itself
        self._expanding = False  # their outputs, although nothing is trained now
        self._records: int | None = None  # in the forward pass that runs
        self.uses: dict[nn.Parameter, list[Use]] = {}  # of the followed layers' parameters, by backward passes
        self.astray: set[nn.Parameter] = set()  # those that got a gradient from elsewhere, too
        self.attached: set[nn.Parameter] = set()  # of layers of which something was trained when they were wrapped
        self._ready = False  # attributes may be passed on
        self._unfollowed: set[nn.Parameter] = set()  # of layers with Opacus' hooks
        self._spared: list[nn.Parameter] = []  # of the layer whose forward runs
        self._anchor = torch.zeros((), requires_grad=True)
        self._guards: list[RemovableHandle] = []
        super().__init__(model, batch_first=True, loss_reduction="mean", strict=True)
        self._guards += [self._guard(p) for p in model.parameters() if p.is_floating_point()]
        self.attached.update(p for layer in self.iterate_submodules(model) for p in layer.parameters())
        self._ready = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_module"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what the plain model has, and the wrapper has not, on the model: its forward would not see it here."""
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
        own = {id(p) for p in _trainable(module)}
        if own and own <= {id(p) for child in module.children() for p in child.parameters()}:
            for child in module.children():
                yield from self.iterate_submodules(child)
        else:
            yield from super().iterate_submodules(module)

    def _follows(self, module: nn.Module) -> bool:
        """Return whether the gradients of this layer's parameters are made here, and not by Opacus' hooks."""
        known = type(module) in _BY_OPACUS_RULE or (
            ghost.follows(module) and self.GRAD_SAMPLERS.get(type(module)) is _OPACUS_RULES[type(module)]
        )  # a rule that somebody registered instead comes first
        own = {name for name, p in module._parameters.items() if p is not None}
        return known and own <= {"weight", "bias"} and not any(True for _ in module.children())

    def _before_layer(self, module: nn.Module, _args: Any) -> None:
        """Spare torch the gradients of the layer's parameters, once they have been compared."""
        refuse_reentrant(module)
        if self._watches(module):
            for p in _trainable(module):
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
        use = _Forward(module, a.detach(), a._version, _trainable(module), self._batch, self._inside)
        if output.requires_grad:
            output.register_hook(partial(self._hear, use))
        else:
            result = _Tap.apply(output, self._anchor, partial(self._hear, use))  # type: ignore[no-untyped-call]
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

    def _hear(self, use: _Forward, gradient: torch.Tensor) -> None:
        """Take in the gradient of the output of a layer, in a backward pass."""
        with full_precision():
            self._take_in(use, gradient)

    def _take_in(self, use: _Forward, gradient: torch.Tensor) -> None:
        if not self.hooks_enabled:
            return
        refuse_anomaly_detection()
        layer, a = use.layer, use.a
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
        found: dict[str, ghost.PerSample]
        if type(layer) in _BY_OPACUS_RULE:
            rows = self.GRAD_SAMPLERS[type(layer)](layer, [ghost.single(a)], ghost.single(gradient.detach()))
            found = {
                name: ghost.Dense(rows[p].flatten(1), float(len(a)))
                for name, p in layer.named_parameters()
                if p in rows
            }
        else:
            found = ghost.per_sample(layer, a, gradient.detach())
        pass_ = torch._C._current_graph_task_id()
        for name, p in layer.named_parameters():
            if any(p is q for q in use.trainable):
                self.uses.setdefault(p, []).append(Use(found[name], pass_))

    def _note_use(self, layer: nn.Module, batch: int, *, inside: bool) -> None:
        """Take note that the loss uses what `layer` made, in a forward pass of the batch of this number."""
        if batch != self._batch:
            raise UnsupportedModelError(
                f"the loss reaches what layer {self.name_of(layer)} made of an earlier batch, whose records were not "
                "drawn for this step",
                hint="Compute the loss of a batch from that batch's outputs alone; keep none from batch to batch.",
            )
        if not (inside or self._step_looked):
            self.outside.add(self.name_of(layer))

    def _watches(self, module: nn.Module) -> bool:
        return self.hooks_enabled and module.training and torch.is_grad_enabled()

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
        if p not in self.compared and p.grad is not None:
            self.averages[p] = self.averages[p] + p.grad if p in self.averages else p.grad
        elif p not in self._unfollowed:
            self.astray.add(p)
        p.grad = None

    def capture_activations_hook(self, module: nn.Module, forward_input: Any, forward_output: Any) -> None:
        """Keep the layer's input and ask for the gradient of its output."""
        refuse_reentrant(module)
        if self._watches(module) and _trainable(module):
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

    def name_of(self, module: nn.Module) -> str:
        """Return the dotted name of one of the model's layers."""
        return next((name for name, layer in self._module.named_modules() if layer is module and name), "(the model)")

    @property
    def checked(self) -> bool:
        """Whether the per-sample gradients of every trainable parameter have been compared with autograd's."""
        return all(p in self.compared for p in self._module.parameters() if p.requires_grad)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to look for in a training step: see :meth:`check_step`."""
        return self.unmixed and self._placed and self._separable and not self.open

    def never_seen(self) -> list[str]:
        """Return the layers at which mixing could not have been seen so far: nothing there differed between records.

        So it is at a layer whose input is the same for all records (a class token), and there it does no harm. They are
        looked at again as soon as their rows differ.
        """
        names = {name for name, *_ in self.open}
        seen = self._layers().keys() - names
        return sorted(name or "(the output)" for name in names if name not in seen)

    def begin(self, drawn: int) -> None:
        """Prepare for a batch, or chunk, of `drawn` records."""
        self.forget()
        self.drawn, self.looked = drawn, False
        self._batch += 1
        self._step_looked = self.unmixed and self._separable
        self.outside.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's model; in batches of two or more check that it treats records one by one, until it was seen.

        Autocast is left out of the passes that are checked, or rounding would hide what is looked for.
        """
        if self.checked and (self.unmixed or self.drawn == 1):
            return self._forward(args, kwargs)
        with full_precision():
            return self._forward(args, kwargs)

    def _forward(self, args: Any, kwargs: Any) -> Any:
        self._called = True
        if not (self.training and torch.is_grad_enabled()) or self._trying:
            return self._module(*args, **kwargs)
        self._records = rows = mixing.rows_of((args, kwargs), self.drawn)
        self._renew()
        if not self._placed:
            self._find_shared(self._module, args, kwargs, rows)
        if rows < 2:
            return self._run(args, kwargs)
        subject = mixing.Subject(self._module, self._layers(), self._module, args, kwargs, rows)
        if not self.unmixed:
            self._look(subject)
        elif self.open:
            output, found = mixing.varying(self.open, subject, lambda: self._run(args, kwargs))
            if self._wake(found):
                with full_precision():
                    self._look(subject)
            return output
        self.looked = self.looked or rows == self.drawn
        return self._run(args, kwargs)

    def _run(self, args: Any, kwargs: Any) -> Any:
        self._inside = True
        try:
            return self._module(*args, **kwargs)
        finally:
            self._inside = False

    def _layers(self) -> dict[str, nn.Module]:
        return {self.name_of(layer): layer for layer in self.iterate_submodules(self._module)}

    def _renew(self) -> None:
        """Begin anew to look for mixing where other parameters are trained, or other layers in training mode."""
        modules, parameters = self._module.modules(), self._module.parameters()
        mode = ([m.training for m in modules], [p.requires_grad for p in parameters])
        if self._mode is not None and mode != self._mode:
            self.unmixed = False
            self.open.clear()
            self._woken.clear()
        self._mode = mode

    def _look(self, subject: mixing.Subject) -> None:
        """Look for mixing; it is settled where it could have been seen, and in a batch that was drawn."""
        with self._unheard():
            could, seen = mixing.refuse_mixing(replace(subject, tell=self._expect_records))
        self._records = subject.rows
        if subject.rows != self.drawn:
            return
        self.looked = True
        if not self.unmixed:
            self.open = seen
        self.open -= could
        self._pairs += subject.rows == 2  # which may be in order by chance, as a model that sorts would put them
        self.unmixed = self.unmixed or (bool(could) and (subject.rows > 2 or self._pairs > _PAIRS))

    def _expect_records(self, records: int) -> None:
        self._records = records

    def _wake(self, found: set[Point]) -> bool:
        """Return whether one of the points where rows differ now is to be looked at, as it is a few times at most."""
        self._woken.update(found)
        return any(self._woken[point] <= _TRIES for point in found)

    @contextmanager
    def _unheard(self) -> Iterator[None]:
        """Keep no gradients of the passes that are for the check alone."""
        self.disable_hooks()
        self._expanding = bool(self.shared) and self._module.training
        try:
            yield
        finally:
            self._expanding = False
            self.enable_hooks()

    def check_step(self, step: Callable[[Any], torch.Tensor], batch: Any) -> None:
        """Check that `step`, which makes a loss of a batch, treats the records one by one, until it was seen that it
        does.

        For training steps that use the model's parts, not `model(...)`, and return the mean loss, a scalar. More is
        seen than of a model: that it is the mean over the records, too, unless it is random in evaluation mode. Call it
        before the step on a batch just drawn; it computes the loss several times. Raises: UnsupportedModelError.
        """
        rows = mixing.rows_of(batch, self.drawn)
        drawn, self._called = rows == self.drawn, False
        with full_precision():
            self._renew()
            self._check_step(step, batch, rows, drawn=drawn)
        self._step_looked = self._step_looked or drawn

    def _check_step(self, step: Callable[[Any], torch.Tensor], batch: Any, rows: int, *, drawn: bool) -> None:
        if not self._placed:
            self._records = rows
            self._find_shared(step, (batch,), {}, rows)
            self._records = None
        if rows < 2 or self.settled:
            return
        self._trying = True
        subject = mixing.Subject(self._module, self._layers(), step, (batch,), {}, rows, step=True)
        try:
            if not self._separable:
                with positions.evaluating(self._module), self._unheard():
                    self._separable = mixing.refuse_inseparable(subject) and drawn
            if not self.unmixed or self._wake(self._differing(subject)):
                looked = self.looked, self.unmixed, set(self.open)
                self._look(subject)
                if self._called:  # the model's own check is still to come
                    self.looked, self.unmixed, self.open = looked
        finally:
            self._trying = False
            self.forget()  # these forward passes have no backward pass

    def _differing(self, subject: mixing.Subject) -> set[Point]:
        """Return at which of the points that are still open the records differ in a training step."""
        take = torch.arange(subject.rows)
        run = partial(mixing.run, subject.forward, subject.args, subject.kwargs, take, subject.rows)
        with self._unheard():
            return mixing.varying(self.open, subject, run)[1] if self.open else set()

    def _find_shared(self, forward: Callable[..., Any], args: Any, kwargs: Any, rows: int) -> None:
        """Find the embeddings of what is the same for all records, and refuse a model that needs them to stay so."""
        self.shared = positions.shared_embeddings(self._module, forward, args, kwargs, rows)
        self._placed = rows == self.drawn

        def mended(yes: bool) -> None:
            self._expanding = yes

        if self.shared and not positions.computes_the_same(self._module, forward, args, kwargs, rows, mended):
            names = ", ".join(self.name_of(layer) for layer in self.shared)
            self.shared, self._placed = None, False
            raise UnsupportedModelError(
                f"layer {names} is given the same for all records, as T5's relative positions are, and the model "
                "computes something else when each record has its own row of the output",
                hint=f"Expand its input to the batch: {names.split(', ')[0]}(positions.expand(len(x), -1)); or freeze "
                "it, requires_grad_(False), and train the rest: T5's is learned in pre-training.",
            )

    def parts(self, p: nn.Parameter) -> list[ghost.PerSample]:
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
            parts.append(ghost.Dense(flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat))
        return parts

    def per_sample(self, p: nn.Parameter) -> torch.Tensor:
        """Return the gradients of `p` for each record of the batch, shape (records, *p.shape); not private."""
        return ghost.added(self.parts(p)).dense().reshape(-1, *p.shape)

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
        self.uses.clear()
        self.astray.clear()
        self._records = None


@dataclass(frozen=True)
class _Forward:
    """One use of a layer in a forward pass."""

    layer: nn.Module
    a: torch.Tensor
    version: int  # of `a`, when it was used
    trainable: list[nn.Parameter]
    batch: int  # its number
    inside: bool  # in a forward pass that is looked at


@dataclass(frozen=True)
class Use:
    """Gradients of one parameter from one use of its layer, heard in one backward pass."""

    gradients: ghost.PerSample
    backward: int


class _Tap(torch.autograd.Function):
    """The output of a layer before which nothing is trained, made part of the graph: else no gradient would come."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, _anchor: torch.Tensor, hear: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        ctx.hear = hear
        ctx.mark_dirty(output)  # as if changed in place: a view would forbid in-place activations
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.hear(gradient)
        return None, None, None


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None and p.requires_grad]


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
    if not isinstance(model, GradSampleModule):
        return model
    plain: nn.Module = model.to_standard_module()
    _wrapped.pop(plain, None)
    return plain
