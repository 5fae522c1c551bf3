"""The report's schema: what JSON holds and HTML is drawn from.

One format, ``choral-report``, of one version, in two kinds: ``comparison`` (several arms) and ``audit`` (one run).
Decoding is strict: an unknown field, a missing one or a wrong type is refused. This module knows no torch.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from choral.audits.findings.evidence import Probe, ScoreAudit
from choral.audits.findings.parameters import LatticeEstimate, PromiseParameters
from choral.audits.findings.whole import CitedManifest
from choral.errors import ChoralError

FORMAT = "choral-report"
FORMAT_VERSION = 2
ORDER = ("cloud", "cloud-dp", "federated", "federated-masked", "federated-dp")  # these come first, with fixed colours
RANDOMNESS = (
    "The seed decides initial weights, data order and rehearsed dropouts. Sampling for privacy, noise, keys and masks"
    " come from the operating system through a cryptographic stream, and are never seeded."
)
Verdict = Literal["holds", "violated", "unverified"]


class ReportError(ChoralError):
    """A report file is missing, damaged, edited by hand into something else, or of another version."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mean over seeds. low, high: its 95 % interval, None where one seed gives none. values: per seed."""

    mean: float
    low: float | None = None
    high: float | None = None
    values: tuple[float, ...]

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else max(self.high - self.mean, self.mean - self.low)


class Difference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """This arm minus the baseline. paired: seed by seed (Student), otherwise two independent means (Welch)."""

    baseline: str
    paired: bool
    estimate: Estimate


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The metric after one round: mean, least and greatest over seeds.

    bytes: sent and received by the busiest party up to then; seconds: of training up to then; both means over seeds.
    """

    round: int
    mean: float
    low: float
    high: float
    bytes: float | None = None
    seconds: float | None = None


class Measure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A metric of an arm: after the last round, and over the rounds."""

    metric: str
    estimate: Estimate
    curve: tuple[Point, ...]


class Reference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A level to hold a metric against, such as that of always the same answer; its mean over the seeds."""

    metric: str
    name: str
    level: float


class DataOwner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One data owner's cost, the worst over seeds. examples: how many records it trained on in that run."""

    name: str
    examples: int | None
    epsilon: float
    steps: int
    noise_multiplier: float | None
    sample_rate: float | None


class Spread(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One quantity over all data owners, each at its worst: extremes, and quartiles that interpolate linearly.

    name: of a field of :class:`DataOwner`, for whose data owners it is.
    """

    name: Literal["epsilon", "noise_multiplier", "sample_rate", "examples"]
    least: float
    lower: float
    median: float
    upper: float
    greatest: float


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A promise with everything that is needed to read it.

    sentence: the whole of it in words. adversary: who may look at what. epsilon: the worst data owner's spending
    (``holder``), at ``delta``, for releases and an end that were fixed in advance. guarantee: what holds whoever chose
    when to stop and what to train next, over all data owners; None where no plan was recorded. asked: the epsilon that
    was promised. public: what neighbouring datasets have in common, which the promise does not hide.
    """

    sentence: str
    adversary: str
    unit: str
    neighbours: str
    public: tuple[str, ...] = ()
    epsilon: float
    guarantee: float | None = None
    asked: float
    delta: float
    accountant: str
    holder: str

    @property
    def quoted(self) -> float:
        """The epsilon for a headline: what is guaranteed, never less than what was spent."""
        return max(self.epsilon, self.guarantee or 0.0)


PartyMeasureName = Literal["worst", "tenth", "mean", "deviation", "range"]


class PartyMeasure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measure of how a model's worth differs between parties, over seeds; every party counts the same.

    name: the worst party's value, the tenth percentile (of a metric of which less is better, the ninetieth), the mean,
    the standard deviation, or the greatest minus the least.
    """

    name: PartyMeasureName
    estimate: Estimate
    difference: Difference | None = None


class Fairness(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The final model at each party's held-out records. note: what that rests on, in words; no party is named.

    metric: of the compared ones the first that was evaluated at each party. parties: of the arm; listed: the fewest,
    over seeds, with at least ``least`` held-out records, of which alone the measures are; records: of the smallest of
    those. by_chance: the standard deviation that few records alone would give, if the metric is a share of records;
    None for other metrics.
    """

    metric: str
    note: str
    least: int
    parties: int
    listed: int
    records: int
    measures: tuple[PartyMeasure, ...]
    by_chance: float | None = None


class Check(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that was tried, and what came of it.

    refutable: False where nothing here could have contradicted it: no claim was made, or the largest value that the
        test can reach is not above the claim. Such a check is shown, and counted nowhere as one that held.
    """

    name: str
    verdict: Verdict
    finding: str
    refutable: bool = True


class NotRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An audit that was not carried out, and what it would have shown."""

    name: str
    would_show: str


class ArmAudit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The evidence for one arm: what :func:`choral.audits.audit` finds in its runs, nothing trained, and attacks.

    runs: how many were audited, each seed of the arm. checks: one of each kind, the worst over the runs. attacks: each
    on one more training of the arm, with canaries. probe: of the arm's promise. not_run: what was not tried here.
    verdict, sentence: as of an audit; "holds" means that nothing was found, not that nothing could be.
    """

    verdict: Verdict
    sentence: str
    runs: int
    checks: tuple[Check, ...]
    attacks: tuple[ScoreAudit, ...] = ()
    probe: Probe | None = None
    parameters: PromiseParameters | None = None
    not_run: tuple[NotRun, ...]


class SharesTrust(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """In what worst case noise in shares keeps its promise: a sum opened over `min_survivors` parties of which
    `colluders` collude, so that `honest` are left. secure_sum: its name; of "plain", against outsiders alone.

    realised: epsilon of as much noise as survived, true if who drops out does not depend on what was released; None
    where no ledger says.
    """

    honest: int
    colluders: int
    min_survivors: int
    secure_sum: str
    realised: float | None = None


class ArmResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way of training, over its seeds.

    examples: records over all parties. metric: after the last round. bytes_per_party: sent and received by the busiest
    party in the whole run; for a centralized arm the largest party's raw data, which is uploaded once; None if not
    recorded. seconds: training time of the whole run, evaluation excluded. survivors: the fewest parties in any round.
    shares: where its noise is in shares. spreads: how unlike the data owners are, where there are several. fairness:
    None where no numbers per party were asked for. audit: the evidence. manifests: of its runs, by seed, those that
    have one. curve: of the metric. more: the other metrics.
    """

    name: str
    kind: Literal["centralized", "federated"]
    seeds: tuple[int, ...]
    rounds: int
    parties: int
    examples: int
    parameters: int
    metric: Estimate
    difference: Difference | None = None
    claim: Claim | None = None
    holders: tuple[DataOwner, ...] = ()
    shares: SharesTrust | None = None
    spreads: tuple[Spread, ...] = ()
    bytes_per_party: float | None = None
    seconds: Estimate
    survivors: int | None = None
    secure_sum: dict[str, Any] | None = None
    lattice: LatticeEstimate | None = None
    fairness: Fairness | None = None
    audit: ArmAudit | None = None
    manifests: tuple[CitedManifest, ...] = ()
    curve: tuple[Point, ...]
    more: tuple[Measure, ...] = ()
    devices: tuple[str, ...]
    folders: tuple[str, ...] = ()
    config: dict[str, Any] = {}

    def measure(self, metric: str) -> Measure:
        """One of ``more``, or else the metric that arms are judged by."""
        mine = Measure(metric=metric, estimate=self.metric, curve=self.curve)
        return next((other for other in self.more if other.metric == metric), mine)


class FailedRuns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Runs of an arm that could not be trained or read. reason: of the first of them, without data values.

    runs: what failed, by seed and budget. left: runs of the arm that are reported; without any it is not in ``arms``.
    """

    arm: str
    reason: str
    runs: tuple[str, ...]
    left: int


class BudgetPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The metric at one budget. asked: the epsilon promised; spent: the worst data owner's over all seeds."""

    asked: float
    spent: float
    delta: float
    seeds: tuple[int, ...]
    metric: Estimate


class BudgetCurve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Budget against accuracy for one arm, by rising epsilon. unit: whose presence epsilon hides, as in the claim."""

    arm: str
    unit: str = "record"
    points: tuple[BudgetPoint, ...]


class WeightsMatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two secure sums, one seed: the largest difference of any final weight.

    difference: None if the weights differ in shape or are not finite.
    error_bound: how far fixed-point encoding may move one coordinate of the weighted mean in one round.
    """

    arm: str
    reference: str
    seed: int
    difference: float | None
    error_bound: float


class OwnerBudget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One data owner's budget: promised, claimed in run.json, and recomputed from its ledger (None: it could not be).

    steps: noisy steps on the ledger. guarantee: what the ledger's plans guarantee whoever chose when to stop and what
    to train next, computed again; None where no plan was recorded in advance. The two before it are for releases,
    and an end, that were fixed in advance.
    """

    holder: str
    promised: float
    claimed: float | None
    recomputed: float | None
    guarantee: float | None = None
    delta: float
    steps: int
    verdict: Verdict
    finding: str


class Trace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One metric of one run, by round; ``values[0]`` belongs to the initial model."""

    name: str
    values: tuple[float, ...]


class RunFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the audited run was trained. completed: rounds done, of ``rounds``. examples: records per party.

    randomness: what the seed decides, and what it never reaches.
    """

    training: Literal["centralized", "federated"]
    completed: int
    rounds: int
    seed: int
    device: str
    parameters: int
    examples: dict[str, int]
    secure_sum: dict[str, Any] | None = None
    lattice: LatticeEstimate | None = None
    privacy: dict[str, float | int | str] | None = None
    config: dict[str, Any] = {}
    randomness: str = RANDOMNESS


NOT_RUN = (
    NotRun(
        name="Membership inference by loss threshold",
        would_show="how often a plain guess from the loss tells a training record from a fresh one",
    ),
    NotRun(
        name="LiRA (likelihood-ratio attack)",
        would_show="the same with shadow models: the true-positive rate at 1 % and 0.1 % false positives",
    ),
    NotRun(
        name="RMIA (robust membership inference)",
        would_show="a strong membership attack from few reference models",
    ),
    NotRun(
        name="One-run audit with canaries",
        would_show="a statistical lower bound on epsilon, to hold against the accountant's upper bound",
    ),
    NotRun(
        name="Gradient inversion",
        would_show="whether inputs can be rebuilt from an update, from a masked message and from the sum",
    ),
    NotRun(
        name="Transcript audit",
        would_show="whether any recorded message correlates with a single party's update or reuses a mask or key",
    ),
)


def check_version(raw: bytes, path: str) -> None:
    """Refuse a file that is not a report of this version, before it is decoded."""
    try:
        head = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} is damaged: {error}") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ReportError(f"{path} is not a Choral report", hint="name the report.json of a comparison or an audit")
    if head.get("version") != FORMAT_VERSION:
        raise ReportError(f"{path} is of report version {head.get('version')}; this Choral reads {FORMAT_VERSION}")
