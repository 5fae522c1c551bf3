"""Trying settings on private data: the best of a random number of tries, paid for before the first.

Reporting the best of many private trainings is not free: the choice itself depends on the data. If the *number* of
tries is random, secret and independent of the data, and each try draws its setting at random, the best of them costs
only a little more than one (Liu and Talwar 2019; Papernot and Steinke 2022, whose theorems 2 and 6 are used here). The
plain alternative, all tries on one ledger, costs the sum of them, but every result may be looked at and kept.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Generic, Literal, TypeVar

from choral.errors import ConfigError
from choral.privacy.accounting import record_level
from choral.privacy.accounting.events import PoissonSampledGaussian, Search
from choral.privacy.accounting.plain_numbers import as_integer, is_number
from choral.privacy.dpsgd.engine import Privacy
from choral.privacy.dpsgd.execution_plan import ExecutionPlan, PoissonPlan
from choral.privacy.dpsgd.where_noise import refuse_shares
from choral.privacy.errors import BudgetExceededError, PrivacyError
from choral.privacy.ledgers.plans import RemainingBudget
from choral.privacy.ledgers.spent import Spent

C = TypeVar("C")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class SearchResult(Generic[C, R]):
    """The best try: its candidate, what `train` returned for it, and its score."""

    candidate: C
    result: R
    score: float
    spent: Spent


@dataclass(frozen=True, kw_only=True)
class _Try(Privacy):
    """The promise of one try: noise as the search was charged for, and one training, no more."""

    planned: PoissonPlan

    def execution_plan(
        self, records: int, batch_size: int, steps: int, passes: int, remaining: RemainingBudget
    ) -> ExecutionPlan:
        """See :meth:`Privacy.execution_plan`. Raises: PrivacyError unless the training is the one that was paid for."""
        plan = self.planned
        if (records, batch_size, steps, passes) != (plan.records, plan.batch_size, plan.event.steps, self.epochs):
            raise PrivacyError(
                f"a try has {records} records in batches of {batch_size}, the search was paid for {plan.records} in "
                f"batches of {plan.batch_size}",
                hint="All tries share dataset, batch size and epochs; candidates may differ in everything else.",
            )
        if not remaining.empty:
            raise BudgetExceededError("a try has trained already", hint="Call wrap once in each try.")
        return plan


def private_search(
    privacy: Privacy,
    candidates: Sequence[C],
    train: Callable[[C, Privacy], tuple[R, float]],
    *,
    records: int,
    batch_size: int,
    mean: float,
    distribution: Literal["negative_binomial", "poisson"] = "negative_binomial",
    shape: float = 1.0,
) -> SearchResult[C, R] | None:
    """Train a random number of times, each with a random candidate, and return the best try alone.

    privacy: the promise for the whole search, what its ledger holds included; `epochs` are those of one try.
    train: from a candidate and the promise of this try to a result and its score, the higher the better. It must
        train by `wrap` of that promise, once; score on data outside the promise; and let nothing else of a try be
        seen (logs, files, how many there were, how long it took).
    records, batch_size: of the loader in every try, which does not drop the last batch.
    mean, distribution, shape: of the number of tries, see :class:`Search`.

    Guarantee: what is returned is (epsilon, delta)-DP for `privacy`, by Renyi DP; the ledger is charged for all of it,
    and synced, before the first try. The number of tries has the distribution up to 2^-53. Returns None if the number
    drawn is zero (only Poisson, with probability e^-mean).
    Unit, neighbours: those of `privacy`.
    Raises: ConfigError, BudgetExceededError, LedgerError before anything is spent; PrivacyError (a score that is not
    finite, another training than the one paid for). An error in a try ends the search; its charge stands.
    """
    records, batch_size = _checked(privacy, candidates, train, records, batch_size)
    rate, steps = Fraction(batch_size, records), math.ceil(records / batch_size)

    def search(noise: float) -> Search:
        event = PoissonSampledGaussian(sample_rate=float(rate), noise_multiplier=noise, steps=steps * privacy.epochs)
        return Search(tries=(event,), mean=mean, distribution=distribution, shape=shape)

    ledger = privacy._open()
    ledger.bind(ledger.holder or "data", privacy.delta, neighbours=privacy.neighbours)
    remaining = RemainingBudget.on(ledger, privacy.epsilon, privacy.delta)
    event = search(remaining.search_noise(search))
    ledger.append(event, after=len(remaining.state.before), plan=remaining.plan(event, 1))
    one_pass = PoissonSampledGaussian(sample_rate=float(rate), noise_multiplier=event.noise_multiplier, steps=steps)
    plan = PoissonPlan(records=records, batch_size=batch_size, rate=rate, event=one_pass)
    tries = number_of_tries(event, secrets.randbits(53) / 2**53)
    best = _best_try(privacy, candidates, train, plan, tries)
    if best is None:
        return None
    return SearchResult(candidate=best[0], result=best[1], score=best[2], spent=privacy.spent())


def _checked(
    privacy: Privacy, candidates: Sequence[C], train: object, records: int, batch_size: int
) -> tuple[int, int]:
    """Return the loader's sizes as Python's own numbers. Raises: ConfigError for an argument that does not fit."""
    if type(privacy) is not Privacy:
        raise ConfigError(f"privacy is a {type(privacy).__name__}, expected a Privacy with sampled batches")
    refuse_shares(privacy.noise)
    if not isinstance(candidates, Sequence) or not candidates:
        raise ConfigError("there are no candidates, expected a list of at least one")
    if not callable(train):
        raise ConfigError(f"train is a {type(train).__name__}, expected a function of a candidate and its promise")
    records, batch_size = as_integer("records", records), as_integer("batch_size", batch_size)
    if batch_size > records:
        raise ConfigError(f"batch_size is {batch_size}, expected at most the {records} records")
    record_level.refuse_large_delta(privacy.delta, records)
    return records, batch_size


def _best_try(
    privacy: Privacy,
    candidates: Sequence[C],
    train: Callable[[C, Privacy], tuple[R, float]],
    plan: PoissonPlan,
    tries: int,
) -> tuple[C, R, float] | None:
    """Train so many times; return the candidate, result and score of the best try. Raises: PrivacyError."""
    best: tuple[C, R, float] | None = None
    for _ in range(tries):
        candidate = candidates[secrets.randbelow(len(candidates))]
        promise = _Try(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            max_grad_norm=privacy.max_grad_norm,
            epochs=privacy.epochs,
            max_physical_batch_size=privacy.max_physical_batch_size,
            neighbours=privacy.neighbours,
            planned=replace(plan),
        )
        tried = train(candidate, promise)
        if not isinstance(tried, tuple) or len(tried) != 2:
            raise PrivacyError(f"train returned a {type(tried).__name__}, expected a result and its score")
        result, score = tried
        if not is_number(score):
            raise PrivacyError("the score of a try is not finite", hint="Return the worst score instead.")
        if best is None or score > best[2]:
            best = (candidate, result, score)
    return best


def number_of_tries(search: Search, uniform: float) -> int:
    """Return the number of tries at this quantile, 0 <= uniform < 1, of the search's distribution."""
    k, mass = (0, math.exp(-search.mean)) if search.distribution == "poisson" else (1, _first(search))
    total = mass
    while uniform >= total and (mass > 1e-18 or k < search.mean):
        k += 1
        mass *= _ratio(search, k)
        total += mass
    return k


def _first(search: Search) -> float:
    """The probability of one try (Papernot and Steinke 2022, definition 1)."""
    gamma, shape = search.gamma, search.shape
    if gamma == 1.0:
        return 1.0
    if shape == 0.0:
        return (1.0 - gamma) / -math.log(gamma)
    return (1.0 - gamma) * shape / math.expm1(-shape * math.log(gamma))


def _ratio(search: Search, k: int) -> float:
    """The probability of k tries over that of k - 1."""
    if search.distribution == "poisson":
        return search.mean / k
    return (1.0 - search.gamma) * (k - 1 + search.shape) / k
