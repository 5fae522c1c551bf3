"""`Privacy` promises what may be spent, and `PrivacyEngine` keeps the promise for one data owner."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from choral.doors import worded
from choral.errors import ConfigError
from choral.privacy.accounting import record_level
from choral.privacy.accounting.events import NEIGHBOURS, Event, ReleasePlan, check_relation
from choral.privacy.accounting.plain_numbers import as_integer
from choral.privacy.dpsgd.checkpoint import Checkpoint, affordable, checkpoint_of, passes_left
from choral.privacy.dpsgd.clip_settings import AdaptiveClip, Clipping, ClippingNorm, check_clip, check_norm
from choral.privacy.dpsgd.execution_plan import (
    CALIBRATION_SLACK,
    ExecutionPlan,
    PoissonPlan,
    poisson_plan,
    refuse_other_sizes,
    refuse_several_processes,
)
from choral.privacy.dpsgd.optimizer_wrapper import refuse_unsupported as refuse_optimizer
from choral.privacy.dpsgd.poisson_loader import PrivateLoader, sizes_of
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.dpsgd.where_noise import Where, check_noise, refuse_shares
from choral.privacy.errors import BudgetExceededError, PrivacyError
from choral.privacy.ledgers.ledger import Ledger, as_ledger
from choral.privacy.ledgers.memory_notice import notice_memory
from choral.privacy.ledgers.plans import RemainingBudget
from choral.privacy.ledgers.spending import spent_by_records
from choral.privacy.ledgers.spent import Spent
from choral.privacy.noise.gaussian import os_stream

if TYPE_CHECKING:
    from choral.privacy.per_sample.model import PerSampleModel


@dataclass(frozen=True)
class Privacy:
    """A promise: training is (epsilon, delta)-differentially private.

    Unit: the record. Neighbour relation: zero out one record, that is, replace it by an empty one, which adds zero to
    every step; or replace it by any other (`neighbours`). Public: how many records there are, the batch size, and so
    sampling rate, steps and noise multiplier. Adversary: sees every model after every step, but not which records were
    sampled, the noise, or losses and metrics that the loop prints.
    Mechanism: DP-SGD (Abadi et al. 2016) with Poisson sampling.

    Args:
        epsilon: the most that may be spent, > 0.
        delta: in (0, 1), below 1/n for n records.
        max_grad_norm: clipping norm C of one record's gradient, > 0; or :class:`PerLayerClip`, or
            :class:`AdaptiveClip`, which follows a quantile of the norms.
        epochs: passes over the data that one call of the training loop makes at most, >= 1.
        ledger: what remembers what this data has spent, for the life of the data: a file, or a :class:`Ledger`. None
            makes one in memory, at zero: so a notebook's cell that is run again forgets what it spent. Copies of a
            promise (`dataclasses.replace`, `copy`) share it; one in memory is not pickled.
        max_physical_batch_size: larger batches are shown to the loop in chunks of at most so many records, >= 1. They
            are drawn, paid for and made noisy as one: `optimizer.step()` adds a chunk up, and only on the last one
            moves the model; `optimizer.stepped` tells. None shows each batch whole.
        neighbours: "zero out one record"; or "replace one record", the stronger promise, which takes more noise for
            the same epsilon: computed, and not twice as much where batches are sampled. A ledger keeps to one.
        noise: "local", each data owner's is enough by itself; or "distributed", in shares that are enough together,
            under a secure sum (:mod:`choral.privacy.record_shares`): for the parties of a federated training alone, of
            which up to `colluders`, >= 1, may tell the adversary their shares. `epochs` is not used then.
        records_per_person: the most that one person holds, if that is known; `spent` then says what holds for all
            records of a person together.
    """

    epsilon: float
    delta: float
    _: KW_ONLY
    max_grad_norm: ClippingNorm = 1.0
    epochs: int = 1
    ledger: Ledger | str | Path | None = field(default=None, compare=False)
    max_physical_batch_size: int | None = None
    neighbours: str = NEIGHBOURS
    records_per_person: int | None = None
    noise: Where = "local"
    colluders: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "ledger", as_ledger(self.ledger))
        record_level.check_target(self.epsilon, self.delta)
        for name in ("epsilon", "delta"):  # Python's own, which can be written down
            if not isinstance(value := getattr(self, name), int | float):
                object.__setattr__(self, name, float(value))
        check_norm(self.max_grad_norm)
        check_relation(self.neighbours)
        check_noise(self.noise, self.colluders, self.max_grad_norm)
        for name in ("epochs", "max_physical_batch_size", "records_per_person"):
            value = getattr(self, name)
            if name != "epochs" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value}, expected an integer >= 1")

    def wrap(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loader: DataLoader[Any],
        *,
        resume: Mapping[str, Any] | None = None,
    ) -> tuple[PerSampleModel, PrivateOptimizer, PrivateLoader]:
        """Make an existing loop private: train as before with what is returned, for `epochs` passes.

        resume: the state_dict() of the private optimizer of an earlier process, loaded at once. The noise is then not
        calibrated for `epochs` passes more, but stays as it was for those that are left.

        Raises: ConfigError, UnsupportedModelError, UnsupportedLoaderError, BudgetExceededError, LedgerError;
        PrivacyError (one of several processes of torch.distributed).
        """
        refuse_several_processes()
        notice_memory(self._open(), "Privacy(ledger=FILE)")
        engine = PrivacyEngine(self, holder="data", ledger=self._open(), passes=self.epochs)
        return engine.wrap(model, optimizer, loader, resume=resume)

    def spent(self) -> Spent:
        """Return what the data has spent so far, in all runs that its ledger knows."""
        return spent_by_records(self._open(), self.delta, self.records_per_person)

    def execution_plan(
        self, records: int, batch_size: int, steps: int, passes: int, remaining: RemainingBudget
    ) -> ExecutionPlan:
        """Return how a PrivacyEngine draws batches and makes noise, so that `passes` passes fit into `remaining`.

        records: the dataset's. batch_size: the loader's, expected on average. steps: of a pass.
        Raises: ConfigError, BudgetExceededError.
        """
        rate = Fraction(batch_size, records)
        noise = remaining.noise_multiplier(float(rate), steps * passes, slack=CALIBRATION_SLACK)
        return poisson_plan(records, batch_size, steps, noise)

    def resumed_plan(self, records: int, batch_size: int, steps: int, event: Event) -> ExecutionPlan | None:
        """Return the same for passes that cost `event` each, as an earlier process planned; None if they are others."""
        plan = poisson_plan(records, batch_size, steps, event.noise_multiplier)
        return plan if plan.event == event else None

    def _open(self) -> Ledger:
        return as_ledger(self.ledger)  # itself, since __post_init__


class PrivacyEngine:
    """One data owner's private training across many calls of the training loop.

    Args:
        privacy: the promise. holder: a name for whose data it is. ledger: what that data has spent before.
        passes: passes over the data that are still to come, in all; the noise is calibrated for them at the
            first `wrap`, on top of what the ledger holds, or is that of an earlier process's plan for which as many are
            left (:mod:`choral.privacy.ledgers.plans`). What one `wrap` returned may make `privacy.epochs` of them.
        clip: where an adaptive clipping norm, of a run that is resumed, had come to.
    """

    def __init__(
        self, privacy: Privacy, *, holder: str, ledger: Ledger, passes: int, clip: float | None = None
    ) -> None:
        for name, value, kind in (("privacy", privacy, Privacy), ("holder", holder, str), ("ledger", ledger, Ledger)):
            if not isinstance(value, kind):
                raise ConfigError(f"{name} is a {type(value).__name__}, expected a {kind.__name__}")
        passes = as_integer("passes", passes)
        refuse_shares(privacy.noise)
        ledger.bind(holder, privacy.delta, neighbours=privacy.neighbours)
        self.privacy, self.holder, self.ledger, self.passes = privacy, holder, ledger, passes
        self._plan: ExecutionPlan | None = None
        self._announced: ReleasePlan | None = None  # to be written in front of the next pass
        self._short: int | None = None  # passes left of an earlier plan, where more are asked for
        self._clipping = Clipping(privacy.max_grad_norm)
        if clip is not None and self.adaptive:
            check_clip(clip)
            self._clipping.norm = clip
        self._steps = 0  # of a pass
        self._known = 0  # events of the ledger that the plan reckons with
        self._passed = 0
        self._latest: PrivateOptimizer | None = None  # whose pass was the latest

    @property
    def adaptive(self) -> bool:
        """Whether the clipping norm moves."""
        return isinstance(self.privacy.max_grad_norm, AdaptiveClip)

    @property
    def clip(self) -> float:
        """The clipping norm of the next step, of all layers together; noisy itself, and so no secret."""
        return self._clipping.norm

    @property
    def noise_multiplier(self) -> float | None:
        """The calibrated noise multiplier; None before the first `wrap`."""
        return self._plan.noise_multiplier if self._plan else None

    def wrap(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loader: DataLoader[Any],
        *,
        resume: Mapping[str, Any] | None = None,
    ) -> tuple[PerSampleModel, PrivateOptimizer, PrivateLoader]:
        """Return private versions of the three for one call of the training loop; see :meth:`Privacy.wrap`.

        May be called once per round with the same model, whose wrapper is used again.
        """
        from choral.privacy.per_sample.model import (
            with_per_sample_gradients,  # loads Opacus, which a promise alone does not need
        )

        if resume is not None and not isinstance(resume, Mapping):
            raise ConfigError(f"resume is a {type(resume).__name__}, expected the state_dict() of a private optimizer")
        plan = self._planned(loader, resume)
        private_model = with_per_sample_gradients(model)
        refuse_optimizer(optimizer, private_model._module)
        private_optimizer = PrivateOptimizer(
            optimizer,
            private_model,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=self._clipping,
            expected_batch_size=plan.batch_size,
            source=os_stream,
            noise=plan.noise,
        )
        private_loader = self._private_loader(loader, plan, private_optimizer)
        private_optimizer.planner = self
        if resume is not None:
            try:
                private_optimizer.load_state_dict(dict(resume))
            except Exception:
                self._plan = self._announced = None  # its noise was the checkpoint's, and is not accounted for
                raise
        return private_model, private_optimizer, private_loader

    def _private_loader(
        self, loader: DataLoader[Any], plan: ExecutionPlan, optimizer: PrivateOptimizer
    ) -> PrivateLoader:
        """Return a loader whose passes are paid for before their first batch, and whose batches `optimizer` expects."""
        made = 0

        def before_pass() -> None:
            nonlocal made
            refuse_other_sizes(plan, self.holder, len(loader.dataset), plan.batch_size)  # type: ignore[arg-type]
            if self._latest is not None:
                self._latest.refuse_owing()
            optimizer.begin_pass()
            if made >= self.privacy.epochs:
                raise self._too_many(f"{self.privacy.epochs} passes over the data by one call of the training loop")
            self._charge()
            optimizer.plan(plan.noise_multiplier if self._plan is None else self._plan.noise_multiplier)
            made += 1
            self._latest = optimizer

        return PrivateLoader(
            loader,
            plan.sampler(),
            before_pass=before_pass,
            before_batch=lambda drawn, first, last: optimizer.expect(drawn, first=first, last=last),
            empty_batch=optimizer.step_empty,
            after_pass=optimizer.end_pass,
            before_place=plan.before_place,
            max_physical_batch_size=self.privacy.max_physical_batch_size,
        )

    def saved(self, clip: float) -> dict[str, float | int | str]:
        """Return what a checkpoint must know of the plan; see :meth:`PrivateOptimizer.state_dict`."""
        plan = self._plan
        if plan is None:
            raise PrivacyError("nothing is planned yet")
        return msgspec.to_builtins(  # type: ignore[no-any-return]
            Checkpoint(
                max_grad_norm=clip,
                noise_multiplier=plan.noise_multiplier,
                sample_rate=_rate(plan),
                steps=self._steps,
                passes_left=self.passes - self._passed,
                events=self._known,
                head=self.ledger.head_after(self._known),
            )
        )

    def resumed(self, entry: Any) -> tuple[float, float]:
        """Plan the passes that a checkpoint left, with its noise; see :meth:`PrivateOptimizer.load_state_dict`."""
        found, plan = checkpoint_of(entry), self._plan
        left = passes_left(found, self.ledger)
        if plan is None or (found.sample_rate, found.steps) != (_rate(plan), self._steps):
            raise PrivacyError(
                f"the checkpoint is of {found.steps} steps at sample rate {found.sample_rate:.6g}, not of this loader",
                hint="Wrap the same dataset in the same batches.",
            )
        clip = found.max_grad_norm if self.adaptive else self._clipping.norm
        # Correlated noise ended with its process, and wrap() has planned anew; a try of a search has its own plan;
        # within a process the plan goes on.
        if self._passed or not isinstance(plan, PoissonPlan) or type(self.privacy) is not Privacy:
            return clip, plan.noise_multiplier
        resumed = poisson_plan(plan.records, plan.batch_size, self._steps, found.noise_multiplier)
        remaining = self._remaining()
        self._announced, self._short = affordable(resumed.event, left, remaining), None
        self._plan = resumed
        self.passes, self._known = left, len(remaining.state.before)
        return clip, resumed.noise_multiplier

    def spent(self) -> Spent:
        """Return what this data owner's records have spent so far, earlier runs included."""
        return spent_by_records(self.ledger, self.privacy.delta, self.privacy.records_per_person)

    @staticmethod
    def unwrap(model: nn.Module) -> nn.Module:
        """Return the plain module inside a wrapped one, all hooks removed."""
        from choral.privacy.per_sample.model import unwrap

        return unwrap(model)

    def sizes(self, loader: DataLoader[Any]) -> tuple[int, int]:
        """Return how many records the loader has, and how many a batch takes on average.

        Both are public, and what the noise is calibrated for. Raises: UnsupportedLoaderError (a batch of more records
        than there are, and others: see :func:`choral.privacy.dpsgd.poisson_loader.sizes_of`).
        """
        return sizes_of(loader, self.holder)

    def _planned(self, loader: DataLoader[Any], resume: Mapping[str, Any] | None) -> ExecutionPlan:
        records, batch_size = self.sizes(loader)
        if self._plan is not None:
            refuse_other_sizes(self._plan, self.holder, records, batch_size)
            return self._plan
        record_level.refuse_large_delta(self.privacy.delta, records, self.holder)
        steps = records // batch_size if loader.drop_last else math.ceil(records / batch_size)
        remaining, entry = self._remaining(), None if resume is None else resume.get("privacy")
        self._steps, self._known = steps, len(remaining.state.before)
        if entry is not None and type(self.privacy) is Privacy:  # checked and accounted for in `resumed`
            self._plan = poisson_plan(records, batch_size, steps, checkpoint_of(entry).noise_multiplier)
            return self._plan
        self._plan = self._gone_on(records, batch_size, remaining, or_less=entry is not None)
        if self._plan is None:
            self._plan = self.privacy.execution_plan(records, batch_size, steps, self.passes, remaining)
            self._announced = remaining.plan(self._plan.event, self.passes)
        return self._plan

    def _gone_on(
        self, records: int, batch_size: int, remaining: RemainingBudget, *, or_less: bool
    ) -> ExecutionPlan | None:
        """Return how to go on with the latest plan on the ledger, None where no passes are left of it.

        Where there are fewer than are asked for, and no other plan fits in: nothing trains until a checkpoint says how
        many are left. or_less: take those that there are.
        """
        for part, left in remaining.unfinished():
            plan = self.privacy.resumed_plan(records, batch_size, self._steps, part.event)
            if plan is None:
                continue
            if left < self.passes:
                try:
                    self.privacy.execution_plan(records, batch_size, self._steps, self.passes, remaining)
                    continue
                except BudgetExceededError:
                    self._short = None if or_less else left
                    self.passes = left if or_less else self.passes
            return plan
        return None

    def _remaining(self) -> RemainingBudget:
        return RemainingBudget.on(self.ledger, self.privacy.epsilon, self.privacy.delta)

    def _charge(self) -> None:
        """Pay for one pass, on disk, before its first batch is drawn."""
        if self._short is not None:
            raise BudgetExceededError(
                f"{self.holder}: {self.passes} passes are asked for, but {self._short} are left of the plan that an "
                "earlier process made, and the budget has no room for another",
                hint=f"Set epochs={self._short}, or give wrap the checkpoint: resume=state.",
            )
        if self._plan is None or self._passed >= self.passes:
            raise self._too_many(f"{self.passes} passes over the data")
        self.ledger.append(self._plan.begin_pass(), after=self._known, plan=self._announced)
        self._announced = None
        self._known += 1
        self._passed += 1

    def _too_many(self, planned: str) -> BudgetExceededError:
        return BudgetExceededError(
            f"{self.holder}: the budget was planned for {planned}, and all are used",
            hint=f"Set {worded(command='training.local_epochs', python='Privacy(epochs=...)')} to the passes that one"
            " call of the training loop makes.",
        )


def _rate(plan: ExecutionPlan) -> float:
    return plan.batch_size / plan.records
