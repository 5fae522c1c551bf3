"""Does one record count for one clipping norm, over all parameters, in the steps that drew it and in no other?"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr

from choral.audits.findings.evidence import ProbeCheck
from choral.audits.probes.records import LOUDNESS, Floats, ProbeLayout
from choral.audits.probes.seen import Seen, check, windows

_EXPLAINED = "Noise is Gaussian of the claimed size."


def fitted(seen: list[Seen], noise: float) -> dict[str, Floats]:
    """By group of parameters: what is left of the releases when what the records add is taken off.

    That is as an exact trainer adds it, or a multiple where the releases contradict this.
    """
    released = np.concatenate([each.released for each in seen])
    expected = np.concatenate([each.layout.expected(each.loud) for each in seen])
    left = {}
    for name, part in seen[0].layout.groups.items():
        k, r = expected[:, part], released[:, part]
        size = max(float((k * k).sum()), 1e-300)
        factor = float((k * r).sum()) / size
        left[name] = r - (1.0 if abs(factor - 1.0) < 5.0 * noise / math.sqrt(size) else factor) * k
    return left


def clipping(seen: list[Seen], noise: float, *, alone: bool = True) -> ProbeCheck:
    """No canary may hold more than the clipping norm and what noise explains: alone, and on average.

    The average over all that were drawn, in parts of the schedule, by loudness and by group of parameters. Each is a
    normal variable of a known deviation whose mean is at most 1 if records are clipped (Bonferroni over the tests).
    alone: False where a step holds several of a record's, as correlated noise mixes them.
    """
    first = seen[0].layout
    parts = np.concatenate([each.layout.projections(each.released) for each in seen])
    loud = np.concatenate([each.loud for each in seen])
    largest = float(np.abs(parts).max())
    single = 2.0 * parts.size * float(ndtr(-(largest - 1.0) / noise)) if alone else 1.0
    tests: list[tuple[str, float, float]] = []  # where, estimated length, its deviation
    released = np.concatenate([each.released for each in seen])
    expected = np.concatenate([each.layout.expected(each.loud) for each in seen])
    for where, rows in windows([each.released for each in seen]):
        tests.append((where, *_length(first, released[rows], expected[rows], noise)))
    for kind, loudness in enumerate(LOUDNESS):
        which = np.resize(np.arange(len(LOUDNESS)), first.canaries) == kind
        count = max(float((loud[:, which] ** 2).sum()), 1e-300)
        length = float((parts * loud)[:, which].sum()) / count
        tests.append((f"for a gradient of {loudness:g} of them", length, noise / math.sqrt(count)))
    for name, part in first.groups.items():
        k, r = expected[:, part], released[:, part]
        own = math.sqrt(_squared(first, name))
        size = max(float((k * k).sum()), 1e-300)
        tests.append((f"in the {name}", own * float((k * r).sum()) / size, own * noise / math.sqrt(size)))
    tails = [float(ndtr(-(length - 1.0) / deviation)) for _, length, deviation in tests]
    worst = int(np.argmin(tails))
    p_value = 2.0 * min(single, len(tests) * tails[worst])
    where, length, _ = tests[worst]
    return check(
        "Every record is clipped",
        p_value,
        f"Clipped: a record counts for {tests[0][1]:.3g} clipping norms on average, and moves a step by "
        f"{largest:.4g} at most, noise included.",
        f"A record counts for {max(length, 0.0):.4g} clipping norms {where}: it is not clipped to one.",
        (1.0, tests[0][1]),
        _EXPLAINED,
    )


def only_drawn(seen: list[Seen], noise: float) -> ProbeCheck:
    """A record that was not drawn may not move the step, nor one that was drawn before move a later one again."""
    parts = np.concatenate([each.layout.projections(each.released) for each in seen])
    loud = np.concatenate([each.loud for each in seen]) > 0
    inside = np.concatenate([np.broadcast_to(each.inside, each.loud.shape) for each in seen])
    before = np.zeros_like(loud)
    before[1:] = loud[:-1]
    before[len(seen[0].released) :: max(len(seen[0].released), 1)] = False
    tests = []
    for rows in (inside & ~loud, inside & ~loud & before):
        count = int(rows.sum())
        tests.append(abs(float(parts[rows].sum())) / (noise * math.sqrt(count)) if count else 0.0)
    largest = max(tests)
    return check(
        "Only records that were drawn move a step",
        4.0 * float(ndtr(-largest)),
        f"What others add is {largest:.1f} deviations from nothing.",
        f"Records that were not drawn move a step ({largest:.1f} deviations): what is paid for once is used again.",
        (0.0, largest),
        _EXPLAINED,
    )


def _squared(layout: ProbeLayout, name: str) -> float:
    """The share of a group of parameters in a canary's squared gradient."""
    first = layout.share**2
    return first if name == "hidden weights" else (1.0 - first) / 3.0


def _length(layout: ProbeLayout, released: Floats, expected: Floats, noise: float) -> tuple[float, float]:
    """The length of a clipped record along the direction of its gradient, estimated, and the estimate's deviation."""
    total, variance = 0.0, 0.0
    for name, part in layout.groups.items():
        k, share = expected[:, part], _squared(layout, name)
        size = float((k * k).sum())
        if size < 1e-12:
            continue
        total += share * float((k * released[:, part]).sum()) / size
        variance += share**2 * noise**2 / size
    return total, math.sqrt(variance) or math.inf
