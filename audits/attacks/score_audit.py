"""Audit any training by scores of canaries: from a file, from arrays, or through two callables.

    audit_scores(*read_scores("scores.csv"), design="coins", delta=1e-5, claimed=3.0)
    audit_training(train, score, canaries, delta=1e-5, claimed=3.0)

What may be concluded depends on where the memberships come from, so that ``design`` has no default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

from choral.audits.attacks.canaries import flip_coins
from choral.audits.attacks.score_bounds import (
    ONE_RUN,
    TooFewCanariesError,
    bounds_by_coins,
    bounds_by_runs,
    plain_bound,
)
from choral.audits.attacks.score_files import Design
from choral.audits.findings.evidence import Bound, Finding, NullControl, ScoreAudit
from choral.audits.findings.text import at_least, power, would_have_refuted
from choral.audits.lower_bounds import one_run
from choral.audits.lower_bounds.guessing import FixedShares, Guessing, SampleSplit
from choral.audits.lower_bounds.roc import Bools, checked_scores, roc
from choral.errors import ConfigError, DataError

NULL_DRAWS = 200
_UNFAIR = 1e-6


def audit_scores(
    scores: Any,
    members: Any,
    *,
    design: Design,
    delta: float,
    claimed: float | None = None,
    confidence: float = 0.95,
    guessing: Guessing | float | None = None,
    attack: str = "scores as given",
    unit: str = "record",
    null_draws: int = NULL_DRAWS,
) -> ScoreAudit:
    """Hold a claimed epsilon against scores; see :class:`choral.audits.findings.evidence.ScoreAudit`.

    scores: shape (n,), finite; a higher one says "member". members: shape (n,), 0 or 1.
    design: "coins": one training, each canary in by its own fair coin. "runs": each score from its own training.
        "split": records of the training set and fresh ones of the same kind; gives an ROC and no bound.
    delta: of the claim; 0 <= delta < 1. claimed: the epsilon that is claimed at it, for this unit.
    guessing: how a score becomes a guess. "coins": how many canaries are guessed, by ``FixedShares(...)``, fixed in
        advance, or ``SampleSplit()``. "runs": the threshold, fixed in advance; None chooses it on a random half and
        judges it on the other.

    Raises: DataError for scores that cannot be used (see :func:`choral.audits.lower_bounds.roc.checked_scores`) or
        coins that were not fair; TooFewCanariesError when not even epsilon = 0 could be refuted; ConfigError for a
        setting out of range.
    """
    values, inside = checked_scores(scores, members)
    check_settings(delta, confidence, claimed, null_draws)
    plan, threshold = _guessing(design, guessing)
    beta = 1.0 - confidence
    found: tuple[Bound, ...] = ()
    null = None
    if design == "coins":
        _check_fair(inside)
        found, null = bounds_by_coins(values, inside, plan, delta, beta, null_draws, claimed)
    elif design == "runs":
        found, null = bounds_by_runs(values, inside, threshold, delta, beta, null_draws, claimed)
    decisive = found[0] if found else None
    if decisive and decisive.ceiling == 0.0:
        said = f"{len(values)} canaries are too few: not even epsilon = 0 could be refuted"
        raise TooFewCanariesError(said, hint=_needed_hint(0.1, delta, beta))
    finding = _finding(decisive, claimed)
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


def _guessing(design: str, guessing: Guessing | float | None) -> tuple[Guessing, float | None]:
    """The guessing by coins, and the threshold of runs where it is fixed.

    Raises: ConfigError for a design that is none, or one that guesses otherwise.
    """
    if design not in ("coins", "runs", "split"):
        raise ConfigError(f"design is {design!r}, expected 'coins', 'runs' or 'split'", hint="see docs/audits.md")
    number = isinstance(guessing, Real) and not isinstance(guessing, bool) and math.isfinite(guessing)
    fits = {"coins": isinstance(guessing, FixedShares | SampleSplit), "runs": number, "split": False}[design]
    if guessing is not None and not fits:
        raise ConfigError(
            f"guessing is {guessing!r}, which does not go with design={design!r}",
            hint="FixedShares(...) or SampleSplit() with 'coins', a finite threshold with 'runs', nothing with 'split'",
        )
    if isinstance(guessing, FixedShares | SampleSplit):
        return guessing, None
    return FixedShares(), None if guessing is None else float(guessing)


def _finding(decisive: Bound | None, claimed: float | None) -> Finding:
    if decisive is None or claimed is None:
        return "no claim"
    return "violated" if decisive.epsilon > claimed else "not violated"


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
    reach = plan.ceiling(len(canaries), partial(plain_bound, delta), beta) if len(canaries) > 3 else 0.0
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


def check_settings(delta: float, confidence: float, claimed: float | None, null_draws: int) -> None:
    one_run.check_levels(delta, 1.0 - confidence)
    if claimed is not None and not (math.isfinite(claimed) and claimed > 0.0):
        raise ConfigError(f"the claimed epsilon is {claimed}, expected a finite number > 0")
    if null_draws < 1:
        raise ConfigError(f"null_draws is {null_draws}, expected >= 1")


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
        said = f"No violation of ε = {claimed:.4g} found ({at}): the lower bound is {least} {sure}; {reach}"
        return f"{said}{would_have_refuted(bound)}."
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
