"""Each party's ledger of a run with noise in shares, the plan that all parties keep to, and how far it reaches.

A step is charged by the party, on disk, before its noise is drawn, and whether or not its sum is opened. So a round
that was cut short, by dropouts or a kill, has paid for the steps whose vectors were made; it is made anew from others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from choral.privacy import Ledger, LedgerError, Privacy, SharesPlan, SharesTerms, Spent, plan_shares
from choral.privacy.accounting.events import ClientRelease, RecordEvent
from choral.privacy.ledgers.memory_notice import notice_memory
from choral.privacy.ledgers.plans import RemainingBudget, passes_left
from choral.privacy.ledgers.spending import spent_by_records
from choral.trainers.federated.codec import cap_of
from choral.trainers.federated.record_shares.checks import check_algorithm, fewest_survivors, in_shares
from choral.trainers.federated.record_shares.codec import SharesCodec
from choral.trainers.federated.virtual_parties import DistantParties
from choral.trainers.run_folder.folder import ledger_file
from choral.trainers.run_folder.recorder import Recorder

if TYPE_CHECKING:
    from choral.privacy import SharesParty
    from choral.trainers.federated.plan import Plan


@dataclass(frozen=True, kw_only=True)
class ShareLedgers:
    """By party. job: what the run was planned as."""

    job: Plan
    privacy: Privacy
    ledgers: Mapping[str, Ledger]
    recorder: Recorder

    @classmethod
    def open(cls, job: Plan, recorder: Recorder) -> ShareLedgers | None:
        """None for a promise of another kind. Raises: LedgerError; ConfigError."""
        privacy = job.privacy
        if not in_shares(privacy):
            return None
        check_algorithm(job.algorithm)
        folder = recorder.ledger_folder
        if folder is None:
            notice_memory(Ledger(), "out=FOLDER")
        ledgers = {}
        for name in job.census.names:
            ledgers[name] = Ledger(ledger_file(folder, name) if folder else None, holder=name)
            ledgers[name].bind(name, privacy.delta, neighbours=privacy.neighbours)
        recorder.keep(ledgers)
        return cls(job=job, privacy=privacy, ledgers=ledgers, recorder=recorder)

    @classmethod
    def elsewhere(cls, job: Plan, recorder: Recorder) -> ShareLedgers | None:
        """Of parties that keep their own ledgers, where nothing is known of them here. Raises: ConfigError."""
        if not in_shares(job.privacy):
            return None
        check_algorithm(job.algorithm)
        return cls(job=job, privacy=job.privacy, ledgers={}, recorder=recorder)

    def spent(self) -> dict[str, Spent]:
        """What each party's data has spent."""
        delta, person = self.privacy.delta, self.privacy.records_per_person
        return {name: spent_by_records(ledger, delta, person) for name, ledger in self.ledgers.items()}

    def rounds_paid_for(self, rounds: int) -> tuple[int, str]:
        """How far the run can go, `rounds` or less, and why no further: a step that was tried again is one less.

        Of a run that has not begun, whatever else its ledgers hold, `within` says so once the plan is known.
        Raises: LedgerError if a ledger holds less than the run has recorded.
        """
        last, reason = rounds, ""
        if self.recorder.fresh:
            return last, reason
        completed, known = self.recorder.completed, self.recorder.spent
        _, steps_per_round = self.job.algorithm.share_steps(self.job.census.total)
        for name, ledger in self.ledgers.items():
            steps = sum(event.steps for event in ledger.events)
            if name in known and steps < known[name].steps:
                raise LedgerError(
                    f"the ledger of {name!r} holds {steps} noisy steps, but the run has recorded {known[name].steps}",
                    hint="put back the ledger file that belongs to this run",
                )
            left = passes_left(ledger, self.privacy.epsilon) if steps else None
            paid = completed + (left or 0) // steps_per_round
            if steps and paid < last:
                last, reason = paid, f"the budget of {name} is spent; ended after round {paid}"
        return last, reason

    def within(self, parties: Mapping[str, SharesParty], last: int, reason: str) -> tuple[int, str]:
        """The same of a last round and its reason, by the steps that each party's ledger has left of the plan."""
        _, steps_per_round = self.job.algorithm.share_steps(self.job.census.total)
        for name, party in parties.items():
            if (paid := self.recorder.completed + party.steps_left // steps_per_round) < last:
                last, reason = paid, f"the budget of {name} is spent; ended after round {paid}"
        return last, reason

    def rows_before(self, parties: Mapping[str, SharesParty]) -> int:
        """By how much rows of correlated noise are ahead of the run's steps: those of a round that was cut short do not
        come again.
        """
        _, steps_per_round = self.job.algorithm.share_steps(self.job.census.total)
        made = [party.last_row for party in parties.values() if party.last_row is not None]
        return max(made) + 1 - self.recorder.completed * steps_per_round if made else 0

    def plan(self, length: int) -> SharesPlan:
        """From the public constants of the job. length: of a gradient. Raises: as :func:`plan_shares`."""
        terms = shares_terms(self.job, length)
        return plan_shares(self.privacy, terms, beside=self._beside(), ledgers=map(self._left, self.ledgers.values()))

    def _left(self, ledger: Ledger) -> RemainingBudget:
        """What a ledger leaves for this job: as it stood before the job's own plan, where that was begun."""
        left = RemainingBudget.on(ledger, self.privacy.epsilon, self.privacy.delta)
        latest = left.state.latest
        if latest is None or latest.epsilon != self.privacy.epsilon:
            return left
        return dataclasses.replace(left.before_latest(), beside=latest.parts[:-1])

    def _beside(self) -> tuple[RecordEvent, ...]:
        """What was fixed together with this training, and released before it: of all parties the same."""
        for ledger in self.ledgers.values():
            latest = ledger.segments[-1][0] if ledger.segments else None
            if latest is not None and latest.epsilon == self.privacy.epsilon:
                return tuple(part.event for part in latest.parts[:-1] if not isinstance(part.event, ClientRelease))
        return ()

    def begin(self, length: int) -> tuple[SharesCodec, dict[str, SharesParty]]:
        """What the server holds, and every party, each of which computes the plan's cost anew for its own ledger.

        No party where all rounds are done: its steps are used, and without one nothing can be sent.
        Raises: as :func:`plan_shares`; BudgetExceededError.
        """
        from choral.privacy import SharesParty  # which loads per-sample gradients

        plan = self.plan(length)
        to_come = self.ledgers.items() if self.recorder.completed < self.job.rounds else ()
        parties = {name: SharesParty(self.privacy, plan, holder=name, ledger=ledger) for name, ledger in to_come}
        return SharesCodec(tuple(self.job.census.names), plan), parties


def shares_terms(job: Plan, length: int) -> SharesTerms:
    """The public constants of a job. length: of a gradient. Raises: ConfigError."""
    census = job.census
    batch_size, steps = job.algorithm.share_steps(census.total)
    return SharesTerms(
        records=census.total,
        batch_size=batch_size,
        steps=job.rounds * steps,
        parties=len(census.names),
        min_survivors=fewest_survivors(job.secure_sum, job.participation, census.names),
        length=length,
        most_records=cap_of(census.largest) if isinstance(job.parties, DistantParties) else census.largest,
    )
