"""Batches that are fixed in advance, and one party's rows of noise that a banded matrix correlates over steps.

**Batches.** Which of a party's steps a record takes part in follows from its place in the data and from the number of
the step on the party's ledger: one in every `separation`, by structure, in a process that starts again, too. Nothing is
drawn, and nothing is claimed for who is in a batch being secret. It takes the records to be in the same order for the
whole of a plan.

**Rows.** What a party adds in a row t of all parties' sums is w_t = z_t - sum over j >= 1 of c_j w_(t - j): row t of
C^-1 z, z fresh. Rows have the numbers that all parties of a sum agree on, and a party makes each at most once, in
rising order, as its ledger remembers after a restart. Where it did not make the row before (it missed a sum, a round
was given up, its process is new), it **begins anew**: nothing is taken back of what came before. So what it takes back
was that many rows ago for everybody, as the lemma in docs/noise-in-shares.md needs. It cannot be left out: for a party
that counted its own vectors instead, a record's two rows could be nearer than C has bands.

Earlier rows are kept as they were drawn, in float64, not as they were rounded: the w of all rows are then C^-1 z, and
rounding is that of independent noise. They are as secret as the noise, and in memory alone.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from choral.privacy.errors import PrivacyError
from choral.privacy.noise.gaussian import Source, gaussian

Floats = npt.NDArray[np.float64]


class NoiseRows:
    """The rows of one party, in units of the deviation of z.

    coefficients: 1, c_1, ..., c_(b-1). last: the last row that an earlier process made, of which nothing is known.
    """

    def __init__(self, coefficients: Sequence[float], last: int | None = None) -> None:
        self._weights = coefficients[1:]
        self._past: deque[Floats] = deque(maxlen=len(self._weights))  # the latest first
        self._last = last
        self._told: int | None = None

    def __repr__(self) -> str:
        return f"NoiseRows(bands={len(self._weights) + 1}, last={self._last})"

    @property
    def last(self) -> int | None:
        """The last row that was made; None before the first."""
        return self._last

    def at(self, row: int) -> None:
        """Say which row the next noise is for. Raises: PrivacyError unless it is later than all that were made."""
        if isinstance(row, bool) or not isinstance(row, int) or row < 0:
            raise PrivacyError(f"row is {row!r:.80}, expected an integer >= 0")
        if self._last is not None and row <= self._last:
            raise PrivacyError(
                f"row {row} of the noise is asked for, and row {self._last} was made before",
                hint="A row that was made is spent, whether or not it was opened: the next attempt is the next row.",
            )
        self._told = row

    def told(self) -> int:
        """Return which row comes next. Raises: PrivacyError unless that was said."""
        if self._told is None:
            raise PrivacyError(
                "correlated noise, and nothing said which row of all parties' sums the next vector is for",
                hint="party.at(row) before each step, with the number that all parties of the sum agree on.",
            )
        return self._told

    def next(self, count: int, source: Source) -> Floats:
        """Return the noise of the row that was told, shape (count,); it is not to be changed.

        Raises: PrivacyError (no row; another count than before).
        """
        row, self._told = self.told(), None
        if self._last is None or row != self._last + 1:
            self._past.clear()
        self._last = row
        noise = gaussian(count, source)
        if self._past and len(self._past[0]) != count:
            raise PrivacyError(f"the noise so far is for {len(self._past[0])} numbers, now there are {count}")
        for weight, before in zip(self._weights, self._past, strict=False):
            noise -= weight * before
        self._past.appendleft(noise)
        return noise


class FixedBatch(Sampler[list[int]]):
    """The rows of one step: the records of its batch, then the first record up to `rows`.

    number: asked for which step it is, from 0. `taken` says which rows are records of the batch, once it was asked.
    """

    def __init__(
        self, size: int, separation: int, rows: int, *, holder: str, padded: bool, number: Callable[[], int]
    ) -> None:
        self.size, self.separation, self.rows, self.padded, self.number = size, separation, rows, padded, number
        self.first = first_of(holder, separation)
        self.taken: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[list[int]]:
        records = batch_of_step(self.size, self.separation, self.first, self.number())
        filled = self.rows if self.padded else max(len(records), 1)
        self.taken, found = np.arange(filled) < len(records), np.zeros(filled, dtype=np.int64)
        found[: len(records)] = records
        yield found.tolist()


def batch_of_step(size: int, separation: int, first: int, number: int) -> npt.NDArray[np.int64]:
    """Return the places, of `size`, of the records in step `number`: those p for which p + first leaves it by m."""
    return np.arange((number - first) % separation, size, separation, dtype=np.int64)


def first_of(holder: str, separation: int) -> int:
    """Return the step of a party's first record: by its name, so that small parties' records spread over all steps."""
    return int.from_bytes(hashlib.sha256(b"choral fixed batches " + holder.encode()).digest()[:8], "big") % separation
