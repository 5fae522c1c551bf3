"""The plan of a training with noise in shares: what is public and fixed before the first step, and what it costs.

In each of T steps every record is drawn with probability q = B / N by its own party; a party sums its drawn records'
clipped gradients, adds noise of deviation s C, s = sigma / sqrt(h), rounds
(:mod:`choral.privacy.noise.record_noise_shares`) and gives the result to a secure sum, which alone is opened, divided
by B and used. h, the honest survivors, are the fewest parties of an opened sum less the colluders, who know their own
shares. So what is opened has, in the worst case, noise sigma C of which the adversary knows nothing: the cost is that
of DP-SGD with noise multiplier sigma on the pooled records (:mod:`choral.privacy.noise.share_rounding` has the
theorem), at a delta that is less by what may fail:

- 2^-40 a sum that is opened, the secure sum's statistical failure (`SharesTerms.failure`); that masks are as good as
  random is a computational assumption on top of it, and so the promise is a computational one;
- 2^-60 a step, that a party draws `rows` or more of its *other* records. Up to `rows` records are used in a step, so
  that sums have a bound and work may be the same in each step; what is drawn beyond is dropped, the highest places
  first. As long as fewer than `rows` others are drawn, the cap does not bind, whether one's own record is there or not.

**The promise is the worst case.** Where more survive there is more noise, and :meth:`SharesPlan.realised` computes what
that would cost. But who survives may be up to a server that looks at the sums opened before, and then noise is chosen
as one goes: a figure that is computed afterwards is no bound. It may be printed with its condition, :data:`REALISED`,
and spent by nobody.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.privacy.accounting import record_level
from choral.privacy.accounting.events import NEIGHBOURS, PoissonSampledShares, RecordEvent, stated
from choral.privacy.accounting.plain_numbers import as_float, as_integer
from choral.privacy.accounting.record_noise import noise_multiplier
from choral.privacy.dpsgd.clip_settings import check_clip, norm_of_all
from choral.privacy.dpsgd.where_noise import check_colluders
from choral.privacy.errors import AccountingError, PrivacyError
from choral.privacy.noise.record_noise_shares import MOST_ROWS, Int64Array, ShareGrid, share_grid

if TYPE_CHECKING:
    from choral.privacy.dpsgd.engine import Privacy
    from choral.privacy.ledgers.plans import RemainingBudget

SECURE_SUM_FAILURE = 2.0**-40  # of one opening
CAP_FAILURE = 2.0**-60  # of one step
REALISED = (
    "if who drops out does not depend on what was opened before; no promise, and not to be spent again except under a "
    "Renyi filter"
)
ALSO_ADD_OR_REMOVE = (
    "add or remove one record as well: sampling rate, batch size, steps, clipping norm and noise are constants of the "
    "job, not computed from the number of records"
)
_SLACK = 1e-3  # the share of epsilon that calibration may leave unused


@dataclass(frozen=True, kw_only=True)
class SharesTerms:
    """The public constants of a job. No server may choose one of them, and every party knows them all.

    Args:
        records: N. batch_size: B, the number of records that a step draws in the mean, and by which sums are divided.
        steps: T, sums that are opened at most; one that is tried again counts again.
        parties: the most in a sum. min_survivors: the fewest in a sum that is opened. length: of a gradient.
        most_records: the most that one party has.
        declared: that `records` and `most_records` are constants which somebody declared, and no counts of the data.
        failure: the secure sum's statistical failure in one opening, added to delta.
    Raises: ConfigError for a value out of range.
    """

    records: int
    batch_size: int
    steps: int
    parties: int
    min_survivors: int
    length: int
    most_records: int
    declared: bool = False
    failure: float = SECURE_SUM_FAILURE

    def __post_init__(self) -> None:
        for name in ("records", "batch_size", "steps", "parties", "min_survivors", "length", "most_records"):
            object.__setattr__(self, name, as_integer(name, getattr(self, name)))
        object.__setattr__(self, "failure", as_float("failure", self.failure))
        if not isinstance(self.declared, bool):
            raise ConfigError(f"declared is {self.declared!r}, expected True or False")
        if self.batch_size > self.records:
            raise ConfigError(f"batch_size is {self.batch_size}, expected at most the {self.records} records")
        if self.min_survivors > self.parties:
            raise ConfigError(f"min_survivors is {self.min_survivors} of {self.parties} parties, expected at most all")
        if not 0.0 <= self.failure <= 1e-6:
            raise ConfigError(f"failure is {self.failure}, expected 0 to 1e-6 for one sum")
        if self.rows > MOST_ROWS:
            raise ConfigError(
                f"a party may draw {self.rows} records in a step, expected at most {MOST_ROWS}",
                hint="Take smaller batches, or divide large parties.",
            )

    @property
    def rate(self) -> Fraction:
        """q, exactly."""
        return Fraction(self.batch_size, self.records)

    @cached_property
    def rows(self) -> int:
        """The most records that a party uses in one step: more are drawn with probability CAP_FAILURE at most."""
        return rows_of(self.most_records, self.rate)


def rows_of(records: int, rate: Fraction) -> int:
    """Return the least K, up to `records`, with P(Bin(records, rate) >= K) <= CAP_FAILURE; where all may come, all."""
    if rate == 1:
        return records
    from scipy import stats  # here, since it takes long to load

    low, high = 0, records
    while high - low > 1:
        middle = (low + high) // 2
        enough = float(stats.binom.sf(middle - 1, records, float(rate))) <= CAP_FAILURE
        low, high = (low, middle) if enough else (middle, high)
    return high


@dataclass(frozen=True, kw_only=True)
class SharesPlan:
    """What all parties of a job do, in every step. Made by :func:`plan_shares`, checked by each party.

    clip: C, the most that one record counts for. noise_multiplier: sigma, of the noise of the honest survivors over C.
    colluders: parties whose shares the adversary may know. Everything else follows.
    Raises: ConfigError for values that do not fit.
    """

    terms: SharesTerms
    clip: float
    colluders: int
    noise_multiplier: float

    def __post_init__(self) -> None:
        check_clip(self.clip)
        object.__setattr__(self, "noise_multiplier", as_float("noise_multiplier", self.noise_multiplier))
        check_colluders(self.colluders)
        if self.honest < 1:
            raise ConfigError(
                f"min_survivors is {self.terms.min_survivors} with {self.colluders} colluders, expected at least "
                f"{self.colluders + 1}",
                hint="Noise is sized for the honest survivors: with none there would be no noise.",
            )
        self.event  # noqa: B018 - its own checks: a grid too coarse, noise that is none
        if self.terms.parties * self.bound >= 2**62:
            raise ConfigError("a sum of these parties does not fit 63 bits", hint="Take smaller batches.")

    @property
    def honest(self) -> int:
        """h: shares of an opened sum that the adversary does not know, at least."""
        return self.terms.min_survivors - self.colluders

    @property
    def share(self) -> float:
        """s: the deviation of one party's noise over C."""
        return self.noise_multiplier / math.sqrt(self.honest)

    @cached_property
    def grid(self) -> ShareGrid:
        """What shares are rounded to."""
        return share_grid(self.share, self.terms.length)

    @property
    def bound(self) -> int:
        """The largest absolute value of a coordinate that a party sends, whatever its records."""
        return self.grid.bound(self.share, self.terms.rows)

    @property
    def bits(self) -> int:
        """Bits of a modulus that the sum of all parties cannot wrap."""
        return (2 * self.terms.parties * self.bound).bit_length()

    @cached_property
    def event(self) -> PoissonSampledShares:
        """One step, for a party's ledger; in the worst case."""
        return self._event(self.honest)

    def _event(self, honest: int) -> PoissonSampledShares:
        return PoissonSampledShares(
            sample_rate=float(self.terms.rate),
            share=self.share,
            honest=honest,
            parties=self.terms.parties,
            deviation=self.grid.deviation(self.share),
            length=self.terms.length,
            stretch=self.grid.stretch(self.terms.length, self.terms.rows),
            failure=self.terms.failure + CAP_FAILURE,
            steps=1,
        )

    def epsilon(self, delta: float, *, neighbours: str = NEIGHBOURS) -> float:
        """Return what all steps cost at `delta`, by PLD: the promise. Raises: ConfigError (delta)."""
        whole = msgspec.structs.replace(self.event, steps=self.terms.steps)
        return record_level.epsilon([whole], delta, neighbours=neighbours)

    def realised(self, survivors: Sequence[int], delta: float, *, neighbours: str = NEIGHBOURS) -> float:
        """Return what sums over so many `survivors` each would have cost: **true only on the condition** of REALISED.

        Where who survives may follow from what was opened, the true delta at this epsilon is larger: up to 1.5 times
        `delta` where the sums' information (sum of 1 / variance) ranges over 11 %, 3.5 times over a factor of two.
        Raises: ConfigError (fewer than min_survivors, or more than all parties).
        """
        terms = self.terms
        if not all(terms.min_survivors <= count <= terms.parties for count in survivors):
            raise ConfigError(f"a sum had other than {terms.min_survivors} to {terms.parties} survivors")
        counted = [(count, len(list(alike))) for count, alike in groupby(sorted(survivors))]
        events = [msgspec.structs.replace(self._event(n - self.colluders), steps=steps) for n, steps in counted]
        return record_level.epsilon(events, delta, neighbours=neighbours)

    def neighbours(self, promised: str = NEIGHBOURS) -> str:
        """Return the neighbour relations that hold, in words."""
        return f"{stated(promised)}; {ALSO_ADD_OR_REMOVE}" if self.terms.declared else stated(promised)

    def mean(self, total: Int64Array) -> npt.NDArray[np.float64]:
        """Return the opened sum over B, in gradients: what the server steps with. Shape (length,), float64.

        Raises: ConfigError for another shape or type.
        """
        if total.shape != (self.terms.length,) or total.dtype != np.int64:
            raise ConfigError(
                f"total has shape {total.shape} and type {total.dtype}, expected int64 and ({self.terms.length},)"
            )
        return np.asarray(total * (math.ldexp(self.clip, -self.grid.coarse) / self.terms.batch_size))


def plan_shares(
    privacy: Privacy,
    terms: SharesTerms,
    *,
    beside: Sequence[RecordEvent] = (),
    ledgers: Iterable[RemainingBudget] = (),
) -> SharesPlan:
    """Return the plan with the least noise that keeps the promise, where nothing was spent and on `ledgers`.

    beside: what else is released under the same promise, fixed together with the plan before any of it.
    ledgers: what parties' ledgers leave for it, where they are known; the noise is that of the one that leaves least.

    Guarantee: all opened sums together are (epsilon, delta)-DP for every record, against whoever sees them and knows
    what up to `privacy.colluders` parties know; computationally, as the secure sum is.
    Unit: the record. Neighbours: the promise's; where the terms are declared, add or remove one record as well.
    Raises: ConfigError (a promise of another kind of noise; delta), BudgetExceededError (no noise is enough).
    """
    refuse_other_promise(privacy)
    record_level.refuse_large_delta(privacy.delta, terms.records)
    failures = terms.steps * (terms.failure + CAP_FAILURE)
    if failures > privacy.delta / 2.0:
        raise ConfigError(
            f"{terms.steps} secure sums may fail with probability {failures:.3g} in all, expected at most half of "
            f"delta, {privacy.delta / 2:.3g}",
            hint="Take fewer steps, or a secure sum of a smaller statistical failure.",
        )
    fresh = noise_multiplier(
        privacy.epsilon,
        privacy.delta - failures,
        float(terms.rate),
        terms.steps,
        beside,
        slack=_SLACK,
        neighbours=privacy.neighbours,
        fixed=True,
    )
    begun = {ledger.state: ledger for ledger in ledgers if not ledger.empty}
    multiplier = max([fresh, *(left.noise_multiplier(float(terms.rate), terms.steps) for left in begun.values())])
    clip = norm_of_all(privacy.max_grad_norm)
    ideal = SharesPlan(terms=terms, clip=clip, colluders=privacy.colluders, noise_multiplier=multiplier)
    wider = multiplier * (1.0 + ideal.event.stretch) * (1.0 + 1e-12)
    plan = SharesPlan(terms=terms, clip=clip, colluders=privacy.colluders, noise_multiplier=wider)
    whole = [*beside, msgspec.structs.replace(plan.event, steps=terms.steps)]
    if not record_level.epsilon(whole, privacy.delta, neighbours=privacy.neighbours) <= privacy.epsilon:
        raise AccountingError("the plan costs more than it was calibrated for", hint="Please report these settings.")
    return plan


def refuse_other_promise(privacy: Privacy) -> None:
    """Raise ConfigError unless the promise is one of noise in shares."""
    if privacy.noise != "distributed":
        raise ConfigError(
            f'the promise is Privacy(noise="{privacy.noise}"), of noise that each party adds for itself',
            hint='Privacy(noise="distributed") lets parties add shares of the noise under a secure sum.',
        )


def refuse_broken_promise(privacy: Privacy, plan: SharesPlan) -> None:
    """Raise PrivacyError unless `plan`, wherever it came from, keeps this party's own promise; ConfigError for another
    kind of promise, or a delta of 1/n and more.

    The plan is computed again, not believed: the noise of one party is far too little for one, and so it matters to
    each how many others add theirs.
    """
    refuse_other_promise(privacy)
    record_level.refuse_large_delta(privacy.delta, plan.terms.records)
    hint = "The party's own settings decide; no server may weaken them."
    if plan.clip != norm_of_all(privacy.max_grad_norm):
        raise PrivacyError(
            f"the plan clips to {plan.clip:g}, and the promise to {norm_of_all(privacy.max_grad_norm):g}", hint=hint
        )
    if plan.colluders < privacy.colluders:
        raise PrivacyError(
            f"the plan withstands {plan.colluders} colluders, and {privacy.colluders} are promised", hint=hint
        )
    cost = plan.epsilon(privacy.delta, neighbours=privacy.neighbours)
    if not cost <= privacy.epsilon:
        raise PrivacyError(f"the plan costs epsilon {cost:.4g}, and {privacy.epsilon:g} is promised", hint=hint)


def refuse_weak_sum(plan: SharesPlan, *, parties: int, min_survivors: int, corrupt: int) -> None:
    """Raise PrivacyError unless a secure sum of these figures hides what the plan rests on: asked by each party.

    parties: in the sum. min_survivors: the fewest over which it may be opened. corrupt: parties that it withstands.
    """
    if parties > plan.terms.parties:
        raise PrivacyError(
            f"the sum is of {parties} parties, and the plan was made for {plan.terms.parties} at most",
            hint="The rounding, and the bound of a sum, were computed for those: plan again.",
        )
    needed = plan.honest + plan.colluders
    if min_survivors < needed:
        raise PrivacyError(
            f"the sum may be opened over {min_survivors} parties, and the noise is sized for {needed}: {plan.honest} "
            f"honest ones and {plan.colluders} colluders",
            hint=f"Set min_survivors={needed}, or plan for fewer survivors, with more noise. Nothing was sent.",
        )
    if corrupt < plan.colluders:
        raise PrivacyError(
            f"the sum withstands {corrupt} corrupt parties, and the noise {plan.colluders} colluders",
            hint=f"Set corrupt={plan.colluders}: parties that could open a single vector would see it nearly bare.",
        )
