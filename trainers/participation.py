"""Who takes part in a round, as it is in the world: cohorts, hours of the day, slow devices, losses. Pure functions.

A round at a simulated time goes: those who are available now are asked (:func:`available`), some are chosen
(:func:`fixed_cohort`, :func:`poisson_cohort`), and of these the ones that answer in time count (:func:`on_time`), less
those that vanish at some step (:func:`lost_at`). All randomness is numpy's, from a seed: it is for data order and
simulation, not for privacy.

**No amplification.** A server that picks the cohort sees who is in it, so what a round costs in privacy must be charged
as if every party took part in every round (sampling rate 1): the sampling here hides nobody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from choral.errors import ConfigError

DAY = 24 * 3600.0


def stream(seed: int, number: int, purpose: str) -> Generator:
    """The generator of one purpose in round ``number``; the same for the same arguments, unrelated for others."""
    digest = hashlib.sha256(f"participation|{seed}|{number}|{purpose}".encode()).digest()
    return default_rng(np.frombuffer(digest, np.uint32))


def fixed_cohort(parties: int, size: int, random: Generator) -> NDArray[np.int64]:
    """``size`` different numbers below ``parties``, each set equally likely, rising.

    Time and memory in proportion to ``size``, not to ``parties`` (Floyd's method, Bentley and Floyd 1987).
    Raises: ConfigError unless 1 <= size <= parties.
    """
    if not 1 <= size <= parties:
        raise ConfigError(f"expected a cohort of 1 to {parties}, got {size}", hint="lower participation.cohort")
    chosen: set[int] = set()
    for top in range(parties - size, parties):
        drawn = int(random.integers(top + 1))
        chosen.add(top if drawn in chosen else drawn)
    return np.array(sorted(chosen), np.int64)


def poisson_cohort(parties: int, rate: float, random: Generator) -> NDArray[np.int64]:
    """Each number below ``parties`` with chance ``rate``, independently, rising; possibly none.

    A binomial size, then a fixed cohort of it, which is the same law in time of the cohort's size.
    Raises: ConfigError unless parties >= 1 and 0 < rate <= 1.
    """
    if parties < 1 or not 0 < rate <= 1:
        raise ConfigError(f"expected parties >= 1 and 0 < rate <= 1, got {parties} and {rate:g}", hint="e.g. 0.01")
    size = int(random.binomial(parties, rate))
    return fixed_cohort(parties, size, random) if size else np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class Availability:
    """Daily hours in which devices may be used (idle, charging, on free Wi-Fi: Bonawitz et al. 2019, section 2).

    peak: chance at the best hour; trough: at the worst, twelve hours from it. hour: local, of the best, 0 to 24.
    Raises: ConfigError unless 0 <= trough <= peak <= 1 and 0 <= hour < 24.
    """

    peak: float = 1.0
    trough: float = 1.0
    hour: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.trough <= self.peak <= 1 or not 0 <= self.hour < 24:
            raise ConfigError(
                f"expected 0 <= trough <= peak <= 1 and 0 <= hour < 24; got {self.trough:g}, {self.peak:g},"
                f" {self.hour:g}",
                hint="1 and 1 is always available",
            )

    def chance(self, seconds: float, zones: NDArray[np.float64]) -> NDArray[np.float64]:
        """At simulated time ``seconds`` for parties whose clocks are ``zones`` hours ahead: a cosine over the day."""
        phase = 2 * np.pi * ((seconds / 3600.0 + zones) - self.hour) / 24.0
        middle, swing = (self.peak + self.trough) / 2, (self.peak - self.trough) / 2
        chance: NDArray[np.float64] = middle + swing * np.cos(phase)
        return chance


def available(chances: NDArray[np.float64], random: Generator) -> NDArray[np.bool_]:
    """Who of some parties is there. chances: in [0, 1], shape (m,)."""
    there: NDArray[np.bool_] = random.random(len(chances)) < chances
    return there


def durations(
    examples: NDArray[np.int64], *, start: float, per_example: float, spread: float, random: Generator
) -> NDArray[np.float64]:
    """Simulated seconds until a party's answer: (start + per_example n_k) times a lognormal with median 1.

    spread: standard deviation of the logarithm; 0 makes all devices alike, 1 gives stragglers five times as slow.
    Raises: ConfigError for negative or infinite arguments.
    """
    if not all(0 <= value < np.inf for value in (start, per_example, spread)):
        raise ConfigError(
            f"expected start, per_example and spread >= 0, got {start:g}, {per_example:g}, {spread:g}",
            hint="seconds, seconds and a standard deviation",
        )
    median = start + per_example * examples.astype(np.float64)
    seconds: NDArray[np.float64] = median * np.exp(spread * random.standard_normal(len(examples)))
    return seconds


def on_time(seconds: NDArray[np.float64], deadline: float) -> NDArray[np.bool_]:
    """Whose answer comes by the deadline. Raises: ConfigError unless deadline > 0 (infinity waits for all)."""
    if not deadline > 0:
        raise ConfigError(f"expected deadline > 0 seconds, got {deadline:g}", hint="inf waits for everybody")
    there: NDArray[np.bool_] = seconds <= deadline
    return there


def lost_at(parties: int, chances: Sequence[float], random: Generator) -> NDArray[np.int64]:
    """The step at which each of some parties vanishes, ``len(chances)`` for those that stay; shape (parties,).

    chances: per step of the round, of a party that is still there. A party that is lost stays lost in that round.
    Raises: ConfigError for a chance outside [0, 1].
    """
    if not all(0 <= chance <= 1 for chance in chances):
        raise ConfigError("expected chances in [0, 1] of being lost at each step", hint="0 loses nobody")
    step = np.full(parties, len(chances), np.int64)
    for place in reversed(range(len(chances))):
        step[random.random(parties) < chances[place]] = place
    return step


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Simulated time. first: seconds at which round 1 begins. period: from one round's start to the next, at least.

    Raises: ConfigError for negative or infinite values.
    """

    first: float = 0.0
    period: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.first < np.inf and 0 <= self.period < np.inf):
            raise ConfigError(f"expected first, period >= 0 seconds, got {self.first:g}, {self.period:g}")

    def starts(self, lasted: Sequence[float]) -> list[float]:
        """When each round starts, if they last so long: the next begins a period later, or when the last has ended."""
        starts, now = [], self.first
        for seconds in lasted:
            starts.append(now)
            ended = now + seconds
            now += self.period
            while now < ended and self.period:
                now += self.period
            now = max(now, ended)
        return starts


ONCE_A_DAY = Clock(first=2 * 3600.0, period=DAY)
