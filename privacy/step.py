"""The private step: clip each record's gradient, sum, add noise once, divide by the expected batch size."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from choral.privacy import ghost
from choral.privacy.errors import BudgetExceededError, PrivacyError, UnsupportedModelError
from choral.privacy.model import PerSampleModel
from choral.privacy.noise import Source, grid_gaussian, noise_grid

# Norms are of float32 blocks, summed in float64; clipping this much below them keeps their rounding, at most
# 2^-24 * ghost.BLOCK / 2 of the norm, inside the sensitivity.
_MARGIN = 1e-4
_COMPARED = 4  # records whose norms are compared with those of their gradients, written down

Noise = Callable[[int, float], npt.NDArray[np.float64]]  # of so many coordinates, multiples of a grid

_stepping: ContextVar[Optimizer | None] = ContextVar("_stepping", default=None)
_guards: weakref.WeakKeyDictionary[Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """The user's optimizer, fed with noisy gradients; its groups, state and hyper-parameters are the user's own.

    Guarantee: each step releases, and hands to the user's optimizer,
        (sum over the batch of g_i * min(1, C / |g_i|) + N(0, (sigma C)^2 I)) / expected_batch_size,
    g_i the gradient of record i over all parameters of the optimizer together: the Gaussian mechanism with
    noise multiplier sigma (Abadi et al. 2016, algorithm 1, with the divisor of McMahan et al. 2018). With `noise`, what
    that makes is added instead, given the number of coordinates and the grid, and the guarantee is its maker's.
    Unit: the record. Neighbours: add or remove one record. The divisor is public, never the realised size.
    One step per batch drawn: a second one raises BudgetExceededError.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: PerSampleModel,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: int,
        source: Source,
        noise: Noise | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self._model = model
        self._source = source
        self._noise = noise or self._independent_noise
        self._drawn: int | None = None
        self._owing = False  # a batch was drawn and nothing released for it
        self._buffers: dict[str, tuple[torch.Tensor, int, torch.Tensor]] | None = None  # itself, its version, its value
        if (old := _guards.pop(optimizer, None)) is not None:
            old.remove()
        _guards[optimizer] = optimizer.register_step_pre_hook(partial(_refuse_raw_step, weakref.ref(model)))

    def expect(self, drawn: int) -> None:
        """Prepare for the step of a batch of `drawn` records. Raises: PrivacyError (the batch before had no step)."""
        self.refuse_owing()
        self._model.forget()
        self._drawn = self._model.drawn = drawn
        self._owing = True
        if self._buffers is None:
            self._remember_buffers()

    def refuse_owing(self) -> None:
        """Raise PrivacyError if a batch was drawn and not stepped: whether to step may not depend on the data."""
        if self._owing:
            raise PrivacyError(
                "the batch before was drawn and never stepped, which tells something about it without noise",
                hint="Step once for every batch, whatever its loss; do not catch errors of step() and go on.",
            )

    def begin_pass(self) -> None:
        """Prepare for a pass over the data. Raises: PrivacyError (a batch had no step)."""
        self.refuse_owing()
        self._remember_buffers()

    def end_pass(self) -> None:
        """Look back at a pass. Raises: PrivacyError (a batch had no step), UnsupportedModelError (buffers changed)."""
        self.refuse_owing()
        self._refuse_changed_buffers(thorough=True)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Make one private step with the gradients of the batch just drawn.

        Raises: BudgetExceededError (no batch awaits a step), UnsupportedModelError (per-sample gradients
        missing or wrong), PrivacyError (a closure, or gradients that are not finite). Nothing is released then.
        """
        if closure is not None:
            raise PrivacyError("step(closure) evaluates the loss again, which was not paid for", hint="Call step().")
        drawn, self._drawn = self._drawn, None
        if drawn is None:
            raise BudgetExceededError(
                "optimizer.step() without a fresh batch: each batch pays for one step",
                hint="Draw batches from the wrapped loader and step once for each.",
            )
        samples = [self._per_sample(p, drawn) for p in self.params]
        clip = self._clip_factors(samples)  # first: NaN would pass the comparison
        if drawn > 1 and not self._model.unmixed:
            raise UnsupportedModelError(
                "it was not seen whether the model treats the records of a batch one by one",
                hint="Compute the loss from outputs of model(...) itself, as wrap() returned it, or call "
                "model.check_step(step, batch), where step(batch) returns the loss.",
            )
        self._refuse_changed_buffers(thorough=not self._model.checked)
        if not self._model.checked:
            self._check_first(samples)
        sums = [g.weighted_sum(clip) for g in samples]
        del samples
        self._model.forget()  # what is not private does not outlive the step
        self._release(sums)
        return self._apply()

    def step_empty(self) -> None:
        """Make the step of a batch without records: noise alone."""
        self._model.forget()
        self._drawn = None
        self._release([torch.zeros(p.numel()) for p in self.params])
        self._apply()
        self._model.forget()

    def _apply(self) -> Any:
        """Let the user's optimizer use what was released, and nothing else."""
        released = {id(p) for p in self.params}
        for group in self.original_optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in released:
                    p.grad = None
        token = _stepping.set(self.original_optimizer)
        try:
            return self.original_optimizer.step()
        finally:
            _stepping.reset(token)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for p in self.params:
            p.grad_sample = None
        self._model.uses.clear()
        self.original_optimizer.zero_grad(set_to_none)

    def _per_sample(self, p: nn.Parameter, drawn: int) -> ghost.PerSample:
        """Return the per-sample gradients of `p`, of `drawn` records."""
        parts = self._model.parts(p)
        if not parts:
            raise UnsupportedModelError(
                f"parameter {self._name(p)} received no per-sample gradient: it took no part in the loss, is used "
                "outside its own layer's forward, or the model was in eval mode",
                hint="Call model.train(); freeze unused parameters and leave them out of the optimizer.",
            )
        for part in parts:
            if part.records != drawn:
                raise UnsupportedModelError(
                    f"parameter {self._name(p)} has gradients for {part.records} samples, but {drawn} records were "
                    "drawn",
                    hint="Each layer's input needs one row per record, in its first dimension (batch_first=True): do "
                    "not drop, repeat or merge records.",
                )
        if p in self._model.astray:
            raise UnsupportedModelError(
                f"parameter {self._name(p)} received a gradient from outside its own layer's forward in train mode",
                hint="Use weights through their layers only: call layer(x), not a function of layer.weight.",
            )
        return ghost.added(parts)

    def _check_first(self, samples: list[ghost.PerSample]) -> None:
        """Compare the per-sample gradients of every parameter with autograd."""
        for p, g in zip(self.params, samples, strict=True):
            if p not in self._model.averages:
                raise UnsupportedModelError(
                    f"parameter {self._name(p)} received no gradient from autograd to compare with",
                    hint="Call loss.backward() on a loss of the wrapped model's own parameters.",
                )
            norms, average = g.norms(), g.weighted_sum(torch.full((g.records,), 1.0 / g.records, dtype=torch.float64))
            expected = self._model.averages[p].reshape(-1).to(average.device, torch.float64)
            difference = torch.linalg.vector_norm(average - expected)
            few = g.dense(_COMPARED)
            astray = (ghost.norms(few).to(norms.device) - norms[: len(few)]).abs()
            scale = float(norms.mean())
            if not (float(difference) <= 1e-3 * scale + 1e-7 and float(astray.max()) <= 1e-3 * scale + 1e-7):
                raise UnsupportedModelError(
                    f"parameter {self._name(p)}: its per-sample gradients do not average to autograd's gradient",
                    hint="The layer is used in a way that per-sample gradients do not follow, such as sharing it "
                    "across records or a scaled loss. Nothing was released.",
                )
        self._model.checked = True

    def _remember_buffers(self) -> None:
        buffers = self._model._module.named_buffers()
        self._buffers = {name: (b, b._version, b.detach().clone()) for name, b in buffers}

    def _refuse_changed_buffers(self, *, thorough: bool) -> None:
        """Compare buffers with those at the beginning of the pass; unless `thorough`, those that torch saw change."""
        known = self._buffers or {}
        for name, buffer in self._model._module.named_buffers():
            before, version, value = known.get(name, (None, 0, None))
            if not thorough and before is not None and buffer is before and before._version == version:
                continue
            if value is None or buffer.shape != value.shape or not torch.equal(value.to(buffer.device), buffer):
                raise UnsupportedModelError(
                    f"buffer {name} changes during training: it would publish the data without noise",
                    hint="Remove the running statistics, or freeze them.",
                )

    def _clip_factors(self, samples: list[ghost.PerSample]) -> torch.Tensor:
        """Return each record's factor min(1, C / norm), shape (batch,), float64; refuse gradients not finite."""
        found = [g.norms() for g in samples]
        per_parameter = torch.stack([n.to(found[0].device) for n in found])
        norms = torch.linalg.vector_norm(per_parameter, dim=0)
        if not bool(torch.isfinite(norms).all()):
            bad = next((i for i, n in enumerate(per_parameter) if not bool(torch.isfinite(n).all())), 0)
            raise PrivacyError(
                f"the gradient of parameter {self._name(self.params[bad])} is not finite; nothing was released",
                hint="Check the loss for NaN, lower the learning rate, or mend the data.",
            )
        factors: torch.Tensor = (self.max_grad_norm / (norms * (1.0 + _MARGIN))).clamp(max=1.0)
        return factors

    def _release(self, sums: list[torch.Tensor]) -> None:
        """Add noise to the clipped sums (one flat tensor per parameter) and leave the result in `p.grad`."""
        device = sums[0].device
        flat = torch.cat([s.to(device, torch.float64) for s in sums])
        grid = noise_grid(self.max_grad_norm, len(flat))
        noise = self._noise(len(flat), grid)
        flat.div_(grid).round_().mul_(grid).add_(torch.from_numpy(noise).to(device)).div_(self.expected_batch_size)
        for p, g in zip(self.params, torch.split(flat, [p.numel() for p in self.params]), strict=True):
            p.grad = g.view(p.shape).to(p.device, p.dtype)
        self._owing = False

    def _independent_noise(self, count: int, grid: float) -> npt.NDArray[np.float64]:
        return grid_gaussian(count, self.noise_multiplier, self.max_grad_norm, grid, self._source)

    def _name(self, p: torch.Tensor) -> str:
        return next((name for name, q in self._model._module.named_parameters() if q is p), "(not in the model)")


def _refuse_raw_step(model: weakref.ref[PerSampleModel], optimizer: Optimizer, *_: Any) -> None:
    wrapped = model()
    if wrapped is not None and wrapped.guarded and _stepping.get() is not optimizer:
        raise PrivacyError(
            "the original optimizer was stepped, whose gradients have no noise",
            hint="Step the optimizer that wrap() returned; choral.privacy.unwrap(model) ends private training.",
        )
