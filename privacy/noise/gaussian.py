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
_CHUNK = 1 << 15  # Gaussians made at once: their buffers stay in the second-level cache
STRETCH = 2.0**-10  # by how much rounding to the grid may stretch the sensitivity, relative


def os_stream(count: int) -> bytes:
    """Return `count` random bytes: an AES-256-CTR keystream under a fresh key from the operating system."""
    return bytes(AES.new(os.urandom(32), AES.MODE_CTR, nonce=b"").encrypt(bytes(count)))


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
    for _ in _filled(result, source):
        pass
    return result


def _filled(result: npt.NDArray[np.float64], source: Source) -> Iterator[npt.NDArray[np.float64]]:
    """Fill `result` with standard Gaussians, a chunk at a time; yield each chunk, while it is in the cache."""
    most = (min(_CHUNK, len(result)) + 1) // 2
    radii, angles, bits = np.empty(most), np.empty(most), np.empty(most, dtype=np.uint64)
    for start in range(0, len(result), _CHUNK):
        chunk = result[start : start + _CHUNK]
        half = (len(chunk) + 1) // 2
        words = np.frombuffer(source(16 * half), dtype="<u8")
        radius, angle, top = radii[:half], angles[:half], bits[:half]
        np.add(words[:half], 0.5, out=radius)
        radius *= 2.0**-64
        far = np.flatnonzero(words[:half] < _FAR)
        if len(far):
            more = np.frombuffer(source(8 * len(far)), dtype="<u8").astype(np.float64)
            radius[far] = (words[far].astype(np.float64) + (more + 0.5) * 2.0**-64) * 2.0**-64
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(np.maximum(radius, 0.0, out=radius), out=radius)
        np.right_shift(words[half:], np.uint64(11), out=top)
        np.multiply(top.view(np.int64), 2.0 * math.pi * 2.0**-53, out=angle)
        cosines, sines = chunk[:half], chunk[half:]
        torch.cos(torch.from_numpy(angle), out=torch.from_numpy(cosines))  # a third of numpy's time
        cosines *= radius
        torch.sin(torch.from_numpy(angle), out=torch.from_numpy(angle))
        np.multiply(angle[: len(sines)], radius[: len(sines)], out=sines)
        yield chunk


def noise_grid(sensitivity: float, size: int) -> float:
    """Return the grid step for `size` coordinates: the largest power of two <= STRETCH * sensitivity / sqrt(size).

    Then rounding two vectors to the grid stretches their distance by at most step * sqrt(size)
    <= STRETCH * sensitivity.
    """
    return 2.0 ** math.floor(math.log2(STRETCH * sensitivity / math.sqrt(max(size, 1))))


def grid_gaussian(
    count: int, noise_multiplier: float, sensitivity: float, grid: float, source: Source
) -> npt.NDArray[np.float64]:
    """Return Gaussian noise rounded to multiples of `grid`, shape (count,), float64.

    Guarantee: added to a value that was itself rounded to `grid`, the release costs no more than the ideal
    Gaussian mechanism with this `noise_multiplier` on values of L2 sensitivity `sensitivity` before rounding;
    the standard deviation is noise_multiplier * (sensitivity + grid * sqrt(count)).
    Unit and neighbours: those for which `sensitivity` holds.
    Reference: module docstring.
    """
    noise = np.empty(count, dtype=np.float64)
    deviation = noise_multiplier * (sensitivity + grid * math.sqrt(count)) / grid
    for chunk in _filled(noise, source):
        chunk *= deviation
        np.rint(chunk, out=chunk)
        chunk *= grid
    return noise
