"""Probe a private trainer: does its code do what its ledger says?

The trainer's own `wrap` is run on data made for it (:mod:`choral.audits.probes.records`). It is known what each
record adds to each coordinate, in two layers with biases, and which coordinates no record touches. So each step shows
its noise alone, what clipping left of a record, and who was drawn; and the released gradients are a one-run audit in
which the adversary is as strong as the accounting supposes.

It is trained twice from one public state (:mod:`choral.audits.probes.twins`), over all passes that were asked for.
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
from torch import nn
from torch.utils.data import DataLoader

from choral.audits.attacks.canaries import flip_coins
from choral.audits.attacks.score_audit import audit_scores, canaries_needed
from choral.audits.findings.evidence import Probe, ProbeCheck, ScoreAudit
from choral.audits.probes import noise_checks, sampling_checks
from choral.audits.probes.clipping_checks import clipping, fitted, only_drawn
from choral.audits.probes.correlated import correlated_checks, matched_scores
from choral.audits.probes.noise_checks import noise_reuse
from choral.audits.probes.records import Floats, ProbeLayout, ProbeRecords
from choral.audits.probes.seen import FALSE_ALARMS, Seen, paid_for
from choral.audits.probes.twins import twins
from choral.errors import ConfigError
from choral.privacy import Ledger, Privacy
from choral.privacy.accounting.events import CorrelatedGaussian
from choral.privacy.dpsgd.clip_settings import AdaptiveClip, PerLayerClip, norm_of_all
from choral.privacy.ledgers.memory_notice import no_notice

__all__ = ["FALSE_ALARMS", "canary_count", "judged", "judged_correlated", "noise_reuse", "probe"]

Wrap = Callable[[nn.Module, torch.optim.Optimizer, DataLoader[Any]], tuple[Any, Any, Any]]

_RATE = 0.4  # five batches do not fill two passes: 1/len(loader) is not the sample rate
_CANARIES, _MOST_CANARIES = 1000, 2000  # every record is one
_PASSES, _MOST_PASSES = 12, 300

UNSEEN = (
    "What the trainer does on data of another kind, in other layers, or after {steps} steps is not seen; nor clipping "
    "that depends on which other records are in a batch, noise that is merely larger than claimed, or what is printed, "
    "logged or saved beside the model."
)


def probe(privacy: Privacy, *, wrap: Callable[[Privacy], Wrap] | None = None, confidence: float = 0.95) -> Probe:
    """Run a private trainer twice on probe records and test it against its own ledger.

    privacy: the promise to be tested, with independent noise. wrap: from such a promise to the function that makes a
        model, an optimizer and a loader private; by default its own ``wrap``.
    Finds: noise that is smaller than claimed, anywhere or at any time; not Gaussian; used twice, elsewhere, or made of
        what anybody can know; records drawn more often than claimed, not by a coin of their own each, or depending on
        where they stand; records beyond the clipping norm in any group of parameters; records that move a step that
        did not draw them; steps that are not in the ledger; and, by the canaries, whatever makes the whole cost more.
        Adversary: sees every step, and knows all records but the coins.
    Does not find: what `Probe.sentence` says at its end. Passes beyond 300 are not trained.
    Chunks of batches are probed as they are asked for; clipping by layer as one norm split evenly; adaptive clipping
    with its norm held still, so that neither its moves nor its count's own noise are seen.

    Correlated noise is made independent by the strategy that the ledger names, and tested then; batches must be the
    same in every pass, with each record in one.

    Raises: ConfigError for the tree of correlated noise, and for a trainer that spends nothing from the
        ledger of the promise, or makes no step; what the trainer raises.
    """
    canaries, ledgers = canary_count(privacy.epsilon, privacy.delta, confidence), list[Ledger]()
    with no_notice():
        seen = twins(lambda: _train(privacy, wrap, canaries, ledgers))
    if type(privacy) is Privacy:
        return judged(seen, privacy.delta, confidence)
    event = next((each for each in ledgers[0].events if isinstance(each, CorrelatedGaussian)), None)
    if event is None:
        raise ConfigError(f"the ledger of {type(privacy).__name__} names no strategy of correlated noise")
    return judged_correlated(seen, event, privacy.delta, confidence)


def judged_correlated(seen: list[Seen], event: CorrelatedGaussian, delta: float, confidence: float) -> Probe:
    """What trainings on probe records show, by the strategy and the noise of `event`."""
    checks = (*correlated_checks(seen, event), paid_for(len(seen[0].released), seen[0].spent.steps, "step"))
    audit = _canary_audit(seen[0], delta, confidence, matched_scores(seen[0], event))
    return _found(checks, audit, len(seen[0].released) * len(seen), len(seen[0].released))


def _found(checks: tuple[ProbeCheck, ...], audit: ScoreAudit, looked_at: int, steps: int) -> Probe:
    faults = [each.finding for each in checks if each.violated]
    faults += [audit.sentence] if audit.finding == "violated" else []
    said = f"No fault found in {looked_at} steps on probe records. {audit.sentence} {UNSEEN.format(steps=steps)}"
    return Probe(checks=checks, canaries=audit, violated=bool(faults), sentence=" ".join(faults) or said)


def judged(seen: list[Seen], delta: float, confidence: float) -> Probe:
    """What trainings on probe records show."""
    first, layout = seen[0], seen[0].layout
    quiet = [each.released[:, layout.quiet] for each in seen]
    together = np.concatenate(quiet)
    drawn = np.concatenate([each.drawn for each in seen])
    claimed, rate = first.noise, float(first.spent.sample_rate or 0.0)
    noise = max(claimed, math.sqrt(float((together**2).mean())))  # more than claimed is no fault
    left = fitted(seen, noise)
    everywhere = np.concatenate(list(left.values()), axis=1)
    loud = np.arange(drawn.shape[1]) < layout.canaries
    loud[: layout.canaries] &= seen[-1].inside & seen[0].inside
    checks = (
        noise_checks.noise_size(quiet, claimed),
        noise_checks.noise_by_group(left, claimed),
        noise_checks.noise_law(together, first.step),
        noise_reuse(together),
        noise_checks.noise_moved(np.split(everywhere, [len(first.released)])),
        noise_checks.noise_between_groups(left, together),
        noise_checks.noise_and_size(together, drawn),
        sampling_checks.sample_rate([each.drawn for each in seen], rate, loud),
        sampling_checks.sample_spread(drawn, rate),
        sampling_checks.overlaps([each.drawn for each in seen]),
        sampling_checks.inclusions(drawn, rate),
        sampling_checks.order(drawn),
        clipping(seen, noise),
        only_drawn(seen, noise),
        paid_for(len(first.released), first.spent.steps, "step"),
    )
    audit = _canary_audit(first, delta, confidence)
    return _found(checks, audit, len(drawn), len(first.released))


def canary_count(epsilon: float, delta: float, confidence: float) -> int:
    """How many canaries can refute the promise, up to a number that is soon trained."""
    try:
        needed = 2 * canaries_needed(epsilon, delta=delta, confidence=confidence)
    except ConfigError:
        needed = _MOST_CANARIES
    return min(max(needed, _CANARIES), _MOST_CANARIES)


def _train(
    privacy: Privacy, wrap: Callable[[Privacy], Wrap] | None, canaries: int, ledgers: list[Ledger] | None = None
) -> Seen:
    """One run of the trainer on fresh coins, over all of its passes."""
    clip, kept, still = norm_of_all(privacy.max_grad_norm), 1.0, privacy.max_grad_norm
    if isinstance(still, AdaptiveClip):  # a norm that moves would hide the scale of the noise
        still, kept = dataclasses.replace(still, rate=1e-12), math.sqrt(1.0 - still.share)
    elif isinstance(still, PerLayerClip):
        still = PerLayerClip(clip)
    passes = min(max(privacy.epochs, _PASSES), _MOST_PASSES)
    ledger = Ledger() if type(privacy) is not Privacy else None
    own = dataclasses.replace(privacy, ledger=ledger, epochs=passes, max_grad_norm=still)
    if ledger is not None and ledgers is not None:
        ledgers.append(ledger)
    layout, records, inside = ProbeLayout.of(canaries), canaries, flip_coins(canaries)
    batch = int(_RATE * records)
    model = layout.model()
    data = ProbeRecords(records, layout, inside, clip)
    plain = torch.optim.SGD(model.parameters(), lr=0.0)
    released: list[Floats] = []
    plain.register_step_post_hook(lambda *_: released.append(_gradient(model)))
    private, optimizer, loader = (wrap(own) if wrap else own.wrap)(model, plain, DataLoader(data, batch, shuffle=True))
    drawn: list[npt.NDArray[np.int64]] = []
    shown = np.zeros(records, dtype=np.int64)
    for _ in range(passes):
        for x in loader:
            np.add.at(shown, x[:, 0].long().cpu().numpy(), 1)
            before = len(released)
            optimizer.zero_grad()
            private(x).mean().backward()
            optimizer.step()
            if len(released) > before:  # else a chunk, and its batch goes on
                drawn.append(shown.copy())
                shown[:] = 0
    spent = own.spent()
    if not released or spent.noise_multiplier is None or spent.sample_rate is None or not spent.steps:
        raise ConfigError(
            f"the trainer made {len(released)} steps and its ledger has none: it claims nothing that could be probed",
            hint="wrap(privacy) must train by what the privacy that it is given makes private",
        )
    drawn += [np.zeros(records, dtype=np.int64)] * (
        len(released) - len(drawn)
    )  # empty batches are stepped out of sight
    scale = kept * batch / clip  # vector and count of adaptive clipping together have the claimed noise
    return Seen(layout, scale * np.stack(released), np.stack(drawn[: len(released)]), inside, spent)


def _gradient(model: nn.Module) -> Floats:
    parts = [
        (torch.zeros_like(p) if p.grad is None else p.grad).detach().double().cpu().numpy().reshape(-1)
        for p in model.parameters()
    ]
    return np.concatenate(parts)


def _canary_audit(seen: Seen, delta: float, confidence: float, scores: Floats | None = None) -> ScoreAudit:
    return audit_scores(
        seen.layout.projections(seen.released).sum(axis=0) if scores is None else scores,
        seen.inside,
        design="coins",
        delta=delta,
        claimed=seen.spent.epsilon,
        confidence=confidence,
        attack="gradients of probe records in every step",
    )
