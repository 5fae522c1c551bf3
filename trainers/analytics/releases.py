"""How the parties' integers are opened: exactly, with noise in shares for each record, or with noise for each party.

Each way takes the packed integers of all parties, lets every party encode its own and pay for it, and returns the total
in the same integers with the standard deviation of the noise in each coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from choral.errors import ConfigError
from choral.privacy import (
    AdaptiveClip,
    ClientPrivacy,
    ClientPrivacyEngine,
    Ledger,
    Privacy,
    SharesParty,
    SharesPlan,
    SharesTerms,
)
from choral.privacy.accounting.events import ReleasePlan
from choral.privacy.client_level.central import CentralScheme
from choral.privacy.record_shares.plan import plan_shares
from choral.protocols.interface import SecureSum, SumResult, SumSpec
from choral.trainers.analytics.grid import Floats, Int64Array
from choral.trainers.analytics.part import Packing
from choral.trainers.federated.codec import ClientCodec, cap_of
from choral.trainers.federated.participation import Participation
from choral.trainers.federated.record_shares.checks import check_shares, fewest_survivors
from choral.trainers.federated.record_shares.codec import SharesCodec


@dataclass
class OpenedSums:
    """total: int64, exact, or float64 with noise. noise: its standard deviation, shape (length,); infinite where a
    coordinate was left out. traffic: bytes of the busiest party, up and down. statement: of the secure sum.
    """

    total: npt.NDArray[Any]
    noise: Floats
    survivors: tuple[str, ...]
    statement: Mapping[str, Any]
    traffic: tuple[int, int]
    left_out: int = 0
    contributors: Int64Array | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class StatisticsRelease:
    """What is opened. vectors: each party's packed integers. records: how many each has, which is public. largest: a
    public bound of those. digest: of what is computed, which all parties agree on.
    """

    packing: Packing
    vectors: Mapping[str, Int64Array]
    records: Mapping[str, int]
    secure_sum: SecureSum
    digest: bytes

    @property
    def names(self) -> tuple[str, ...]:
        """The parties."""
        return tuple(self.vectors)

    @property
    def encoding(self) -> str:
        """What the parties agree on, as text."""
        return f"statistics {self.digest.hex()}"

    # ------------------------------------------------------------------------------------------------- without noise

    def exactly(self, contributors: int | None = None) -> OpenedSums:
        """Open the integers as they are. contributors: leave out what fewer parties contribute to.

        Raises: ConfigError for contributors of whom all but one may be corrupt; what the sum raises.
        """
        dropped = np.zeros(self.packing.length, dtype=bool)
        counts, extra = None, (0, 0)
        if contributors is not None:
            counted, result = self._contributions(contributors)
            counts, extra = counted, traffic_of(result)
            dropped = to_drop(self.packing, counted, contributors)
        cap = cap_of(max(self.records.values()))
        spec = SumSpec(
            parties=self.names,
            length=self.packing.length,
            bound=self.packing.bound * cap,
            encoding=f"{self.encoding}, exact",
        )
        session = self.secure_sum.open(spec)
        summing = session.begin()
        for name, vector in self.vectors.items():  # each party drops by the opened counts, which all of them see
            summing.submit(name, np.where(dropped, 0, vector))
        result = summing.finish()
        up, down = traffic_of(result)
        return OpenedSums(
            total=np.asarray(result.total),
            noise=np.where(dropped, math.inf, 0.0),
            survivors=result.survivors,
            statement=session.statement,
            traffic=(up + extra[0], down + extra[1]),
            left_out=int(dropped.sum()),
            contributors=counts,
        )

    def _contributions(self, least: int) -> tuple[Int64Array, SumResult]:
        """How many parties contribute to each coordinate: a release of its own, one bit of each party and coordinate.

        Where the coordinates of a statistic are no cells, a party contributes to all of them or to none.
        """
        spec = SumSpec(
            parties=self.names, length=self.packing.length, bound=1, encoding=f"{self.encoding}, contributors"
        )
        session = self.secure_sum.open(spec)
        if least < (needed := int(session.statement.get("corrupt", 0)) + 2):
            raise ConfigError(
                f"contributors is {least}, expected at least {needed}: corrupt parties know their own part of a cell",
                hint="the sum's corrupt parties and two more; fewer corrupt ones (corrupt) need fewer",
            )
        summing = session.begin()
        for name, vector in self.vectors.items():
            summing.submit(name, contributes(self.packing, vector))
        result = summing.finish()
        return np.asarray(result.total), result

    # ------------------------------------------------------------------------------------------- noise for each record

    def shares_plan(self, privacy: Privacy) -> SharesPlan:
        """One step that takes every record, of which the packing's unit makes a contribution of norm at most 1.

        Raises: ConfigError; what opening the sum does; BudgetExceededError.
        """
        names, rule = self.names, Participation()
        check_shares(privacy, self.secure_sum, rule, names)
        total = sum(self.records.values())
        terms = SharesTerms(
            records=total,
            batch_size=total,
            steps=1,
            parties=len(names),
            min_survivors=fewest_survivors(self.secure_sum, rule, names),
            length=self.packing.length,
            most_records=max(self.records.values()),
        )
        return plan_shares(privacy, terms)

    def for_records(
        self, privacy: Privacy, ledgers: Mapping[str, Ledger], wholes: Mapping[str, ReleasePlan] | None = None
    ) -> OpenedSums:
        """Add shares of noise: (epsilon, delta)-DP for each record, by :mod:`choral.privacy.record_shares`.

        wholes: by party, what was fixed together with it, under a larger promise.
        Unit: the record. Neighbours: the promise's; an empty record has all values missing, and adds zero everywhere.
        Raises: ConfigError; BudgetExceededError, LedgerError (nothing was sent); what the sum raises.
        """
        plan = self.shares_plan(privacy)
        codec = SharesCodec(self.names, plan)
        session = self.secure_sum.open(codec.spec)
        codec.check(session)
        fixed = wholes or {}
        parties = {
            name: SharesParty(privacy, plan, holder=name, ledger=ledger, padded=True, whole=fixed.get(name))
            for name, ledger in ledgers.items()
        }
        summing = session.begin()
        for name, party in parties.items():
            party.add(self.vectors[name] / self.packing.unit * plan.clip)
            summing.submit(name, party.take())
        result = summing.finish()
        codec.decode(result)  # which refuses too few survivors
        sums, deviation = opened_shares(plan, result)
        return self._noisy(sums, deviation, session.statement, result)

    # -------------------------------------------------------------------------------------------- noise for each party

    def for_clients(self, privacy: ClientPrivacy, ledger: Ledger) -> OpenedSums:
        """Clip each party's whole vector, and add noise: (epsilon, delta)-DP for each party with all of its records.

        The clipping norm is in records: one record's contribution has a norm of at most 1.
        Raises: ConfigError; BudgetExceededError, LedgerError (nothing was sent); what the sum raises.
        """
        if isinstance(privacy.clip, AdaptiveClip) or privacy.sample_rate is not None:
            raise ConfigError(
                "statistics are one round of all clients, with a fixed clip",
                hint="leave out sample_rate, and give clip a number: as many records as a client usually has",
            )
        names, length = self.names, self.packing.length
        engine = ClientPrivacyEngine(privacy, clients=len(names), length=length, rounds=1, ledger=ledger)
        codec = ClientCodec(names, engine)
        session = self.secure_sum.open(codec.spec)
        codec.check(session)
        summing = session.begin()
        codec.begin(names, lambda: self.digest)
        for name, vector in self.vectors.items():
            client = codec.party(self.records[name])
            client.pay(lambda: self.digest)
            summing.submit(name, client.encode(torch.from_numpy(vector / self.packing.unit)).vector)
        result = summing.finish()
        sums = codec.decode(result).value.numpy() * len(result.survivors)
        scheme = engine.scheme
        if isinstance(scheme, CentralScheme):
            deviation = scheme.ratio * engine.clip
        else:  # each share, and the rounding of each client at random, of variance 1/4 at most
            squared = len(result.survivors) * (float(scheme.share_variance) + 0.25)
            deviation = math.sqrt(squared) / scheme.scale * engine.clip
        return self._noisy(sums, deviation, session.statement, result)

    def _noisy(self, sums: Floats, deviation: float, statement: Mapping[str, Any], result: SumResult) -> OpenedSums:
        """sums, deviation: in units of a record's largest contribution."""
        return OpenedSums(
            total=sums * self.packing.unit,
            noise=deviation * self.packing.unit,
            survivors=result.survivors,
            statement=statement,
            traffic=traffic_of(result),
        )


def opened_shares(plan: SharesPlan, result: SumResult) -> tuple[Floats, float]:
    """An opened sum of shares, and the deviation of its noise, in units of a record's largest contribution."""
    sums = plan.mean(np.asarray(result.total)) * (plan.terms.batch_size / plan.clip)
    step = math.ldexp(1.0, -plan.grid.coarse)
    return sums, math.sqrt(len(result.survivors) * (plan.share**2 + step**2 / 12.0))


def traffic_of(result: SumResult) -> tuple[int, int]:
    """Bytes of the busiest party, up and down."""
    return max(result.bytes_up.values()), max(result.bytes_down.values())


def contributes(packing: Packing, vector: Int64Array) -> Int64Array:
    """Return 1 where the party with this vector contributes, 0 where it does not."""
    found: Int64Array = (vector != 0).astype(np.int64)
    for (_, at), part in zip(packing.places.items(), packing.parts.values(), strict=True):
        if not part.cells:
            found[at] = int(vector[at].any())
    return found


def to_drop(packing: Packing, contributors: Int64Array, least: int) -> npt.NDArray[np.bool_]:
    """Return which coordinates are left out: those that fewer than `least` parties contribute to, unless none does.

    Where cells of a statistic are left out, so is one more, that of the fewest contributors among the others: the sum
    of all cells may be known from elsewhere, and what is left out then has `least` contributors or more together.
    """
    dropped = (contributors > 0) & (contributors < least)
    for (_, at), part in zip(packing.places.items(), packing.parts.values(), strict=True):
        if part.cells and dropped[at].any():
            others = np.where(contributors[at] >= least, contributors[at], np.iinfo(np.int64).max)
            if (contributors[at] >= least).any():
                dropped[at.start + int(np.argmin(others))] = True
    return dropped
