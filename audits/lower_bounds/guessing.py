"""Guesses from scores, and how often they are right, without looking at the answers first.

The number of guesses is fixed before the coins are known (`FixedShares`), each of several numbers paying its part of
the error probability (Bonferroni), or is chosen on one half of the canaries and judged on the other (`SampleSplit`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from choral.audits.lower_bounds import one_run
from choral.audits.lower_bounds.roc import Bools, Floats
from choral.errors import ConfigError

LowerBound = Callable[[int, int, int, float], float]
"""From (canaries, guesses, right, beta) to a lower bound."""

DEFAULT_SHARES = (0.02, 0.1, 0.4, 1.0)
_GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


@dataclass(frozen=True)
class GuessingOutcome:
    """The bound of one procedure with its counts. tried: bounds that share the error probability."""

    epsilon: float
    canaries: int
    guesses: int
    right: int
    tried: int


@dataclass(frozen=True)
class FixedShares:
    """Guess these shares of the canaries, fixed in advance; the largest of their bounds counts, at beta / (how many).

    Raises: ConfigError for no share, or one outside (0, 1].
    """

    shares: tuple[float, ...] = DEFAULT_SHARES

    def __post_init__(self) -> None:
        numbers = isinstance(self.shares, tuple) and all(isinstance(share, int | float) for share in self.shares)
        if not numbers or not self.shares or not all(0.0 < share <= 1.0 for share in self.shares):
            raise ConfigError(f"shares are {self.shares}, expected one or more in (0, 1]", hint="0.1 guesses a tenth")

    @property
    def words(self) -> str:
        shown = ", ".join(f"{share:g}" for share in self.shares)
        if len(self.shares) == 1:
            return f"the share guessed, {shown}, was fixed in advance"
        return f"the shares guessed, {shown}, were fixed in advance; Bonferroni over {len(self.shares)}"

    def counts(self, canaries: int) -> tuple[int, ...]:
        return tuple(sorted({one_run.guesses_of(canaries, share) for share in self.shares}))

    def run(self, scores: Floats, members: Bools, bound: LowerBound, beta: float) -> GuessingOutcome:
        ordered = members[ranking(scores)]
        counts = self.counts(len(ordered))
        part = beta / len(counts)
        found = [(bound(len(ordered), r, right(ordered, r), part), -r) for r in counts]
        best, guesses = max(found)
        return GuessingOutcome(best, len(ordered), -guesses, right(ordered, -guesses), len(counts))

    def tests(self, canaries: int, beta: float) -> list[tuple[int, int, float]]:
        """(canaries, guesses, error probability) of each bound that is computed."""
        counts = self.counts(canaries)
        return [(canaries, r, beta / len(counts)) for r in counts]

    def ceiling(self, canaries: int, bound: LowerBound, beta: float) -> float:
        counts = self.counts(canaries)
        return max(bound(canaries, r, r, beta / len(counts)) for r in counts)


@dataclass(frozen=True)
class SampleSplit:
    """Choose the share of guesses on a random half of the canaries; judge it on the other half."""

    grid: tuple[float, ...] = _GRID

    @property
    def words(self) -> str:
        return "the share guessed was chosen on one half of the canaries and judged on the other half"

    def run(self, scores: Floats, members: Bools, bound: LowerBound, beta: float) -> GuessingOutcome:
        mixed = shuffled(scores)
        first, second = mixed[::2], mixed[1::2]
        trial = members[first][ranking(scores[first])]
        counts = [one_run.guesses_of(len(trial), share) for share in self.grid]
        best = int(np.argmax([bound(len(trial), r, right(trial, r), beta) for r in counts]))
        return FixedShares((self.grid[best],)).run(scores[second], members[second], bound, beta)

    def tests(self, canaries: int, beta: float) -> list[tuple[int, int, float]]:
        """The same; of all shares that the first half may choose."""
        return [(canaries // 2, one_run.guesses_of(canaries // 2, share), beta) for share in self.grid]

    def ceiling(self, canaries: int, bound: LowerBound, beta: float) -> float:
        return max(FixedShares((share,)).ceiling(canaries // 2, bound, beta) for share in self.grid)


Guessing = FixedShares | SampleSplit


def ranking(scores: Floats) -> npt.NDArray[np.int64]:
    """Places from the highest score to the lowest. Ties are broken by a shuffle: in the order of the file they would
    follow the memberships, where a file lists members first."""
    mixed = shuffled(scores)
    return mixed[np.argsort(-scores[mixed], kind="stable")]


def shuffled(scores: Floats) -> npt.NDArray[np.int64]:
    """A permutation that depends on the scores alone."""
    return stream_of(scores).permutation(len(scores))


def stream_of(scores: Floats, *key: int) -> np.random.Generator:
    """Random numbers that depend on the scores alone, so that a report can be computed again to the digit.

    Nobody is protected by them. key: of a stream of its own, independent of those of other keys.
    """
    digest = hashlib.sha256(np.ascontiguousarray(scores, dtype="<f8").tobytes()).digest()
    return np.random.default_rng(np.random.SeedSequence(int.from_bytes(digest), spawn_key=key))


def right(ordered: Bools, guesses: int) -> int:
    """Right guesses: "in" for the first half of ``guesses`` of the ordered canaries, "out" for as many at the end."""
    says_in = (guesses + 1) // 2
    says_out = guesses - says_in
    return int(ordered[:says_in].sum()) + int((~ordered[len(ordered) - says_out :]).sum())
