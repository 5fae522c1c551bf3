"""A federation as it runs: all that it holds open, and what changes from round to round.

    with Session.open(plan) as session:
        for number in session.rounds_left():
            session.keep(one_round(session, number))
    run = session.run

Rank 0 of several processes is the federation; on the others there are no rounds, and `run` comes from rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import torch

from choral.protocols.interface import Step
from choral.protocols.tap import watched_by
from choral.trainers.algorithms.interface import Channel, FederationInfo, LocalTrainer, Server
from choral.trainers.engines.sharded import RankGroup, RankSetup, Sharded, led
from choral.trainers.federated.checks import check_ranks
from choral.trainers.federated.codec import Codec, WeightedCodec, cap_of
from choral.trainers.federated.distant.elsewhere import (
    DistantEngine,
    Elsewhere,
    Engine,
    OpenChannel,
    check_distant,
)
from choral.trainers.federated.failures import with_reasons
from choral.trainers.federated.ledgers import Ledgers, engines_here
from choral.trainers.federated.one_round import RoundOutcome
from choral.trainers.federated.participation import stream
from choral.trainers.federated.plan import Plan, contributor_count, trainer_of
from choral.trainers.federated.record_shares.checks import check_processes
from choral.trainers.federated.round_parties import PartiesHere, RoundParties, select
from choral.trainers.federated.sums import Sums, check_promises
from choral.trainers.federated.terms.site_metrics import metrics_releases
from choral.trainers.federated.terms.task_code import code_of
from choral.trainers.federated.terms.training_terms import TrainingTerms
from choral.trainers.local_steps.batch_gradients import ShareSteps
from choral.trainers.run_folder.algorithm_state import AlgorithmState
from choral.trainers.run_folder.describe import NOTHING, settings_of
from choral.trainers.run_folder.energy import EnergyMeter, Stopwatch
from choral.trainers.run_folder.evidence.rehearsal import Rehearsal, SentMessages
from choral.trainers.run_folder.evidence.sealing import seal
from choral.trainers.run_folder.info import RoundRecord, RunFolderError
from choral.trainers.run_folder.keep import OnRound
from choral.trainers.run_folder.owner_privacy import clips_of
from choral.trainers.run_folder.recorder import Recorder
from choral.trainers.run_folder.run import Run
from choral.trainers.run_folder.transcript import Transcript
from choral.trainers.task.evaluation import evaluated
from choral.trainers.task.per_party import per_party_of


class Session:
    """See the module. run: the finished run, once the session is closed without an error.

    engine: the parties, who answer. terms: what they agree to. codecs, sums: by channel. weights: the global ones,
    float32, shape (d,). receipts: of the parties, where they are kept.
    """

    run: Run
    weights: torch.Tensor
    receipts: Rehearsal | None = None
    _distant: DistantEngine | None = None

    tell: OnRound  # of each completed round

    def __init__(
        self,
        plan: Plan,
        ranks: RankGroup | None,
        recorder: Recorder,
        transcript: Transcript,
        sent: SentMessages,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self.plan, self._ranks, self._recorder, self.transcript = plan, ranks, recorder, transcript
        self._sent, self._elsewhere = sent, elsewhere
        self._ledgers = Ledgers.open(plan, recorder, begun=elsewhere.begun if elsewhere else 0)
        self._last, self._reason = self._ledgers.rounds_paid_for(plan.rounds, 1)
        self._over = bool(self._reason) and self._last <= recorder.completed
        if not self._over:
            self._prepare()

    @classmethod
    @contextmanager
    def open(cls, plan: Plan, elsewhere: Elsewhere | None = None) -> Iterator[Session]:
        """All resources, an earlier part of the run included; they are closed in the end, whatever happens.

        elsewhere: where the parties of the plan are `DistantParties`, who has them answer.
        Raises: ConfigError for terms that the sums refuse, or for ledgers that several processes cannot keep;
            RunFolderError, LedgerError, ProcessError; what building the model does.
        """
        check_distant(plan, elsewhere)
        ranks = RankGroup.join() if elsewhere is None else None
        if ranks is not None:
            check_processes(plan.privacy)
            check_ranks(ranks.size, plan.by_record, plan.keep.out, len(plan.parties))
            if ranks.rank:
                yield _Follower(plan, ranks)
                return
        with (
            led(ranks) as share,
            Recorder.open(plan.keep.out, plan.info, resume=plan.keep.resume, ledgers=plan.keep.ledgers) as recorder,
            Transcript(plan.keep.folder, plan.keep.transcript, recorder.sealed) as transcript,
            watched_by((sent := SentMessages(transcript.watcher, heard=plan.has_receipts)).watcher),
            plan.keep.telling(plan.rounds, "federated") as tell,
        ):
            session = cls(plan, ranks, recorder, transcript, sent, elsewhere)
            session.tell = tell
            yield session
            session.run = share(session._sealed())

    def rounds_left(self) -> Iterator[int]:
        """The numbers of the rounds that are to come, and that are paid for."""
        if self._over:
            return
        for number in range(self._recorder.completed + 1, self._last + 1):
            self._round, _ = Stopwatch().start(), self._meter.take()
            yield number

    def select(self, number: int) -> RoundParties:
        """Who is selected for a round. Raises: RunFolderError if what the algorithm kept is missing."""
        self.transcript.round = number
        algorithm = self.plan.algorithm
        if self._succeeded and algorithm.remembers and not self._state and self._elsewhere is None:
            raise RunFolderError(
                f"what {algorithm.kind} kept after round {number - 1} is missing, without which it cannot go on",
                hint=f"restore algorithm_state.{number - 1}.safetensors, or run again in a new folder",
            )
        found = select(
            self.plan.participation,
            self.plan.census.names,
            self.plan.census.examples,
            number=number,
            start=self.next_start,
            draws=self._draws,
            seed=self.plan.compute.seed,
            states=self._state.parties,
        )
        found.contributed = contributor_count(self.plan, self.terms.federation.length)
        if self.receipts:
            self.receipts.begin(number, found.names, self.weights)
        return found

    @property
    def completed(self) -> int:
        """The last round that is recorded."""
        return self._recorder.completed

    @property
    def sealed(self) -> bool:
        """Whether the run was over before, and its manifest is there."""
        return self._recorder.is_sealed(None)

    @property
    def next_start(self) -> float:
        """When the next round begins, in simulated seconds."""
        last, clock = self._recorder.history[-1], self.plan.participation.clock
        if last.simulated_start is None or last.simulated_seconds is None:
            return clock.first
        return clock.next(last.simulated_start, last.simulated_seconds)

    def sums_over(self, selected: tuple[str, ...]) -> Mapping[str, OpenChannel]:
        """The secure sums over a round's parties, by channel. Raises: as :meth:`Sums.open_for`."""
        if self._distant is not None:
            return self._distant.sums_over(selected)
        rule = self.plan.participation
        return self.sums if rule.everybody else self._sums.open_for(selected, rule, self.sums)

    def server_view(self, number: int) -> Server:
        """The server's of round `number`, with a copy of its state."""
        federation, pace = self.terms.federation, self._resident.rate_factor(number)
        return Server(federation=federation, number=self._succeeded + 1, state=dict(self._state.server), pace=pace)

    def dropouts(self, parties: RoundParties) -> dict[str, Step]:
        """Who is to drop out in the round's next sum, and where, as participation rehearses it."""
        random = stream(self.plan.compute.seed, parties.number, f"dropouts {parties.sums}")
        return self.plan.participation.dropouts.draw(parties.names, random)

    def keep(self, outcome: RoundOutcome, ahead: Callable[[], object] = lambda: None) -> None:
        """Evaluate and record a round. ahead: called before the round counts as complete.

        Raises: TooFewSurvivorsError if it failed and there is no more patience.
        """
        rule, codec = self.plan.participation, self._last_codec
        if outcome.failed and not outcome.interrupted and _failed_in_a_row(self._recorder.history) >= rule.patience:
            raise with_reasons(outcome.failed, outcome.errors)
        self.transcript.flush()
        self.weights = outcome.weights
        if outcome.server is not None and outcome.parties is not None:
            self._state.server, self._state.parties = outcome.server, outcome.parties
            self._succeeded += 1
        self._resident.layout.write(self.weights)
        seconds, joules = self._round.stop().seconds, self._meter.take()
        spent = self._ledgers.spent()
        theirs = {} if self._distant is None or outcome.failed else self._distant.judged(outcome.number, self.weights)
        with (evaluating := Stopwatch()):
            metrics = {**self._evaluated(), **theirs}
        entry = RoundRecord(
            round=outcome.number,
            metrics=metrics,
            seconds=seconds,
            survivors=outcome.survivors,
            bytes_up=outcome.bytes_up,
            bytes_down=outcome.bytes_down,
            epsilon=max((cost.epsilon for cost in spent.values()), default=None),
            clip=codec.clip,
            joules=joules,
            selected=outcome.selected,
            failed=str(outcome.failed or ""),
            dropped=outcome.dropped,
            largest=codec.largest if not outcome.failed else None,
            simulated_start=outcome.start if rule.timed else None,
            simulated_seconds=outcome.seconds if rule.timed else None,
            contributed=outcome.contributed,
            times=None if self._ranks or self._distant else outcome.times(self._round, evaluating),
        )
        self._state.clips = {} if self._ranks is not None else clips_of(self._ledgers.engines)  # others keep theirs
        ahead()
        self._recorder.add(
            entry, self._resident.model, spent, algorithm_state=self._state, sealed=self.transcript.sealed
        )
        if self.receipts:
            self.receipts.end(self.weights, entry.failed, spent)
        self.tell(entry)

    def _prepare(self) -> None:
        """Build the model, open the sums, record the untrained model."""
        plan, recorder = self.plan, self._recorder
        self._resident, trainer = trainer_of(plan, self._ledgers.engines)
        self._resident.check_batches()
        if self._ranks is not None:
            trainer = self._with_ranks(self._ranks, trainer)
        census, layout = plan.census, self._resident.layout
        federation = FederationInfo(
            parties=len(plan.parties),
            length=layout.length,
            examples=census.total,
            largest=cap_of(census.largest),
            value_bound=plan.encoding.value_bound,
            weight=len(plan.parties) if plan.encoding.weights == "equal" else census.total,
        )
        self.terms = TrainingTerms(
            algorithm=plan.algorithm,
            federation=federation,
            encoding=plan.encoding,
            privacy=settings_of(plan.privacy, len(plan.parties)),
            shapes=layout.shapes,
            rounds=plan.rounds,
            code=code_of(plan.task),
            metrics=() if self._elsewhere is None else self._elsewhere.metrics,
        )
        self.codecs = self._make_codecs(plan.algorithm.channels(federation))
        self._open_sums()
        self._distant = self._elsewhere.engine(self) if self._elsewhere is not None else None
        self.engine: Engine = self._distant or PartiesHere(
            terms=self.terms,
            trainer=trainer,
            examples=census.examples,
            ledgers=self._ledgers.by_party,
            codecs=self.codecs,
            transcript=self.transcript,
        )
        self._begin_record()
        self.receipts = self._open_receipts()
        self._state: AlgorithmState = recorder.algorithm_state()
        rehearsed = plan.participation.draw == "seed" or plan.participation.everybody
        self._draws = plan.compute.seed if rehearsed else recorder.draws()
        self._succeeded = sum(not entry.failed for entry in recorder.history[1:])
        if recorder.fresh:
            untrained = RoundRecord(round=0, metrics=self._evaluated(), **NOTHING)
            recorder.add(untrained, self._resident.model, sealed=self.transcript.sealed)

    def _with_ranks(self, ranks: RankGroup, trainer: LocalTrainer) -> LocalTrainer:
        folder, left = self._recorder.ledger_folder, self.plan.rounds - self._recorder.completed
        clips = dict(self._ledgers.clips)
        ranks.begin(RankSetup(rounds_left=left, folder=str(folder) if folder else None, clips=clips))
        return Sharded(ranks, trainer, self.plan.census.examples, sticky=bool(self._ledgers.engines))

    def _make_codecs(self, channels: Mapping[str, Channel]) -> dict[str, Codec]:
        plan, federation = self.plan, self.terms.federation
        listed = not plan.census.population or plan.participation.everybody
        roster = tuple(plan.census.names) if listed else plan.first_parties
        if self._ledgers.clients:
            sums = sum(channel.sums for channel in channels.values() if not channel.once)
            self._last, self._reason = self._ledgers.rounds_paid_for(plan.rounds, sums)
            most = plan.participation.cohort
            codec = self._ledgers.clients.codec(
                roster, federation.parties, federation.length, plan.rounds, sums, most=most
            )
            return dict.fromkeys(channels, codec)
        if self._ledgers.shares:
            in_shares, parties = self._ledgers.shares.begin(federation.length)
            self._last, self._reason = self._ledgers.shares.within(parties, self._last, self._reason)
            self.terms, before = replace(self.terms, shares=in_shares.plan), self._ledgers.shares.rows_before(parties)
            self._resident.shares = {name: ShareSteps(party, before) for name, party in parties.items()}
            return dict.fromkeys(channels, in_shares)
        return {
            name: WeightedCodec(
                channel,
                plan.encoding,
                cap=federation.largest,
                roster=roster,
                in_clear=plan.secure_sum.name == "plain" and not plan.keep.transcript and self._elsewhere is None,
            )
            for name, channel in channels.items()
        }

    def _open_sums(self) -> None:
        plan = self.plan
        rule, names, first = plan.participation, plan.census.names, plan.first_parties
        self._sums = Sums(
            secure_sum=plan.secure_sum,
            codecs=self.codecs,
            transcript=self.transcript if self._elsewhere is None else Transcript(None, None),
            parties=len(names),
            policy=plan.encoding.policy,
            terms=self.terms.digest,
        )
        # Of parties elsewhere this is a rehearsal, for what the sum states; their own sessions are the engine's.
        with watched_by(self.transcript.watcher if self._elsewhere is None else None):
            self.sums = self._sums.open(None if rule.everybody else first)
        if not rule.everybody and len(first) < (most := rule.expected(len(names))):
            check_promises(self.sums, len(first), self._sums.open(tuple(names[:most])), most)
            self._sums.check_between(self.sums, len(first), names[:most])

    def _begin_record(self) -> None:
        plan, last = self.plan, list(self.codecs)[-1]
        self._meter = EnergyMeter(plan.arithmetic.device)
        info = msgspec.structs.replace(
            plan.info,
            parameters=self._resident.layout.length,
            secure_sum={"name": plan.secure_sum.name, **self._stated(self.sums[last].session.statement)},
            fixed_point=self._last_codec.fixed_point,
            releases=(*plan.info.releases, *metrics_releases(self.terms.metrics)),
            meters=self._meter.meters,
        )
        self._recorder.begin(info)
        self.transcript.flush()
        self.weights = self._recorder.restore(self._resident.model, self._resident.layout)

    @property
    def _last_codec(self) -> Codec:
        """Of the round's last exchange, which the run's record tells of."""
        return list(self.codecs.values())[-1]

    def _open_receipts(self) -> Rehearsal | None:
        folder, terms = self.plan.keep.folder, self.terms
        if folder is None or not self.plan.has_receipts or self._recorder.is_sealed(self.plan.task.evaluate_party):
            return None
        return Rehearsal(
            folder,
            self.plan.census.names,
            self._sent,
            terms=terms.digest.hex(),
            text=terms.text.decode(),
            ledgers=self._ledgers.by_party,
        )

    def _stated(self, statement: Mapping[str, Any]) -> dict[str, Any]:
        """What the sum promises, and whether a party may weigh more by its own word."""
        alike = " Every party counts alike, whatever it says of its records."
        more = alike if self.plan.encoding.weights == "equal" else ""
        return {**statement, "trust": f"{statement.get('trust', '')}{more}".strip()}

    def _evaluated(self) -> dict[str, float]:
        return evaluated(self.plan.task.evaluate, self._resident.model, self.plan.compute.seed)

    def _closed(self) -> Run:
        """The run as it is recorded in the end."""
        task, parties = self.plan.task, self.plan.parties
        if self._recorder.completed < self.plan.rounds:
            return self._recorder.end(self._reason, self._ledgers.spent())
        return self._recorder.finish(per_party_of(task.held_out, task.evaluate_party, self._resident.model, parties))

    def _sealed(self) -> Run:
        """The same, with its manifest."""
        seal(run := self._closed(), self.receipts, self._distant.signatories() if self._distant else None)
        return run


class _Follower(Session):
    """At the ranks other than 0: trains what it is told to, until there is a run."""

    def __init__(self, plan: Plan, ranks: RankGroup) -> None:
        self.plan, self._over = plan, True
        self.run = ranks.follow(lambda told: trainer_of(plan, engines_here(plan, ranks, told))[1])


def _failed_in_a_row(history: Sequence[RoundRecord]) -> int:
    return next(count for count, entry in enumerate(reversed(history)) if not entry.failed)
