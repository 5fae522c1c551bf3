"""How batches are drawn and noise is made, fixed before a training begins: what the noise was calibrated for."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from torch import distributed
from torch.utils.data import Sampler

from choral.privacy.accounting.events import PoissonSampledGaussian, RecordEvent
from choral.privacy.dpsgd.poisson_loader import PoissonSampler
from choral.privacy.dpsgd.private_optimizer import Noise
from choral.privacy.errors import PrivacyError, UnsupportedLoaderError
from choral.privacy.noise.gaussian import os_stream

CALIBRATION_SLACK = 1e-3  # the share of a budget that calibration may leave unused


class ExecutionPlan(Protocol):
    """One data owner's batches and noise over all passes, for one number of records and one batch size."""

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

    @property
    def event(self) -> RecordEvent:
        """What the first pass costs."""
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
class PoissonPlan:
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


def poisson_plan(records: int, batch_size: int, steps: int, noise_multiplier: float) -> PoissonPlan:
    """Return the plan of passes of so many steps, with Poisson batches and independent noise."""
    rate = Fraction(batch_size, records)
    event = PoissonSampledGaussian(sample_rate=float(rate), noise_multiplier=noise_multiplier, steps=steps)
    return PoissonPlan(records=records, batch_size=batch_size, rate=rate, event=event)


def refuse_other_sizes(plan: ExecutionPlan, holder: str, records: int, batch_size: int) -> None:
    """Raise UnsupportedLoaderError if a loader of the data owner `holder` has other sizes than the plan."""
    if (records, batch_size) != (plan.records, plan.batch_size):
        raise UnsupportedLoaderError(
            f"{holder}: {records} records in batches of {batch_size}, but the noise was calibrated for "
            f"{plan.records} in batches of {plan.batch_size}",
            hint="Keep one dataset, of one size, and one batch size per PrivacyEngine. Other records are another "
            "training: wrap again, on the same ledger.",
        )


def refuse_several_processes() -> None:
    """Raise PrivacyError in a process group of more than one: each would sample, and spend, one dataset on its own.

    Gradients averaged over processes would have another sample rate, noise and sensitivity than were accounted for. A
    PrivacyEngine of its own data is not refused: the parties of a federated run may be processes.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise PrivacyError(
            f"torch.distributed runs {distributed.get_world_size()} processes; several processes on one dataset are "
            "not accounted for",
            hint="Train in one process, or make each process a party of federate(), with data of its own.",
        )
