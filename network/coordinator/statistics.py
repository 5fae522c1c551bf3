"""Statistics with parties at their own sites: one exchange, or two where contributors are counted first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from choral.errors import ConfigError
from choral.network.coordinator.remote import RemoteChannel, RemoteSum, identity_of, signatories_of
from choral.network.coordinator.sites import Carrier, Say, Sites, Waits
from choral.network.site.offer import Offer
from choral.network.site.terms import setup_of
from choral.network.transport.certificates import CertifiedIdentity
from choral.privacy import SharesPlan
from choral.protocols.homomorphic.front import Homomorphic
from choral.protocols.interface import SecureSum, SumResult, SumSpec
from choral.protocols.masking.ahead.floor import promised
from choral.protocols.masking.masked import Masked
from choral.trainers.algorithms.interface import Exchange
from choral.trainers.analytics.releases import OpenedSums, opened_shares, to_drop, traffic_of
from choral.trainers.analytics.terms import CONTRIBUTORS, SUMS, StatisticsTerms
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.run_folder.evidence.receipts import model_digest
from choral.trainers.run_folder.evidence.sealing import Signatories
from choral.trainers.run_folder.transcript import Transcript


@dataclass(frozen=True, kw_only=True)
class SitesStatistics:
    """What is asked of whom. keys: the sites' public keys, by name. coordinator: writes the manifest; None,
    there is none. rehearsal: one operator runs the sites as well.
    """

    offer: Offer
    terms: StatisticsTerms
    secure_sum: SecureSum
    carrier: Carrier
    keys: Mapping[str, bytes]
    waits: Waits
    say: Say
    coordinator: CertifiedIdentity | None = None
    rehearsal: bool = False

    def opened(self) -> tuple[OpenedSums, Signatories | None]:
        """Have the sites answer; with it, who signs the manifest. Nothing is asked a second time: sites answer an
        exchange once. Raises: TooFewSurvivorsError; ConfigError for a sum that hides nothing; what ends a sum.
        """
        if not isinstance(self.secure_sum, Masked | Homomorphic):
            raise ConfigError(f"sites send into no {self.secure_sum.name} sum", hint='kind = "masked"')
        terms, names = self.terms, tuple(self.keys)
        setup = setup_of(self.secure_sum, names)
        sites = Sites(self.carrier, self.offer, self.waits, self.say, length=terms.federation.length)
        weights = torch.zeros(terms.federation.length)
        counting = terms.sums.contributors is not None
        sites.begin_round(fewest=len(names) if counting else setup.min_survivors, all_of_them=True)
        channels = self._channels(sites)
        counts, extra = None, (0, 0)
        dropped = np.zeros(terms.federation.length, dtype=bool)
        if terms.sums.contributors is not None:
            counted = self._sum(channels, CONTRIBUTORS, weights, 0)
            counts, extra = np.asarray(counted.total), traffic_of(counted)
            weights = torch.from_numpy(counts.astype(np.float32))
            dropped = to_drop(terms.packing, counts, terms.sums.contributors)
        result = self._sum(channels, SUMS, weights, int(counting))
        signatories = self._end(sites, (model_digest(weights), 1))
        total, noise = self._read(terms.shares, result, dropped)
        up, down = traffic_of(result)
        opened = OpenedSums(
            total=total,
            noise=noise,
            survivors=result.survivors,
            statement={
                "min_survivors": promised(setup, self.secure_sum.min_survivors),
                "corrupt": setup.corrupt,
                "name": self.secure_sum.name,
            },
            traffic=(up + extra[0], down + extra[1]),
            left_out=int(dropped.sum()),
            contributors=counts,
        )
        return opened, signatories

    def _end(self, sites: Sites, ended: tuple[str, int]) -> Signatories | None:
        if self.coordinator is None:
            sites.end(*ended)
            return None
        identity = identity_of(self.coordinator)
        return signatories_of(sites, self.keys, self.terms, identity, ended, rehearsal=self.rehearsal)

    def _read(self, plan: SharesPlan | None, result: SumResult, dropped: Any) -> tuple[Any, Any]:
        if plan is None:
            return np.asarray(result.total), np.where(dropped, np.inf, 0.0)
        unit = self.terms.packing.unit
        sums, deviation = opened_shares(plan, result)
        return sums * unit, deviation * unit

    def _channels(self, sites: Sites) -> dict[str, RemoteChannel]:
        terms, names, found = self.terms, tuple(self.keys), {}
        sums: dict[SumSpec, RemoteSum] = {}
        for channel in terms.channels:
            codec = terms.codec(channel, names)
            spec = replace(codec.spec, directory=len(names), terms=terms.digest)
            if spec not in sums:
                driver = self.secure_sum.server_driver(spec, directory=self.keys)
                sums[spec] = RemoteSum(sites, driver, spec, Transcript(None, None), self.secure_sum.name, channel)
            found[channel] = RemoteChannel(channel, sums[spec], codec, terms.digest)
        for summing in sums.values():
            summing.open()
        return found

    def _sum(self, channels: Mapping[str, RemoteChannel], name: str, weights: torch.Tensor, number: int) -> SumResult:
        channel = channels[name]
        told = Told.of(Exchange(channel=name, weights=weights, moved=True), 1, number)
        summing = channel.begin(told, tuple(self.keys))
        summing.collect()
        result = summing.finish()
        if self.terms.shares is not None:
            channel.codec.decode(result)  # which refuses too few survivors
        return result
