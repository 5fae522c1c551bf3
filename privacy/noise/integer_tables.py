"""Integer noise at training speed: inversion of an exact cumulative table, two random bytes for most numbers.

:func:`discrete_gaussian_table` and :func:`skellam_table` hold a law's cumulative probabilities, computed with integers
to 320 bits. A draw is the value whose interval a uniform number in [0, 1) falls into. The uniform number's bits are
drawn as they are needed: the first `cell_bits` decide, by one lookup, wherever their cell lies inside one interval; the
others are drawn further, to 64 bits, and where that is still a tie, which happens once in 2^64 draws and boundaries, to
256. There are no floats.

**Distance from the law.** Let p be the law and p' that of the draws. In total variation |p - p'| < 2^-200: the table
leaves out values beyond `reach`, whose mass is below 2^-210; its entries are truncated at 2^-320, and the recurrences
below have at most 2^20 of them, each adding errors below 2^(50 - 320); uniform numbers are cut at 2^-256 (a tie there
takes the lower value). A training of 2^60 draws is therefore within 2^-140 of one that draws from the law itself, so
(epsilon, delta) becomes (epsilon, delta + (1 + e^epsilon) 2^-140): nothing, at the deltas >= 1e-10 that are accounted.

- Discrete Gaussian: w(k) = exp(-k^2 / (2 v)) by w(k) = w(k - 1) r(k), r(k) = g^(2k - 1), g = exp(-1 / (2 v)) from a
  correctly rounded decimal exponential (IEEE 754-2008 style ``Decimal.exp``). Mass beyond reach = 17.5 sqrt(v) is below
  2 exp(-153) = 2^-219.
- Skellam: p(k) = e^-v I_k(v) by Miller's backward recurrence I_(k-1) = I_(k+1) + (2 k / v) I_k from far out, where
  the mass is below 2^-220, normalised by I_0 + 2 sum I_k (Abramowitz and Stegun 9.6.26 and 9.12).
"""

from __future__ import annotations

from array import array
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import asinh, ceil, isqrt, sqrt
from typing import Literal

import numpy as np
import numpy.typing as npt

from choral.errors import ConfigError
from choral.privacy.noise.gaussian import Source

Law = Literal["discrete_gaussian", "skellam"]

LARGEST_DEVIATION = 1 << 14  # tables of half a million entries, made in half a second; more brings no accuracy
SMALLEST_VARIANCE = Fraction(1, 100)
_PRECISION = 320  # bits of a table's entries while it is computed
_UNIFORM = 256  # bits of a uniform number, at most
_CONTEXT = Context(prec=110)  # decimal digits: 365 bits


class CumulativeTable:
    """A symmetric law on the integers -reach..reach, ready to be drawn from.

    law, variance: what it is; `reach`: the largest absolute value of a draw. The module's docstring says how far the
    draws are from the law. Obtain it from :func:`table`, which keeps the latest ones.
    Raises: ConfigError (variance not a Fraction from 1/100 to LARGEST_DEVIATION^2).
    """

    def __init__(self, law: Law, variance: Fraction) -> None:
        if isinstance(variance, bool) or not isinstance(variance, int | Fraction):
            raise ConfigError(f"variance is a {type(variance).__name__}, expected an integer or a Fraction")
        if not SMALLEST_VARIANCE <= variance <= LARGEST_DEVIATION**2:
            raise ConfigError(
                f"the variance of the integer noise is {float(variance):.6g}, expected {float(SMALLEST_VARIANCE):g} to"
                f" {LARGEST_DEVIATION}^2",
                hint="Use more bits if it is too small, fewer if it is too large.",
            )
        self.law, self.variance = law, Fraction(variance)
        high = np.frombuffer(array("Q", [entry >> (_UNIFORM - 64) for entry in self._cumulative()]), np.uint64)
        self.reach = len(high) // 2
        self._high = high  # floor(2^64 P(X <= k)) for k = -reach, ..., reach - 1
        # At 64 cells per deviation, boundaries fall into one cell in eight; 16 bits are a whole word.
        self.cell_bits = min(max(16, ceil(64.0 * sqrt(variance)).bit_length()), 22)
        self._guide = self._cells()

    def __repr__(self) -> str:
        return f"CumulativeTable({self.law}, variance={float(self.variance):.6g}, reach={self.reach})"

    def draw(self, count: int, source: Source) -> npt.NDArray[np.int32]:
        """Return `count` independent draws, shape (count,), int32."""
        if count < 0:
            raise ConfigError(f"count is {count}, expected >= 0")
        if self.cell_bits == 16:
            cells = np.frombuffer(source(2 * count), "<u2").astype(np.intp)
        else:
            cells = (np.frombuffer(source(4 * count), "<u4") >> np.uint32(32 - self.cell_bits)).astype(np.intp)
        marked = self._guide.take(cells, mode="clip")  # never out of range; "clip" is the fast way
        undecided = np.flatnonzero(marked & 1)
        result = marked >> 1
        if len(undecided):
            result[undecided] = self._refine(cells[undecided], result[undecided], source)
        return result

    def _refine(
        self, cells: npt.NDArray[np.intp], least: npt.NDArray[np.int32], source: Source
    ) -> npt.NDArray[np.int32]:
        """The values for uniform numbers that begin with `cells`, by 64 bits of them, and more where those tie.

        least: the smallest values that begin so; there are few more.
        """
        rest = np.frombuffer(source(8 * len(cells)), "<u8") >> np.uint64(self.cell_bits)
        words = cells.astype(np.uint64) << np.uint64(64 - self.cell_bits) | rest
        places = least.astype(np.intp) + self.reach  # how many boundaries are at most the word: count on from there
        going = np.arange(len(cells))
        for _ in range(3):
            going = going[places[going] < len(self._high)]
            going = going[self._high[places[going]] <= words[going]]
            places[going] += 1
        if len(going):  # in the tails a cell has many boundaries
            places[going] = np.searchsorted(self._high, words[going], side="right")
        # A boundary whose first 64 bits equal the word's lies on one side or the other of the uniform number.
        for tie in np.flatnonzero(self._high[np.maximum(places - 1, 0)] == words):
            places[tie] = self._exact_place(int(words[tie]), source)
        return (places - self.reach).astype(np.int32)

    def _exact_place(self, word: int, source: Source) -> int:
        uniform = word << (_UNIFORM - 64) | int.from_bytes(source((_UNIFORM - 64) // 8), "big")
        return sum(1 for entry in self._cumulative() if entry <= uniform)

    def _cells(self) -> npt.NDArray[np.int32]:
        """For each cell twice its smallest value, and 1 more if a boundary lies in it."""
        starts = np.arange(1 << self.cell_bits, dtype=np.uint64) << np.uint64(64 - self.cell_bits)
        ends = starts | np.uint64((1 << (64 - self.cell_bits)) - 1)
        first = np.searchsorted(self._high, starts, side="left")  # boundaries whose first 64 bits are smaller
        last = np.searchsorted(self._high, ends, side="right")
        return np.asarray(2 * (first - self.reach) + (first != last), dtype=np.int32)

    def _cumulative(self) -> list[int]:
        """P(X <= k) for k = -reach, ..., reach - 1, as integers over 2^256."""
        half = _gaussian_weights(self.variance) if self.law == "discrete_gaussian" else _skellam_weights(self.variance)
        total = 2 * sum(half) - half[0]
        below = [(weight << _UNIFORM) // total for weight in accumulate(reversed(half[1:]))]
        most = (1 << _UNIFORM) - 1
        return below + [
            min((1 << _UNIFORM) - entry, most) for entry in reversed(below)
        ]  # P(X <= k) = 1 - P(X <= -k - 1)


@lru_cache(maxsize=4)
def table(law: Law, variance: Fraction) -> CumulativeTable:
    """The :class:`CumulativeTable` of this law; a second or so for the largest variances, then kept."""
    return CumulativeTable(law, variance)


def _gaussian_weights(variance: Fraction) -> list[int]:
    """exp(-k^2 / (2 variance)) for k = 0, ..., reach, times 2^320."""
    exponent = _CONTEXT.divide(Decimal(-variance.denominator), Decimal(2 * variance.numerator))
    base = int(_CONTEXT.multiply(_CONTEXT.exp(exponent), _CONTEXT.power(Decimal(2), _PRECISION)))
    square = base * base >> _PRECISION
    weight, ratio = 1 << _PRECISION, base
    weights = []
    for _ in range(isqrt(ceil(306 * variance)) + 2):
        weights.append(weight)
        weight = weight * ratio >> _PRECISION
        ratio = ratio * square >> _PRECISION
    return weights


def _skellam_weights(variance: Fraction) -> list[int]:
    """I_k(variance) for k = 0, ..., reach, up to a factor."""
    a, b = variance.numerator, 2 * variance.denominator
    # Chernoff: P(X >= k) <= exp(-k asinh(k/v) + sqrt(k^2 + v^2) - v); this k makes it less than 2^-220.
    reach = _skellam_reach(variance)
    beyond, weight = 0, 1 << _PRECISION
    weights = []
    for k in range(reach + 1, 0, -1):
        weights.append(weight)
        beyond, weight = weight, beyond + k * b * weight // a
    weights.append(weight)
    weights.reverse()
    scale = max(weight.bit_length() - 2 * _PRECISION, 0)  # I_0 may have grown by more bits than are needed
    return [entry >> scale for entry in weights]


def _skellam_reach(variance: Fraction) -> int:
    v = float(variance)

    def exponent(k: int) -> float:
        return k * asinh(k / v) - sqrt(k * k + v * v) + v

    low, high = 0, 1
    while exponent(high) < 153.0:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if exponent(middle) < 153.0 else (low, middle)
    return high
