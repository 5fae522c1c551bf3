"""A wavelet scattering transform of images: features that are the same whatever the data (Bruna and Mallat 2013).

Two scales (J = 2), eight orientations (L = 8), orders 0, 1 and 2: 1 + 16 + 64 = 81 channels, each a quarter of the
image high and wide. Filters, padding and the order of the channels are those of kymatio 0.3 (Andreux et al. 2020, BSD),
to which `python benchmarks/scattering.py` compares it, where that is installed.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

SCALES, ANGLES = 2, 8


def scatter(images: torch.Tensor, batch: int = 1000) -> torch.Tensor:
    """Return the scattering coefficients of `images`, shape (n, height, width), float32.

    Both sides are multiples of 4. Shape of the result: (n, 81, height / 4, width / 4), float32.
    """
    _, height, width = images.shape
    if height % 4 or width % 4 or min(height, width) < 8:
        raise ValueError(f"images are {height} x {width}, expected sides that are multiples of 4, at least 8")
    tall, wide = (side + 2 * (1 << SCALES) for side in (height, width))
    phi, psi = _filters(tall, wide)
    return torch.cat([_scatter(part, phi, psi) for part in images.split(batch)])  # type: ignore[no-untyped-call]


def _scatter(images: torch.Tensor, phi: torch.Tensor, psi: list[torch.Tensor]) -> torch.Tensor:
    padded = F.pad(images[:, None], (1 << SCALES,) * 4, mode="reflect")
    spectrum = torch.fft.fft2(padded)
    orders: list[list[torch.Tensor]] = [[_smooth(spectrum, phi, 0)], [], []]
    for first in range(SCALES):
        u = torch.fft.fft2(torch.fft.ifft2(spectrum * psi[first])[..., :: 1 << first, :: 1 << first].abs())
        smooth = _smooth(u, phi, first)  # (n, angles, h, w)
        deeper = [
            _smooth(
                torch.fft.fft2(
                    torch.fft.ifft2(u[:, :, None] * _coarser(psi[second], first))[
                        ..., :: 1 << (second - first), :: 1 << (second - first)
                    ].abs()
                ),
                phi,
                second,
            ).flatten(1, 2)
            for second in range(first + 1, SCALES)
        ]
        orders[1].append(smooth)
        orders[2] += deeper
    return torch.cat([channels for order in orders for channels in order], 1)


def _smooth(spectrum: torch.Tensor, phi: torch.Tensor, level: int) -> torch.Tensor:
    """Return the low-passed signal at a quarter of the resolution, without the padding."""
    step = 1 << (SCALES - level)
    smooth = torch.fft.ifft2(spectrum * _coarser(phi, level)).real[..., ::step, ::step]
    return smooth[..., 1:-1, 1:-1]  # type: ignore[no-any-return]


def _coarser(spectrum: torch.Tensor, level: int) -> torch.Tensor:
    """Return a filter's spectrum for a signal of which every 2^level-th point is kept.

    Frequencies from half of the new band on are left out, the new band's middle row and column included.
    """
    if not level:
        return spectrum
    cut = spectrum.clone()
    for axis in (-2, -1):
        size = spectrum.shape[axis]
        start, length = size >> (level + 1), int(size * (1 - 0.5**level))
        cut.narrow(axis, start, length).zero_()
    *some, tall, wide = cut.shape
    parts = 1 << level
    folded = cut.reshape(*some, parts, tall // parts, parts, wide // parts)
    return folded.sum((-4, -2))


def _filters(tall: int, wide: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the spectra of the low-pass filter, shape (tall, wide), and of each scale's wavelets, (angles, ...)."""
    phi = _gabor(tall, wide, 0.8 * 2 ** (SCALES - 1), 0.0, 0.0, 1.0)
    psi = []
    for scale in range(SCALES):
        turns = [(ANGLES // 2 - 1 - k) * math.pi / ANGLES for k in range(ANGLES)]
        waves = [_morlet(tall, wide, 0.8 * 2**scale, turn, 0.75 * math.pi / 2**scale, 4 / ANGLES) for turn in turns]
        psi.append(torch.stack([_spectrum(wave) for wave in waves]))
    return _spectrum(phi), psi


def _spectrum(signal: npt.NDArray[np.complex128]) -> torch.Tensor:
    return torch.from_numpy(np.fft.fft2(signal).real.astype(np.float32))


def _morlet(tall: int, wide: int, sigma: float, turn: float, xi: float, slant: float) -> npt.NDArray[np.complex128]:
    """Return a Gabor wavelet less the multiple of its envelope that makes the sum zero."""
    wave, envelope = (_gabor(tall, wide, sigma, turn, frequency, slant) for frequency in (xi, 0.0))
    return wave - wave.sum() / envelope.sum() * envelope  # type: ignore[no-any-return]


def _gabor(tall: int, wide: int, sigma: float, turn: float, xi: float, slant: float) -> npt.NDArray[np.complex128]:
    """Return a plane wave of frequency `xi` under a Gaussian, on a torus."""
    cos, sin = math.cos(turn), math.sin(turn)
    rotation = np.array([[cos, -sin], [sin, cos]])
    curve = rotation @ np.diag([1.0, slant**2]) @ rotation.T / (2 * sigma**2)
    y, x = np.meshgrid(np.arange(-2 * tall, 3 * tall), np.arange(-2 * wide, 3 * wide), indexing="ij")
    exponent = -(curve[0, 0] * y * y + (curve[0, 1] + curve[1, 0]) * y * x + curve[1, 1] * x * x)
    wave = np.exp(exponent + 1j * xi * (y * cos + x * sin)) * slant / (2 * math.pi * sigma**2)
    return np.asarray(wave.reshape(5, tall, 5, wide).sum((0, 2)))


def main() -> None:
    from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D as Scattering2D  # no dependency

    images = torch.rand(50, 28, 28, generator=torch.Generator().manual_seed(0))
    theirs = Scattering2D(J=SCALES, L=ANGLES, shape=(28, 28))(images)
    ours = scatter(images)
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    print({"shape": list(ours.shape), "largest_relative_error": error})
    if not error < 1e-4:
        raise SystemExit("the coefficients are not kymatio's")


if __name__ == "__main__":
    main()
