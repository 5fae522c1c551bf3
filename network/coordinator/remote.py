"""The parties of a session at their own sites: the engine that has them answer, and the secure sums with them.

A round is :func:`~choral.trainers.federated.one_round.one_round`, unchanged. Here is what it asks for:

    sums_over     who is there; sessions of the sums, opened anew where somebody has come who is in none
    begin         the exchange is told and the trips up to the vectors are made
    answer        the vectors: each site checks what it was told against what all sign, pays, trains, sends
    finish        the trips after them; the sum
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from Crypto.PublicKey import ECC

from choral.errors import ConfigError
from choral.network.coordinator.sites import Carrier, Say, Sites, Waits
from choral.network.host.messages import ExchangeEnded
from choral.network.site.offer import Offer
from choral.network.transport.certificates import CertifiedIdentity
from choral.protocols.crypto.identity import Identity
from choral.protocols.driver import NeedsVector, ServerDriver, Trip
from choral.protocols.errors import TooFewSurvivorsError
from choral.protocols.interface import SumResult, SumSpec
from choral.protocols.masking.ahead.floor import fewest_opened
from choral.protocols.masking.ahead.messages import AheadSetup
from choral.protocols.masking.ahead.server_driver import AheadServerDriver
from choral.trainers.algorithms.interface import Exchange
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.federated.codec import Codec
from choral.trainers.federated.round_parties import RoundParties
from choral.trainers.federated.terms.site_metrics import CHANNEL
from choral.trainers.federated.terms.training_terms import TrainingTerms
from choral.trainers.run_folder.evidence.manifest import Owned
from choral.trainers.run_folder.evidence.receipts import model_digest
from choral.trainers.run_folder.evidence.sealing import Signatories
from choral.trainers.run_folder.evidence.signed_lines import signed_by
from choral.trainers.run_folder.transcript import Transcript

if TYPE_CHECKING:
    from choral.trainers.federated.session import Session


class RemoteSites:
    """What a session is given for parties that are at sites (`Elsewhere`).

    propose: the offer, given the terms of the training. keys: the sites' public keys, by name. say: as in `Sites`.
    metrics: of the sites' own evaluations, whose sums are released. coordinator: who writes the run's manifest; sites
    sign none of another key than the one that they have pinned. rehearsal: one operator runs the sites as well. begun:
    the round that they were told of last, by a coordinator that was stopped.
    """

    begun = 0

    def __init__(
        self,
        carrier: Carrier,
        propose: Callable[[TrainingTerms], Offer],
        *,
        keys: Mapping[str, bytes],
        waits: Waits,
        say: Say,
        coordinator: CertifiedIdentity,
        metrics: tuple[str, ...] = (),
        rehearsal: bool = False,
    ) -> None:
        self._rehearsal = rehearsal
        self._carrier, self._propose, self.keys = carrier, propose, keys
        self._waits, self._say, self.metrics = waits, say, metrics
        self._identity = identity_of(coordinator)
        self.sites: Sites | None = None
        self._remote: RemoteEngine | None = None

    def engine(self, session: Session) -> RemoteEngine:
        length = max(codec.spec.length for codec in session.codecs.values())
        offer = self._propose(session.terms)
        self.sites = Sites(self._carrier, offer, self._waits, self._say, length=length)
        self._remote = RemoteEngine(self.sites, self.keys, session, self._identity, rehearsal=self._rehearsal)
        return self._remote

    def end(self, session: Session) -> None:
        """The run is over: the sites are told which model came of it, and say what they have of its receipts."""
        if self._remote is not None and not session.sealed:
            self._remote.end(session.completed, session.weights)


class RemoteEngine:
    """See the module, and :class:`~choral.trainers.federated.distant.elsewhere.DistantEngine`."""

    def __init__(
        self, sites: Sites, keys: Mapping[str, bytes], session: Session, identity: Identity, *, rehearsal: bool
    ) -> None:
        self._rehearsal = rehearsal
        self._sites, self._begun, self._keys, self._identity = sites, False, keys, identity
        self._ended: Signatories | None = None
        plan, terms = session.plan, session.terms
        self._terms = terms
        sums: dict[SumSpec, RemoteSum] = {}
        self._channels: dict[str, RemoteChannel] = {}
        self._metrics, self._exchange = terms.metrics, 0
        codecs = dict(session.codecs)
        if terms.metrics:
            codecs[CHANNEL] = terms.codec(CHANNEL, tuple(plan.census.names))
        for channel, codec in codecs.items():
            spec = replace(codec.spec, directory=len(plan.parties), terms=terms.digest)
            if spec not in sums:
                driver = plan.secure_sum.server_driver(spec, directory=keys)
                sums[spec] = RemoteSum(sites, driver, spec, session.transcript, plan.secure_sum.name, channel)
            self._channels[channel] = RemoteChannel(channel, sums[spec], codec, terms.digest)
        self._sums = tuple(sums.values())
        stated = [session.sums[channel].session.statement for channel in session.codecs]
        self._fewest = max(int(each.get("asked_survivors", each.get("min_survivors", 2))) for each in stated)

    def sums_over(self, selected: tuple[str, ...]) -> Mapping[str, RemoteChannel]:
        """Raises: TooFewSurvivorsError."""
        del selected  # all are
        self._sites.begin_round(fewest=self._fewest, all_of_them=not self._begun)
        self._begun = True
        for summing in self._sums:
            summing.open()
        self._sites.strange.clear()
        self._sites.restarted.clear()
        return self._channels

    def answer(self, told: Told, parties: RoundParties, summing: RemoteRound) -> None:
        """Raises: what the driver does."""
        self._exchange = told.exchange
        summing.collect()
        present = self._sites.present
        parties.lost |= {name: "vector" for name in parties.names if name not in present}
        parties.silent |= {name for name in parties.names if name not in summing.sent}

    def judged(self, number: int, weights: torch.Tensor) -> Mapping[str, float]:
        """The mean over all records that the sites hold out; nothing where too few of them answer."""
        if not self._metrics:
            return {}
        channel = self._channels[CHANNEL]
        told = Told.of(Exchange(channel=CHANNEL, weights=weights), number, self._exchange + 1)
        try:
            summing = channel.begin(told, self._sites.names)
            summing.collect()
            mean = channel.codec.decode(summing.finish())
        except TooFewSurvivorsError as error:
            self._sites.say(f"no sum of the sites' own evaluations of round {number}: {error}")
            return {}
        values = mean.value.tolist()
        return {f"{name} at the sites": value for name, value in zip(self._metrics, values, strict=True)}

    def end(self, number: int, weights: torch.Tensor) -> None:
        """No round comes after that one, and these are the weights in the end."""
        ended = model_digest(weights), number
        self._ended = signatories_of(
            self._sites, self._keys, self._terms, self._identity, ended, rehearsal=self._rehearsal
        )

    def signatories(self) -> Signatories | None:
        """Who was there in the end."""
        return self._ended


def identity_of(coordinator: CertifiedIdentity) -> Identity:
    """What signs manifests."""
    return Identity(ECC.import_key(coordinator.key_path.read_bytes()).seed)


def signatories_of(
    sites: Sites,
    keys: Mapping[str, bytes],
    terms: TrainingTerms,
    coordinator: Identity,
    ended: tuple[str, int],
    *,
    rehearsal: bool,
) -> Signatories:
    """End a job at the sites, and say who was there, and how they are asked to sign. ended: digest of the model that
    came of the last round, and the number of that round.
    """
    over = sites.end(*ended)

    def sign(body: bytes, names: Sequence[str]) -> dict[str, str]:
        """The signatures that hold under the keys of the directory."""
        found = sites.sign(body, names)
        for name in [each for each in names if each not in found]:
            sites.say(f"{name} has not signed the run's manifest; who runs it knows why")
        return {name: each for name, each in found.items() if signed_by("manifest", body, each, keys[name].hex())}

    return Signatories(
        run=sites.offer.digest,
        coordinator=coordinator,
        owned={
            name: Owned(keys=over[name].keys, receipts=over[name].receipts, head=over[name].head)
            for name in sites.names
            if name in over and over[name].keys[-1] == keys[name].hex()
        },
        sign=sign,
        model=ended[0],
        terms=terms.digest.hex(),
        text=terms.text.decode(),
        rehearsal=rehearsal,
    )


class RemoteSum:
    """A session of one kind of vector with the sites. channels that look alike share it."""

    def __init__(
        self, sites: Sites, driver: ServerDriver, spec: SumSpec, transcript: Transcript, name: str, channel: str
    ) -> None:
        self.sites, self.driver, self._spec, self.transcript = sites, driver, spec, transcript
        self._name, self._channel = name, channel
        # Of all parties: what is stated, and what noise is sized by. 0 but in two and three trips.
        self._least = driver.promised if isinstance(driver, AheadServerDriver) else 0
        self._members: frozenset[str] = frozenset()
        self.place = 0

    def open(self) -> None:
        """Open a session, unless one is open that everybody who is there is in, and can go on with.

        Raises: TooFewSurvivorsError; also where a sum in two trips of those who are there may be opened over fewer than
            is stated of all: nobody confirms who is in it, so that nobody would notice.
        """
        present = self.sites.present
        fits = self._members.issuperset(present) and not self.sites.strange & set(present)
        if fits and all(self.driver.forget(name) for name in sorted(self.sites.restarted & set(present))):
            return
        self.place = self.transcript.open_session(self._name, self._spec)
        self._members = frozenset()
        for trip in self.driver.open():
            self._refuse_fewer()  # before the sites do, who say no more than that
            self.sites.pass_on(self._channel, trip)
        setup = getattr(self.driver, "setup", None)
        self._members = frozenset(self._spec.parties if setup is None else setup.roster)

    def _refuse_fewer(self) -> None:
        """Raises: TooFewSurvivorsError."""
        setup = getattr(self.driver, "setup", None)
        if isinstance(setup, AheadSetup) and setup.trips == 2 and (least := fewest_opened(setup)) < self._least:
            raise TooFewSurvivorsError(
                f"a sum in two trips of the {len(setup.roster)} sites that are there may be over {least}, and"
                f" {self._least} are stated",
                survivors=len(setup.roster),
                needed=len(setup.roster) + 1,
                missing=tuple(name for name in self._spec.parties if name not in setup.roster),
                hint=f"wait for the others, state min_survivors={least}, or take trips=3 or 4",
            )


class RemoteChannel:
    """One channel's exchanges in a session (`OpenChannel`)."""

    def __init__(self, name: str, summing: RemoteSum, codec: Codec, terms: bytes) -> None:
        self._name, self.summing, self.codec, self._terms = name, summing, codec, terms

    def begin(self, told: Told, parties: RoundParties | tuple[str, ...]) -> RemoteRound:
        """parties: who was selected. Raises: TooFewSurvivorsError; what begins to pay for the sum."""
        summing, sites = self.summing, self.summing.sites
        names = parties if isinstance(parties, tuple) else parties.names
        self.codec.begin(sites.present, lambda: told.digest)
        summing.transcript.begin_sum(told.exchange + 1, self._name, session=summing.place, told=told.bytes_down)
        return RemoteRound(self._name, summing, told, self._terms, lost=set(names) - set(sites.present))


class RemoteRound:
    """One sum with the sites, as far as it has come. sent: whose vectors came."""

    def __init__(self, channel: str, summing: RemoteSum, told: Told, terms: bytes, *, lost: set[str]) -> None:
        self._channel, self._sites, self._driver, self._told = channel, summing.sites, summing.driver, told
        self._fresh = set(self._sites.names)
        self.sent: tuple[str, ...] = ()
        self._asked: tuple[str, ...] = ()
        self._trips: Iterator[Trip] = self._driver.round(told.terms(terms), lost=lost)
        self._vectors: Trip | None = None
        for trip in self._trips:
            if trip.step == "vector":
                self._vectors = trip
                return
            self._pass(trip)

    def collect(self) -> None:
        """Have the sites train and send their vectors. Raises: ConfigError for a sum without vectors."""
        if self._vectors is None:
            raise ConfigError("a sum without a trip for vectors")
        self._asked = tuple(name for name in self._vectors.outbox if name in self._sites.present)
        self._pass(self._vectors)
        self._end(())  # as long as nothing else is known
        waiting = set(self._vectors.waiting)
        self.sent = tuple(name for name in self._asked if name not in waiting)

    def finish(self) -> SumResult:
        """Raises: TooFewSurvivorsError, and what else ends a sum."""
        for trip in self._trips:
            self._pass(trip)
        if self._driver.result is None:
            raise ConfigError("a sum without a result")
        self._end(self._driver.result.survivors)
        return self._driver.result

    def _end(self, survivors: tuple[str, ...]) -> None:
        told = self._told
        for name in self._asked:
            self._sites.past[name] = ExchangeEnded(told.number, told.exchange, name in survivors, False)

    def _pass(self, trip: Trip) -> None:
        self._sites.pass_on(self._channel, trip, self._told, self._fresh)

    def needs(self, party: str) -> NeedsVector | None:
        """The sites compare, each for itself."""

    def submit(self, party: str, vector: Any) -> None:  # noqa: ARG002
        """Raises: ConfigError: sites send their vectors themselves."""
        raise ConfigError(f"the vector of {party!r} comes from its site")
