"""Statistics as parties at sites of their own agree on them: training terms whose algorithm is a sum, and one party.

What a party at a site does for a training it does for statistics: one exchange, whose digest all sign, its own policy
of the sum, its ledger, receipts. In the place of a model there is the packed vector's length:

    "contributors"   1 where the party contributes, 0 where not     opened first, where the terms ask for it
    "sums"           its integers, with a share of the noise; or exact, without what too few contribute to

In the second exchange the parties are told how many contribute. That is the coordinator's word: a party refuses counts
that its own contribution contradicts, and no more can be known at one party alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from choral.errors import ChoralError, ConfigError
from choral.privacy import PrivacyError, SharesParty
from choral.protocols.driver import NeedsVector, PartyDriver
from choral.protocols.errors import FaultyServerError
from choral.protocols.interface import SumResult, SumSession, SumSpec
from choral.trainers.algorithms.interface import Algorithm, Channel, ExchangeMean, FederationInfo, LocalTrainer, Release
from choral.trainers.analytics.cells import Categories, Histogram, Table
from choral.trainers.analytics.federated_statistics import packing_of
from choral.trainers.analytics.grid import Int64Array
from choral.trainers.analytics.moments import Count, Covariance, Mean
from choral.trainers.analytics.part import Packing, Statistic
from choral.trainers.analytics.quantiles import Quantiles
from choral.trainers.analytics.releases import contributes, to_drop
from choral.trainers.analytics.scales import Scales
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.federated.codec import Encoded
from choral.trainers.federated.party import TrainingParty
from choral.trainers.federated.record_shares.codec import SharesCodec
from choral.trainers.federated.terms.training_terms import TrainingTerms

CONTRIBUTORS, SUMS = "contributors", "sums"
_KINDS: dict[str, type[Statistic]] = {
    kind.__name__.lower(): kind for kind in (Count, Mean, Covariance, Histogram, Categories, Table, Quantiles, Scales)
}


def record_of(statistic: Statistic) -> dict[str, Any]:
    """A statistic as JSON types. In which order a mapping has its columns is not kept: :func:`statistic_of`."""
    return {"kind": type(statistic).__name__.lower(), **asdict(statistic)}


def statistic_of(record: Any) -> Statistic:
    """What :func:`record_of` wrote, columns in the order of their names: JSON has none. Raises: ConfigError."""
    kind = _KINDS.get(str(record.get("kind"))) if isinstance(record, Mapping) else None
    if kind is None:
        raise ConfigError(f"a statistic of no kind that is known: {record!s:.80}")
    try:
        fields: dict[str, Any] = {name: value for name, value in record.items() if name != "kind"}
        for name, value in fields.items():
            fields[name] = dict(sorted(value.items())) if isinstance(value, Mapping) else value
        made = kind(**fields)
        made.check_weight()
    except (ChoralError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"a statistic that cannot be read: {error!s:.200}") from None
    return made


@dataclass(frozen=True, kw_only=True)
class StatisticsSums(Algorithm):
    """statistics: by name, as :func:`record_of` writes them. contributors: leave out what fewer contribute to."""

    kind: ClassVar[str] = "statistics"
    statistics: Mapping[str, Mapping[str, Any]]
    contributors: int | None = None

    @property
    def releases(self) -> tuple[Release, ...]:
        sums = Release(channel=SUMS, what="counts and sums of each party's records", source="data", once=True)
        if self.contributors is None:
            return (sums,)
        what = "whether each party contributes to a cell: everybody learns how many do"
        return Release(channel=CONTRIBUTORS, what=what, source="data", once=True), sums

    def channels(self, federation: FederationInfo) -> dict[str, Channel]:
        names = (SUMS,) if self.contributors is None else (CONTRIBUTORS, SUMS)
        return {name: Channel(length=federation.length, weighing="parties", once=True) for name in names}


@dataclass(frozen=True, kw_only=True)
class StatisticsTerms(TrainingTerms):
    """See the module. algorithm: a :class:`StatisticsSums`; federation.length: of the packed vector."""

    @property
    def sums(self) -> StatisticsSums:
        """Raises: ConfigError for another algorithm."""
        if not isinstance(self.algorithm, StatisticsSums):
            raise ConfigError("terms of statistics with another algorithm")
        return self.algorithm

    @cached_property
    def packing(self) -> Packing:
        """In the order of the names, which is one for all. Raises: ConfigError for statistics that cannot be read."""
        made = {str(name): statistic_of(record) for name, record in sorted(self.sums.statistics.items())}
        if not made:
            raise ConfigError("no statistics")
        return packing_of(made, self.federation.examples, noisy=self.shares is not None)

    def check(self) -> None:
        """Raises: ConfigError for terms that do not fit together."""
        federation, sums = self.federation, self.sums
        if self.packing.length != federation.length or self.rounds != 1 or self.metrics:
            raise ConfigError(f"statistics of {self.packing.length} coordinates, and terms of {federation.length}")
        if sums.contributors is None:
            return
        if self.shares is not None or self.privacy is not None:
            raise ConfigError("contributors with noise: whether a record is in a cell is what the noise hides")
        if type(sums.contributors) is not int or not 2 <= sums.contributors <= federation.parties:
            raise ConfigError(f"contributors is {sums.contributors!a:.40} of {federation.parties} parties")

    def codec(self, channel: str, roster: tuple[str, ...] = ()) -> ExactCodec | SharesCodec:  # type: ignore[override]
        """Both halves of a channel's sum."""
        if self.shares is not None:
            return SharesCodec(roster, self.shares)
        bound = 1 if channel == CONTRIBUTORS else self.packing.bound * self.federation.largest
        return ExactCodec(roster, self.federation.length, bound, f"statistics, {channel}")


@dataclass(frozen=True)
class ExactCodec:
    """Integers as they are; see :class:`choral.trainers.federated.codec.Codec`, both halves of it."""

    names: tuple[str, ...]
    length: int
    bound: int
    encoding: str
    clip: float | None = None
    largest: float | None = None
    more_bytes: int = 0
    fixed_point: dict[str, float | int] = field(default_factory=dict)

    @property
    def spec(self) -> SumSpec:
        return SumSpec(parties=self.names, length=self.length, bound=self.bound, encoding=self.encoding)

    def check(self, session: SumSession) -> None:
        """Any sum will do."""

    def begin(self, present: tuple[str, ...], exchange: Callable[[], bytes]) -> None:
        """Nothing is paid for."""

    def party(self, examples: int) -> ExactCodec:
        del examples
        return self

    def pay(self, exchange: Callable[[], bytes]) -> None:
        """Nothing is paid for."""

    def encode(self, update: torch.Tensor) -> Encoded:
        return Encoded(update)

    def stand_in(self) -> None:
        """It sends nothing."""

    def take(self, encoded: Encoded) -> None:
        """There is nothing beside the integers."""

    def decode(self, result: SumResult) -> ExchangeMean:
        return ExchangeMean(torch.from_numpy(np.asarray(result.total)), 1.0)


def of_counts(terms: TrainingTerms) -> bool:
    """Whether who contributes is counted first: then both sums are over everybody, or nobody could tell of whom a count
    is that is left when the sum is over fewer.
    """
    return isinstance(terms, StatisticsTerms) and terms.sums.contributors is not None


class _NoTrainer:
    """Of a party that trains nothing."""

    length = 0

    def do(self, orders: Any, weights: torch.Tensor, round_number: int) -> Any:  # noqa: ARG002
        raise ConfigError("statistics are no training")


class StatisticsParty(TrainingParty):
    """A party of statistics, in a process of its own. vector: its packed integers. shares: its share of the noise, of a
    promise for its records; None where the sums are exact.
    """

    terms: StatisticsTerms

    def __init__(
        self,
        name: str,
        terms: StatisticsTerms,
        vector: Int64Array,
        *,
        examples: int,
        drivers: Mapping[str, PartyDriver],
        shares: SharesParty | None,
        **kept: Any,
    ) -> None:
        """kept: receipts and trained_for, as of any party. Raises: PrivacyError for a promise and no share of noise."""
        if (terms.shares is None) != (shares is None):
            raise PrivacyError("a plan of noise in shares and no share of it, or the other way round")
        codecs = {channel: terms.codec(channel).party(examples) for channel in terms.channels}
        trainer: LocalTrainer = _NoTrainer()
        super().__init__(name, terms, codecs, examples=examples, trainer=trainer, drivers=drivers, **kept)
        self._vector, self._shares = vector, shares

    def _trained(self, needs: NeedsVector, driver: PartyDriver, trainer: LocalTrainer) -> Encoded:
        del trainer
        told = self.heard()
        self.check(needs, told)
        if self._drivers[told.ask.channel] is not driver:
            raise FaultyServerError(f"{self.name!r} was told an exchange of another sum than it is asked a vector for")
        self.error, self._pending = None, None
        self._trained_for.write(told.number, told.exchange)
        return self._codecs[told.ask.channel].encode(torch.from_numpy(self._made(told)))

    def _made(self, told: Told) -> Int64Array:
        packing, least = self.terms.packing, self.terms.sums.contributors
        own = contributes(packing, self._vector)
        if told.ask.channel == CONTRIBUTORS:
            return own
        if self._shares is not None and self.terms.shares is not None:
            self._shares.add(self._vector / packing.unit * self.terms.shares.clip)
            return self._shares.take()
        if least is None:
            return self._vector
        counts = np.nan_to_num(told.ask.weights.numpy(), nan=-1.0, posinf=-1.0, neginf=-1.0).astype(np.int64)
        if told.exchange != 1 or (counts < own).any() or (counts > self.terms.federation.parties - 1 + own).any():
            raise FaultyServerError(
                f"the counts of contributors that {self.name!r} was told are not of a sum that it is in",
                hint="the server may say of a cell of one party that many contribute; nothing was sent",
            )
        return np.where(to_drop(packing, counts, least), 0, self._vector)
