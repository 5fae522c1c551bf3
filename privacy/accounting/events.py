"""What was released, as immutable data: the events a ledger holds and an accountant reads; and neighbour relations.

How many records there are is **public**, and so are the batch size, and what is computed from both: the sampling rate,
the number of steps and the noise multiplier. They have to be: the noise of a released step shows its own size, and so
the number of records that it was calibrated for. A relation that changes that number ("add or remove one record") is
therefore not one that this training keeps, and no claim is made for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import msgspec

from choral.errors import ConfigError
from choral.privacy.accounting.banded_shares import BandedShares, participations
from choral.privacy.accounting.matrix_strategies import Strategy
from choral.privacy.accounting.plain_numbers import as_float, as_integer
from choral.privacy.noise.share_rounding import check_shares

_RATE = "The expected batch size over the number of records, such as 64 / 6400 = 0.01."

UNIT = "record"
ZERO_OUT = "zero out one record"  # one record is replaced by an empty one, which adds zero to every step
REPLACE_ONE = "replace one record"  # by any other
ADD_OR_REMOVE = "add or remove one record"  # as ledgers were worded once
NEIGHBOURS = ZERO_OUT
CLIENT_UNIT = "client"
CLIENT_NEIGHBOURS = "zero out one client: its update is the zero vector in every round"
RELATIONS = {UNIT: (ZERO_OUT, REPLACE_ONE, ADD_OR_REMOVE), CLIENT_UNIT: (CLIENT_NEIGHBOURS,)}  # that a ledger may state
_OLDER = f"{ZERO_OUT} (in older words: {ADD_OR_REMOVE})"


def relation_of(words: str) -> str:
    """Return the neighbour relation that is meant, and accounted for, by the words of a ledger or a run.

    Ledgers once said "add or remove one record". Their mechanism, and so their cost, is that of "zero out one record",
    which is how their claim reads.
    """
    return ZERO_OUT if words in (ADD_OR_REMOVE, _OLDER) else words


def check_relation(words: str, unit: str = UNIT) -> None:
    """Raise ConfigError unless a new promise for this unit may state these neighbours."""
    offered = [each for each in RELATIONS[unit] if each != ADD_OR_REMOVE]
    if not isinstance(words, str) or words not in offered:
        hint = "Take one of these, word for word."
        if isinstance(words, str) and words == ADD_OR_REMOVE:
            hint = "The number of records is public: the noise shows it. Take one of these, word for word."
        raise ConfigError(f"neighbours is {words!r:.80}, expected {' or '.join(map(repr, offered))}", hint=hint)


def replaces(neighbours: str) -> bool:
    """Whether the neighbours differ by a record replaced, not by one zeroed out. Raises: ConfigError."""
    meant = relation_of(neighbours)
    if meant not in (ZERO_OUT, REPLACE_ONE):
        raise ConfigError(f"neighbours is {neighbours!r:.80}, of which no record's cost is known")
    return meant == REPLACE_ONE


def stated(words: str) -> str:
    """Return what is said of the neighbour relation of a ledger or a run of these words."""
    return _OLDER if words == ADD_OR_REMOVE else words


class PoissonSampledGaussian(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="poisson_gaussian"
):
    """`steps` releases of the Poisson-sampled Gaussian mechanism.

    Each step takes every record independently with probability `sample_rate` (0 < q <= 1), sums contributions
    of L2 norm at most C and adds N(0, (noise_multiplier * C)^2) to every coordinate.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        _make_plain(self, ("sample_rate", "noise_multiplier"), ("steps",))
        if not 0.0 < self.sample_rate <= 1.0:
            raise ConfigError(f"sample_rate is {self.sample_rate}, expected 0 < sample_rate <= 1", hint=_RATE)
        if not self.noise_multiplier > 0.0:
            raise ConfigError(f"noise_multiplier is {self.noise_multiplier}, expected a finite number > 0")


class CorrelatedGaussian(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="correlated_gaussian"
):
    """One pass of `steps` releases of the matrix mechanism: the rows of C x + z that the pass adds.

    Every record is in the same one of the `steps` batches in every pass, or in none, and contributes a vector of L2
    norm at most C to its sum. `noise` is the standard deviation of z's coordinates over C; the pass is the one of
    this `number`, from 1, under its own z. Together, passes 1 to p cost one Gaussian mechanism
    (:mod:`choral.privacy.accounting.matrix_strategies`); this event is the part of pass p.
    """

    strategy: Strategy
    noise: float
    steps: int
    number: int

    def __post_init__(self) -> None:
        _make_plain(self, ("noise",), ("steps", "number"))
        if not isinstance(self.strategy, Strategy):
            raise ConfigError(
                f"strategy is a {type(self.strategy).__name__}, expected one of"
                " choral.privacy.accounting.matrix_strategies"
            )
        if not self.noise > 0.0:
            raise ConfigError(f"noise is {self.noise}, expected a finite number > 0")

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation over sensitivity of the one Gaussian mechanism that the pass adds, computed from C."""
        known = 1 << (self.number - 1).bit_length()  # few lengths, so that the costs of a strategy are computed once
        return self.noise / math.sqrt(float(self.strategy.costs(self.steps, known)[self.number - 1]))

    @property
    def sample_rate(self) -> float:
        """One: nothing is claimed for sampling."""
        return 1.0


class PoissonSampledShares(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="poisson_shares"):
    """`steps` opened sums of Poisson-sampled gradients of several parties, each of which added a share of the noise.

    Each step takes every record independently with probability `sample_rate`; each of up to `parties` parties sums its
    records' contributions of L2 norm at most C, adds N(0, (share * C)^2) to every one of `length` coordinates and
    rounds to a grid on which that deviation is `deviation` steps; only the sum is opened
    (:mod:`choral.privacy.noise.share_rounding`). At least `honest` shares in it are unknown to the adversary: the worst
    case, whoever drops out. stretch: by how much further apart than C neighbours may be. failure: of one step, the
    probability that it is not so, added to delta: the secure sum's, and of a draw that passed its cap.

    Its cost is that of the Gaussian mechanism of `noise_multiplier` at delta less the failures: the rounding's 2^-100 a
    step is below what the accountants' double precision can tell.
    """

    sample_rate: float
    share: float
    honest: int
    parties: int
    deviation: float
    length: int
    stretch: float
    failure: float
    steps: int

    def __post_init__(self) -> None:
        _make_plain(
            self,
            ("sample_rate", "share", "deviation", "stretch", "failure"),
            ("honest", "parties", "length", "steps"),
        )
        if not 0.0 < self.sample_rate <= 1.0:
            raise ConfigError(f"sample_rate is {self.sample_rate}, expected 0 < sample_rate <= 1", hint=_RATE)
        check_shares(
            share=self.share,
            honest=self.honest,
            parties=self.parties,
            deviation=self.deviation,
            length=self.length,
            stretch=self.stretch,
            failure=self.failure,
        )

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise that the adversary does not know over the sensitivity."""
        return self.share * math.sqrt(self.honest) / (1.0 + self.stretch)


BaseEvent = PoissonSampledGaussian | CorrelatedGaussian
NumberOfTries = Literal["negative_binomial", "poisson"]
NUMBERS_OF_TRIES = get_args(NumberOfTries)


class Search(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="search"):
    """The best of a random, secret number of tries, each of which releases at most the events `tries`.

    Only the best try's output is released; how many there were is drawn independently of the data and told to nobody.
    Each try runs the same mechanism: draw a setting at random, train, score.

    distribution: of the number of tries K. "negative_binomial": truncated, K >= 1, with this `shape` >= 0 (1 is the
        geometric distribution, 0 the logarithmic); "poisson": K >= 0, `shape` is not used and must be 1.
    mean: E[K], at least 1.

    Source: Papernot and Steinke 2022, "Hyperparameter tuning with Renyi differential privacy", definition 1.
    """

    tries: tuple[BaseEvent, ...]
    mean: float
    distribution: NumberOfTries = "negative_binomial"
    shape: float = 1.0

    def __post_init__(self) -> None:
        _make_plain(self, ("mean", "shape"), ())
        if not isinstance(self.tries, tuple | list) or not all(isinstance(event, BaseEvent) for event in self.tries):
            raise ConfigError("tries of a search are a tuple of events of training")
        msgspec.structs.force_setattr(self, "tries", tuple(self.tries))
        if not self.tries:
            raise ConfigError("a search has no events for its tries, expected at least one")
        if self.distribution not in NUMBERS_OF_TRIES:
            raise ConfigError(f"distribution is {self.distribution!r}, expected one of {', '.join(NUMBERS_OF_TRIES)}")
        if not 1.0 <= self.mean <= 500.0:
            raise ConfigError(f"mean is {self.mean}, expected 1 <= mean <= 500 tries")
        if not 0.0 <= self.shape <= 100.0:
            raise ConfigError(f"shape is {self.shape}, expected 0 <= shape <= 100", hint="1 is the geometric.")
        if self.distribution == "poisson" and self.shape != 1.0:
            raise ConfigError(f"shape is {self.shape}, but the distribution is poisson, which has none")

    @property
    def gamma(self) -> float:
        """The parameter in (0, 1] of the negative binomial of this mean, rounded down: more tries, never fewer."""
        low, high = 0.0, 1.0
        while high - low > 1e-12 * high:
            middle = (low + high) / 2.0
            low, high = (middle, high) if _mean_of(middle, self.shape) >= self.mean else (low, middle)
        return low if self.mean > 1.0 else 1.0

    @property
    def steps(self) -> int:
        """Noisy steps of one try."""
        return sum(event.steps for event in self.tries)

    @property
    def noise_multiplier(self) -> float:
        """Of the last event of a try."""
        return self.tries[-1].noise_multiplier

    @property
    def sample_rate(self) -> float:
        """Of the last event of a try."""
        return self.tries[-1].sample_rate


def _mean_of(gamma: float, shape: float) -> float:
    if shape == 0.0:
        return (1.0 / gamma - 1.0) / -math.log(gamma)
    return shape * (1.0 - gamma) / (gamma * -math.expm1(shape * math.log(gamma)))


Priced = BaseEvent | Search  # what accountants know
ShareEvent = PoissonSampledShares | BandedShares
RecordEvent = Priced | ShareEvent


def as_gaussians(events: Iterable[RecordEvent], delta: float) -> tuple[tuple[Priced, ...], float]:
    """Return `events` with Gaussian mechanisms in the place of sums of shares, and the delta that is left.

    The shares' failures do not depend on the data: unless one comes, what is left is (epsilon, delta - failures)-DP.
    """
    known = tuple(events)
    delta -= math.fsum(event.steps * event.failure for event in known if isinstance(event, ShareEvent))
    found: list[Priced] = [event for event in known if not isinstance(event, ShareEvent)]
    sums: list[tuple[ShareEvent, int]] = [*participations(event for event in known if isinstance(event, BandedShares))]
    sums += [(event, event.steps) for event in known if isinstance(event, PoissonSampledShares)]
    for each, count in sums:
        noise = each.noise_multiplier
        found.append(PoissonSampledGaussian(sample_rate=each.sample_rate, noise_multiplier=noise, steps=count))
    return tuple(found), delta


ClientMechanism = Literal["gaussian", "discrete_gaussian", "skellam"]


class ClientRelease(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="client_release"):
    """`steps` sums of bounded client vectors with noise, of all clients (no amplification by sampling).

    Each client's vector has a squared L2 norm of at most `sensitivity_squared`; each coordinate of the sum has `shares`
    independent noises of variance parameter `share_variance` that the adversary does not know.

    mechanism: "gaussian" (real vectors), "discrete_gaussian" or "skellam" (integer vectors, `length` coordinates).
    settles: the sum that the event before this one paid for had this many shares, no fewer than it paid for; it counts
        in place of that one.
    """

    mechanism: ClientMechanism
    sensitivity_squared: int
    share_variance: float
    shares: int
    length: int
    steps: int = 1
    settles: bool = False

    def __post_init__(self) -> None:
        _make_plain(self, ("share_variance",), ("sensitivity_squared", "shares", "length", "steps"))
        if self.mechanism not in get_args(ClientMechanism):
            raise ConfigError(
                f"mechanism is {self.mechanism!r}, expected one of {', '.join(get_args(ClientMechanism))}"
            )
        if not self.share_variance > 0.0:
            raise ConfigError(f"share_variance is {self.share_variance}, expected a finite number > 0")
        if not isinstance(self.settles, bool):
            raise ConfigError(f"settles is {self.settles!r}, expected True or False")

    @property
    def noise_multiplier(self) -> float:
        """The deviation of the unknown noise in one coordinate over the largest norm of a client's vector."""
        return math.sqrt(self.shares * self.share_variance / self.sensitivity_squared)


class SampledClientRelease(ClientRelease, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="sampled_clients"):
    """`steps` sums of the vectors of cohorts, with Gaussian noise; all that is seen of a sum is what is computed of it.

    Each cohort takes every client independently with probability `sample_rate`, from randomness that nobody else knows,
    and neither who was taken nor how many is ever seen: the sum is not divided by their number. Its cost is that of the
    Poisson-sampled Gaussian mechanism of `noise_multiplier`.
    """

    sample_rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _make_plain(self, ("sample_rate",), ())
        if not 0.0 < self.sample_rate <= 1.0:
            raise ConfigError(f"sample_rate is {self.sample_rate}, expected 0 < sample_rate <= 1", hint=_RATE)
        if self.mechanism != "gaussian" or self.shares != 1 or self.settles:
            raise ConfigError("secret cohorts have Gaussian noise, all of it the server's")


Event = RecordEvent | ClientRelease | SampledClientRelease


class PlannedEvents(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`times` events like `event`. Of correlated noise: the first ones, of one stream or of one plan."""

    event: Event
    times: int

    def __post_init__(self) -> None:
        if not isinstance(self.event, Event):
            raise ConfigError(
                f"event of a plan is a {type(self.event).__name__}, expected one of choral.privacy.accounting.events"
            )
        _make_plain(self, (), ("times",))
        settles = isinstance(self.event, ClientRelease) and self.event.settles
        if settles or (isinstance(self.event, Search) and self.times > 1):
            raise ConfigError("a plan has a search once, and no release that settles another")
        if isinstance(self.event, CorrelatedGaussian | BandedShares) and self.event.number != 1:
            raise ConfigError(f"number is {self.event.number}, expected 1: a plan has all from the first on")

    @property
    def whole(self) -> tuple[Event, ...]:
        """All of its events, as few as say the same."""
        if isinstance(self.event, CorrelatedGaussian):
            return tuple(msgspec.structs.replace(self.event, number=1 + i) for i in range(self.times))
        if isinstance(self.event, Search):
            return (self.event,)
        return (msgspec.structs.replace(self.event, steps=self.event.steps * self.times),)

    def covers(self, event: Event) -> bool:
        """Whether `event` is one of these. Of correlated noise any pass is: an earlier one costs no more."""
        if isinstance(event, BandedShares):
            return event.steps == 1 and event.kind == self.event
        if isinstance(event, CorrelatedGaussian):
            event = msgspec.structs.replace(event, number=1)
        return event == self.event


class ReleasePlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="plan"):
    """What was fixed before any of it was released: the events that follow, up to the next plan, are among these.

    A plan releases nothing and costs nothing by itself. epsilon: of the promise that it was made for.
    """

    epsilon: float
    parts: tuple[PlannedEvents, ...]

    def __post_init__(self) -> None:
        _make_plain(self, ("epsilon",), ())
        if not self.epsilon > 0.0:
            raise ConfigError(f"epsilon is {self.epsilon}, expected a finite number > 0")
        if not isinstance(self.parts, tuple | list) or not all(isinstance(part, PlannedEvents) for part in self.parts):
            raise ConfigError("parts of a plan are a tuple of PlannedEvents")
        msgspec.structs.force_setattr(self, "parts", tuple(self.parts))
        if len({isinstance(part.event, ClientRelease) for part in self.parts}) != 1:
            raise ConfigError("a plan has at least one part, and all are of one unit")

    @property
    def whole(self) -> tuple[Event, ...]:
        """All of its events, as few as say the same."""
        return tuple(event for part in self.parts for event in part.whole)


def _make_plain(event: msgspec.Struct, floats: tuple[str, ...], integers: tuple[str, ...]) -> None:
    """Turn fields of an event that is just being made into Python's own numbers. Raises: ConfigError."""
    for name in floats:
        msgspec.structs.force_setattr(event, name, as_float(name, getattr(event, name)))
    for name in integers:
        msgspec.structs.force_setattr(event, name, as_integer(name, getattr(event, name)))
