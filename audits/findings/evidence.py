"""What an attack or a bound found, as data: the numbers, how they were reached, and what they rest on.

Every result is a frozen struct that JSON holds whole. This module needs neither numpy nor torch.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Finding = Literal["violated", "not violated", "no claim"]
"""Of a claim held against evidence: contradicted at the stated confidence, not contradicted, or nothing to hold."""


class Interval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A measured value and its two-sided interval. level: of confidence, such as 0.95."""

    value: float
    low: float
    high: float
    level: float


class Refuting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What would have contradicted the claim. counts: the fewest, of the names in `Bound.counts`; {} where the bound
    counts nothing. auc: the area under the curve of normal scores that reach it; None where none is computed.
    """

    counts: dict[str, int]
    auc: float | None


class Bound(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A lower bound on epsilon at `delta`. It is evidence against a smaller claim, and never proof of privacy.

    method: its name. epsilon: the bound; 0.0 says that nothing was found. ceiling: the largest bound that this test
        could have given, with everything right; a claim at or above it cannot be refuted by this test.
    confidence: of the statement "the mechanism's true epsilon is at least this". kind: "confidence" (of
        repeated audits, a share of at most 1 - confidence report more than the truth) or "credible" (a posterior
        probability, which has no such guarantee).
    counts: what was counted: "canaries", "guesses" and "right" of one run; "true_positives" and so on of two-sided
        tests. thresholds: how they were chosen, in words. tried: how many bounds share the error probability
        (Bonferroni); 1 without correction.
    assumptions: what must be true besides, one sentence each. reference: paper and theorem.
    refuting: what would have put this bound above the claim; None without a claim, or if nothing could have.
    """

    method: str
    epsilon: float
    delta: float
    confidence: float
    kind: Literal["confidence", "credible"]
    ceiling: float
    counts: dict[str, int]
    thresholds: str
    tried: int
    assumptions: tuple[str, ...]
    reference: str
    refuting: Refuting | None = None


class RocPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One corner of an ROC curve: rates in [0, 1]."""

    false_positive_rate: float
    true_positive_rate: float


class TprAtFpr(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The true-positive rate at the threshold whose observed false-positive rate is the largest not above `wanted`.

    false_positive_rate: what was observed there, with its interval: with few non-members the true one may be far from
    `wanted`. resolved: there are at least 1/wanted non-members; otherwise no false positive at all was allowed.
    """

    wanted: float
    false_positive_rate: Interval
    true_positive_rate: Interval
    resolved: bool


class Roc(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How well scores tell members from non-members.

    auc: area under the curve, ties counted half, with DeLong's interval. points: corners of the curve from (0, 0) to
    (1, 1), thinned to a few hundred for drawing. at: true-positive rates at fixed false-positive rates.
    """

    members: int
    non_members: int
    auc: Interval
    at: tuple[TprAtFpr, ...]
    points: tuple[RocPoint, ...]
    assumptions: tuple[str, ...]


class NullControl(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The same test on coins that the model never saw: how often it gave a positive bound, which would be false.

    positives of draws; rate with its Clopper-Pearson interval; allowed: the error probability of the test.
    holds: False if the rate is above what is allowed even at the lower end of its interval: the test itself is broken.
    blind_to: what this control could not have noticed, one sentence each.
    """

    draws: int
    positives: int
    rate: Interval
    allowed: float
    holds: bool
    blind_to: tuple[str, ...] = ()


class ScoreAudit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What scores of canaries, or of members and non-members, say about a claim.

    design: where the memberships come from, which decides what may be concluded.
        "coins": one training, each canary in or out by its own fair coin: one-run bounds.
        "runs": every score from a training of its own: Clopper-Pearson and joint-beta bounds.
        "split": training records against fresh ones: an ROC only; no bound on epsilon follows.
    claimed: the epsilon that the accounting claims at `delta`, or None. bounds: all that were computed. decisive: the
        method of the bound that `finding` rests on: named before scores are seen, and free of distributional
        assumptions; "" for "split".
    finding: "violated" if the decisive bound is above the claim. sentence: the verdict in words, ceiling included.
    null: the control, None for "split". notes: warnings, such as a ceiling below the claim.
    """

    attack: str
    design: Literal["coins", "runs", "split"]
    unit: str
    scores: int
    members: int
    delta: float
    claimed: float | None
    finding: Finding
    sentence: str
    decisive: str
    bounds: tuple[Bound, ...]
    roc: Roc
    null: NullControl | None
    notes: tuple[str, ...] = ()


class ProbeCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One test of a mechanism against what it claims.

    expected, observed: the tested quantity. p_value: of the observation if the claim were true, None where a bound
    decides. violated: p_value is below the false-alarm rate that belongs to this test. finding: in words.
    """

    name: str
    violated: bool
    expected: float
    observed: float
    p_value: float | None
    false_alarms: float
    finding: str
    assumptions: tuple[str, ...]


class Probe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a private trainer did on probe data whose right answers are known.

    checks: noise, its reuse, sampling, clipping. canaries: the one-run audit of probe records.
    violated: any of them.
    """

    checks: tuple[ProbeCheck, ...]
    canaries: ScoreAudit
    violated: bool
    sentence: str


class View(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an adversary rebuilt from one kind of message.

    name: "plain update", "masked message", "sum" or "sum with noise". sees: what the adversary holds, in words.
    image: one reconstruction, row by row, values in [0, 1], shape `InversionAudit.shape`, of the first trial, not the
        best. psnr (dB), ssim: of the reconstruction against the true image, mean over trials.
    unrelated_psnr: against images of other records, mean over trials. p_value: one-sided, that the
        true image is nearer than unrelated ones. recovered: p_value below the level and psnr above `RECOGNISABLE_PSNR`.
    """

    name: str
    sees: str
    image: tuple[float, ...]
    psnr: float
    ssim: float
    unrelated_psnr: float
    p_value: float
    recovered: bool


class InversionAudit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gradient inversion of one party's update, seen in several ways. shape: (height, width) of `truth` and images.

    method: "exact (linear first layer)" or "optimisation". trials: updates attacked, of `batch` records each. truth:
    the image that the shown reconstructions are of.
    """

    method: str
    shape: tuple[int, int]
    batch: int
    trials: int
    level: float
    truth: tuple[float, ...]
    views: tuple[View, ...]
    assumptions: tuple[str, ...]
