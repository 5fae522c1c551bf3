"""One job at a site: its party in memory, and on disk what a restart goes on from.

    state/DIGEST/trained-for  the latest exchange that it trained for, written before it is paid for
    state/DIGEST/states       what the algorithm has it remember
    state/DIGEST/sum-N        the public state of its driver of each sum (no secret is in it)

All are written whole and synced before anything that depends on them is sent. After a restart the party is made anew
from the offer, and goes on from there: it answers the next round.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError

from choral.errors import ChoralError
from choral.locks import locked_folder
from choral.network.door.trained import Trained
from choral.network.errors import BusyError, OfferRefusedError, SiteError
from choral.network.host.engine_training import EngineTrainer, PausingDriver, TrainFirstError
from choral.network.host.messages import ExchangeEnded, StepTaken, TakeStep, TellAgain
from choral.network.host.statistics_job import statistics_party
from choral.network.host.training_code import Loaded, embedded_part, site_task
from choral.network.site.files.log import Fact
from choral.network.site.files.private import write_private
from choral.network.site.files.settings import PART
from choral.privacy import ClientPrivacy
from choral.protocols.driver import PartyDriver
from choral.protocols.interface import SumSpec
from choral.trainers.analytics.terms import StatisticsTerms, of_counts
from choral.trainers.data.standardised import Standardisation, standardised_task
from choral.trainers.engines.exchange_messages import NotToldError
from choral.trainers.engines.rank_messages import packed, unpacked
from choral.trainers.federated.party import PartyStates, TrainingParty, own_party
from choral.trainers.federated.terms.trained_for import PartyMemory, TrainedFor
from choral.trainers.federated.terms.training_terms import TrainingTerms
from choral.trainers.run_folder.evidence.party_receipts import Receipted, open_receipts
from choral.trainers.run_folder.evidence.receipts import receipts_path
from choral.trainers.task.arithmetic import Compute
from choral.trainers.task.settings import Split, Training

if TYPE_CHECKING:
    from choral.network.site.admission import Agreement
    from choral.network.site.folder import SiteFolder


_PARTS = ("now", "pending", "before")
_BUSY = "it is still at work on an earlier message"


class TrainingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What of a job's settings a party needs beside the terms. The rest has been said in those."""

    seed: int
    training: Training
    split: Split
    standardise: Standardisation | None = None


def settings_in(settings: Mapping[str, Any]) -> TrainingSettings:
    """Raises: OfferRefusedError for settings of another form."""
    try:
        return msgspec.convert(settings, TrainingSettings, dec_hook=lambda kind, value: kind(value))
    except (msgspec.ValidationError, ChoralError) as error:
        raise OfferRefusedError([f"its settings cannot be read: {error!s:.200}"]) from None


class SiteJob:
    """See the module. One message at a time; whoever brings several waits.

    Raises: what making a party raises; OfferRefusedError for terms that are not what this site computes.
    """

    def __init__(self, folder: SiteFolder, agreement: Agreement) -> None:
        offer, self._agreement, self._folder = agreement.offer, agreement, folder
        self.digest, self.name = offer.digest, folder.settings.name
        self._state = folder.path / "state" / offer.digest
        self._state.mkdir(mode=0o700, exist_ok=True)
        receipts = receipts_path(folder.path, offer.digest)
        receipts.parent.mkdir(mode=0o700, exist_ok=True)
        receipts.touch(mode=0o600)
        self.made, self._lock = secrets.token_bytes(8), threading.Lock()
        self._doing = b""  # the message at hand
        rehearsed = folder.settings.rehearsal
        receipted = Receipted(path=receipts, identity=folder.signing, run=offer.digest, rehearsal=rehearsed)
        self._engine: EngineTrainer | None = None
        self.party = self._by_engine(receipted) if offer.by_engine else self._own(receipted)
        if self.party.examples != agreement.data.records:
            raise SiteError(
                f"the data has {self.party.examples} records, and site.toml says {agreement.data.records}",
                hint="a promise is held against what is said there",
            )
        if self.party.terms.digest != agreement.terms.digest:
            raise OfferRefusedError(["its terms are not those of the model, promise and code that are here"])
        self.party.store = self._store
        if (path := self._state / "states").is_file():
            self.party.states = _states_of(path)

    def _own(self, receipted: Receipted) -> TrainingParty:
        """A party of this process: of a training, or of statistics."""
        agreement = self._agreement
        if not isinstance(agreement.terms, StatisticsTerms):
            return self._here(receipted)
        settings, memory = agreement.offer.settings, self._memory()
        return statistics_party(
            self.name,
            agreement,
            agreement.terms,
            lambda: _loaded(agreement, settings_in(settings)),
            self._drivers,
            memory,
            receipted,
        )

    def _here(self, receipted: Receipted) -> TrainingParty:
        """A party that trains in this process, by the code that is installed here."""
        agreement, settings = self._agreement, settings_in(self._agreement.offer.settings)
        task, dataset = _loaded(agreement, settings)
        if settings.standardise is not None:
            task = standardised_task(task, settings.standardise)
        chosen = settings.training
        private = agreement.privacy is not None and not isinstance(agreement.privacy, ClientPrivacy)
        in_torch = private or chosen.precision != "float32" or chosen.compile
        return own_party(
            self.name,
            dataset,
            replace(task, schedule=chosen.schedule, min_classes=min(task.min_classes, settings.split.min_classes)),
            agreement.terms,
            self._drivers,
            privacy=agreement.privacy,
            ledger=agreement.ledger,
            compute=Compute(
                seed=settings.seed,
                device="cpu",
                precision=chosen.precision,
                compile=chosen.compile,
                engine=None if in_torch else task.engine,
            ),
            memory=self._memory(),
            receipts=receipted,
        )

    def _by_engine(self, receipted: Receipted) -> TrainingParty:
        """A party that is handed what an engine's process trained."""
        terms, records, memory = self._agreement.terms, self._agreement.data.records, self._memory()
        self._engine = trainer = EngineTrainer(terms, records)
        return TrainingParty(
            self.name,
            terms,
            terms.party_codecs(records),
            examples=records,
            state=memory.state,
            trainer=trainer,
            drivers={channel: PausingDriver(driver, trainer) for channel, driver in self._drivers(terms).items()},
            receipts=open_receipts(receipted, self.name, terms.text, terms.digest, None),
            trained_for=memory.trained_for.bound(self.name, terms.digest),
        )

    def books(self) -> dict[str, Fact]:
        """How far the data's ledger has come, for the site's log. Raises: LedgerError."""
        return self._agreement.books()

    @property
    def coordinator(self) -> str:
        return self._agreement.offer.coordinator

    def step(self, asked: TakeStep, trained: Trained | None = None) -> StepTaken | TellAgain | torch.Tensor:
        """One message of a sum, and before it the exchange that it is of. trained: for it, by an engine's process;
        where there is none yet and one is wanted, the weights to train from come back, and nothing has changed.

        Training takes as long as it takes. The message that asked for it, if it comes again, waits for its answer;
        another is of a later round, for the coordinator has given this one up, and is not kept waiting.

        Raises: BusyError; OfferRefusedError if the approval was revoked or is over; what the party does: ProtocolError,
            BudgetExceededError, LedgerError. It is then out of this round.
        """
        if not self._lock.acquire(blocking=self._doing in (b"", asked.message)):
            raise BusyError(_BUSY)
        try:
            self._doing = asked.message
            self._agreement.check(self._folder)
            self._ended(asked.past)
            if asked.told:
                try:
                    self.party.hear(asked.told)
                except NotToldError:
                    return TellAgain()
            return self._handled(asked, trained)
        finally:
            self._doing = b""
            self._lock.release()

    def _handled(self, asked: TakeStep, trained: Trained | None) -> StepTaken | torch.Tensor:
        if self._engine is None:
            return StepTaken(self.party.handle(asked.channel, asked.message))
        self._engine.trained = trained
        try:
            return StepTaken(self.party.handle(asked.channel, asked.message))
        except TrainFirstError as first:
            told = self.party.heard()
            self.party.check(first.needs, told)
            return told.ask.weights
        finally:
            self._engine.trained = None

    def end(self, past: ExchangeEnded | None, model: str, *, completed: int) -> None:
        """No message comes after this one. model: digest of the one that came of round ``completed``.

        Raises: BusyError.
        """
        if not self._lock.acquire(blocking=False):
            raise BusyError(_BUSY)
        try:
            self._ended(past)
            self.party.leave(model, completed=completed)
        finally:
            self._lock.release()

    def _ended(self, past: ExchangeEnded | None) -> None:
        """How the latest exchange ended; what the algorithm has the party remember depends on it."""
        if past is None or past.number != self.party.trained_for[0]:
            return
        if past.exchange == self.party.trained_for[1]:
            self.party.settle(survived=past.survived)
        if past.failed:
            self.party.undo()
        self._store(self.party.states)

    def _memory(self) -> PartyMemory:
        path = self._state / "trained-for"
        known = _content_of(path)

        def store(raw: bytes) -> None:
            """Raises: SiteError where another process of this site has gone on with the job: this one's is an old copy,
            which would train for an exchange twice, and break the chain of receipts.
            """
            nonlocal known
            with locked_folder(self._state):
                if _content_of(path) != known:
                    raise SiteError(
                        f"another process of this site has trained for job {self.digest[:16]} meanwhile",
                        hint="one process is the site; end one of them, and start the other anew",
                    )
                write_private(path, raw)
                known = raw

        return PartyMemory(trained_for=TrainedFor(store, known))

    def _drivers(self, own: TrainingTerms) -> dict[str, PartyDriver]:
        """Of each channel, of what is summed there by the party's own terms."""
        drivers: dict[SumSpec, PartyDriver] = {}
        roster = self._agreement.offer.parties
        found = {}
        for channel in own.channels:
            spec = replace(own.codec(channel, roster).spec, directory=len(roster), terms=own.digest)
            found[channel] = self._driver(spec, drivers, own)
        return found

    def _driver(self, spec: SumSpec, drivers: dict[SumSpec, PartyDriver], own: TrainingTerms) -> PartyDriver:
        """One for each sum, which channels that look alike share."""
        if spec in drivers:
            return drivers[spec]
        path = self._state / f"sum-{len(drivers)}"
        drivers[spec] = driver = self._agreement.secure_sum.party_driver(
            spec,
            name=self.name,
            identity=self._folder.signing,
            policy=self._agreement.policy_for(spec, everybody=of_counts(own)),
            store=lambda raw: write_private(path, raw),
            state=path.read_bytes() if path.is_file() else None,
            purpose=f"{self.digest} {len(drivers)}",
        )
        return driver

    def _store(self, states: PartyStates) -> None:
        there = {part: found for part in _PARTS if (found := getattr(states, part)) is not None}
        path = self._state / "states"
        if not there and not path.exists():
            return  # of an algorithm that has it remember nothing
        tensors = {f"{part}/{name}": tensor for part, found in there.items() for name, tensor in found.items()}
        write_private(path, packed({"parts": list(there)}, tensors).numpy().tobytes())


def _content_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _states_of(path: Path) -> PartyStates:
    """Raises: SiteError."""
    try:
        head, tensors = unpacked(torch.from_numpy(np.frombuffer(bytearray(path.read_bytes()), np.uint8)))
        parts = {
            part: {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}/")}
            for part in head["parts"]
        }
        return PartyStates(**parts)
    except (OSError, LookupError, TypeError, ValueError, SafetensorError, msgspec.MsgspecError):
        raise SiteError(
            f"{path} cannot be read", hint="what the algorithm had this party remember is lost; begin a new job"
        ) from None


def _loaded(agreement: Agreement, settings: TrainingSettings) -> Loaded:
    offer, data = agreement.offer, agreement.data
    if agreement.code is not None and agreement.path is not None:
        return site_task(agreement.code, offer.code, agreement.path, settings.training, settings.seed)
    found = PART.fullmatch(data.part)
    if found is None:
        raise SiteError(f"the data of {offer.task} is no part of a task of Choral")
    return embedded_part(offer.task, int(found[1]), int(found[2]), settings.split, settings.training, settings.seed)
