"""Who takes part in a round, as it is in the world: cohorts, hours of the day, slow devices, losses.

    federate(..., participation=Participation(cohort=100, availability=Availability(peak=0.3, trough=0.02),
                                              device=Device(start=20, per_example=0.1, spread=0.5), deadline=120,
                                              clock=ONCE_A_DAY, patience=3))

A round at a simulated time goes: some of those who are available now are asked (:meth:`Participation.select`), and of
these the ones that answer in time count (:meth:`Participation.late`), less those that vanish at some step
(:func:`lost_at`). All randomness is numpy's, from a seed: it is for data order and simulation, not for privacy. Only
who is asked comes from a secret of the run, drawn by the operating system, so that nobody picks a victim beforehand. A
round costs what those cost that it looks at, not what all parties would.

**No amplification.** A server that picks the cohort sees who is in it, so what a round costs in privacy must be charged
as if every party took part in every round (sampling rate 1): the sampling here hides nobody.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from choral.errors import ConfigError
from choral.protocols.interface import STEPS, Step
from choral.trainers.task import arguments

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

    Whether a party is there is drawn anew for each round, for each by itself.
    Raises: ConfigError unless 0 <= trough <= peak <= 1, 0 <= hour < 24, and all zones are finite, at least one.
    """

    peak: float = 1.0
    """Chance of a party to be there at the best hour of its day."""
    trough: float = 1.0
    """The same at the worst hour, twelve hours from the best; between them a cosine."""
    hour: float = 2.0
    """The best hour, local, 0 to 24."""
    zones: tuple[float, ...] = (0.0,)
    """Time zones, in hours ahead; each party lives in one of them, with equal chances, for the whole run."""

    def __post_init__(self) -> None:
        arguments.own_numbers(self, "Availability")
        arguments.instance(self.zones, "zones", (tuple, list), "hours, such as (-8, 0, 5.5)")
        zones = tuple(arguments.number(zone, "a zone", "hours, such as 5.5") for zone in self.zones)
        object.__setattr__(self, "zones", zones)
        if not 0 <= self.trough <= self.peak <= 1 or not 0 <= self.hour < 24:
            raise ConfigError(
                f"expected 0 <= trough <= peak <= 1 and 0 <= hour < 24; got {self.trough:g}, {self.peak:g},"
                f" {self.hour:g}",
                hint="1 and 1 is always available",
            )
        if not self.zones or not all(abs(zone) <= 24 for zone in self.zones):
            raise ConfigError(f"expected zones of -24 to 24 hours, got {self.zones}", hint="e.g. [-8, 0, 5.5]")

    @property
    def always(self) -> bool:
        return self.trough == 1

    def zone_of(self, seed: int, party: int) -> float:
        """Hours ahead of a party, by its number: the same in all rounds."""
        digest = hashlib.sha256(f"participation|{seed}|zone|{party}".encode()).digest()
        return self.zones[int.from_bytes(digest[:8]) % len(self.zones)]

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


def lost_at(parties: int, chances: Sequence[float], random: Generator) -> NDArray[np.int64]:
    """The step at which each of some parties vanishes, ``len(chances)`` for those that stay; shape (parties,).

    chances: per step of the round, of a party that is still there. One that drops out is gone for that round.
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
    """Simulated time, in seconds. Raises: ConfigError for negative or infinite values."""

    first: float = 0.0
    """Seconds after midnight at which round 1 begins."""
    period: float = 0.0
    """Seconds from one round's start to the next, at least; 86400 is once a day. 0: each begins when the last ends."""

    def __post_init__(self) -> None:
        arguments.own_numbers(self, "Clock")
        if not (0 <= self.first < np.inf and 0 <= self.period < np.inf):
            raise ConfigError(f"expected first, period >= 0 seconds, got {self.first:g}, {self.period:g}")

    def next(self, start: float, lasted: float) -> float:
        """When the next round starts: whole periods after this one, but not before this one has ended."""
        periods = self.period * max(1, math.ceil(lasted / self.period)) if self.period else 0.0
        return start + max(periods, lasted)


ONCE_A_DAY = Clock(first=2 * 3600.0, period=DAY)


@dataclass(frozen=True, kw_only=True)
class Device:
    """How long a party takes to answer: (start + per_example n_k) times a lognormal, drawn anew for each round.

    Raises: ConfigError for negative or infinite values.
    """

    start: float = 0.0
    """Seconds that every answer takes."""
    per_example: float = 0.0
    """Seconds more for each of the party's examples."""
    spread: float = 0.0
    """Standard deviation of the logarithm: 0 makes all alike, with 1 the slowest in twenty take five times as long."""

    def __post_init__(self) -> None:
        arguments.own_numbers(self, "Device")
        if not all(0 <= value < np.inf for value in (self.start, self.per_example, self.spread)):
            raise ConfigError(
                f"expected start, per_example and spread >= 0, got {self.start:g}, {self.per_example:g},"
                f" {self.spread:g}",
                hint="seconds, seconds and a standard deviation",
            )

    def draw(self, examples: Sequence[int], random: Generator) -> NDArray[np.float64]:
        """Simulated seconds until each answer, of parties with so many examples."""
        median = self.start + self.per_example * np.array(examples, np.float64)
        seconds: NDArray[np.float64] = median * np.exp(self.spread * random.standard_normal(len(examples)))
        return seconds


@dataclass(frozen=True, kw_only=True)
class Dropouts:
    """Chances, in each secure sum of a round, of a party that is still there to vanish before it takes a step.

    Who vanishes is gone for the rest of the round; its vector is in the sum from confirmation on. Raises: ConfigError
    for chances outside [0, 1).
    """

    keys: float = 0.0
    """Before it advertises keys."""
    shares: float = 0.0
    """Before it shares its secrets."""
    vector: float = 0.0
    """Before it sends its vector."""
    confirmation: float = 0.0
    """After its vector, before it confirms the survivors."""
    unmasking: float = 0.0
    """Before it helps to unmask the sum."""

    def __post_init__(self) -> None:
        arguments.own_numbers(self, "Dropouts")
        if not all(0 <= chance < 1 for chance in self.chances):
            raise ConfigError(f"expected chances in [0, 1) of being lost, got {self.chances}", hint="0 loses nobody")

    @property
    def chances(self) -> list[float]:
        """By step."""
        return [getattr(self, step) for step in STEPS]

    def draw(self, parties: Sequence[str], random: Generator) -> dict[str, Step]:
        """Who drops out in one sum, and the first step that it does not take."""
        if not any(self.chances):
            return {}
        places = lost_at(len(parties), self.chances, random)
        return {
            party: STEPS[place] for party, place in zip(parties, places.tolist(), strict=True) if place < len(STEPS)
        }


@dataclass(frozen=True, kw_only=True)
class Participation:
    """Who takes part in each round of a federation. By default everybody, always, at once.

    What a round that has too few parties left costs in privacy is charged as far as it came; patience says whether the
    run goes on after it. Raises: ConfigError for numbers out of range, and for both cohort and rate.
    """

    cohort: int | None = None
    """Parties to ask in each round, among those available; fewer if there are fewer. By default all available."""
    rate: float | None = None
    """Chance of each available party to be asked, in the place of a cohort (Poisson sampling)."""
    least: int | None = None
    """Fewest parties to begin a round with; by default the cohort, or half of those expected where there is none."""
    availability: Availability = field(default_factory=Availability)
    device: Device = field(default_factory=Device)
    deadline: float | None = None
    """Seconds after which answers no longer count; None waits for all."""
    dropouts: Dropouts = field(default_factory=Dropouts)
    clock: Clock = field(default_factory=Clock)
    draw: Literal["system", "seed"] = "system"
    """Who is asked is drawn by the operating system, so that nobody knows it before; or from the run's seed, which
    everybody knows: for rehearsals that are to be repeated."""
    patience: int = 0
    """Rounds in a row that may fail for too few survivors; each counts as a round, and leaves the model as it was."""

    def __post_init__(self) -> None:
        arguments.own_numbers(self, "Participation")
        for name, kind in (
            ("availability", Availability),
            ("device", Device),
            ("dropouts", Dropouts),
            ("clock", Clock),
        ):
            arguments.instance(getattr(self, name), f"participation.{name}", kind, f"{kind.__name__}(...)")
        arguments.one_of(self.draw, "participation.draw", ("system", "seed"))
        if self.cohort is not None and self.rate is not None:
            raise ConfigError("participation takes a cohort or a rate, not both", hint="leave one of them out")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ConfigError(f"expected 0 < participation.rate <= 1, got {self.rate:g}", hint="e.g. 0.01")
        if self.deadline is not None and not self.deadline > 0:
            raise ConfigError(f"expected participation.deadline > 0, got {self.deadline:g}", hint="in seconds")
        if self.patience < 0:
            raise ConfigError(f"expected participation.patience >= 0, got {self.patience}", hint="0 gives up at once")

    @property
    def everybody(self) -> bool:
        """Whether all parties are asked in every round."""
        return self.cohort is None and self.rate is None and self.availability.always

    @property
    def timed(self) -> bool:
        """Whether simulated time means anything."""
        given = (self.clock != Clock(), self.device != Device(), self.deadline is not None)
        return any(given) or not self.availability.always

    def expected(self, parties: int) -> int:
        """How many are asked if all are available, at least two."""
        if self.rate is not None:
            return min(parties, max(2, round(self.rate * parties)))
        return parties if self.cohort is None else self.cohort

    def fewest(self, parties: int) -> int:
        """How many a round begins with at least."""
        if self.least is not None:
            return self.least
        return self.cohort or max(2, -(-self.expected(parties) // 2))

    def select(self, parties: int, start: float, random: Generator, seed: int) -> NDArray[np.int64]:
        """The numbers of those who are asked at simulated time ``start``, rising, each set of a size equally likely.

        At most 1,000 + 100 cohorts are looked at to fill one.
        """

        def there(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
            if self.availability.always:
                return numbers
            zones = np.array([self.availability.zone_of(seed, number) for number in numbers.tolist()])
            present: NDArray[np.int64] = numbers[available(self.availability.chance(start, zones), random)]
            return present

        if self.rate is not None:
            return there(poisson_cohort(parties, self.rate, random))
        if self.cohort is None:
            return there(np.arange(parties))
        if self.availability.always:
            return fixed_cohort(parties, self.cohort, random)
        most = 1_000 + 100 * self.cohort
        if parties <= most:
            return np.sort(there(random.permutation(parties))[: self.cohort])
        looked: set[int] = set()
        found: list[int] = []
        while len(found) < self.cohort and len(looked) < most:
            drawn = random.integers(parties, size=2 * self.cohort).tolist()
            fresh = [number for number in dict.fromkeys(drawn) if number not in looked]
            looked.update(fresh)
            found += there(np.array(fresh, np.int64)).tolist()
        return np.sort(np.array(found[: self.cohort], np.int64))

    def late(self, seconds: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whose answer comes after the deadline."""
        late: NDArray[np.bool_] = seconds > (math.inf if self.deadline is None else self.deadline)
        return late

    def lasted(self, seconds: NDArray[np.float64], *, complete: bool) -> float:
        """Simulated seconds of a round. seconds: of those that answered. complete: all that should have done so.

        Until the last answer; or, where somebody is late, lost or was not found, until the deadline if there is one.
        """
        if not complete and self.deadline is not None:
            return self.deadline
        return float(seconds.max(initial=0.0))

    def record(self) -> dict[str, Any] | None:
        """As JSON data for the run's record, None for the default."""
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return None if self == Participation() else plain
