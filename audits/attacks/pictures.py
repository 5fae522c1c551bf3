"""How alike two pictures are: PSNR, SSIM, and a test of whether one is nearer to its original than to others."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.ndimage import uniform_filter

from choral.errors import DataError

Floats = npt.NDArray[np.float64]

RECOGNISABLE_PSNR = 20.0
"""dB: an error of a tenth of the range, root mean square; below it digits are hard to tell."""
_LARGEST_PSNR = 100.0
_WINDOW = 7
_C1, _C2 = 0.01**2, 0.03**2


def psnr(truth: Floats, image: Floats) -> float:
    """Peak signal-to-noise ratio in dB of values in [0, 1]: -10 log10 of the mean squared error, at most 100."""
    _check(truth, image)
    error = float(((truth - image) ** 2).mean())
    return _LARGEST_PSNR if error <= 10.0 ** (-_LARGEST_PSNR / 10.0) else -10.0 * math.log10(error)


def ssim(truth: Floats, image: Floats) -> float:
    """Mean structural similarity of two pictures, shape (h, w), values in [0, 1], in windows of 7 x 7 of even weight.

    Windows that reach over the border are left out; smaller pictures are one window of the largest odd size that fits.
    Reference: Wang et al. 2004, equation 13, with unbiased variances.
    """
    _check(truth, image)
    size = min(_WINDOW, *truth.shape)
    size -= 1 - size % 2
    edge = size // 2
    inner = tuple(slice(edge, length - edge) for length in truth.shape)

    def mean(values: Floats) -> Floats:
        return np.asarray(uniform_filter(values, size)[inner])

    scale = size**2 / max(size**2 - 1, 1)
    a, b = mean(truth), mean(image)
    aa, bb, ab = (
        scale * (mean(x * y) - mean(x) * mean(y)) for x, y in ((truth, truth), (image, image), (truth, image))
    )
    return float((((2 * a * b + _C1) * (2 * ab + _C2)) / ((a**2 + b**2 + _C1) * (aa + bb + _C2))).mean())


def nearer_p_value(own: Floats, others: Floats) -> float:
    """One-sided p-value that pictures are nearer to their own originals than to unrelated ones.

    own: PSNR against the original, shape (trials,). others: against u unrelated pictures, shape (trials, u). If a
    picture knows nothing of its original, the rank of ``own`` among the u + 1 is uniform in each trial; the sum of
    ranks has an exact distribution. Ties count against the finding.
    """
    ranks = (others >= own[:, None]).sum(axis=1)  # 0: the original is the nearest
    each = np.full(others.shape[1] + 1, 1.0 / (others.shape[1] + 1))
    mass = np.ones(1)
    for _ in own:
        mass = np.convolve(mass, each)
    return min(float(mass[: int(ranks.sum()) + 1].sum()), 1.0)


def _check(truth: Floats, image: Floats) -> None:
    if truth.shape != image.shape or truth.ndim != 2 or not (np.isfinite(truth).all() and np.isfinite(image).all()):
        raise DataError(f"pictures have shapes {truth.shape} and {image.shape}, expected one shape (h, w), all finite")
