"""A party, one object: its records' promise, its trainer, its half of the codec and of the sum, what it remembers.

    from the server             at the party                                                 what leaves
    the exchange (weights)      hear      its digest, of what was really received            -
    messages of the sum         handle    the driver's                                       keys, shares
    Begin, signed by all        check     model and training terms are those it was told     nothing, if they are not
                                order     1. that it trains for this exchange is on disk,
                                             and what the exchange costs                     -
                                train     2. the promise's engine pays for each pass         -
                                              before its first batch is drawn
                                answer    3. what is sent, encoded; refused if unpaid        -
                                send      4. the vector, masked or encrypted                 the upload

**Append, fsync, train, send**: a party that dies anywhere on that way has told nothing that its ledger does not hold.
What was paid for and not sent stays paid for: nobody can know that it was not seen. A failure of its training is its
dropout, and what failed stays here.

The same object runs in one process with all others, whose orders go to one trainer that may train them together or at
other ranks (:class:`~choral.trainers.federated.round_parties.PartiesHere`), and in a process of its own (`own_party`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from choral.errors import ChoralError, ConfigError
from choral.privacy import ClientPrivacy, EncodingError, Ledger, Privacy, PrivacyEngine
from choral.protocols.driver import NeedsVector, PartyDriver
from choral.protocols.errors import FaultyServerError, MessageError
from choral.trainers.algorithms.interface import (
    Done,
    Failed,
    LocalTrainer,
    Party,
    Work,
)
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.engines.fastest import Fastest
from choral.trainers.federated.checks import check_fits, check_weights
from choral.trainers.federated.codec import Encoded, PartyCodec
from choral.trainers.federated.failures import beyond, nothing_made
from choral.trainers.federated.record_shares.checks import in_shares
from choral.trainers.federated.record_shares.own_process import check_drivers, own_plan
from choral.trainers.federated.terms.clients import check_sums, clients_of
from choral.trainers.federated.terms.site_metrics import CHANNEL, Judge, judge_of
from choral.trainers.federated.terms.task_code import code_of
from choral.trainers.federated.terms.trained_for import PartyMemory, TrainedFor
from choral.trainers.federated.terms.training_terms import TrainingTerms
from choral.trainers.local_steps.resident_model import Resident
from choral.trainers.run_folder.algorithm_state import State
from choral.trainers.run_folder.describe import settings_of
from choral.trainers.run_folder.evidence.party_receipts import PartyReceipts, Receipted, open_receipts
from choral.trainers.run_folder.evidence.receipts import Asked
from choral.trainers.run_folder.owner_privacy import check_delta, engine_for, written
from choral.trainers.task.arithmetic import Arithmetic, Compute, resolve_device
from choral.trainers.task.learning_rate import Rates
from choral.trainers.task.seeding import caller_keeps_generators
from choral.trainers.task.task import DivergedError, Task, TaskError, check_party, raised_by

_log = logging.getLogger("choral.trainers")
_MOST_KEPT = 16  # tensors that a server may have a party keep from round to round


@dataclass(frozen=True, kw_only=True)
class PartyStates:
    """What the algorithm has a party remember.

    pending: what it will be if the latest vector is in the sum. before: what it was before the round.
    """

    now: State | None = None
    pending: State | None = None
    before: State | None = None


class TrainingParty:
    """See the module. Not for several threads at once.

    codecs: its half for each channel. examples: how many records it has, and so its weight. ledger: of its records'
    promise; None, and its training is not private by record. state: what the algorithm has it remember. trainer,
    drivers: of a party in a process of its own (:func:`own_party`); a driver for each channel,
    the same one where channels share a session. trained_for: where it had come to, before a restart.
    """

    error: ChoralError | None = None
    """Why its latest exchange failed, for its owner alone; None if it did not."""
    judge: Judge | None = None
    """What it says of a model by the records that it holds out, where the terms have that summed."""
    store: Callable[[PartyStates], None] | None = None
    """Keeps its states where a restart finds them, before what depends on them is sent. None: there is no restart."""

    def __init__(
        self,
        name: str,
        terms: TrainingTerms,
        codecs: Mapping[str, PartyCodec],
        *,
        examples: int,
        ledger: Ledger | None = None,
        state: State | None = None,
        trainer: LocalTrainer | None = None,
        drivers: Mapping[str, PartyDriver] | None = None,
        receipts: PartyReceipts | None = None,
        trained_for: TrainedFor | None = None,
    ) -> None:
        self.name, self.terms, self.examples, self.state = name, terms, examples, state
        self._receipts = receipts or PartyReceipts(None, None)
        self._codecs, self._ledger, self._trainer, self._drivers = codecs, ledger, trainer, drivers or {}
        self._told: Told | None = None
        self._kept: dict[str, torch.Tensor] = {}
        self._before: State | None = state  # the round
        self._pending: State | None = None
        self._unpaid: Callable[[], bool] = lambda: False
        self._trained_for = trained_for or TrainedFor()

    # ------------------------------------------------------------------------------------------- one exchange, in order

    def check(self, needs: NeedsVector, told: Told) -> None:
        """Whether it is to train on what it was told, under its own terms. Before, nothing is paid and nothing trained.

        Raises: FaultyServerError.
        """
        if needs.terms != self.terms.digest:
            raise FaultyServerError(
                f"the training terms that the parties sign are not those of {self.name!r}",
                hint="algorithm, promise, encoding, rounds, model and code must be the same at all parties",
            )
        if (needs.exchange, needs.weights) != (told.exchange, told.digest):
            raise FaultyServerError(
                f"{self.name!r} was told other weights, tensors or another exchange than the parties sign",
                hint="the server may show parties different models; nothing was trained",
            )
        if told.number > self.terms.rounds:
            raise FaultyServerError(
                f"it asks {self.name!r} for round {told.number} of the {self.terms.rounds} that were agreed on"
            )
        if not self.terms.has(told.ask.channel, told.exchange):
            asked = f"it asks {self.name!r} for exchange {told.exchange + 1} of round {told.number}"
            raise FaultyServerError(f"{asked}, {told.ask.channel!r}, which no round has there: each is a training")
        if self._trained_for.covers(told.number, told.exchange):
            raise FaultyServerError(
                f"{self.name!r} has trained for exchange {told.exchange} of round {told.number} or a later one before",
                hint="nothing is trained twice: a round that failed is left, and the next one begun",
            )

    def order(self, told: Told) -> Work:
        """1. Pay for the exchange; then what is to be computed. Raises: BudgetExceededError, LedgerError."""
        self._told, self.error, self._pending = told, None, None
        self._trained_for.write(told.number, told.exchange)
        if told.exchange == 0:
            self._before = self.state
        self._codecs[told.ask.channel].pay(lambda: told.digest)
        self._view = Party(
            name=self.name,
            examples=self.examples,
            federation=self.terms.federation,
            number=told.number,
            state=dict(self.state or {}),
        )
        work = self.terms.algorithm.work(self._view, told.ask)
        if (ledger := self._ledger) is not None:
            before = written(ledger)
            self._unpaid = lambda: written(ledger) <= before
        return work

    def answer(self, done: Done | Failed) -> Encoded | None:
        """3. What it sends of what was trained, encoded; None if it drops out, and `error` says why."""
        told = self.heard()
        codec = self._codecs[told.ask.channel]
        if isinstance(done, Failed):
            self.error = raised_by(done.error, f"training at party {self.name!r}")
        else:
            try:
                encoded = self._encoded(done, codec, told)
                self._pending = dict(self._view.state) if self._view.state or self.state is not None else None
                return encoded
            except (TaskError, DivergedError, EncodingError) as error:
                self.error = error
        _log.warning("round %d: %s (%s)", told.number, self.error, self.error.hint)
        return codec.stand_in()

    def settle(self, *, survived: bool) -> None:
        """The sum is over: what the algorithm has the party remember counts only if its vector is in it."""
        driver = self._drivers.get(self._told.ask.channel) if self._told else None
        self._receipts.settle(driver.agreed() if driver else None, survived=survived)
        if survived and self._pending is not None:
            self.state = self._pending
        self._pending = None

    def undo(self) -> None:
        """The round failed: remember what was before its first exchange."""
        self._receipts.give_up("given up")
        self.state, self._pending = self._before, None

    @property
    def trained_for(self) -> tuple[int, int]:
        """The latest round that it trained for, and the exchange in it."""
        return self._trained_for.last

    @property
    def states(self) -> PartyStates:
        """What a restart goes on from. It is the party's own matter, and never sent."""
        return PartyStates(now=self.state, pending=self._pending, before=self._before)

    @states.setter
    def states(self, found: PartyStates) -> None:
        self.state, self._pending, self._before = found.now, found.pending, found.before

    def _encoded(self, done: Done, codec: PartyCodec, told: Told) -> Encoded:
        if self._unpaid():
            raise TaskError(
                f"training at party {self.name!r} went by its ledger: nothing was paid for, so nothing is sent",
                hint="train with the model, optimizer and loader that fit is given",
            )
        vector = self.terms.algorithm.answer(self._view, told.ask, done)
        try:
            return codec.encode(vector)
        except EncodingError as error:
            where = f"round {told.number}, party {self.name!r}, {told.ask.channel}"
            raise beyond(error, vector, where, self.terms.shapes) from None

    def heard(self) -> Told:
        if self._told is None:
            raise FaultyServerError("it asked for a vector, and told no exchange that it would be of")
        return self._told

    # ------------------------------------------------------------------------------------------ in a process of its own

    def hear(self, raw: bytes) -> None:
        """The exchange that comes next, as the server tells it. Raises: MessageError."""
        told = Told.read(raw, length=self.terms.federation.length, kept=self._kept)
        if told.ask.channel not in self._codecs or told.ask.channel not in self._drivers:
            raise MessageError("the server", f"the algorithm has no channel {told.ask.channel!r}")
        self._told = told
        self._receipts.hear(told.number, Asked(told.exchange, told.ask.channel, told.digest), told.ask.weights)

    def leave(self, model: str = "", *, completed: int = 0) -> None:
        """No round is to come: the last one's receipt is written. model: digest of the one that came of round
        ``completed``, if the party was told.
        """
        self._receipts.close(model, completed=completed)

    def handle(self, channel: str, raw: bytes) -> tuple[bytes, ...]:
        """Take one message of the sum of that channel; what to send back. Where a vector is asked for, train first.

        An empty answer to that is the party's dropout: `error` has the reason.
        Raises: what the driver and `check` do, LedgerError, BudgetExceededError; it is then out of this round.
        """
        driver, trainer = self._drivers.get(channel), self._trainer
        if driver is None or trainer is None:
            raise MessageError("the server", f"this party takes part in no sum of channel {channel!r:.80}")
        needs = driver.handle(raw)
        if not isinstance(needs, NeedsVector):
            return self._receipts.send(needs)
        try:
            encoded = self._trained(needs, driver, trainer)
            if encoded is not None:
                if self.store is not None:
                    self.store(self.states)
                return self._receipts.send(driver.supply(encoded.vector), vector=True)  # 4.
        except BaseException:
            driver.decline()
            raise
        driver.decline()
        return ()

    def _trained(self, needs: NeedsVector, driver: PartyDriver, trainer: LocalTrainer) -> Encoded | None:
        told = self.heard()
        self.check(needs, told)
        if self._drivers[told.ask.channel] is not driver:
            raise FaultyServerError(f"{self.name!r} was told an exchange of another sum than it is asked a vector for")
        self._kept = dict(list((self._kept | dict(told.ask.new)).items())[-_MOST_KEPT:])
        if self.judge is not None and told.ask.channel == CHANNEL:
            return self._judged(told, self.judge)
        with caller_keeps_generators():
            made = list(trainer.do([(self.name, self.order(told))], told.ask.weights, told.number))  # 1., 2.
        if [name for name, _ in made] != [self.name]:
            raise nothing_made(trainer, self.name)
        return self.answer(made[0][1])

    def _judged(self, told: Told, judge: Judge) -> Encoded | None:
        """What its own evaluation says, in the place of training; None if that fails."""
        self.error, self._pending = None, None
        self._trained_for.write(told.number, told.exchange)
        try:
            return self._codecs[CHANNEL].encode(judge(told.ask.weights))
        except Exception as error:
            self.error = raised_by(error, f"the evaluation at party {self.name!r}")
            _log.warning("round %d: %s (%s)", told.number, self.error, self.error.hint)
            return None


def own_party(
    name: str,
    dataset: Any,
    task: Task,
    terms: TrainingTerms,
    drivers: Callable[[TrainingTerms], Mapping[str, PartyDriver]],
    *,
    privacy: Privacy | ClientPrivacy | None = None,
    ledger: Ledger | None = None,
    compute: Compute | None = None,
    memory: PartyMemory | None = None,
    receipts: Receipted | None = None,
) -> TrainingParty:
    """A party in a process of its own: nothing of any other is here, and nothing is taken on a server's word.

    terms: agreed to; promise, model and code are this party's own, whatever they say, and so is the digest that it
    demands. drivers: its half of each channel's sum, given those terms. privacy, ledger: the promise to its records, or
    to it as a client, and what remembers that it was spent; both or none. memory: of before a restart; by default it
    forgets with the process. receipts: where it keeps them, and as whom it signs.

    Noise in shares: the terms have its plan, which is computed anew; every step is computed on equally many rows, so
    that the time of an answer does not tell how many records were drawn. The noise of a client is its own share, or
    "local"; "central" is the server's, which is trusted with it: the party clips.

    Raises: ConfigError for what does not fit the promise (one of the two alone, an algorithm, weights, delta not below
        1/n, a sum that does not hide noise), more records than the cap, or a plan of other terms; PrivacyError for a
        plan, or a sum of which it demands too little, that breaks it; DataError, LedgerError; what ``build`` does.
    """
    examples, compute = _own_examples(name, dataset, task, terms, privacy, ledger), compute or Compute()
    resident = _own_resident(name, dataset, task, terms, privacy, ledger, compute)
    own = replace(
        terms,
        shares=own_plan(resident, name, privacy, ledger, terms),
        privacy=settings_of(privacy, terms.federation.parties),
        shapes=resident.layout.shapes,
        code=code_of(task),
        clients=clients_of(terms, privacy, ledger, name, begun=memory is None or memory.trained_for.begun),
    )
    check_drivers(own.shares, sums := drivers(own))
    check_sums(own.clients, sums)
    judge = judge_of(task, own.metrics, resident, terms.federation.largest)
    party = TrainingParty(
        name,
        own,
        own.party_codecs(examples, judged=judge.examples if judge else 0),
        examples=examples,
        ledger=None if own.clients else ledger,
        state=memory.state if memory else None,
        trainer=compute.engine(resident) if compute.engine else Fastest(resident),
        drivers=sums,
        receipts=open_receipts(receipts, name, own.text, own.digest, ledger) if receipts else None,
        trained_for=(memory or PartyMemory()).trained_for.bound(name, own.digest),
    )
    party.judge = judge
    return party


def _own_examples(
    name: str,
    dataset: Any,
    task: Task,
    terms: TrainingTerms,
    privacy: Privacy | ClientPrivacy | None,
    ledger: Ledger | None,
) -> int:
    """How many records it has, if all that is known beforehand fits together. Raises: as :func:`own_party`."""
    if (privacy is None) != (ledger is None):
        raise ConfigError("privacy and its ledger go together", hint="a promise that nobody remembers is none")
    examples = check_party(name, dataset, task.min_classes)
    if examples > (cap := terms.federation.largest):
        raise ConfigError(f"{examples} records weigh more than the cap of {cap} that was agreed on")
    check_fits(terms.algorithm, privacy, task.loss)
    check_weights(terms.algorithm, privacy, terms.encoding.weights)
    if isinstance(privacy, Privacy):
        check_delta(privacy, {name: examples})
    return examples


def _own_resident(
    name: str,
    dataset: Any,
    task: Task,
    terms: TrainingTerms,
    privacy: Privacy | ClientPrivacy | None,
    ledger: Ledger | None,
    compute: Compute,
) -> Resident:
    engines: dict[str, PrivacyEngine] = {}
    if isinstance(privacy, Privacy) and ledger is not None and not in_shares(privacy):
        engines = {name: engine_for(privacy, name, ledger, terms.rounds)}
    resident = Resident(
        build=task.build,
        fit=task.fit,
        datasets={name: dataset},
        privacy_engines=engines,
        seed=compute.seed,
        arithmetic=Arithmetic(resolve_device(compute.device), compute.precision, compile=compute.compile),
        loss=task.loss,
        rates=Rates(task.schedule, terms.rounds),
    )
    resident.check_batches()
    return resident
