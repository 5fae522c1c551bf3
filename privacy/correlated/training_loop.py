"""Training privately without sampling: fixed batches in a fixed order, and noise correlated over steps.

DP-SGD owes much of its guarantee to nobody knowing who was sampled. Where batches cannot be drawn afresh, or are
known to the adversary, its noise must be so large that little is learned. Noise that is correlated over steps (DP-FTRL;
the matrix mechanism) makes up for much of that: the noise of later steps takes back noise of earlier ones, so that the
model, which is a sum over steps, keeps a fraction of it. See :mod:`choral.privacy.accounting.matrix_strategies` for the
mechanism.

Batches: each record takes one of the places of a pass, once, uniformly and independently of the others; the places
of a batch lie side by side, and every pass visits the batches in the same order. So a batch has the loader's batch
size on average (the last short one its share), and whether one record is there changes no other record's batch. That
is why a batch tells nothing of who else is in the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from choral.errors import ConfigError
from choral.privacy.accounting.events import CorrelatedGaussian, Event
from choral.privacy.accounting.matrix_strategies import Banded, Buffered, Strategy, Tree, sensitivity
from choral.privacy.correlated.factorisation import banded, buffered
from choral.privacy.correlated.noise_streams import Stream, stream
from choral.privacy.dpsgd.clip_settings import AdaptiveClip, norm_of_all
from choral.privacy.dpsgd.engine import Privacy
from choral.privacy.dpsgd.execution_plan import CALIBRATION_SLACK, ExecutionPlan
from choral.privacy.errors import BudgetExceededError, PrivacyError
from choral.privacy.ledgers.plans import RemainingBudget
from choral.privacy.noise.gaussian import Source, os_stream

Mechanism = Literal["buffered", "banded", "tree"]
MECHANISMS: tuple[Mechanism, ...] = ("buffered", "banded", "tree")
_KINDS = {"buffered": Buffered | Banded, "banded": Banded, "tree": Tree}


_UNPROVED = "not proved, of a record that takes part several times where a party may drop out in between"


@dataclass(frozen=True, kw_only=True)
class CorrelatedPrivacy(Privacy):
    """A promise: training is (epsilon, delta)-differentially private, without sampling.

    Guarantee: all steps of all passes together are (epsilon, delta)-DP, whoever knows the batches.
    Unit: the record. Neighbour relation: zero out one record, whose gradients are then zero; or replace one record,
    which moves each sum twice as far and so takes twice the noise. How many there are is public, as in
    :class:`Privacy`.
    Adversary: sees every model after every step and knows who is in which batch; does not see the noise, nor losses
    and metrics that the loop prints.
    Mechanism: the matrix mechanism with adaptive inputs (Denisov et al. 2022, theorem 2.1) over fixed batches in a
    fixed order, each record at most once a pass; one Gaussian mechanism, accounted for exactly.

    Used like :class:`Privacy`, with the same arguments and `wrap`, `spent`, `ledger`; federate() takes it too. And:

    Args:
        mechanism: "buffered" (the best for its memory: two float64 for each parameter), "banded" (32 bits for each
            band but one and parameter) or "tree" (32 bits for each level and parameter).
        bands: of "banded" alone: 1 (independent noise) to the steps of a pass; None takes at most 32.
        noise: "distributed" with "banded" alone, for the parties of FedSGD (:mod:`choral.privacy.record_shares`).

    A pass that the loop breaks off, or a process that starts again, ends the correlation: what follows has new noise,
    independent of the old; it takes the place of passes that were planned, and costs no more than they would have. The
    noise is kept in memory alone.
    """

    mechanism: Mechanism = "buffered"
    bands: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.max_grad_norm, AdaptiveClip):
            raise ConfigError(
                "AdaptiveClip moves the clipping norm C, but correlated noise takes back noise of earlier steps",
                hint="Give a number or PerLayerClip, or take Privacy.",
            )
        if not isinstance(self.mechanism, str) or self.mechanism not in MECHANISMS:
            raise ConfigError(f"mechanism is {self.mechanism!r}, expected one of {', '.join(MECHANISMS)}")
        if self.noise != "local" and self.mechanism != "banded":
            raise ConfigError(
                f'{self.mechanism} correlated noise with noise="distributed": {_UNPROVED}',
                hint='Take mechanism="banded", of which it is; or Privacy(noise="distributed"), of independent noise.',
            )
        if self.bands is None:
            return
        if self.mechanism != "banded":
            raise ConfigError(f"bands is given, but the mechanism is {self.mechanism!r}", hint="mechanism='banded'")
        if isinstance(self.bands, bool) or not isinstance(self.bands, int) or self.bands < 1:
            raise ConfigError(f"bands is {self.bands}, expected an integer >= 1", hint="16 is a start.")

    def strategy(self, steps: int, passes: int) -> Strategy:
        """Return the best strategy of this mechanism for `passes` passes of `steps`.

        Raises: ConfigError (more bands than steps in a pass).
        """
        if self.mechanism == "tree":
            return Tree()
        if self.mechanism == "banded":
            return banded(steps, passes, min(steps, 32) if self.bands is None else self.bands)
        return buffered(steps, passes)

    def execution_plan(
        self, records: int, batch_size: int, steps: int, passes: int, remaining: RemainingBudget
    ) -> ExecutionPlan:
        """See :meth:`Privacy.execution_plan`."""
        strategy = self.strategy(steps, passes)
        noise = remaining.noise_multiplier(1.0, 1, slack=CALIBRATION_SLACK) * sensitivity(strategy, steps, passes)
        return self._fixed_order(strategy, noise, records, batch_size, steps)

    def resumed_plan(self, records: int, batch_size: int, steps: int, event: Event) -> ExecutionPlan | None:
        """See :meth:`Privacy.resumed_plan`. The noise is new, of the same strategy and deviation."""
        if not isinstance(event, CorrelatedGaussian) or event.steps != steps:
            return None
        if not isinstance(event.strategy, _KINDS[self.mechanism]):
            return None
        return self._fixed_order(event.strategy, event.noise, records, batch_size, steps)

    def _fixed_order(
        self, strategy: Strategy, noise: float, records: int, batch_size: int, steps: int
    ) -> FixedOrderPlan:
        return FixedOrderPlan(
            strategy,
            noise=noise,
            max_grad_norm=norm_of_all(self.max_grad_norm),
            records=records,
            batch_size=batch_size,
            steps=steps,
            source=os_stream,
        )


class FixedOrderPlan:
    """The batches and the noise of one data owner, over all its passes: a :class:`ExecutionPlan`.

    Args:
        strategy: C. noise: standard deviation of z over `max_grad_norm`. records, batch_size: of the loader.
        steps: of a pass. source: of the randomness for batches and noise.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        noise: float,
        max_grad_norm: float,
        records: int,
        batch_size: int,
        steps: int,
        source: Source,
    ) -> None:
        self.strategy, self.records, self.batch_size, self.steps = strategy, records, batch_size, steps
        self.noise_multiplier = noise
        self._clip, self._source = max_grad_norm, source
        self._batches = deal(records, batch_size, steps, source)
        self._stream: Stream = stream(strategy)
        self._number = 0  # passes begun under this stream
        self._row = steps  # rows of the present pass that were released

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise PrivacyError(
            "the noise of earlier steps is secret, and may be neither copied nor written to a file",
            hint="Save model.state_dict() and optimizer.state_dict(); after a restart, wrap again on the same ledger.",
        )

    def begin_pass(self) -> CorrelatedGaussian:
        """Return the event of the next pass: of the same stream if the pass before was finished, else of a new one."""
        if self._row != self.steps or isinstance(self.strategy, Tree):
            self._stream, self._number = stream(self.strategy), 0
        self._number, self._row = self._number + 1, 0
        return msgspec.structs.replace(self.event, number=self._number)

    @property
    def event(self) -> CorrelatedGaussian:
        """The first pass of a stream."""
        return CorrelatedGaussian(strategy=self.strategy, noise=self.noise_multiplier, steps=self.steps, number=1)

    def sampler(self) -> Sampler[list[int]]:
        """Return what goes through the batches, the same at every pass."""
        return FixedSampler(self._batches)

    def before_place(self, place: int) -> None:
        """Refuse a batch in another row than its own, as when two passes are drawn from by turns."""
        if place != self._row:
            raise PrivacyError(
                f"batch {place} of a pass is next, but step {self._row} of a pass is: each batch has its own step",
                hint="Finish a pass over the loader before the next one; do not go through it twice at once.",
            )

    def noise(self, count: int, grid: float) -> npt.NDArray[np.float64]:
        """Return the noise of the next step, multiples of `grid`, shape (count,), float64.

        The standard deviation of z pays for rounding values to the grid as in :func:`noise.grid_gaussian`.
        """
        if self._row >= self.steps:
            raise BudgetExceededError("a step beyond the pass that was paid for", hint="Draw from the wrapped loader.")
        scale = self.noise_multiplier * (self._clip / grid + math.sqrt(count))
        noise = self._stream.next(count, scale, self._source)
        self._row += 1
        noise *= grid
        return noise


class FixedSampler(Sampler[list[int]]):
    """The same batches of indices in the same order, each time."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def deal(records: int, batch_size: int, steps: int, source: Source) -> list[list[int]]:
    """Give each record one of as many places as there are records, uniformly and independently; return the batches.

    Batch j has places j * batch_size to (j + 1) * batch_size; records beyond batch `steps` are left out, which can
    only be with drop_last. Two records may have one place.
    """
    batch = _below(records, records, source) // batch_size
    order = np.argsort(batch, kind="stable")
    ends = np.searchsorted(batch[order], np.arange(steps + 1))
    return [order[first:last].tolist() for first, last in pairwise(ends.tolist())]


def _below(limit: int, count: int, source: Source) -> npt.NDArray[np.int64]:
    """Return `count` independent integers, each exactly uniform below `limit`, shape (count,)."""
    usable = 2**64 // limit * limit  # words from here on would favour some
    result = np.empty(0, np.uint64)
    while len(result) < count:
        words = np.frombuffer(source(8 * (count - len(result))), "<u8")
        if usable < 2**64:
            words = words[words < np.uint64(usable)]
        result = np.concatenate([result, words % np.uint64(limit)])
    return result.astype(np.int64)
