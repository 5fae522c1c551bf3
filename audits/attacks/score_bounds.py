"""Lower bounds on epsilon from scores of canaries, each with the control that it could have failed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np

from choral.audits.findings.evidence import Bound, NullControl
from choral.audits.lower_bounds import one_run, trade_off, trials
from choral.audits.lower_bounds.guessing import Guessing, GuessingOutcome, LowerBound, shuffled, stream_of
from choral.audits.lower_bounds.refuting import Refutes, by_guesses, by_trials
from choral.audits.lower_bounds.roc import Bools, Floats, curve
from choral.audits.lower_bounds.trials import Counts, rate_interval
from choral.errors import DataError

ONE_RUN, FDP = "one run", "one run, Gaussian f-DP"
EXACT, GAUSSIAN, JOINT = "Clopper-Pearson", "Gaussian from two rates", "joint beta"
_NULL_LEVEL = 0.99
_NULL_STREAM = 1  # of random numbers, apart from that of the shuffles
_SHARED_COINS = (
    "Canaries that share a coin: the control flips one for each. Where several entered together, the bound is false far"
    " more often than it says (twenty to a coin: positive in about half of all audits of a model that leaks nothing)."
)
_SHARED_TRAININGS = (
    "Scores that share a training: the control takes each to be of its own. Where several are of one, they stand or"
    " fall together, and the bound is false more often than it says."
)
_COINS = "Each canary entered by its own fair coin, and nothing but training depends on the coins."
_TRIALS = "Each score is of a training of its own, independent of the others, with or without the same canary."
_FDP_REFERENCE = "Mahloujifar, Melis, Chaudhuri 2024, algorithm 3"
_ONE_RUN_REFERENCE = "Steinke, Nasr, Jagielski 2023, theorem 5.2"
_Bounded = tuple[tuple[Bound, ...], NullControl]


class TooFewCanariesError(DataError):
    """So few canaries could not refute the claim, whatever the scores: the audit would be a formality."""


def bounds_by_coins(
    values: Floats, inside: Bools, plan: Guessing, delta: float, beta: float, null_draws: int, claimed: float | None
) -> _Bounded:
    found = _one_run_bounds(values, inside, plan, delta, beta, claimed)
    null = null_control(lambda coins: _one_run(values, coins, plan, delta, beta).epsilon, values, beta, null_draws)
    return found, null


def bounds_by_runs(
    values: Floats,
    inside: Bools,
    threshold: float | None,
    delta: float,
    beta: float,
    null_draws: int,
    claimed: float | None,
) -> _Bounded:
    found = _two_sided_bounds(values, inside, threshold, delta, beta, claimed)
    null = null_control(
        lambda coins: trials.clopper_pearson(_counts(values, coins, threshold, delta), delta=delta, beta=beta),
        values, beta, null_draws, count=int(inside.sum()),
    )  # fmt: skip
    return found, null


def null_control(
    bound: Callable[[Bools], float], scores: Floats, beta: float, draws: int, *, count: int | None = None
) -> NullControl:
    """The whole procedure on memberships drawn afresh, which the scores cannot know: how often is the bound positive?

    count: of members, where it is fixed; None flips a coin for each.
    """
    rng = stream_of(scores, _NULL_STREAM)
    positives = 0
    for _ in range(draws):
        if count is None:
            inside = rng.random(len(scores)) < 0.5
        else:
            inside = rng.permutation(len(scores)) < count
        positives += bound(inside) > 0.0
    rate = rate_interval(positives, draws, _NULL_LEVEL)
    return NullControl(
        draws=draws,
        positives=positives,
        rate=rate,
        allowed=beta,
        holds=rate.low <= beta,
        blind_to=(_SHARED_COINS if count is None else _SHARED_TRAININGS,),
    )


def plain_bound(delta: float, canaries: int, guesses: int, right: int, beta: float) -> float:
    return one_run.lower_bound(canaries, guesses, right, delta=delta, beta=beta)


def _gaussian(delta: float, canaries: int, guesses: int, right: int, beta: float) -> float:
    return trade_off.lower_bound(canaries, guesses, right, delta=delta, beta=beta)


def _one_run(scores: Floats, members: Bools, plan: Guessing, delta: float, beta: float) -> GuessingOutcome:
    return plan.run(scores, members, partial(plain_bound, delta), beta)


def _one_run_bounds(
    scores: Floats, members: Bools, plan: Guessing, delta: float, beta: float, claimed: float | None
) -> tuple[Bound, ...]:
    def bound(
        method: str, compute: LowerBound, refutes: Refutes, assumptions: tuple[str, ...], reference: str
    ) -> Bound:
        made = plan.run(scores, members, compute, beta)
        return Bound(
            method=method,
            epsilon=made.epsilon,
            delta=delta,
            confidence=1.0 - beta,
            kind="confidence",
            ceiling=plan.ceiling(len(scores), compute, beta),
            counts={"canaries": made.canaries, "guesses": made.guesses, "right": made.right},
            thresholds=plan.words,
            tried=made.tried,
            assumptions=assumptions,
            reference=reference,
            refuting=None if claimed is None else by_guesses(plan.tests(len(scores), beta), refutes),
        )

    def passes(canaries: int, guesses: int, right: int, part: float) -> bool:
        return one_run.p_value(claimed or 0.0, canaries, guesses, right, delta) <= part

    found = [bound(ONE_RUN, partial(plain_bound, delta), passes, (_COINS,), _ONE_RUN_REFERENCE)]
    if delta > 0.0:
        mu = 0.0 if claimed is None else trade_off.mu_of_epsilon(claimed, delta)
        gaussian = "Training is Gaussian-private for some mu: its trade-off curve is that of two shifted normals."
        within = partial(trade_off.refuted, mu)
        found.append(bound(FDP, partial(_gaussian, delta), within, (_COINS, gaussian), _FDP_REFERENCE))
    return tuple(found)


def _two_sided_bounds(
    scores: Floats, members: Bools, threshold: float | None, delta: float, beta: float, claimed: float | None
) -> tuple[Bound, ...]:
    counts = _counts(scores, members, threshold, delta)
    chosen = (
        f"fixed in advance at {threshold:g}"
        if threshold is not None
        else "chosen on a random half of the trials and judged on the other half"
    )
    prior = "Jeffreys priors on both error rates; the result is a posterior probability and not a confidence."
    shape = "The trade-off curve is that of two shifted normals, so that one pair of rates fixes all of it."
    rows = [
        (EXACT, "clopper-pearson", trials.clopper_pearson, (_TRIALS,), "Kairouz et al. 2015; Jagielski et al. 2020"),
        (JOINT, "joint-beta", trials.joint_beta, (_TRIALS, prior), "Zanella-Beguelin et al. 2023"),
    ]
    if delta > 0.0:
        rows.append((GAUSSIAN, "gaussian", trials.gaussian, (_TRIALS, shape), "Nasr et al. 2023"))
    return tuple(
        Bound(
            method=name,
            epsilon=compute(counts, delta=delta, beta=beta),
            delta=delta,
            confidence=1.0 - beta,
            kind="credible" if name == JOINT else "confidence",
            ceiling=trials.ceiling(counts.members, counts.non_members, delta=delta, beta=beta, method=key),
            counts={field: getattr(counts, field) for field in Counts.__struct_fields__},
            thresholds=chosen,
            tried=1,
            assumptions=assumptions,
            reference=reference,
            refuting=None
            if claimed is None
            else by_trials(counts.members, partial(_would, compute, counts, delta, beta, claimed)),
        )
        for name, key, compute, assumptions, reference in rows
    )


def _would(
    compute: Callable[..., float], counts: Counts, delta: float, beta: float, claimed: float, true_positives: int
) -> bool:
    """Whether so many true positives, at the false positives that there were, put the bound above the claim."""
    other = msgspec.structs.replace(
        counts, true_positives=true_positives, false_negatives=counts.members - true_positives
    )
    return compute(other, delta=delta, beta=beta) > claimed


def _counts(scores: Floats, members: Bools, threshold: float | None, delta: float) -> Counts:
    """At the threshold fixed in advance, or at the best one of one half, counted on the other half."""
    if threshold is None:
        mixed = shuffled(scores)
        first, second = mixed[::2], mixed[1::2]
        if len({*members[first]}) < 2 or len({*members[second]}) < 2:
            raise TooFewCanariesError(
                f"{len(scores)} scores are too few to be halved", hint="fix a threshold in advance, or train more often"
            )
        threshold = _best_threshold(scores[first], members[first], delta)
        scores, members = scores[second], members[second]
    guessed = scores >= threshold
    return Counts(
        true_positives=int((guessed & members).sum()),
        false_negatives=int((~guessed & members).sum()),
        false_positives=int((guessed & ~members).sum()),
        true_negatives=int((~guessed & ~members).sum()),
    )


def _best_threshold(scores: Floats, members: Bools, delta: float) -> float:
    """The observed score whose rates, with one more error of each kind, give the largest epsilon."""
    levels = np.unique(scores)[::-1]
    false, true = (counted[1:] for counted in curve(scores, members))
    m, n = int(members.sum()), int((~members).sum())
    fnr, fpr = (m - true + 1.0) / (m + 1.0), (false + 1.0) / (n + 1.0)
    return float(levels[int(np.argmax(np.maximum((1.0 - fnr - delta) / fpr, (1.0 - fpr - delta) / fnr)))])
