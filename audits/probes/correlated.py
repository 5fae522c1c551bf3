"""Probe records under noise that is correlated over steps: made independent by the strategy that the ledger names.

What is released is G + C^-1 Z: gradients, and independent noise Z that C^-1 mixes over steps. Whoever knows the ledger
multiplies by C, and sees C G + Z. So each test of independent noise is one of Z, the sums that records should add are
mixed alike, and a matched filter over a record's steps is the strongest attack on it.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy.linalg import toeplitz

from choral.audits.findings.evidence import ProbeCheck
from choral.audits.probes import noise_checks
from choral.audits.probes.clipping_checks import clipping, fitted
from choral.audits.probes.noise_checks import noise_reuse
from choral.audits.probes.records import Floats
from choral.audits.probes.seen import Seen, check
from choral.errors import ConfigError
from choral.privacy.accounting.events import CorrelatedGaussian
from choral.privacy.accounting.matrix_strategies import Tree


def correlated_checks(seen: list[Seen], event: CorrelatedGaussian) -> tuple[ProbeCheck, ...]:
    """Of trainings whose passes are all of one stream of noise; event: of any of their passes.

    Raises: ConfigError for the tree, whose noise no square matrix makes independent.
    """
    white = [whitened(each, event) for each in seen]
    claimed = event.noise
    quiet = [each.released[:, each.layout.quiet] for each in white]
    together = np.concatenate(quiet)
    noise = max(claimed, math.sqrt(float((together**2).mean())))
    left = fitted(white, noise)
    everywhere = np.concatenate(list(left.values()), axis=1)
    return (
        noise_checks.noise_size(quiet, claimed),
        noise_checks.noise_by_group(left, claimed),
        noise_checks.noise_law(together, seen[0].step),
        noise_reuse(together),
        noise_checks.noise_moved(np.split(everywhere, [len(white[0].released)])),
        noise_checks.noise_between_groups(left, together),
        once_a_pass(seen, event.steps),
        clipping(white, noise, alone=False),
    )


def whitened(seen: Seen, event: CorrelatedGaussian) -> Seen:
    """The same training multiplied by C: independent noise, and records in the steps that C mixes theirs into."""
    if isinstance(event.strategy, Tree):
        raise ConfigError(
            "the tree's noise is not probed: no square matrix makes it independent",
            hint="probe the same promise with mechanism='buffered' or 'banded', which the same loop trains",
        )
    count = len(seen.released)
    matrix = toeplitz(event.strategy.column(count), np.zeros(count))
    return dataclasses.replace(seen, released=matrix @ seen.released, drawn=matrix @ seen.drawn)


def once_a_pass(seen: list[Seen], steps: int) -> ProbeCheck:
    """No record is in two steps of a pass, nor in another step of a later one. Exact."""
    repeated, moved = 0, 0
    for each in seen:
        passes = [each.drawn[start : start + steps] for start in range(0, len(each.drawn), steps)]
        repeated += sum(int((part.sum(axis=0) > 1).sum()) for part in passes)
        moved += sum(int((part != passes[0]).any(axis=0).sum()) for part in passes if part.shape == passes[0].shape)
        moved += int(len(each.drawn) % steps > 0)
    return check(
        "Each record takes part once a pass, in the same step",
        0.0 if repeated or moved else 1.0,
        "Every pass visits the same batches, and no record is in two of them.",
        f"Records are drawn twice in a pass {repeated} times, and {moved} times in another step than at first.",
        (0.0, float(repeated + moved)),
    )


def matched_scores(seen: Seen, event: CorrelatedGaussian) -> Floats:
    """By a matched filter: each canary's part of every step, weighed by how much of it C mixes into that step."""
    white = whitened(seen, event)
    weights = white.drawn[:, : seen.layout.canaries]
    scores = (seen.layout.projections(white.released) * weights).sum(axis=0)
    return np.asarray(scores / np.sqrt(np.maximum((weights**2).sum(axis=0), 1e-12)))
