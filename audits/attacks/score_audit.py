"""Audit any training by scores of canaries: from a file, from arrays, or through two callables.

    audit_scores(*read_scores("scores.csv"), design="coins", delta=1e-5, claimed=3.0)
    audit_training(train, score, canaries, delta=1e-5, claimed=3.0)

What may be concluded depends on where the memberships come from, so that ``design`` has no default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from choral.audits.attacks.canaries import flip_coins
from choral.audits.attacks.score_files import Design
from choral.audits.findings.evidence import Bound, Finding, NullControl, ScoreAudit
from choral.audits.findings.text import at_least, power
from choral.audits.lower_bounds import one_run
from choral.audits.lower_bounds import trade_off as fdp
from choral.audits.lower_bounds import trials as bounds
from choral.audits.lower_bounds.guessing import Bound as BoundOf
from choral.audits.lower_bounds.guessing import FixedShares, Guessing, GuessingOutcome, SampleSplit, shuffled
from choral.audits.lower_bounds.roc import Bools, Floats, checked_scores, curve, roc
from choral.audits.lower_bounds.trials import Counts, rate_interval
from choral.errors import ConfigError, DataError

ONE_RUN, FDP = "one run", "one run, Gaussian f-DP"
EXACT, GAUSSIAN, JOINT = "Clopper-Pearson", "Gaussian from two rates", "joint beta"
NULL_DRAWS = 200
_NULL_LEVEL = 0.99
_UNFAIR = 1e-6
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


class TooFewCanariesError(DataError):
    """So few canaries could not refute the claim, whatever the scores: the audit would be a formality."""


def audit_scores(
    scores: Any,
    members: Any,
    *,
    design: Design,
    delta: float,
    claimed: float | None = None,
    confidence: float = 0.95,
    guessing: Guessing | None = None,
    threshold: float | None = None,
    attack: str = "scores as given",
    unit: str = "record",
    null_draws: int = NULL_DRAWS,
) -> ScoreAudit:
    """Hold a claimed epsilon against scores; see :class:`choral.audits.findings.evidence.ScoreAudit`.

    scores: shape (n,), finite; a higher one says "member". members: shape (n,), 0 or 1.
    design: "coins": one training, each canary in by its own fair coin. "runs": each score from its own training.
        "split": records of the training set and fresh ones of the same kind; gives an ROC and no bound.
    delta: of the claim; 0 <= delta < 1. claimed: the epsilon that is claimed at it, for this unit.
    guessing: for "coins", how many canaries are guessed: ``FixedShares(...)``, fixed in advance, or ``SampleSplit()``.
    threshold: for "runs", fixed in advance; None chooses it on a random half and judges it on the other.

    Raises: DataError for scores that cannot be used (see :func:`choral.audits.lower_bounds.roc.checked_scores`) or
    coins that were
        not fair; TooFewCanariesError when not even epsilon = 0 could be refuted; ConfigError for a setting out of
        range.
    """
    values, inside = checked_scores(scores, members)
    check_settings(delta, confidence, claimed, null_draws)
    if design not in ("coins", "runs", "split"):
        raise ConfigError(f"design is {design!r}, expected 'coins', 'runs' or 'split'", hint="see docs/audits.md")
    if (guessing is not None and design != "coins") or (threshold is not None and design != "runs"):
        raise ConfigError(f"guessing belongs to design='coins' and threshold to 'runs', not to {design!r}")
    beta = 1.0 - confidence
    found: tuple[Bound, ...] = ()
    null = None
    if design == "coins":
        _check_fair(inside)
        plan = guessing or FixedShares()
        found = _one_run_bounds(values, inside, plan, delta, beta)
        null = null_control(lambda coins: _one_run(values, coins, plan, delta, beta).epsilon, values, beta, null_draws)
    elif design == "runs":
        found = _two_sided_bounds(values, inside, threshold, delta, beta)
        null = null_control(
            lambda coins: bounds.clopper_pearson(_counts(values, coins, threshold, delta), delta=delta, beta=beta),
            values, beta, null_draws, count=int(inside.sum()),
        )  # fmt: skip
    decisive = found[0] if found else None
    if decisive and decisive.ceiling == 0.0:
        raise TooFewCanariesError(
            f"{len(values)} canaries are too few: not even epsilon = 0 could be refuted",
            hint=_needed_hint(0.1, delta, beta),
        )
    finding: Finding = "no claim"
    if decisive and claimed is not None:
        finding = "violated" if decisive.epsilon > claimed else "not violated"
    return ScoreAudit(
        attack=attack,
        design=design,
        unit=unit,
        scores=len(values),
        members=int(inside.sum()),
        delta=delta,
        claimed=claimed,
        finding=finding,
        sentence=_sentence(finding, decisive, claimed, unit),
        decisive=decisive.method if decisive else "",
        bounds=found,
        roc=roc(values, inside, level=confidence),
        null=null,
        notes=(*_half(inside, design), *_notes(decisive, claimed, null, delta, beta)),
    )


def audit_training(
    train: Callable[[list[Any]], Any],
    score: Callable[[Any, Sequence[Any]], Any],
    canaries: Sequence[Any],
    *,
    delta: float,
    claimed: float | None = None,
    confidence: float = 0.95,
    guessing: Guessing | None = None,
    attack: str = "canaries in one training",
    unit: str = "record",
    null_draws: int = NULL_DRAWS,
) -> ScoreAudit:
    """Train once with a random half of the canaries and see whether the model tells which they were.

    train: from the canaries that came up heads to a model; it adds them to its own data and trains as ever, once.
    score: from the model and all canaries to their scores, shape (m,); a higher one says that the canary was in.
    canaries: m things that ``train`` and ``score`` understand. The coins are the operating system's.
    Others: see :func:`audit_scores`.

    Raises: TooFewCanariesError, before any training, when so many canaries could not refute ``claimed``; what
        :func:`audit_scores` raises.
    """
    check_settings(delta, confidence, claimed, null_draws)
    plan, beta = guessing or FixedShares(), 1.0 - confidence
    reach = plan.ceiling(len(canaries), partial(_plain, delta), beta) if len(canaries) > 3 else 0.0
    if reach <= (claimed or 0.0):
        raise TooFewCanariesError(
            f"{len(canaries)} canaries can refute at most epsilon = {reach:.3g}, and {claimed or 0.0:g} is claimed",
            hint=_needed_hint(claimed or 0.1, delta, beta),
        )
    inside = flip_coins(len(canaries))
    model = train([canary for canary, enters in zip(canaries, inside, strict=True) if enters])
    return audit_scores(
        score(model, canaries), inside, design="coins", delta=delta, claimed=claimed, confidence=confidence,
        guessing=plan, attack=attack, unit=unit, null_draws=null_draws,
    )  # fmt: skip


def canaries_needed(
    epsilon: float, *, delta: float, confidence: float = 0.95, guessing: FixedShares | None = None
) -> int:
    """The fewest canaries with which one training could refute ``epsilon``, if all guesses are right.

    Real attacks are not always right: take several times as many. Raises: ConfigError when no number is enough.
    """
    plan, beta = guessing or FixedShares(), 1.0 - confidence
    best: int | None = None
    for share in plan.shares:
        try:
            needed = one_run.canaries_needed(epsilon, guessed=share, delta=delta, beta=beta / len(plan.shares))
        except ConfigError:
            if best is None and share == plan.shares[-1]:
                raise
            continue
        best = needed if best is None else min(best, needed)
    if best is None:
        raise ConfigError(f"no number of canaries can refute epsilon = {epsilon:g} at delta = {delta:g} with one run")
    return best


def null_control(
    bound: Callable[[Bools], float], scores: Floats, beta: float, draws: int, *, count: int | None = None
) -> NullControl:
    """The whole procedure on memberships drawn afresh, which the scores cannot know: how often is the bound positive?

    count: of members, where it is fixed; None flips a coin for each.
    """
    rng = np.random.default_rng(shuffled(scores).tolist()[:64])  # of the order of coins that protect nobody
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


def check_settings(delta: float, confidence: float, claimed: float | None, null_draws: int) -> None:
    one_run.check_levels(delta, 1.0 - confidence)
    if claimed is not None and not (math.isfinite(claimed) and claimed > 0.0):
        raise ConfigError(f"the claimed epsilon is {claimed}, expected a finite number > 0")
    if null_draws < 1:
        raise ConfigError(f"null_draws is {null_draws}, expected >= 1")


def _plain(delta: float, canaries: int, guesses: int, right: int, beta: float) -> float:
    return one_run.lower_bound(canaries, guesses, right, delta=delta, beta=beta)


def _gaussian(delta: float, canaries: int, guesses: int, right: int, beta: float) -> float:
    return fdp.lower_bound(canaries, guesses, right, delta=delta, beta=beta)


def _one_run(scores: Floats, members: Bools, plan: Guessing, delta: float, beta: float) -> GuessingOutcome:
    return plan.run(scores, members, partial(_plain, delta), beta)


def _one_run_bounds(scores: Floats, members: Bools, plan: Guessing, delta: float, beta: float) -> tuple[Bound, ...]:
    def bound(method: str, compute: BoundOf, assumptions: tuple[str, ...], reference: str) -> Bound:
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
        )

    found = [bound(ONE_RUN, partial(_plain, delta), (_COINS,), _ONE_RUN_REFERENCE)]
    if delta > 0.0:
        gaussian = "Training is Gaussian-private for some mu: its trade-off curve is that of two shifted normals."
        found.append(bound(FDP, partial(_gaussian, delta), (_COINS, gaussian), _FDP_REFERENCE))
    return tuple(found)


def _two_sided_bounds(
    scores: Floats, members: Bools, threshold: float | None, delta: float, beta: float
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
        (EXACT, "clopper-pearson", bounds.clopper_pearson, (_TRIALS,), "Kairouz et al. 2015; Jagielski et al. 2020"),
        (JOINT, "joint-beta", bounds.joint_beta, (_TRIALS, prior), "Zanella-Beguelin et al. 2023"),
    ]
    if delta > 0.0:
        rows.append((GAUSSIAN, "gaussian", bounds.gaussian, (_TRIALS, shape), "Nasr et al. 2023"))
    return tuple(
        Bound(
            method=name,
            epsilon=compute(counts, delta=delta, beta=beta),
            delta=delta,
            confidence=1.0 - beta,
            kind="credible" if name == JOINT else "confidence",
            ceiling=bounds.ceiling(counts.members, counts.non_members, delta=delta, beta=beta, method=key),
            counts={field: getattr(counts, field) for field in Counts.__struct_fields__},
            thresholds=chosen,
            tried=1,
            assumptions=assumptions,
            reference=reference,
        )
        for name, key, compute, assumptions, reference in rows
    )


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


def _check_fair(members: Bools) -> None:
    from scipy.stats import binomtest

    if binomtest(int(members.sum()), len(members), 0.5).pvalue < _UNFAIR:
        raise DataError(
            f"{int(members.sum())} of {len(members)} canaries are members, which fair coins do not give",
            hint="flip one fair coin per canary; for training records against fresh ones use design='split'",
        )


def _half(members: Bools, design: Design) -> tuple[str, ...]:
    """A warning of coins that came up exactly half and half, as a random half does always."""
    from scipy.stats import binom

    if design != "coins" or 2 * int(members.sum()) != len(members):
        return ()
    chance = float(binom.pmf(len(members) // 2, len(members), 0.5))
    return (
        f"Exactly half of the {len(members)} canaries are members, which fair coins give in {100 * chance:.2g} % of all"
        " cases. If a fixed number was drawn instead, the bound does not hold: flip a coin for each.",
    )


def _needed_hint(epsilon: float, delta: float, beta: float) -> str:
    try:
        needed = canaries_needed(epsilon, delta=delta, confidence=1.0 - beta)
    except ConfigError as error:
        return error.hint or str(error)
    return f"{needed} canaries are needed for a ceiling above {epsilon:g}, and several times as many for a real attack"


def _sentence(finding: Finding, bound: Bound | None, claimed: float | None, unit: str) -> str:
    if bound is None:
        return "An ROC only: from training records against fresh ones no bound on epsilon follows."
    at = f"δ\u00a0=\u00a0{power(bound.delta)}, unit: the {unit}"
    sure = f"at {100 * bound.confidence:.4g}\u00a0% confidence"
    least = at_least(bound.epsilon)
    reach = f"this test could have shown at most {bound.ceiling:.3g}"
    if finding == "violated":
        return f"Violated {sure}: training costs at least ε = {least} ({at}), and {claimed:.4g} was claimed."
    if finding == "not violated":
        return f"No violation of ε = {claimed:.4g} found ({at}): the lower bound is {least} {sure}; {reach}."
    return f"Training costs at least ε = {least} {sure} ({at}); {reach}. No claim was given."


def _notes(
    bound: Bound | None, claimed: float | None, null: NullControl | None, delta: float, beta: float
) -> tuple[str, ...]:
    notes = []
    if bound and claimed is not None and bound.ceiling <= claimed:
        hint = _needed_hint(claimed, delta, beta) if bound.method == ONE_RUN else "more trainings are needed"
        notes.append(f"The ceiling, {bound.ceiling:.3g}, is not above the claim, which cannot be refuted so: {hint}.")
    if null and not null.holds:
        notes.append(f"The null control failed: {null.positives} of {null.draws} bounds on fresh coins were positive.")
    return tuple(notes)


__all__ = [
    "FixedShares",
    "SampleSplit",
    "TooFewCanariesError",
    "audit_scores",
    "audit_training",
    "canaries_needed",
]
