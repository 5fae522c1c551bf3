"""Randomness nobody can replay: Poisson masks and Gaussian noise from a cryptographic stream.

A *source* is a function from a number of bytes to that many uniformly random ones. :func:`os_stream` is the
one to use: AES-256 in counter mode under a key that the operating system gives afresh for each call, so there
is no state that a fork, a copy or a checkpoint could repeat, and no seed. Everything else here is a
deterministic function of its source. The mask of who was sampled is as secret as the noise: amplification by
sampling rests on it.

Floating point. Noise drawn with floats has holes that reveal the value under it (Mironov 2012; Holohan and
Braghin 2021, "Secure random sampling in differential privacy"). Summing several float Gaussians makes the
holes harder to find; here they are removed: value and noise are both rounded to multiples of one grid and
added exactly, as integers. Since rounding commutes with adding a multiple of the grid, the release is
round(value + noise) for a value on the grid: post-processing of the ideal Gaussian mechanism, with the same
support whatever the data. Rounding the value may stretch the distance between neighbours by one grid step
per coordinate; :func:`noise_grid` chooses the step so that this is at most 2^-10 of the sensitivity, and
:func:`grid_gaussian` pays for it with as much more noise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from Crypto.Cipher import AES

from choral.errors import ConfigError

Source = Callable[[int], bytes]

_FAR = np.uint64(1 << 32)  # radii from smaller words are drawn with more bits
_BLOCK = 1 << 16  # Gaussians whose bytes are drawn at once
_PAIRS = 1 << 13  # pairs made at once: their buffers stay in the second-level cache
STRETCH = 2.0**-10  # by how much rounding to the grid may stretch the sensitivity, relative


def os_stream(count: int) -> bytes:
    """Return `count` random bytes: an AES-256-CTR keystream under a fresh key from the operating system."""
    blocks = bytearray(-(-count // 16) * 16)  # become counters from zero on, and their encryption: twice as fast
    np.frombuffer(blocks, dtype=">u8")[1::2] = np.arange(len(blocks) // 16)  # as pycryptodome's own counter mode
    AES.new(os.urandom(32), AES.MODE_ECB).encrypt(blocks, output=blocks)
    return bytes(memoryview(blocks)[:count])


def poisson_sample(size: int, rate: Fraction, source: Source) -> npt.NDArray[np.int64]:
    """Return the sorted indices below `size` that a Poisson sample takes, each with probability exactly `rate`.

    Compares the binary expansion of a uniform number with that of `rate`, 32 bits at a time, so the
    probability is exact for every rational rate. Shape (k,) with k random, int64.
    Raises: ConfigError (rate outside [0, 1], negative size).
    """
    if not 0 <= rate <= 1 or size < 0:
        raise ConfigError(f"rate is {rate} and size {size}, expected 0 <= rate <= 1 and size >= 0")
    if rate == 1:
        return np.arange(size, dtype=np.int64)
    chosen = np.zeros(size, dtype=np.bool_)
    open_ = np.arange(size, dtype=np.int64)
    while len(open_) and rate > 0:
        digit, rate = divmod(rate * 2**32, 1)
        word = np.frombuffer(source(4 * len(open_)), dtype="<u4")
        chosen[open_[word < digit]] = True
        open_ = open_[word == digit]
    return np.flatnonzero(chosen).astype(np.int64, copy=False)


def gaussian(count: int, source: Source) -> npt.NDArray[np.float64]:
    """Return `count` standard Gaussians, shape (count,), float64, by the method of Box and Muller (1958).

    Radii come from uniforms in (0, 1) of 64 bits, and of 128 where the top 32 are zero; angles from 53-bit ones.

    Tail. A pair of coordinates that is then rounded to a grid of step h (in standard deviations) must lie on a circle
    that can be drawn, or the release excludes a neighbour outright. About radius r there are 2^b e^(-r^2/2) r h radii
    to a step of the grid, b bits. With 64 that is less than one from r = 8 on at h = 1e-6, and one of n pairs lies out
    there with probability n e^-32 = n 1.3e-14. With 64 more from r = 6.66 on (e^(-r^2/2) = 2^-32) there are
    at least 2^32 * 6.66 h, 2,800 at h = 1e-7, below it, and one or more up to r = 12.2 at h = 1e-7; that a pair lies
    beyond has probability 5e-33: 2.5e-20 over 1e7 parameters and 1e6 steps. The tail ends at 13.4 (2^-129).
    Not for release as they are: see :func:`grid_gaussian`.
    """
    result = np.empty(count, dtype=np.float64)
    for _ in _filled(result, 1.0, source):
        pass
    return result


def _filled(result: npt.NDArray[np.float64], deviation: float, source: Source) -> Iterator[npt.NDArray[np.float64]]:
    """Fill `result` with Gaussians of this deviation, a piece at a time; yield each piece, while it is in the cache."""
    most = min(_PAIRS, (len(result) + 1) // 2)
    radii, angles, bits = np.empty(most), np.empty(most), np.empty(most, dtype=np.uint64)
    for start in range(0, len(result), _BLOCK):
        block = result[start : start + _BLOCK]
        half = (len(block) + 1) // 2
        words = np.frombuffer(source(16 * half), dtype="<u8")
        cosines, sines = block[:half], block[half:]
        for first in range(0, half, _PAIRS):
            here = slice(first, min(first + _PAIRS, half))
            count = here.stop - first
            radius, angle, top = radii[:count], angles[:count], bits[:count]
            _draw_radii(words[here], radius, deviation, source)
            np.right_shift(words[half:][here], np.uint64(11), out=top)
            np.multiply(top.view(np.int64), 2.0 * math.pi * 2.0**-53, out=angle)
            x, y = cosines[here], sines[here]
            torch.cos(torch.from_numpy(angle), out=torch.from_numpy(x))  # a third of numpy's time
            x *= radius
            yield x
            torch.sin(torch.from_numpy(angle), out=torch.from_numpy(angle))
            np.multiply(angle[: len(y)], radius[: len(y)], out=y)
            yield y


def _draw_radii(
    words: npt.NDArray[np.uint64], radius: npt.NDArray[np.float64], deviation: float, source: Source
) -> None:
    """Make radii of `words`, whose law is that of the length of two Gaussians of this deviation."""
    np.add(words, 0.5, out=radius)
    radius *= 2.0**-64
    far = np.flatnonzero(words < _FAR)
    if len(far):
        more = np.frombuffer(source(8 * len(far)), dtype="<u8").astype(np.float64)
        radius[far] = (words[far].astype(np.float64) + (more + 0.5) * 2.0**-64) * 2.0**-64
    np.log(radius, out=radius)  # of at most 1
    radius *= -2.0 * deviation**2
    np.sqrt(radius, out=radius)


def noise_grid(sensitivity: float, size: int) -> float:
    """Return the grid step for `size` coordinates: the largest power of two <= STRETCH * sensitivity / sqrt(size).

    Then rounding two vectors to the grid stretches their distance by at most step * sqrt(size)
    <= STRETCH * sensitivity.
    """
    return 2.0 ** math.floor(math.log2(STRETCH * sensitivity / math.sqrt(max(size, 1))))


def grid_gaussian(
    count: int, noise_multiplier: float, sensitivity: float, grid: float, source: Source, whole: int | None = None
) -> npt.NDArray[np.float64]:
    """Return Gaussian noise rounded to multiples of `grid`, shape (count,), float64; of `whole` coordinates, or all.

    Guarantee: added to a value that was itself rounded to `grid`, the release costs no more than the ideal
    Gaussian mechanism with this `noise_multiplier` on values of L2 sensitivity `sensitivity` before rounding;
    the standard deviation is noise_multiplier * (sensitivity + grid * sqrt(whole)).
    Unit and neighbours: those for which `sensitivity` holds.
    Reference: module docstring.
    """
    noise = np.empty(count, dtype=np.float64)
    deviation = noise_multiplier * (sensitivity + grid * math.sqrt(count if whole is None else whole)) / grid
    for piece in _filled(noise, deviation, source):
        np.rint(piece, out=piece)
        piece *= grid
    return noise
