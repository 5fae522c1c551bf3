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
from functools import cached_property
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.privacy.accounting import record_level
from choral.privacy.accounting.banded_shares import BandedShares
from choral.privacy.accounting.events import (
    NEIGHBOURS,
    PoissonSampledGaussian,
    PoissonSampledShares,
    RecordEvent,
    ShareEvent,
    stated,
)
from choral.privacy.accounting.matrix_strategies import Banded
from choral.privacy.accounting.plain_numbers import as_float
from choral.privacy.accounting.record_noise import noise_multiplier
from choral.privacy.dpsgd.clip_settings import check_clip, norm_of_all
from choral.privacy.dpsgd.where_noise import check_colluders
from choral.privacy.errors import AccountingError
from choral.privacy.noise.record_noise_shares import Int64Array, ShareGrid, share_grid
from choral.privacy.record_shares.terms import CAP_FAILURE, SharesTerms, separation_of

if TYPE_CHECKING:
    from choral.privacy.dpsgd.engine import Privacy
    from choral.privacy.ledgers.plans import RemainingBudget

REALISED = (
    "if who drops out does not depend on what was opened before; no promise, and not to be spent again except under a "
    "Renyi filter"
)
ALSO_ADD_OR_REMOVE = (
    "add or remove one record as well: sampling rate, batch size, steps, clipping norm and noise are constants of the "
    "job, not computed from the number of records"
)
MOST_BANDS = 32  # where nothing is said, as for one data owner
MOST_STEPS = 1 << 20  # of banded noise, whose bound is computed from a number for each step
_SLACK = 1e-3  # the share of epsilon that calibration may leave unused


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
        return self.grid.bound(self.share, self.rows)

    @property
    def rows(self) -> int:
        """The most records that a party uses in one step; a step is padded to as many rows."""
        return self.terms.rows

    @property
    def failure(self) -> float:
        """What one step adds to delta."""
        return self.terms.failure + CAP_FAILURE

    @property
    def bits(self) -> int:
        """Bits of a modulus that the sum of all parties cannot wrap."""
        return (2 * self.terms.parties * self.bound).bit_length()

    @cached_property
    def event(self) -> ShareEvent:
        """One step, for a party's ledger; in the worst case."""
        return self._event(self.honest)

    def _event(self, honest: int) -> ShareEvent:
        return PoissonSampledShares(
            sample_rate=float(self.terms.rate),
            share=self.share,
            honest=honest,
            parties=self.terms.parties,
            deviation=self.grid.deviation(self.share),
            length=self.terms.length,
            stretch=self.grid.stretch(self.terms.length, self.rows),
            failure=self.failure,
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
        return record_level.epsilon(self._of_sums(sorted(survivors)), delta, neighbours=neighbours)

    def _of_sums(self, survivors: Sequence[int]) -> list[RecordEvent]:
        """What sums over so many parties, the fewest first, are priced as."""
        counted = [(count, len(list(alike))) for count, alike in groupby(survivors)]
        return [msgspec.structs.replace(self._event(n - self.colluders), steps=steps) for n, steps in counted]

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


@dataclass(frozen=True, kw_only=True)
class BandedPlan(SharesPlan):
    """The same with fixed batches, and noise that a banded matrix C correlates over steps.

    coefficients: the column of C, Toeplitz: 1, and numbers that do not grow. noise_multiplier: of z, over the clipping
    norm; a step's own noise is C^-1 z. Each record takes part once in every `separation` steps of its party, and C has
    at most as many bands.

    Guarantee: a record that takes part k times pays for one Gaussian mechanism of multiplier share sqrt(h) / (|c|
    sqrt(k) (1 + eta)), h the fewest honest parties of any sum, whoever drops out of which and begins anew after it.
    *Proof* in short (docs/noise-in-shares.md has it all). The noise of the sums has the covariance M = sum of P_i K_i
    P_i over honest parties i, K_i = (C_i^T C_i)^-1 of the rows that i made, P_i those of them that were opened; C_i is
    made of blocks of C. Split a record's x into y_i = x_t / |S_t| over the rows t that i is in, S_t the parties of row
    t. Then x^T M^-1 x <= sum of y_i^T (P_i K_i P_i)^+ y_i <= sum of y_i^T C_i^T C_i y_i, which is at most |c|^2 times
    the sum of x_t^2 / |S_t|, since rows of the record are as far apart as C has bands, by numbers that all parties of a
    sum share. Row by row, given those before, that bounds a sum of squared distances along every path, so that parties
    may drop out, and begin anew, by what was opened. []
    """

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", Banded(self.coefficients).coefficients)
        _refuse_many(self.terms.steps)
        if any(later > earlier for earlier, later in pairwise(self.coefficients)):
            raise ConfigError(f"coefficients are {self.coefficients}, expected numbers that do not grow")
        super().__post_init__()

    @property
    def separation(self) -> int:
        """m: a record takes part in one of so many steps in a row."""
        return separation_of(self.terms)

    @property
    def rows(self) -> int:
        return math.ceil(self.terms.most_records / self.separation)

    @property
    def failure(self) -> float:
        return self.terms.failure

    @cached_property
    def grid(self) -> ShareGrid:
        """Finer by the sum of the coefficients, which bounds the norm of C: by so much less do shares hide rounding."""
        return share_grid(self.share / sum(self.coefficients), self.terms.length)

    @property
    def bound(self) -> int:
        gain = float(np.abs(Banded(self.coefficients).inverse(self.terms.steps)).sum())  # of the largest z in w
        return self.grid.bound(self.share * gain, self.rows)

    def _event(self, honest: int) -> BandedShares:
        return BandedShares(
            coefficients=self.coefficients,
            separation=self.separation,
            share=self.share,
            honest=honest,
            parties=self.terms.parties,
            deviation=self.grid.deviation(self.share / sum(self.coefficients)),
            length=self.terms.length,
            stretch=self.grid.stretch(self.terms.length, self.rows),
            failure=self.failure,
            number=1,
            steps=1,
        )

    def neighbours(self, promised: str = NEIGHBOURS) -> str:
        """Return the neighbour relation that holds, in words: a record added would move others to other batches."""
        return stated(promised)

    def _of_sums(self, survivors: Sequence[int]) -> list[RecordEvent]:
        """Of the record that took part in the sums of the fewest, whichever they were."""
        counted = survivors[: math.ceil(len(survivors) / self.separation)]
        noise = [self._event(count - self.colluders).noise_multiplier for count in counted]
        return [PoissonSampledGaussian(sample_rate=1.0, noise_multiplier=each, steps=1) for each in noise]


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
    coefficients = _coefficients(privacy, terms)
    failures = terms.steps * (terms.failure + (0.0 if coefficients else CAP_FAILURE))
    if failures > privacy.delta / 2.0:
        raise ConfigError(
            f"{terms.steps} secure sums may fail with probability {failures:.3g} in all, expected at most half of "
            f"delta, {privacy.delta / 2:.3g}",
            hint="Take fewer steps, or a secure sum of a smaller statistical failure.",
        )
    rate, times, norm = float(terms.rate), terms.steps, 1.0
    if coefficients:  # each record takes part in so many steps, and moves C x by |c| in each
        rate, times, norm = 1.0, math.ceil(terms.steps / separation_of(terms)), math.hypot(*coefficients)
    fresh = noise_multiplier(
        privacy.epsilon,
        privacy.delta - failures,
        rate,
        times,
        beside,
        slack=_SLACK,
        neighbours=privacy.neighbours,
        fixed=True,
    )
    begun = {ledger.state: ledger for ledger in ledgers if not ledger.empty}
    multiplier = max([fresh, *(left.noise_multiplier(rate, times) for left in begun.values())])
    given: dict[str, Any] = {
        "terms": terms,
        "clip": norm_of_all(privacy.max_grad_norm),
        "colluders": privacy.colluders,
        **({"coefficients": coefficients} if coefficients else {}),
    }
    kind = BandedPlan if coefficients else SharesPlan
    ideal = kind(noise_multiplier=multiplier * norm, **given)
    plan = kind(noise_multiplier=multiplier * norm * (1.0 + ideal.event.stretch) * (1.0 + 1e-12), **given)
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


def bands_of(privacy: Privacy) -> int | None:
    """How many bands the correlated noise of a promise has, 0 if it leaves that open; None for independent noise."""
    from choral.privacy.correlated.training_loop import CorrelatedPrivacy  # which loads torch

    return (privacy.bands or 0) if isinstance(privacy, CorrelatedPrivacy) else None


def _refuse_many(steps: int) -> None:
    if steps > MOST_STEPS:
        raise ConfigError(f"steps is {steps}, expected at most {MOST_STEPS} with banded noise", hint="Larger batches.")


def _coefficients(privacy: Privacy, terms: SharesTerms) -> tuple[float, ...]:
    """The column of C that is best for the terms, to four decimals, alike on every machine; () for independent noise.

    Raises: ConfigError (every record in every step; more bands than the steps of a pass).
    """
    if (bands := bands_of(privacy)) is None:
        return ()
    _refuse_many(terms.steps)
    separation = separation_of(terms)
    if separation == 1:
        raise ConfigError(
            "correlated noise in shares, and every record takes part in every step",
            hint='FedSGD with batches of half the records or fewer; or Privacy(noise="distributed").',
        )
    from choral.privacy.correlated.factorisation import banded

    best = banded(separation, math.ceil(terms.steps / separation), bands or min(separation, MOST_BANDS))
    return tuple(round(value, 4) for value in best.coefficients)
