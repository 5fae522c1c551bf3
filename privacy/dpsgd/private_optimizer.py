"""The private step: clip each record's gradient, sum, add noise once, divide by the expected batch size."""

from __future__ import annotations

import math
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from choral.privacy.dpsgd.clip_factors import clip_factors
from choral.privacy.dpsgd.clip_settings import AdaptiveClip, Clipping, ClippingNorm, PerLayerClip
from choral.privacy.dpsgd.clipped_sum import ClippedSum, clipped_sum, in_pieces
from choral.privacy.dpsgd.optimizer_wrapper import OptimizerWrapper
from choral.privacy.dpsgd.unchanged_buffers import UnchangedBuffers
from choral.privacy.errors import BudgetExceededError, PrivacyError, UnsupportedModelError
from choral.privacy.full_precision import full_precision
from choral.privacy.noise.gaussian import Source, grid_gaussian, noise_grid
from choral.privacy.per_sample import ghost_norms
from choral.privacy.per_sample.sample_gradients import compare_with_autograd, gradients_of, parameter_name
from choral.privacy.record_independence.unsupported_calls import warn_of_clipping

if TYPE_CHECKING:
    from choral.privacy.per_sample.model import PerSampleModel

_CACHED = 1 << 16  # numbers that are rounded and made noisy at once: they stay in the cache
_ALL_CHUNKS = "Draw all chunks of a batch, and from one pass at a time."

Noise = Callable[[int, float], npt.NDArray[np.float64]]  # of so many coordinates, multiples of a grid

_stepping: ContextVar[Optimizer | None] = ContextVar("_stepping", default=None)
_step_refusals: weakref.WeakKeyDictionary[Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()


class StepPlanner(Protocol):
    """Who plans and pays for the steps, asked when an optimizer's state is saved or loaded."""

    def saved(self, clip: float) -> dict[str, float | int | str]:
        """Return what to write down beside the optimizer's state, given the clipping norm."""
        ...

    def resumed(self, entry: Any) -> tuple[float, float]:
        """Go on as `entry` says; return clipping norm and noise multiplier. Raises: PrivacyError, and its kinds."""
        ...


class PrivateOptimizer(OptimizerWrapper):
    """The user's optimizer, fed with noisy gradients; its groups, state and hyper-parameters are the user's own.

    Guarantee: each step releases, and hands to the user's optimizer,
        (sum over the batch of g_i * min(1, C / |g_i|) + N(0, (sigma C)^2 I)) / expected_batch_size,
    g_i the gradient of record i over all parameters of the optimizer together: the Gaussian mechanism with
    noise multiplier sigma (Abadi et al. 2016, algorithm 1, with the divisor of McMahan et al. 2018). With `noise`, what
    that makes is added instead, given the number of coordinates and the grid, and the guarantee is its maker's.
    Unit: the record. Neighbours: zero out one record. The divisor is public, never the realised size.
    With PerLayerClip each layer's part of g_i has a factor of its own, and C is that of all layers together. With
    AdaptiveClip the sum has one more coordinate, the count that C follows: see there.

    A gradient that is not finite counts as zero, in the count of AdaptiveClip, too: a record that makes one changes as
    much as a record that is not there, and raises no error, which would tell of it without noise. The data owner, and
    nobody else, may ask for the number of such records: see `count_zeroed`.

    One step per batch drawn: a second one raises BudgetExceededError. A batch may come in chunks: `step` on all but the
    last adds its clipped gradients up and releases nothing, and `stepped` is then False.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: PerSampleModel,
        *,
        noise_multiplier: float,
        max_grad_norm: ClippingNorm | Clipping,
        expected_batch_size: int,
        source: Source,
        noise: Noise | None = None,
    ) -> None:
        self.clipping = max_grad_norm if isinstance(max_grad_norm, Clipping) else Clipping(max_grad_norm)
        super().__init__(optimizer)
        self.noise_multiplier = noise_multiplier
        self.max_grad_norm = self.clipping.norm
        self.expected_batch_size = expected_batch_size
        self._model = model
        self._source = source
        self._noise = noise
        self._drawn: int | None = None
        self._owing = False  # a batch or chunk was drawn and not stepped
        self._last = True  # the batch, or chunk, just drawn completes its batch
        self._pending: ClippedSum | None = None  # of the chunks so far; secret
        self._planned_noise = noise_multiplier
        self.planner: StepPlanner | None = None  # of the budget, for checkpoints
        self._process = os.getpid()
        self.stepped = False  # whether the latest step() released something and moved the model
        self._warned = False  # that the loop clips gradients, which does nothing
        self._zeroed: int | None = None  # records whose gradient was not finite, if that is counted; secret
        self._buffers = UnchangedBuffers(model._module)
        if (old := _step_refusals.pop(optimizer, None)) is not None:
            old.remove()
        _step_refusals[optimizer] = optimizer.register_step_pre_hook(partial(_refuse_raw_step, weakref.ref(model)))

    def count_zeroed(self) -> None:
        """Count from now on the records whose gradient was not finite, so that :attr:`zeroed` can be read."""
        self._zeroed = self._zeroed or 0

    @property
    def zeroed(self) -> int:
        """How often a record's gradient was not finite and counted as zero, since `count_zeroed` was called.

        **Not private:** it is for the data owner, to mend the data. Never log or send it, nor let training depend on
        it. No state dict, ledger or message holds it. Raises: PrivacyError (`count_zeroed` was not called).
        """
        if self._zeroed is None:
            raise PrivacyError(
                "records whose gradient is not finite were not counted",
                hint="The data owner may call optimizer.count_zeroed() before training; the number is not private.",
            )
        return self._zeroed

    def _note_zeroed(self, gone: torch.Tensor) -> None:
        if self._zeroed is not None:
            self._zeroed += int(gone.sum())

    def expect(self, drawn: int, *, first: bool = True, last: bool = True) -> None:
        """Prepare for the step of a batch, or of its `first` to `last` chunk, of `drawn` records.

        Raises: PrivacyError (the batch before had no step, or not all of its chunks).
        """
        self._refuse_fork()
        if self._owing or first:
            self.refuse_owing()
        elif self._pending is None:
            raise PrivacyError("a chunk of a batch whose first chunks were not stepped", hint=_ALL_CHUNKS)
        self._model.begin(drawn)
        self._drawn = drawn
        self._owing, self._last = True, last
        if first:
            self.max_grad_norm = self.clipping.norm  # of the whole batch
        if not self._buffers.remembered:
            self._buffers.remember()

    def _refuse_fork(self) -> None:
        if os.getpid() != self._process:
            raise PrivacyError(
                "this process was forked off one that trains privately, and a pass is paid for once",
                hint="Wrap in the process that trains; each wrap pays for passes of its own.",
            )

    def refuse_owing(self) -> None:
        """Raise PrivacyError if a batch was drawn and not stepped: whether to step may not depend on the data."""
        if self._owing or self._pending is not None:
            raise PrivacyError(
                "the batch before was drawn and never stepped, which tells something about it without noise",
                hint="Step once for every batch, whatever its loss; do not catch errors of step() and go on. Look at a "
                "first batch, next(iter(loader)), with the original loader: here it is drawn, and its pass paid for."
                + (f" {_ALL_CHUNKS}" if self._pending is not None else ""),
            )

    def plan(self, noise_multiplier: float) -> None:
        """Take the noise multiplier that will be paid for."""
        self.noise_multiplier = self._planned_noise = noise_multiplier

    def begin_pass(self) -> None:
        """Prepare for a pass over the data. Raises: PrivacyError (a batch had no step; weights are not finite)."""
        self.refuse_owing()
        self._refuse_diverged()
        self._buffers.remember()

    def end_pass(self) -> None:
        """Look back at a pass.

        Raises: PrivacyError (a batch had no step; weights are not finite), UnsupportedModelError (buffers changed).
        """
        self.refuse_owing()
        self._refuse_diverged()
        self._buffers.check(thorough=True)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Make one private step with the gradients of the batch just drawn.

        Raises: BudgetExceededError (no batch awaits a step), UnsupportedModelError (per-sample gradients
        missing or wrong), PrivacyError (a closure). Nothing is released then.
        """
        self._refuse_fork()
        if closure is not None:
            raise PrivacyError("step(closure) evaluates the loss again, which was not paid for", hint="Call step().")
        drawn, self._drawn = self._drawn, None
        if drawn is None:
            raise BudgetExceededError(
                "optimizer.step() without a fresh batch: each batch pays for one step",
                hint="Draw batches from the wrapped loader and step once for each.",
            )
        self.stepped = False
        self._warned = self._warned or warn_of_clipping(sys._getframe(1))
        with full_precision():
            self._accumulate(drawn)
        self._owing, self._model.drawn = False, None
        return self._settle() if self._last else None

    def _accumulate(self, drawn: int) -> None:
        """Add the clipped gradients of the records just drawn to those of earlier chunks of the batch."""
        params = self.params
        samples = [gradients_of(self._model, p, drawn) for p in params]
        clip, within, gone = self._clip_factors(samples)
        if drawn > 1 and not (self._model.unmixed or self._model.looked):
            raise UnsupportedModelError(
                "it was not seen whether the model treats the records of a batch one by one",
                hint="Compute the loss from outputs of model(...) itself, as wrap() returned it, or call "
                "model.check_step(step, batch), where step(batch) returns the loss.",
            )
        if drawn > 1 and self._model.outside:
            raise UnsupportedModelError(
                f"the loss uses layer {min(self._model.outside)} outside model(...), where it was not seen whether "
                "records are treated one by one",
                hint="Compute the loss from outputs of model(...) alone, and let its forward return what is needed; or "
                "call model.check_step(step, batch) before, where step(batch) returns the whole loss.",
            )
        self._buffers.check(thorough=not self._model.checked)
        finite = not bool(gone.any())
        if finite:  # autograd's mean is NaN otherwise
            compare_with_autograd(self._model, self.params, samples)
        if not finite:
            samples = [g.without(gone) for g in samples]
            self._note_zeroed(gone)
        self._model.forget()  # what is not private does not outlive the step
        pieces, before = clipped_sum(samples, clip, [p.numel() for p in params]), self._pending
        total = ClippedSum(params, pieces, within)
        self._pending = total if before is None else before.add(total)

    def step_empty(self) -> None:
        """Make the step of a batch without records: noise alone. Raises: PrivacyError (a batch had no step)."""
        self.refuse_owing()
        self._model.forget()
        self._drawn = None
        self.max_grad_norm = self.clipping.norm
        params = self.params
        lengths = [sum(p.numel() for p in params[group]) for group in in_pieces([p.numel() for p in params])]
        pieces = [torch.zeros(length, dtype=torch.float64, device=params[0].device) for length in lengths]
        self._pending = ClippedSum(params, pieces, 0.0)
        self._settle()
        self._model.forget()

    def _settle(self) -> Any:
        """Release the batch whose chunks are all there, and step."""
        pending = self._pending
        if pending is None:
            raise PrivacyError("nothing was accumulated for this batch")
        self._release(pending)
        self._pending = None
        self.stepped = True
        return self._apply()

    def _apply(self) -> Any:
        """Let the user's optimizer use what was released, and nothing else."""
        released = {id(p) for p in self.params}
        for group in self.original_optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in released:
                    p.grad = None
        self._opt_called = True  # a scheduler that looks at this optimizer need not warn after an empty batch
        token = _stepping.set(self.original_optimizer)
        try:
            return self.original_optimizer.step()
        finally:
            _stepping.reset(token)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by torch.amp.GradScaler.step alone, and before it looks at gradients."""
        raise PrivacyError(
            "GradScaler skips steps whose gradients overflow, which tells something about them without noise",
            hint="Use bfloat16, which needs no scaling, and optimizer.step().",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the user's optimizer; of a wrapped one, with an entry "privacy".

        That entry, of numbers and strings, says where the clipping norm is, what noise was planned for how many more
        passes, and how long the ledger was. Nothing in it is secret; chunks of an unfinished batch are left out.
        """
        state: dict[str, Any] = dict(super().state_dict())
        if self.planner is not None:
            state["privacy"] = self.planner.saved(self.max_grad_norm if self._pending else self.clipping.norm)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, and go on as it was planned then: same noise, the passes that are left.

        The ledger must be the one of that time, with what was paid since. A pass that was begun after the state was
        saved is paid for and gone. A state without "privacy" is loaded into the user's optimizer alone.
        Raises: LedgerError (it holds less, or other events), PrivacyError (not such a state, of another sampling, or a
        batch without a step), BudgetExceededError (what is left is too little). Nothing is loaded then.
        """
        state = dict(state_dict)
        missing = min({"state", "param_groups"} - state.keys(), default=None)
        if missing is not None:
            raise PrivacyError(
                f"the optimizer's state has no {missing!r}", hint="Give what optimizer.state_dict() returned."
            )
        entry = state.pop("privacy", None)
        if entry is not None and self.planner is not None:
            self.refuse_owing()
            self.clipping.norm, noise = self.planner.resumed(entry)
            self.max_grad_norm = self.clipping.norm
            self.plan(noise)
        try:
            super().load_state_dict(state)
        except (ValueError, KeyError, TypeError) as error:
            raise PrivacyError(
                f"the state is not of an optimizer of these parameters: {error}",
                hint="Build model and optimizer alike.",
            ) from error

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for p in self.params:
            p.grad_sample = None  # type: ignore[attr-defined]
        self._model.uses.clear()
        self.original_optimizer.zero_grad(set_to_none)

    def _refuse_diverged(self) -> None:
        """Refuse trained weights that are not finite. They are released: to stop for them tells nothing more."""
        for p in self.params:
            # A number that is not finite makes the sum none, which is twenty times faster; a sum may also be too large.
            if not math.isfinite(float(p.detach().sum())) and not bool(torch.isfinite(p).all()):
                raise PrivacyError(
                    f"parameter {parameter_name(self._model, p)} is not finite any more: training has diverged",
                    hint="Lower the learning rate, and begin again from finite weights.",
                )

    def _clip_factors(self, samples: list[ghost_norms.PerSample]) -> tuple[list[torch.Tensor], float, torch.Tensor]:
        """See :func:`choral.privacy.dpsgd.clip_factors.clip_factors`."""
        setting = self.clipping.setting
        names = [parameter_name(self._model, p) for p in self.params] if isinstance(setting, PerLayerClip) else []
        return clip_factors(setting, self.max_grad_norm, [g.norms() for g in samples], names)

    def _release(self, pending: ClippedSum) -> None:
        """Add noise to the clipped sum and leave the result in `p.grad`; move the clipping norm if it adapts."""
        pieces, adaptive, shrunk = pending.pieces, self.clipping.setting, 1.0
        if isinstance(adaptive, AdaptiveClip):  # one vector of norm 1 at most for each record
            shrunk = math.sqrt(1.0 - adaptive.share) / self.max_grad_norm
            pieces = [piece * shrunk for piece in pieces]
            answers = pieces[-1].new_tensor([pending.within * math.sqrt(adaptive.share)])
            pieces[-1] = torch.cat([pieces[-1], answers])
        sizes = [p.numel() for p in pending.params]
        for group, piece in zip(in_pieces(sizes), self._noisy(pieces), strict=True):
            gradient = piece[: sum(sizes[group])]
            if isinstance(adaptive, AdaptiveClip):
                gradient = gradient / shrunk
            for p, g in zip(pending.params[group], torch.split(gradient, sizes[group]), strict=True):
                p.grad = g.view(p.shape).to(p.device, p.dtype)
        if isinstance(adaptive, AdaptiveClip):
            within = (float(pieces[-1][-1]) / math.sqrt(adaptive.share) + 1.0) / 2.0
            self.clipping.norm = adaptive.moved(self.max_grad_norm, within)

    def _noisy(self, pieces: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Round each piece, add noise and divide by the expected batch size, in place; yield it, still in the cache."""
        count, done = sum(map(len, pieces)), 0
        grid = noise_grid(self._sensitivity, count)
        given = None if self._noise is None else self._noise(count, grid)
        for piece in pieces:
            for part in torch.split(piece, _CACHED):
                here = slice(done, done := done + len(part))
                noise = self._independent_noise(len(part), grid, count) if given is None else given[here]
                part.div_(grid).round_().mul_(grid).add_(torch.from_numpy(noise).to(part.device))
                part.div_(self.expected_batch_size)
            yield piece

    @property
    def _sensitivity(self) -> float:
        return 1.0 if isinstance(self.clipping.setting, AdaptiveClip) else self.max_grad_norm

    def _independent_noise(self, count: int, grid: float, whole: int) -> npt.NDArray[np.float64]:
        """Return the noise of `count` of `whole` coordinates."""
        if self.noise_multiplier != self._planned_noise:
            raise PrivacyError(
                f"noise_multiplier was set to {self.noise_multiplier}, but {self._planned_noise} was paid for",
                hint="Leave it alone; noise schedules are not accounted for.",
            )
        return grid_gaussian(count, self.noise_multiplier, self._sensitivity, grid, self._source, whole)


def _refuse_raw_step(model: weakref.ref[PerSampleModel], optimizer: Optimizer, *_: Any) -> None:
    wrapped = model()
    if wrapped is not None and wrapped.hides_gradients and _stepping.get() is not optimizer:
        raise PrivacyError(
            "the original optimizer was stepped, whose gradients have no noise",
            hint="Step the optimizer that wrap() returned; choral.privacy.unwrap(model) ends private training.",
        )
