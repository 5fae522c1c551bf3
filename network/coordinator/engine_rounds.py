"""The sums of a federation whose parties train in the processes of an engine, under the engine's own strategy.

What the strategy makes of the mean, and when it ends, is its own; here is a round's mean and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from choral.errors import ChoralError, ConfigError
from choral.network.coordinator.remote import RemoteChannel, RemoteSum
from choral.network.coordinator.sites import Carrier, Say, Sites, Waits
from choral.network.host.messages import ExchangeEnded
from choral.network.site.offer import BY_ENGINE, Offer
from choral.network.site.terms import setup_of, sum_record
from choral.protocols.masking.masked import Masked
from choral.trainers.algorithms import FedAvg
from choral.trainers.algorithms.interface import Exchange, ExchangeMean, FederationInfo, updated
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.federated.codec import Encoding, cap_of
from choral.trainers.federated.terms.task_code import version_here
from choral.trainers.federated.terms.training_terms import TrainingTerms
from choral.trainers.run_folder.evidence.receipts import model_digest
from choral.trainers.run_folder.transcript import Transcript

if TYPE_CHECKING:
    from choral.protocols.interface import SecureSum

CHANNEL = "update"


@dataclass(frozen=True, kw_only=True)
class EngineJob:
    """What is agreed on. job, task: names, of the job and of what site.toml has under [tasks]. records, largest: of all
    sites together, and the most that one has. engine: what the sites are told of the engine, for a person to read.
    """

    job: str
    task: str
    coordinator: str
    records: int
    largest: int
    rounds: int
    shapes: Mapping[str, tuple[int, ...]]
    encoding: Encoding
    secure_sum: SecureSum
    engine: Mapping[str, str]

    def terms(self, parties: int) -> TrainingTerms:
        length = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        return TrainingTerms(
            algorithm=FedAvg(),
            federation=FederationInfo(
                parties=parties,
                length=length,
                examples=self.records,
                largest=cap_of(self.largest),
                value_bound=self.encoding.value_bound,
                weight=parties if self.encoding.weights == "equal" else self.records,
            ),
            encoding=self.encoding,
            privacy=None,
            shapes=self.shapes,
            rounds=self.rounds,
            code=f"{version_here()}, {BY_ENGINE}",
        )

    def offer(self, names: tuple[str, ...]) -> Offer:
        """Raises: OfferError."""
        return Offer(
            job=self.job,
            coordinator=self.coordinator,
            task=self.task,
            code=BY_ENGINE,
            settings=dict(self.engine),
            terms=self.terms(len(names)).record(),
            secure_sum=sum_record(self.secure_sum),
            parties=names,
        )


class EngineRounds:
    """See the module. keys: the sites' public keys, by name. say: as in `Sites`.

    Raises: ConfigError for a sum that is not masked; OfferError.
    """

    def __init__(self, job: EngineJob, carrier: Carrier, keys: Mapping[str, bytes], waits: Waits, say: Say) -> None:
        if not isinstance(job.secure_sum, Masked):
            raise ConfigError(
                f"secure_sum.kind is {job.secure_sum.name!r}: an engine carries masked sums",
                hint='kind = "masked" in [secure_sum]',
            )
        names = tuple(keys)
        self.offer, terms = job.offer(names), job.terms(len(names))
        self._codec = terms.codec(CHANNEL, names)
        self._sites = Sites(carrier, self.offer, waits, say, length=self._codec.spec.length)
        spec = replace(self._codec.spec, directory=len(names), terms=terms.digest)
        driver = job.secure_sum.server_driver(spec, directory=keys)
        self._sum = RemoteSum(self._sites, driver, spec, Transcript(None, None), job.secure_sum.name, CHANNEL)
        self._channel = RemoteChannel(CHANNEL, self._sum, self._codec, terms.digest)
        self._fewest, self._begun = setup_of(job.secure_sum, names).min_survivors, False

    def gather(self) -> None:
        """Those who are there, for a round that begins. Raises: TooFewSurvivorsError if they are too few."""
        self._sites.begin_round(fewest=self._fewest, all_of_them=not self._begun)
        self._begun = True

    def mean(self, number: int, weights: torch.Tensor) -> ExchangeMean:
        """Have the sites train, and sum. Raises: TooFewSurvivorsError, what else ends a sum; the next may follow."""
        sites = self._sites
        told = Told.of(Exchange(channel=CHANNEL, weights=weights), number, 0)
        try:
            self._sum.open()
            sites.strange.clear()
            sites.restarted.clear()
            summing = self._channel.begin(told, sites.names)
            summing.collect()
            return self._codec.decode(summing.finish())
        except ChoralError:
            for name, past in sites.past.items():
                if past.number == number:
                    sites.past[name] = ExchangeEnded(number, past.exchange, past.survived, True)
            raise

    def end(self, number: int, weights: torch.Tensor) -> None:
        """Tell the sites that no more is coming, and which model came of that round, for their receipts."""
        self._sites.end(model_digest(weights), number)


def moved(weights: torch.Tensor, mean: ExchangeMean) -> torch.Tensor:
    """The weights that plain averaging goes on with, bit by bit those of `federate`."""
    return updated(weights, mean.value)
