"""Is a step's noise as large as claimed, everywhere and always; Gaussian; and used once?

Every test is of coordinates that no record touches, `quiet`, shape (steps, coordinates), of one or several trainings,
or of what is left of others when what the records add is taken off.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, betaincc, chdtr, chdtrc, ndtr
from scipy.stats import kstest, kurtosistest

from choral.audits.findings.evidence import ProbeCheck
from choral.audits.probes.records import Floats
from choral.audits.probes.seen import check, windows

_GAUSSIAN = "Noise is Gaussian and independent between coordinates and steps."
REUSE = "Noise is never used twice"


def noise_size(trainings: list[Floats], claimed: float) -> ProbeCheck:
    """One-sided: more noise than claimed costs accuracy and no privacy. Sum of squares ~ chi-square.

    Of all steps and coordinates, and of parts of both, so that noise that fails now and then, or here and there, is
    not made up for by the rest (Bonferroni over the parts).
    """
    quiet = np.concatenate(trainings)
    squares = (quiet / claimed) ** 2
    parts = [(where, squares[rows].sum(), squares[rows].size) for where, rows in windows(trainings)]
    width = squares.shape[1]
    for pieces in (2, 4, 8, width):
        sums = np.array([piece.sum() for piece in np.array_split(squares.sum(axis=0), pieces)])
        sizes = np.array([len(piece) for piece in np.array_split(np.arange(width), pieces)]) * len(squares)
        worst = int(chdtr(sizes, sums).argmin())
        parts += [(f"on part {worst + 1} of {pieces} of the coordinates", sums[worst], sizes[worst])] * pieces
    tails = [float(chdtr(size, total)) for _, total, size in parts]
    p_value = min(2.0 * tails[0], 2.0 * len(parts) * min(tails))
    certain = [part for part, tail in zip(parts, tails, strict=True) if tail <= min(1e-12, 1e6 * min(tails))] or parts[
        :1
    ]
    where, total, size = min(certain, key=lambda part: part[1] / part[2])
    observed = math.sqrt(float((quiet**2).mean()))
    least = claimed * math.sqrt(total / size)
    return check(
        "Noise is as large as claimed",
        p_value,
        f"The noise multiplier is {observed:.4g}, {claimed:.4g} is claimed.",
        f"The noise multiplier is {least:.4g} {where}, {claimed:.4g} was claimed.",
        (claimed, observed),
        _GAUSSIAN,
    )


def noise_by_group(left: dict[str, Floats], claimed: float) -> ProbeCheck:
    """Of each group of parameters, after what the records add was taken off. One-sided, as `noise_size`."""
    tails = {name: float(chdtr(rest.size - 1, float((rest**2).sum()) / claimed**2)) for name, rest in left.items()}
    worst = min(tails, key=lambda name: tails[name])
    observed = math.sqrt(float((left[worst] ** 2).mean()))
    return check(
        "Noise is on all parameters",
        len(tails) * tails[worst],
        f"Least on the {worst}: {observed:.4g} clipping norms.",
        f"On the {worst} the noise multiplier is {observed:.4g}, {claimed:.4g} was claimed.",
        (claimed, observed),
        _GAUSSIAN,
    )


def noise_law(quiet: Floats, step: float = 0.0) -> ProbeCheck:
    """Gaussian in the middle (Kolmogorov-Smirnov), the fourth moment (Anscombe and Glynn) and the tail beyond 3.

    step: of the grid that the noise is on. A law on a grid is half a step's probability from every continuous one,
    which many coordinates tell: each is moved evenly within its step, and a rounded Gaussian is nearly one again.
    """
    if step:
        quiet = quiet + step * np.random.default_rng(0).uniform(-0.5, 0.5, quiet.shape)
    scale = math.sqrt(float((quiet**2).mean())) or 1.0
    z = (quiet / scale).reshape(-1)
    beyond, chance = int((np.abs(z) > 3.0).sum()), 2.0 * float(ndtr(-3.0))
    distance = kstest(z, "norm")
    fourth = float(kurtosistest(z).pvalue) if np.ptp(z) > 0.0 else 0.0
    p_value = 3.0 * min(float(distance.pvalue), fourth, float(bdtr(beyond, z.size, chance)))
    shown = f"{beyond} of {z.size} coordinates lie beyond 3 deviations, {chance * z.size:.0f} are expected"
    return check(
        "Noise is Gaussian",
        p_value,
        f"Its distribution is at most {float(distance.statistic):.2g} from the Gaussian one; {shown}.",
        f"Its distribution is {float(distance.statistic):.2g} from the Gaussian one; {shown}.",
        (0.0, float(distance.statistic)),
        "Coordinates and steps are independent.",
    )


def noise_reuse(released: Floats) -> ProbeCheck:
    """Do two releases share their noise? released: shape (k, n), of coordinates that hold noise alone.

    The difference of two steps that share their noise is free of it, however large it is. Under independent Gaussian
    noise the squared cosine of two rows is Beta(1/2, (n - 1)/2); the largest of all pairs is tested, with Bonferroni's
    correction, and the sum of all squares, which is near chi-square: noise made of fewer numbers than it has
    coordinates.
    """
    rows = _unit(released)
    cosines = np.abs(np.triu(rows @ rows.T, k=1))
    largest, pairs = min(float(cosines.max()), 1.0), len(rows) * (len(rows) - 1) // 2
    alone = pairs * float(betaincc(0.5, (rows.shape[1] - 1) / 2.0, largest**2))
    together = float(chdtrc(pairs, rows.shape[1] * float((cosines**2).sum())))
    p_value = min(2.0 * min(alone, together), 1.0)
    if not released.any(axis=1).all():
        p_value, largest = 0.0, 1.0  # a step without any noise
    a, b = np.unravel_index(int(cosines.argmax()), cosines.shape)
    what = "share their noise" if alone <= together else "look alike, as all do"
    return check(
        REUSE,
        p_value,
        f"The largest cosine of {pairs} pairs of releases is {largest:.3f}.",
        f"Steps {a + 1} and {b + 1} {what} (cosine {largest:.3f}): their difference shows data without it.",
        (0.0, largest),
        "Noise is Gaussian and independent between coordinates.",
    )


def noise_moved(trainings: list[Floats]) -> ProbeCheck:
    """Is noise used again at other coordinates: rolled, tiled, mirrored, in another order, or weakly in every step?

    All cyclic shifts of all pairs of steps, as they are and mirrored, and each step against itself, by the fast Fourier
    transform; the same summed over all pairs of steps that are as far apart. Deviations of 1/sqrt(n) each, Bonferroni.
    """
    rows = _unit(np.concatenate(trainings))
    count, n = rows.shape
    spectra = np.fft.rfft(rows, axis=1)
    largest, tests, pooled = 0.0, 0, 0.0
    own = np.fft.irfft(np.abs(spectra) ** 2, n, axis=1)[:, 1 : (n - 1) // 2 + 1]
    for at in range(count):
        for others in (np.conj(spectra[at + 1 :]), spectra[at + 1 :]):
            shifted = np.fft.irfft(spectra[at] * others, n, axis=1)
            largest, tests = max(largest, float(np.abs(shifted).max(initial=0.0))), tests + shifted.size
    largest, tests = max(largest, float(np.abs(own).max())), tests + own.size
    sums = [(own.sum(axis=0), count)]
    lengths = [len(each) for each in trainings]
    starts = np.cumsum([0, *lengths])
    for lag in range(1, min(lengths)):
        for start, size in zip(starts, lengths, strict=False):
            a, b = spectra[start : start + size - lag], spectra[start + lag : start + size]
            sums.append((np.fft.irfft((a * np.conj(b)).sum(axis=0), n), size - lag))
    for total, terms in sums:
        pooled = max(pooled, float(np.abs(total).max()) * math.sqrt(n / terms))
    alone = tests * float(betaincc(0.5, (n - 1) / 2.0, min(largest, 1.0) ** 2))
    weak = sum(total.size for total, _ in sums) * 2.0 * float(ndtr(-pooled))
    again = 0.0 if _permuted(rows) else 1.0
    return check(
        "Noise is not used again elsewhere",
        3.0 * min(alone, weak, again),
        f"The largest correlation of {tests} pairs of steps and shifts is {min(largest, 1.0):.3f}.",
        f"Noise of one coordinate returns at another or in a later step: correlation {min(largest, 1.0):.3f}, "
        f"{pooled:.1f} deviations over all steps" + (", the same values in another order." if again == 0.0 else "."),
        (0.0, min(largest, 1.0)),
        "Noise is Gaussian and independent between coordinates and steps.",
    )


def noise_between_groups(left: dict[str, Floats], quiet: Floats) -> ProbeCheck:
    """Do small groups of parameters share the noise of one another or of the large one? Pooled over steps."""
    large, largest, tests = _scaled(quiet), 0.0, 0
    small = {name: _scaled(rest) for name, rest in left.items() if rest.shape[1] < quiet.shape[1] // 4}
    for name, rest in small.items():
        terms = [_scaled(other)[:, : rest.shape[1]] for key, other in left.items() if key > name]
        wide = np.lib.stride_tricks.sliding_window_view(large, rest.shape[1], axis=1)
        against = np.einsum("tsk,tk->s", wide, rest)
        sums = [float((rest[:, : each.shape[1]] * each).sum()) / math.sqrt(each.size) for each in terms]
        sums += (against / math.sqrt(rest.size)).tolist()
        largest, tests = max(largest, *np.abs(sums).tolist()), tests + len(sums)
    return check(
        "Groups of parameters do not share noise",
        4.0 * tests * float(ndtr(-largest)),  # twice, since products have heavier tails than sums
        f"The largest of {tests} correlations is {largest:.2f} deviations.",
        f"One group of parameters has the noise of another: {largest:.1f} deviations.",
        (0.0, largest),
        "Noise is Gaussian and independent between coordinates and steps.",
    )


def noise_and_size(quiet: Floats, drawn: npt.NDArray[np.int64]) -> ProbeCheck:
    """Is the noise the same whoever was drawn? A release divided by the size of its batch shows that size."""
    sizes = drawn.sum(axis=1).astype(np.float64)
    energy = (quiet**2).mean(axis=1)
    spread = sizes.std()
    if spread == 0.0 or energy.mean() == 0.0:
        z = 0.0
    else:
        relative = energy / energy.mean() - 1.0
        z = float(((sizes - sizes.mean()) / spread * relative).sum() / math.sqrt(2.0 * len(sizes) / quiet.shape[1]))
    return check(
        "Noise does not depend on who was drawn",
        4.0 * float(ndtr(-abs(z))),
        f"Noise and batch size go together by {z:.1f} deviations.",
        f"Noise is {'smaller' if z < 0 else 'larger'} in larger batches ({abs(z):.1f} deviations): a step is divided, "
        "or its noise scaled, by how many were drawn, and shows that number.",
        (0.0, z),
        "Noise is Gaussian and independent between coordinates and steps.",
    )


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300))


def _scaled(rest: Floats) -> Floats:
    return np.asarray(rest / max(math.sqrt(float((rest**2).mean())), 1e-300))


def _permuted(rows: Floats) -> bool:
    """Whether two rows hold the same absolute values in another order.

    The mean square distance of two sorted samples of n Gaussians is about 2 log log n / n; a hundredth of that has a
    probability below exp(-70), as that of a Brownian bridge so small has.
    """
    n = rows.shape[1]
    ordered = np.sort(np.abs(rows), axis=1) * math.sqrt(n)
    squares = (ordered**2).mean(axis=1)
    apart = squares[:, None] + squares[None, :] - 2.0 * (ordered @ ordered.T) / n
    return bool((apart[np.triu_indices(len(rows), k=1)] < 0.02 * math.log(math.log(n)) / n).any())
