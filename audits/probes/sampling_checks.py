"""Was every record drawn by a coin of its own, at the claimed rate, in every step? `drawn`: (steps, records) counts."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import bdtrc, chdtr, chdtrc, ndtr

from choral.audits.findings.evidence import ProbeCheck
from choral.audits.probes.seen import check, windows

Counts = npt.NDArray[np.int64]
_OWN_COIN = "Records are drawn independently."


def sample_rate(trainings: list[Counts], claimed: float, loud: npt.NDArray[np.bool_]) -> ProbeCheck:
    """One-sided: drawing fewer costs no privacy. Totals are Binomial(records * steps, rate).

    Of all records, of the loud ones alone, and in parts of the schedule (Bonferroni). loud: shape (records,).
    """
    drawn = np.concatenate(trainings)
    tested = [(where, drawn[rows]) for where, rows in windows(trainings)]
    tested.append(("of records with a gradient", drawn[:, loud]))
    worst, least = tested[0], 1.0
    for place, (where, part) in enumerate(tested):
        total = int(part.sum())
        tail = 1.0 if total == 0 else float(bdtrc(total - 1, part.size, min(claimed, 1.0)))
        if (tail if place == 0 else tail * len(tested)) < least and part.size:
            worst, least = (where, part), tail if place == 0 else tail * len(tested)
    if claimed >= 1.0 and int(drawn.sum()) > drawn.size:
        least = 0.0
    seen = float(drawn.mean())
    said = f"A record is drawn with probability {seen:.4g} per step; {claimed:.4g} is claimed."
    return check(
        "Records are drawn at the claimed rate",
        2.0 * least,
        said,
        f"A record is drawn with probability {float(worst[1].mean()):.4g} {worst[0]}; {claimed:.4g} is claimed.",
        (claimed, seen),
        _OWN_COIN,
    )


def sample_spread(drawn: Counts, claimed: float) -> ProbeCheck:
    """Batch sizes of one spread alone are Poisson's: neither fixed nor wilder. Chi-square, two-sided."""
    sizes, records = drawn.sum(axis=1), drawn.shape[1]
    rate = min(float(drawn.mean()), 1.0)
    expected, observed = records * rate * (1.0 - rate), float(sizes.var(ddof=1))
    p_value = 1.0
    if expected > 0.0 and claimed < 1.0:
        total = (len(sizes) - 1) * observed / expected
        p_value = 2.0 * min(float(chdtr(len(sizes) - 1, total)), float(chdtrc(len(sizes) - 1, total)))
    shown = f"{math.sqrt(observed):.3g}, expected {math.sqrt(expected):.3g}"
    return check(
        "Batch sizes vary as Poisson samples do",
        p_value,
        f"The standard deviation of the batch size is {shown}.",
        f"The standard deviation of the batch size is {shown}: batches are not drawn by chance.",
        (expected, observed),
        "The binomial batch size is near normal, which at hundreds of records it is.",
    )


def overlaps(trainings: list[Counts]) -> ProbeCheck:
    """Do two batches have as many records in common as chance lets them? All pairs, also of two trainings.

    Given the sizes of both, the overlap is hypergeometric; pairs of one distance are tested together, too. Two-sided:
    a shuffled pass without replacement has too few in common, a repeated batch all.
    """
    drawn = np.concatenate(trainings).astype(np.float64)
    steps, records = drawn.shape
    centred = drawn - drawn.mean(axis=1, keepdims=True)
    scale = np.sqrt((centred**2).sum(axis=1))
    usable = scale > 0.0
    z = centred[usable] / scale[usable, None]
    pairs = z @ z.T * math.sqrt(records - 1.0)
    upper = np.triu_indices(len(z), k=1)
    largest = float(np.abs(pairs[upper]).max(initial=0.0))
    lengths = [len(each) for each in trainings]
    together, tests = 0.0, 0
    if usable.all():
        starts = np.cumsum([0, *lengths])[:-1]
        for lag in range(1, max(lengths)):
            lines = [np.diagonal(pairs[s : s + n, s : s + n], lag) for s, n in zip(starts, lengths, strict=True)]
            line = np.concatenate(lines)
            together, tests = max(together, abs(float(line.sum())) / math.sqrt(len(line))), tests + 1
    p_value = 2.0 * min(2.0 * len(upper[0]) * float(ndtr(-largest)), 2.0 * tests * float(ndtr(-together)), 1.0)
    return check(
        "Batches have in common what chance gives them",
        p_value if tests or len(upper[0]) else 1.0,
        f"The overlap of two of {steps} batches is at most {largest:.1f} deviations from what chance gives.",
        f"Overlaps of batches are {max(largest, together):.1f} deviations from what chance gives: who is drawn in one "
        "step tells who is in another, or in the next training.",
        (0.0, max(largest, together)),
        _OWN_COIN,
    )


def inclusions(drawn: Counts, claimed: float) -> ProbeCheck:
    """Is each record drawn about as often as every other, and never twice in a step?

    Counts over steps are Binomial(steps, rate): their dispersion is tested from both sides, the largest from above.
    """
    steps, records = drawn.shape
    counts = drawn.sum(axis=0)
    rate = min(float(drawn.mean()), 1.0)
    repeated = bool((drawn > 1).any())
    p_value = 1.0
    if 0.0 < rate < 1.0:
        total = float(((counts - counts.mean()) ** 2).sum()) / (steps * rate * (1.0 - rate))
        spread = 2.0 * min(float(chdtr(records - 1, total)), float(chdtrc(records - 1, total)))
        most = records * float(bdtrc(int(counts.max()) - 1, steps, claimed)) if claimed < 1.0 else 1.0
        p_value = 2.0 * min(spread, most)
    shown = f"between {counts.min()} and {counts.max()} of {steps} steps"
    return check(
        "Each record is drawn as often as chance lets it",
        0.0 if repeated else p_value,
        f"Each record was in {shown}.",
        "A record is drawn twice in one step."
        if repeated
        else f"Each record was in {shown}: some take part more often than others, or all equally often.",
        (steps * claimed, float(counts.max())),
        _OWN_COIN,
    )


def order(drawn: Counts) -> ProbeCheck:
    """Are records drawn without regard to where they stand? Correlation over all distances in the data, all steps."""
    steps, records = drawn.shape
    centred = drawn - drawn.mean(axis=1, keepdims=True)
    power = (np.abs(np.fft.rfft(centred, axis=1)) ** 2).sum(axis=0)
    line = np.fft.irfft(power, records)[1 : (records - 1) // 2 + 1]
    size = float((centred**2).sum())
    largest = (
        0.0 if size == 0.0 else float(np.abs(line / size + 1.0 / (records - 1)).max()) * math.sqrt(steps * records)
    )
    return check(
        "Records are drawn without regard to their order",
        2.0 * len(line) * float(ndtr(-largest)),
        f"Neighbours, at any distance, are drawn together by {largest:.1f} deviations at most.",
        f"Records that stand near each other are drawn together, or apart ({largest:.1f} deviations).",
        (0.0, largest),
        _OWN_COIN,
    )
