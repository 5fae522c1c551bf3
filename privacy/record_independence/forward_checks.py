"""The forward pass of a wrapped model, and training steps, looked at: are the records of a batch treated one by one?

No look counts unless it could have failed: see :mod:`choral.privacy.record_independence.batch_mixing`. So each drawn
batch is looked at until one has shown that a record's row changes with the record, at as many layers as it does; where
it did not, a layer is looked at again in the batch in which its rows differ. Frozen, unfrozen and switched layers begin
anew, and in the 2nd, 4th, 8th, ... batch some records are looked at once more, for mixing that has begun since.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from torch import nn

from choral.errors import ConfigError
from choral.privacy.errors import UnsupportedModelError
from choral.privacy.full_precision import full_precision
from choral.privacy.record_independence import batch_mixing, batch_rows, module_state, shared_inputs
from choral.privacy.record_independence.forward_probes import Point
from choral.privacy.record_independence.loss_graph import LossGraphCheck
from choral.privacy.record_independence.separable_loss import refuse_inseparable

_PAIRS = 8  # batches of two records that show as much as one of more
_TRIES = 3  # times that a point whose rows differ is looked at again, where it shows nothing all the same


class CheckedModule(GradSampleModule):  # type: ignore[misc]
    """A model whose records are looked at; of the gradients its kind takes care."""

    forget: Callable[[], None]  # drop the gradients of passes so far

    def __init__(self, model: nn.Module) -> None:
        self.compared: set[nn.Parameter] = set()  # per-sample gradients with autograd's, where there was one
        self.unmixed = False  # records are treated one by one: found out in a drawn batch in which it could be seen
        self.open: set[Point] = set()  # where it could not be seen yet
        self.looked = False  # it was looked for in the batch that awaits its step
        self.drawn: int | None = None  # records in the batch that awaits its step
        self.shared: dict[nn.Module, shared_inputs.SharedInput] | None = (
            None  # embeddings of what is the same for all records
        )
        self.outside: set[str] = set()  # layers that a loss uses outside the forward pass that is looked at
        self._placed = False  # `shared` is of a batch that was drawn
        self._separable = False  # a training step's loss: found out likewise
        self._step_looked = False  # a whole training step was looked at, so layers may be used outside `forward`
        self._woken: Counter[Point] = Counter()  # how often each of `open` was looked at again
        self._pairs = 0  # batches of two that were looked at
        self._mode: object = None  # what is trained, and which layers are in training mode
        self._batch = 0  # batches drawn
        self._latest = 0  # at which of them it was looked for
        self._inside = False  # the forward pass that is looked at runs
        self._trying = False  # a whole training step, whose loss is looked at
        self._called = False  # and which calls the model itself
        self._losses, self._ends = LossGraphCheck(), set[Any]()  # and the nodes that made what a loss is made of
        self._expanding = False  # outputs of `shared`, although nothing is trained now
        self._records: int | None = None  # in the forward pass that runs
        super().__init__(model, batch_first=True, loss_reduction="mean", strict=True)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: not the graph of the last forward pass, which cannot be."""
        return self.__dict__ | {"_ends": set()}

    def name_of(self, module: nn.Module) -> str:
        """Return the dotted name of one of the model's layers."""
        return next((name for name, layer in self._module.named_modules() if layer is module and name), "(the model)")

    @property
    def checked(self) -> bool:
        """Whether the per-sample gradients of every trainable parameter have been compared with autograd's."""
        parameters = (p for m in self._module.modules() for p in m._parameters.values())
        return all(p in self.compared for p in parameters if p is not None and p.requires_grad)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to look for in a training step: see :meth:`check_step`."""
        return self.unmixed and self._placed and self._separable and not self.open

    @property
    def _due(self) -> bool:
        """Whether to look again all the same, as after 2, 4, 8, ... batches: what mixes may have begun since."""
        return self._batch & (self._batch - 1) == 0 and self._batch != self._latest

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
        self._records = rows = batch_rows.rows_of((args, kwargs), self.drawn)
        self._renew()
        if not self._placed:
            self._find_shared(self._module, args, kwargs, rows)
        if rows < 2:
            return self._run(args, kwargs)
        if not self.unmixed:
            self._look(self._subject(self._module, args, kwargs, rows))
            return self._run(args, kwargs)
        if rows == self.drawn and self._due:
            self._look_again(self._subject(self._module, args, kwargs, rows))
        self.looked = self.looked or rows == self.drawn
        before = module_state.marks(self._module)
        run = partial(self._run, args, kwargs)
        output, found = batch_mixing.varying(self.open, self._layers(), run, rows) if self.open else (run(), set())
        after = module_state.marks(self._module)
        found |= {(name, "kept", 0, 0) for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        if self._wake(found):
            with full_precision():
                self._look(self._subject(self._module, args, kwargs, rows))
        return output

    def _subject(self, forward: Callable[..., Any], args: Any, kwargs: Any, rows: int) -> batch_mixing.CheckedForward:
        return batch_mixing.CheckedForward(
            self._module,
            self._layers(),
            forward,
            args,
            kwargs,
            rows,
            step=forward is not self._module,
            tell=self._expect_records,
        )

    def _run(self, args: Any, kwargs: Any) -> Any:
        self._inside = True
        try:
            output = self._module(*args, **kwargs)
        finally:
            self._inside = False
        self._ends.update(t.grad_fn for t in batch_rows.tensors(output))
        return output

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

    def _look(self, subject: batch_mixing.CheckedForward) -> None:
        """Look for mixing; it is settled where it could have been seen, and in a batch that was drawn."""
        with self._unheard():
            could, seen = batch_mixing.refuse_mixing(subject)
        self._records = subject.rows
        if subject.rows != self.drawn:
            return
        self.looked, self._latest = True, self._batch
        if not self.unmixed:
            self.open = seen
        self.open -= could
        self._pairs += subject.rows == 2  # which may be in order by chance, as a model that sorts would put them
        self.unmixed = self.unmixed or (bool(could) and (subject.rows > 2 or self._pairs > _PAIRS))

    def _look_again(self, subject: batch_mixing.CheckedForward) -> None:
        """Look whether records are mixed by now, which were not in the batches before."""
        with self._unheard(), full_precision():
            batch_mixing.refuse_again(subject)
        self._records = subject.rows
        if not subject.step or not self._called:
            self._latest = self._batch

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
        if not callable(step):
            raise ConfigError(f"step is a {type(step).__name__}, expected a function of a batch that returns its loss")
        step, rows = partial(_loss_of, step), batch_rows.rows_of(batch, self.drawn)
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
        if rows < 2 or (self.settled and not (drawn and self._due)):
            return
        self._trying = True
        subject = self._subject(step, (batch,), {}, rows)
        try:
            if not self._separable or self._due:
                with shared_inputs.evaluating(self._module), self._unheard():
                    self._separable = (refuse_inseparable(subject) and drawn) or self._separable
            if self.unmixed and self._due:
                self._look_again(subject)
            if not self.unmixed or self._wake(self._differing(subject)):
                looked = self.looked, self.unmixed, set(self.open), self._latest
                self._look(subject)
                if self._called:  # the model's own check is still to come
                    self.looked, self.unmixed, self.open, self._latest = looked
        finally:
            self._trying = False
            self.forget()  # these forward passes have no backward pass

    def _differing(self, subject: batch_mixing.CheckedForward) -> set[Point]:
        """Return at which of the points that are still open the records differ in a training step."""
        take = torch.arange(subject.rows)
        run = partial(batch_rows.run, subject.forward, subject.args, subject.kwargs, take, subject.rows)
        with self._unheard():
            return batch_mixing.varying(self.open, subject.layers, run, subject.rows)[1] if self.open else set()

    def _find_shared(self, forward: Callable[..., Any], args: Any, kwargs: Any, rows: int) -> None:
        """Find the embeddings of what is the same for all records, and refuse a model that needs them to stay so."""
        self.shared = shared_inputs.shared_embeddings(self._module, forward, args, kwargs, rows)
        self._placed = rows == self.drawn

        def mended(yes: bool) -> None:
            self._expanding = yes

        if self.shared and not shared_inputs.computes_the_same(self._module, forward, args, kwargs, rows, mended):
            names = ", ".join(self.name_of(layer) for layer in self.shared)
            self.shared, self._placed = None, False
            raise UnsupportedModelError(
                f"layer {names} is given the same for all records, as T5's relative positions are, and the model "
                "computes something else when each record has its own row of the output",
                hint=f"Expand its input to the batch: {names.split(', ')[0]}(positions.expand(len(x), -1)); or freeze "
                "it, requires_grad_(False), and train the rest: T5's is learned in pre-training.",
            )

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


def _loss_of(step: Callable[[Any], Any], batch: Any) -> torch.Tensor:
    loss = step(batch)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        given = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
        raise UnsupportedModelError(
            f"the step that is checked returned {given}, expected the loss of the batch, a tensor of one number",
            hint="Return the mean of the records' losses, and do not call backward() in it.",
        )
    return loss
