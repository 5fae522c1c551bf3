"""Noise correlated over steps, made step by step: row t of C^-1 z when step t asks for it.

A stream remembers what it must of earlier noise, in memory alone. That memory is as secret as the noise: whoever
reads it can take noise out of what was released. It is never written to a file, and a process that starts again
begins a new stream, whose noise is independent of the old one's.

Rounding. Let r_t be the release of step t, x_t its clipped sum rounded to a grid, w_t = r_t - x_t the noise in it,
also on the grid. The Toeplitz streams draw z_t and take w_t = round(z_t - sum_{j >= 1} c_j w_{t-j}), with the rounded
noise of earlier steps. So r_t = round(z_t + sum_{j >= 0} c_j x_{t-j} - sum_{j >= 1} c_j r_{t-j}): given earlier
releases, it is a function of row t of C x + z alone, and rounding is post-processing of the ideal matrix mechanism,
at every step, whatever the rounding did before. Likewise each estimate of a tree's node, rounded, is a function of
noisy node sums.

All numbers here are in units of the grid. Reference for the recursions: Choquette-Choo et al. 2023, "(Amplified)
banded matrix factorization", algorithm 9; McMahan et al. 2024, algorithm 1; Kairouz et al. 2021, appendix.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from choral.privacy.accounting.matrix_strategies import Banded, Buffered, Floats, Strategy, estimate_variance
from choral.privacy.errors import PrivacyError
from choral.privacy.noise.gaussian import Source, gaussian

_PART = 1 << 14  # coordinates handled at once: their copies in float64 stay in the second-level cache
_LARGEST = 2.0**31 - 1.0

Integers = npt.NDArray[np.int32]


class Stream(Protocol):
    """What makes noise: a state, empty at first."""

    def next(self, count: int, scale: float, source: Source) -> Floats:
        """Return the noise of the next step, whole numbers, shape (count,), float64.

        scale: standard deviation of z, in the same unit. source: where its randomness comes from.
        Raises: PrivacyError (another `count` than before, or noise too large for the memory).
        """
        ...

    @property
    def size(self) -> int:
        """Bytes of memory held."""
        ...


def stream(strategy: Strategy) -> Stream:
    """Return a new stream of noise for `strategy`."""
    if isinstance(strategy, Banded):
        return BandedStream(strategy)
    return BufferedStream(strategy) if isinstance(strategy, Buffered) else TreeStream()


class BandedStream:
    """w_t = z_t - sum_{j=1}^{b-1} c_j w_{t-j}; keeps b - 1 vectors of 32-bit integers."""

    def __init__(self, strategy: Banded) -> None:
        self._weights = np.array(strategy.coefficients[1:])
        self._past: Integers = np.zeros((0, 0), np.int32)  # a ring: row t mod (b - 1) holds w_t
        self._made = 0

    def __repr__(self) -> str:
        return f"BandedStream(bands={len(self._weights) + 1}, made={self._made})"

    def next(self, count: int, scale: float, source: Source) -> Floats:
        """See :meth:`Stream.next`."""
        if self._made == 0:
            self._past = np.zeros((len(self._weights), count), np.int32)
        _check_length(self._past.shape[1], count)
        noise = _scaled(count, scale, source)
        if len(self._weights):
            slot = self._made % len(self._weights)
            weights = np.roll(self._weights[::-1], slot)  # row slot holds the oldest, w_{t-(b-1)}
            for part in _parts(count):
                noise[part] -= weights @ self._past[:, part].astype(np.float64)
                self._past[slot, part] = _whole(noise[part])
        else:
            np.rint(noise, out=noise)
        self._made += 1
        return noise

    @property
    def size(self) -> int:
        """Bytes of memory held."""
        return self._past.nbytes


class BufferedStream:
    """w_t = z_t - sum_i weights[i] s_i, then s_i <- decays[i] s_i + w_t; keeps one vector of float64 for each i."""

    def __init__(self, strategy: Buffered) -> None:
        self._decays, self._weights = np.array(strategy.decays)[:, None], np.array(strategy.weights)
        self._buffers: Floats = np.zeros((0, 0))
        self._made = 0

    def __repr__(self) -> str:
        return f"BufferedStream(buffers={len(self._weights)}, made={self._made})"

    def next(self, count: int, scale: float, source: Source) -> Floats:
        """See :meth:`Stream.next`."""
        if self._made == 0:
            self._buffers = np.zeros((len(self._weights), count))
        _check_length(self._buffers.shape[1], count)
        noise = _scaled(count, scale, source)
        for part in _parts(count):
            buffers = self._buffers[:, part]
            noise[part] -= self._weights @ buffers
            np.rint(noise[part], out=noise[part])
            buffers *= self._decays
            buffers += noise[part]
        self._made += 1
        return noise

    @property
    def size(self) -> int:
        """Bytes of memory held."""
        return self._buffers.nbytes


class TreeStream:
    """N_t - N_{t-1}, N_t the sum of the estimates of the nodes that make up steps 1 to t.

    Keeps one vector of 32-bit integers for each level of the tree, and one for N_t.
    """

    def __init__(self) -> None:
        self._open: list[tuple[int, Integers]] = []  # level and estimate of the nodes that make up the steps so far
        self._total: Floats | None = None

    def __repr__(self) -> str:
        return f"TreeStream(levels={[level for level, _ in self._open]})"

    def next(self, count: int, scale: float, source: Source) -> Floats:
        """See :meth:`Stream.next`."""
        if self._total is None:
            self._total = np.zeros(count)
        _check_length(len(self._total), count)
        level, node = 0, _whole(_scaled(count, scale, source))
        while self._open and self._open[-1][0] == level:
            children = self._open.pop()[1].astype(np.float64) + node
            both = 2.0 * estimate_variance(level)  # of the children's sum; the parent's own noise has variance 1
            level += 1
            own = _scaled(count, scale, source)
            node = _whole((both * own + children) / (1.0 + both))
        self._open.append((level, node))
        before, self._total = self._total, np.sum([estimate for _, estimate in self._open], axis=0, dtype=np.float64)
        return self._total - before

    @property
    def size(self) -> int:
        """Bytes of memory held."""
        return sum(node.nbytes for _, node in self._open) + (0 if self._total is None else self._total.nbytes)


def _scaled(count: int, scale: float, source: Source) -> Floats:
    noise = gaussian(count, source)
    noise *= scale
    return noise


def _whole(values: Floats) -> Integers:
    """Round `values` in place and return them as 32-bit integers. Raises: PrivacyError (too large)."""
    np.rint(values, out=values)
    if len(values) and not float(np.abs(values).max()) <= _LARGEST:
        raise PrivacyError(
            "the noise does not fit 32 bits in units of the grid; nothing was released",
            hint="Use mechanism='buffered', fewer parameters or a larger epsilon.",
        )
    return values.astype(np.int32)


def _check_length(before: int, now: int) -> None:
    if before != now:
        raise PrivacyError(
            f"the noise so far is for {before} parameters, now there are {now}",
            hint="Train the same parameters in every round; noise correlated over steps cannot change its length.",
        )


def _parts(count: int) -> list[slice]:
    return [slice(start, min(start + _PART, count)) for start in range(0, count, _PART)]
