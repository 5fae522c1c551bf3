"""Probe a private trainer: does its code do what its ledger says?

The trainer's own `wrap` is run on data made for the purpose. Each canary record has a coordinate of its own and a
gradient a thousand clipping norms long; each coin that came up tails, and every filler, is a record without gradient;
and many coordinates belong to no record at all. So each step shows its noise alone, what clipping left of one record,
and how many records were drawn; and the final weights are a one-run audit in which the adversary is as strong as the
accounting supposes.

Nothing is spent from the user's ledger: the probe keeps its own, in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import bdtrc, betaincc, chdtr, ndtr
from torch import nn
from torch.utils.data import DataLoader, Dataset

from choral.audits.attacks.canaries import flip_coins
from choral.audits.attacks.score_audit import audit_scores, canaries_needed
from choral.audits.findings.evidence import Probe, ProbeCheck, ScoreAudit
from choral.errors import ConfigError
from choral.privacy import Privacy, Spent
from choral.privacy.dpsgd.clipping import AdaptiveClip, PerLayerClip, norm_of_all
from choral.privacy.ledgers.memory_notice import no_notice

Floats = npt.NDArray[np.float64]
Wrap = Callable[[nn.Module, torch.optim.Optimizer, DataLoader[Any]], tuple[Any, Any, Any]]

FALSE_ALARMS = 1e-6
"""Of each check on an honest trainer; the canaries have 1 - confidence."""
_LOUD = 1000.0  # clipping norms in a canary's gradient
QUIET = 1000  # coordinates that no record touches
_RECORDS, _RATE = 1000, 0.4  # five batches do not fill two passes: 1/len(loader) is not the sample rate
_CANARIES, _MOST_CANARIES = 500, 2000
_PASSES = 8


@dataclasses.dataclass(frozen=True)
class Seen:
    """One training. released: of each step, shape (steps, width), times batch size over clipping norm. drawn: records
    per step, shape (steps,). inside: the coins of the first coordinates. spent: what the ledger says."""

    released: Floats
    drawn: npt.NDArray[np.int64]
    inside: npt.NDArray[np.bool_]
    spent: Spent
    records: int


class ProbeRecords(Dataset[torch.Tensor]):
    """Record i is a vector of _LOUD clipping norms along coordinate first + stride i if its coin says so, else zero."""

    def __init__(
        self,
        records: int,
        width: int,
        inside: npt.NDArray[np.bool_],
        clip: float,
        *,
        first: int = 0,
        stride: int = 1,
    ) -> None:
        self.records, self.width, self.inside, self.length = records, width, inside, _LOUD * clip
        self.first, self.stride = first, stride

    def __len__(self) -> int:
        return self.records

    def __getitem__(self, index: int) -> torch.Tensor:
        x = torch.zeros(self.width)
        if index < len(self.inside) and self.inside[index]:
            x[self.first + self.stride * index] = self.length
        return x


def probe(privacy: Privacy, *, wrap: Callable[[Privacy], Wrap] | None = None, confidence: float = 0.95) -> Probe:
    """Run a private trainer twice on probe records and test it against its own ledger.

    privacy: the promise to be tested, with independent noise. wrap: from such a promise to the function that makes a
        model, an optimizer and a loader private; by default its own ``wrap``.
    Finds: noise that is smaller than claimed; noise used twice, within a run or in the next; more records drawn than
    the sample rate, or batches of fixed size; records beyond the clipping norm; and, by the canaries, whatever makes
    the whole cost more than claimed. Adversary: sees every step, and knows all records but the coins.
    Does not find: what the trainer does on other data alone, such as an unclipped layer of another kind.
    Chunks of batches are probed as they are asked for; clipping by layer as one norm, since the probe's model has one
    layer; adaptive clipping with its norm held still, so that neither its moves nor its count's own noise are seen.

    Raises: ConfigError for correlated noise, which repeats by design, and for a trainer that spends nothing from the
        ledger of the promise, or makes no step; what the trainer raises.
    """
    if type(privacy) is not Privacy:
        raise ConfigError(f"the probe is for Privacy, whose noise is independent, not for {type(privacy).__name__}")
    canaries = canary_count(privacy.epsilon, privacy.delta, confidence)
    with no_notice():
        first, second = (_train(privacy, wrap, canaries) for _ in range(2))
    return judged(first, second, privacy.delta, confidence)


def judged(first: Seen, second: Seen, delta: float, confidence: float) -> Probe:
    """What two trainings on probe records show, of which the first coordinates are the canaries'."""
    canaries = len(first.inside)
    quiet = np.concatenate([seen.released[:, canaries:] for seen in (first, second)])
    drawn = np.concatenate([first.drawn, second.drawn])
    checks = (
        _noise_size(quiet, first.spent.noise_multiplier),
        noise_reuse(quiet),
        _sample_rate(drawn, first.records, first.spent.sample_rate),
        _sample_spread(drawn, first.records, first.spent.sample_rate),
        _clipping(np.concatenate([s.released[:, :canaries] for s in (first, second)]), first.spent.noise_multiplier),
    )
    audit = _canary_audit(first, delta, confidence)
    faults = [check.finding for check in checks if check.violated]
    if audit.finding == "violated":
        faults.append(audit.sentence)
    return Probe(
        checks=checks,
        canaries=audit,
        violated=bool(faults),
        sentence=" ".join(faults) or f"No fault found in {len(drawn)} steps on probe records. {audit.sentence}",
    )


def noise_reuse(released: Floats) -> ProbeCheck:
    """Do two releases share their noise? released: shape (k, n), of coordinates that hold noise alone.

    The difference of two steps that share their noise is free of it, however large it is. Under independent Gaussian
    noise the squared cosine of two rows is Beta(1/2, (n - 1)/2); the largest of all pairs is tested, with Bonferroni's
    correction.
    """
    rows = released / np.maximum(np.linalg.norm(released, axis=1, keepdims=True), 1e-300)
    cosines = np.abs(np.triu(rows @ rows.T, k=1))
    largest, pairs = min(float(cosines.max()), 1.0), len(rows) * (len(rows) - 1) // 2
    p_value = min(pairs * float(betaincc(0.5, (rows.shape[1] - 1) / 2.0, largest**2)), 1.0)
    if not released.any(axis=1).all():
        p_value, largest = 0.0, 1.0  # a step without any noise
    violated = p_value < FALSE_ALARMS
    a, b = np.unravel_index(int(cosines.argmax()), cosines.shape)
    said = (
        f"Steps {a + 1} and {b + 1} share their noise (cosine {largest:.3f}): their difference shows data without it."
    )
    return ProbeCheck(
        name="Noise is never used twice",
        violated=violated,
        expected=0.0,
        observed=largest,
        p_value=p_value,
        false_alarms=FALSE_ALARMS,
        finding=said if violated else f"The largest cosine of {pairs} pairs of releases is {largest:.3f}.",
        assumptions=("Noise is Gaussian and independent between coordinates.",),
    )


def canary_count(epsilon: float, delta: float, confidence: float) -> int:
    """How many canaries can refute the promise, up to a number that is soon trained."""
    try:
        needed = 2 * canaries_needed(epsilon, delta=delta, confidence=confidence)
    except ConfigError:
        needed = _MOST_CANARIES
    return min(max(needed, _CANARIES), _MOST_CANARIES)


def _train(privacy: Privacy, wrap: Callable[[Privacy], Wrap] | None, canaries: int) -> Seen:
    """One run of the trainer on fresh coins."""
    clip, kept, still = norm_of_all(privacy.max_grad_norm), 1.0, privacy.max_grad_norm
    if isinstance(still, AdaptiveClip):  # a norm that moves would hide the scale of the noise
        still, kept = dataclasses.replace(still, rate=1e-12), math.sqrt(1.0 - still.share)
    own = dataclasses.replace(
        privacy, ledger=None, epochs=_PASSES, max_grad_norm=clip if isinstance(still, PerLayerClip) else still
    )
    width, records = canaries + QUIET, max(_RECORDS, 2 * canaries)
    batch = int(_RATE * records)
    inside = flip_coins(canaries)
    model = nn.Linear(width, 1, bias=False)
    nn.init.zeros_(model.weight)
    data = ProbeRecords(records, width, inside, clip)
    plain = torch.optim.SGD(model.parameters(), lr=0.0)
    released: list[Floats] = []
    plain.register_step_post_hook(lambda *_: released.append(_gradient(model)))
    private, optimizer, loader = (wrap(own) if wrap else own.wrap)(model, plain, DataLoader(data, batch, shuffle=True))
    drawn, shown = [], 0
    for _ in range(_PASSES):
        for x in loader:
            shown, before = shown + len(x), len(released)
            optimizer.zero_grad()
            private(x).mean().backward()
            optimizer.step()
            if len(released) > before:  # else a chunk, and its batch goes on
                drawn.append(shown)
                shown = 0
    spent = own.spent()
    if not released or spent.noise_multiplier is None or spent.sample_rate is None or not spent.steps:
        raise ConfigError(
            f"the trainer made {len(released)} steps and its ledger has none: it claims nothing that could be probed",
            hint="wrap(privacy) must train by what the privacy that it is given makes private",
        )
    drawn += [0] * (len(released) - len(drawn))  # empty batches are stepped out of sight
    scale = kept * batch / clip  # vector and count of adaptive clipping together have the claimed noise
    return Seen(scale * np.stack(released), np.array(drawn), inside, spent, records)


def _gradient(model: nn.Linear) -> Floats:
    gradient = model.weight.grad
    if gradient is None:
        return np.zeros(model.in_features)
    return gradient.detach().double().cpu().numpy().reshape(-1).copy()


def _noise_size(quiet: Floats, claimed: float) -> ProbeCheck:
    """One-sided: more noise than claimed costs accuracy and no privacy. Sum of squares ~ chi-square."""
    p_value = float(chdtr(quiet.size, float((quiet**2).sum()) / claimed**2))
    observed = math.sqrt(float((quiet**2).mean()))
    violated = p_value < FALSE_ALARMS
    return ProbeCheck(
        name="Noise is as large as claimed",
        violated=violated,
        expected=claimed,
        observed=observed,
        p_value=p_value,
        false_alarms=FALSE_ALARMS,
        finding=f"The noise multiplier is {observed:.4g}, {claimed:.4g} {'was claimed' if violated else 'is claimed'}.",
        assumptions=("Noise is Gaussian and independent between coordinates and steps.",),
    )


def _sample_rate(drawn: npt.NDArray[np.int64], records: int, claimed: float) -> ProbeCheck:
    """One-sided: drawing fewer costs no privacy. The total is Binomial(records * steps, rate)."""
    total, trials = int(drawn.sum()), records * len(drawn)
    p_value = 1.0 if total == 0 else float(bdtrc(total - 1, trials, claimed))
    violated = p_value < FALSE_ALARMS or (claimed >= 1.0 and total > trials)
    return ProbeCheck(
        name="Records are drawn at the claimed rate",
        violated=violated,
        expected=claimed,
        observed=total / trials,
        p_value=p_value,
        false_alarms=FALSE_ALARMS,
        finding=f"A record is drawn with probability {total / trials:.4g} per step; {claimed:.4g} is claimed.",
        assumptions=("Records are drawn independently.",),
    )


def _sample_spread(drawn: npt.NDArray[np.int64], records: int, claimed: float) -> ProbeCheck:
    """Fixed batch sizes are not Poisson sampling: their spread is too small. Chi-square, approximately."""
    expected = records * claimed * (1.0 - claimed)
    observed = float(drawn.var(ddof=1))
    p_value = 1.0 if expected == 0.0 else float(chdtr(len(drawn) - 1, (len(drawn) - 1) * observed / expected))
    violated = p_value < FALSE_ALARMS
    shown = f"{math.sqrt(observed):.3g}, expected {math.sqrt(expected):.3g}"
    ending = ": batches are not drawn by chance" if violated else ""
    return ProbeCheck(
        name="Batch sizes vary as Poisson samples do",
        violated=violated,
        expected=expected,
        observed=observed,
        p_value=p_value,
        false_alarms=FALSE_ALARMS,
        finding=f"The standard deviation of the batch size is {shown}{ending}.",
        assumptions=("The binomial batch size is near normal, which at hundreds of records it is.",),
    )


def _clipping(loud: Floats, noise: float) -> ProbeCheck:
    """No coordinate, one canary's at most, may hold more than the clipping norm and what noise explains."""
    largest = float(np.abs(loud).max())
    p_value = min(2.0 * loud.size * float(ndtr(-(largest - 1.0) / noise)), 1.0)
    violated = p_value < FALSE_ALARMS
    said = f"A record of {_LOUD:g} clipping norms moves a step by {largest:.4g} of them: it is not clipped."
    return ProbeCheck(
        name="Every record is clipped",
        violated=violated,
        expected=1.0,
        observed=largest,
        p_value=p_value,
        false_alarms=FALSE_ALARMS,
        finding=said
        if violated
        else f"Clipped: a record of {_LOUD:g} clipping norms moves a step by {largest:.4g} at most, noise included.",
        assumptions=("Noise is Gaussian of the claimed size.",),
    )


def _canary_audit(seen: Seen, delta: float, confidence: float) -> ScoreAudit:
    return audit_scores(
        seen.released[:, : len(seen.inside)].sum(axis=0),
        seen.inside,
        design="coins",
        delta=delta,
        claimed=seen.spent.epsilon,
        confidence=confidence,
        attack="probe records with a coordinate each",
    )
