"""The promise and its keeper: `Privacy` says what may be spent, `Guard` sees to it for one data holder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.utils.data import DataLoader, Sampler

from choral.errors import ConfigError
from choral.privacy import accounting
from choral.privacy.errors import BudgetExceededError, PrivacyError, UnsupportedLoaderError, UnsupportedModelError
from choral.privacy.events import PoissonSampledGaussian, RecordEvent
from choral.privacy.ledger import Ledger
from choral.privacy.loader import PoissonSampler, PrivateLoader, refuse_unsupported
from choral.privacy.model import PerSampleModel, unwrap, with_per_sample_gradients
from choral.privacy.noise import os_stream
from choral.privacy.spent import Spent
from choral.privacy.step import Noise, PrivateOptimizer

CALIBRATION_SLACK = 1e-3  # the share of a budget that calibration may leave unused


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """A promise: training is (epsilon, delta)-differentially private.

    Unit: the record. Neighbour relation: add or remove one record. Adversary: sees every model after every
    step, but not which records were sampled, the noise, or losses and metrics that the loop prints.
    Mechanism: DP-SGD (Abadi et al. 2016) with Poisson sampling.

    Args:
        epsilon: the most that may be spent, > 0. delta: in (0, 1), below 1/n for n records.
        max_grad_norm: clipping norm C of one record's gradient, > 0.
        epochs: passes over the data that one call of the training loop makes at most, >= 1.
        ledger: file that remembers what this data has spent, for the life of the data; None keeps it in memory.
    """

    epsilon: float
    delta: float
    max_grad_norm: float = 1.0
    epochs: int = 1
    ledger: str | Path | None = None
    _ledgers: list[Ledger] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        accounting.check_target(self.epsilon, self.delta)
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0.0):
            raise ConfigError(f"max_grad_norm is {self.max_grad_norm}, expected a finite number > 0", hint="Try 1.0.")
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs}, expected an integer >= 1")

    def wrap(
        self, model: nn.Module, optimizer: Optimizer, loader: DataLoader[Any]
    ) -> tuple[PerSampleModel, PrivateOptimizer, PrivateLoader]:
        """Make an existing loop private: train as before with what is returned, for `epochs` passes.

        Raises: ConfigError, UnsupportedModelError, UnsupportedLoaderError, BudgetExceededError, LedgerError.
        """
        guard = Guard(self, holder="data", ledger=self._open(), passes=self.epochs)
        return guard.wrap(model, optimizer, loader)

    def spent(self) -> Spent:
        """Return what the data has spent so far, in all runs that its ledger knows."""
        return _spent(self._open(), self.delta)

    def scheme(self, records: int, batch_size: int, steps: int, passes: int, spent: tuple[RecordEvent, ...]) -> Scheme:
        """Return how a Guard draws batches and makes noise, so that `spent` and `passes` more passes keep the promise.

        records: the dataset's. batch_size: the loader's, expected on average. steps: of a pass.
        Raises: ConfigError, BudgetExceededError.
        """
        rate = min(Fraction(batch_size, records), Fraction(1))
        noise = accounting.noise_multiplier(
            self.epsilon, self.delta, float(rate), steps * passes, spent, slack=CALIBRATION_SLACK
        )
        event = PoissonSampledGaussian(sample_rate=float(rate), noise_multiplier=noise, steps=steps)
        return Sampled(records=records, batch_size=batch_size, rate=rate, event=event)

    def _open(self) -> Ledger:
        if not self._ledgers:
            self._ledgers.append(Ledger(self.ledger))
        return self._ledgers[0]


class Scheme(Protocol):
    """One data holder's batches and noise over all passes, for one number of records and one batch size."""

    @property
    def records(self) -> int:
        """How many the dataset has."""
        ...

    @property
    def batch_size(self) -> int:
        """What the loader asked for."""
        ...

    @property
    def noise_multiplier(self) -> float:
        """As calibrated."""
        ...

    @property
    def noise(self) -> Noise | None:
        """What makes the noise of the next step; None for independent noise of this noise multiplier."""
        ...

    def begin_pass(self) -> RecordEvent:
        """Prepare for a pass; return what must be paid for it before it draws a batch."""
        ...

    def sampler(self) -> Sampler[list[int]]:
        """Return what draws the batches of a pass."""
        ...

    def before_place(self, place: int) -> None:
        """Hear that the batch at this place of a pass is next. Raises: PrivacyError (out of order)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Poisson batches, independent noise."""

    records: int
    batch_size: int
    rate: Fraction
    event: PoissonSampledGaussian  # one pass
    noise: Noise | None = None

    @property
    def noise_multiplier(self) -> float:
        return self.event.noise_multiplier

    def begin_pass(self) -> RecordEvent:
        return self.event

    def sampler(self) -> Sampler[list[int]]:
        return PoissonSampler(self.records, self.rate, self.event.steps, os_stream)

    def before_place(self, place: int) -> None:
        """Any order will do."""


class Guard:
    """One data holder's private training across many calls of the training loop.

    Args:
        privacy: the promise. holder: a name for whose data it is. ledger: what that data has spent before.
        passes: passes over the data that are still to come, in all; the noise is calibrated for them at the
            first `wrap`, on top of what the ledger holds. What one `wrap` returned may make `privacy.epochs` of them.
    """

    def __init__(self, privacy: Privacy, *, holder: str, ledger: Ledger, passes: int) -> None:
        if passes < 1:
            raise ConfigError(f"passes is {passes}, expected >= 1")
        ledger.bind(holder, privacy.delta)
        self.privacy, self.holder, self.ledger, self.passes = privacy, holder, ledger, passes
        self._plan: Scheme | None = None
        self._known = 0  # events of the ledger that the plan reckons with
        self._passed = 0
        self._latest: PrivateOptimizer | None = None  # whose pass was the latest

    @property
    def noise_multiplier(self) -> float | None:
        """The calibrated noise multiplier; None before the first `wrap`."""
        return self._plan.noise_multiplier if self._plan else None

    def wrap(
        self, model: nn.Module, optimizer: Optimizer, loader: DataLoader[Any]
    ) -> tuple[PerSampleModel, PrivateOptimizer, PrivateLoader]:
        """Return private versions of the three for one call of the training loop; see :meth:`Privacy.wrap`.

        May be called once per round with the same model, whose wrapper is used again.
        """
        refuse_unsupported(loader)
        plan = self._planned(loader)
        private_model = with_per_sample_gradients(model)
        _refuse_optimizer(optimizer, private_model)
        private_optimizer = PrivateOptimizer(
            optimizer,
            private_model,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=self.privacy.max_grad_norm,
            expected_batch_size=min(plan.batch_size, plan.records),
            source=os_stream,
            noise=plan.noise,
        )
        made = 0

        def before_pass() -> None:
            nonlocal made
            if self._latest is not None:
                self._latest.refuse_owing()
            private_optimizer.begin_pass()
            if made >= self.privacy.epochs:
                raise self._too_many(f"{self.privacy.epochs} passes over the data by one call of the training loop")
            self._charge()
            made += 1
            self._latest = private_optimizer

        private_loader = PrivateLoader(
            loader,
            plan.sampler(),
            before_pass=before_pass,
            before_batch=private_optimizer.expect,
            empty_batch=private_optimizer.step_empty,
            after_pass=private_optimizer.end_pass,
            before_place=plan.before_place,
        )
        return private_model, private_optimizer, private_loader

    def spent(self) -> Spent:
        """Return what this holder's data has spent so far, earlier runs included."""
        return _spent(self.ledger, self.privacy.delta)

    @staticmethod
    def unwrap(model: nn.Module) -> nn.Module:
        """Return the plain module inside a wrapped one, all hooks removed."""
        return unwrap(model)

    def _planned(self, loader: DataLoader[Any]) -> Scheme:
        records, batch_size = len(loader.dataset), int(loader.batch_size or 0)  # type: ignore[arg-type]
        if self._plan is not None:
            if (records, batch_size) != (self._plan.records, self._plan.batch_size):
                raise UnsupportedLoaderError(
                    f"{self.holder}: {records} records in batches of {batch_size}, but the noise was calibrated for "
                    f"{self._plan.records} in batches of {self._plan.batch_size}",
                    hint="Keep one dataset and batch size per Guard.",
                )
            return self._plan
        if self.privacy.delta >= 1.0 / records:
            raise ConfigError(
                f"{self.holder}: delta is {self.privacy.delta:g}, expected below 1/n = {1 / records:.3g} "
                f"for {records} records",
                hint="At delta >= 1/n publishing a record outright would count as private.",
            )
        steps = records // batch_size if loader.drop_last else math.ceil(records / batch_size)
        if steps == 0:
            raise UnsupportedLoaderError(
                f"{self.holder}: {records} records do not fill one batch of {batch_size} and drop_last is set",
                hint="Use drop_last=False (every step then takes all records) or a smaller batch.",
            )
        before = self.ledger.events
        self._plan = self.privacy.scheme(records, batch_size, steps, self.passes, before)
        self._known = len(before)
        return self._plan

    def _charge(self) -> None:
        """Pay for one pass, on disk, before its first batch is drawn."""
        if self._plan is None or self._passed >= self.passes:
            raise self._too_many(f"{self.passes} passes over the data")
        self.ledger.append(self._plan.begin_pass(), after=self._known)
        self._known += 1
        self._passed += 1

    def _too_many(self, planned: str) -> BudgetExceededError:
        return BudgetExceededError(
            f"{self.holder}: the budget was planned for {planned}, and all are used",
            hint="Set Privacy(epochs=...) to the passes that one call of the training loop makes.",
        )


def _spent(ledger: Ledger, delta: float) -> Spent:
    events = ledger.events
    return Spent(
        epsilon=accounting.epsilon(events, delta),
        delta=delta,
        accountant=accounting.accountant_of(events),
        steps=sum(e.steps for e in events),
        noise_multiplier=events[-1].noise_multiplier if events else 0.0,
        sample_rate=events[-1].sample_rate if events else 0.0,
    )


def _refuse_optimizer(optimizer: Optimizer, model: PerSampleModel) -> None:
    if isinstance(optimizer, PrivateOptimizer):
        raise PrivacyError("the optimizer is already private", hint="Wrap the original optimizer.")
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LBFGS):
        raise PrivacyError(
            f"optimizer is a {type(optimizer).__name__}, expected a torch optimizer that needs no closure",
            hint="SGD, Adam and their kin work.",
        )
    known = {id(p) for p in model._module.parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if any(id(p) not in known for p in params):
        raise UnsupportedModelError(
            "the optimizer holds parameters that are not the model's",
            hint="Build the optimizer from model.parameters() of the model you wrap, after any copy or move.",
        )
    if not params:
        raise UnsupportedModelError("the optimizer holds no trainable parameter", hint="Check requires_grad.")
