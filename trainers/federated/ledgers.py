"""The ledgers of a federation: one per party for promises of records, one in all for that of clients, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from choral.privacy import ClientPrivacy, ClientPrivacyEngine, Ledger, LedgerError, PrivacyEngine, Spent
from choral.privacy.accounting.client_noise import SLACK
from choral.privacy.client_level.client import HOLDER
from choral.privacy.ledgers.ledger import as_ledger
from choral.privacy.ledgers.memory_notice import notice_memory
from choral.privacy.ledgers.plans import passes_left
from choral.privacy.ledgers.spending import spent_by_clients
from choral.trainers.engines.sharded import RankGroup, RankSetup
from choral.trainers.federated.codec import ClientCodec
from choral.trainers.federated.plan import Plan
from choral.trainers.federated.record_shares.ledgers import ShareLedgers
from choral.trainers.federated.virtual_parties import DistantParties
from choral.trainers.run_folder.folder import ledger_file
from choral.trainers.run_folder.owner_privacy import open_privacy_engines, rounds_paid_for
from choral.trainers.run_folder.recorder import Recorder


class Clients:
    """The one ledger of a federation's clients, and what may still be spent from it.

    begun: the round that was begun last, where it is never begun again: paid for or not, it is over.
    """

    def __init__(self, privacy: ClientPrivacy, ledger: Ledger, recorder: Recorder, begun: int = 0) -> None:
        self._privacy, self._ledger, self._recorder = privacy, ledger, recorder
        self._over = max(recorder.completed, begun)

    def spent(self) -> dict[str, Spent]:
        return {HOLDER: spent_by_clients(self._ledger, self._privacy.delta)}

    def rounds_paid_for(self, rounds: int, sums: int) -> tuple[int, str]:
        """How far a run of so many sums a round can go, `rounds` or less, and why no further.

        Raises: LedgerError if the ledger holds less than was recorded.
        """
        spent, before = self.spent()[HOLDER], self._recorder.spent.get(HOLDER)
        if before and spent.steps < before.steps:
            raise LedgerError(
                f"the clients' ledger holds {spent.steps} rounds, but the run has recorded {before.steps}",
                hint="put back the ledger file that belongs to this run",
            )
        if self._recorder.fresh:
            return rounds, ""
        left = passes_left(self._ledger, self._privacy.epsilon)
        if left is None and spent.epsilon >= (1 - 2 * SLACK) * self._privacy.epsilon:
            left = 0
        paid = rounds if left is None else min(rounds, self._over + left // sums)
        return paid, "" if paid == rounds else f"the clients' budget is spent; ended after round {paid}"

    def codec(
        self, roster: tuple[str, ...], clients: int, length: int, rounds: int, sums: int, *, most: int | None = None
    ) -> ClientCodec:
        """For the rounds that are left, of so many sums each; an adaptive clipping norm goes on where it was.

        roster: who takes part in one sum, of so many clients. most: in any sum, by default all.
        """
        history = self._recorder.run().history
        paid, _ = self.rounds_paid_for(rounds, sums)
        privacy_engine = ClientPrivacyEngine(
            self._privacy,
            clients=clients,
            length=length,
            rounds=max(paid - self._over, 0) * sums,
            ledger=self._ledger,
            clip=history[-1].clip if history else None,
            most=most,
        )
        return ClientCodec(roster, privacy_engine)


def open_clients(privacy: ClientPrivacy, recorder: Recorder, begun: int = 0) -> Clients:
    """Open the promise's own ledger, else the one in the run's folder, else one in memory. Raises: LedgerError."""
    folder = recorder.ledger_folder
    own = privacy.ledger is not None
    ledger = as_ledger(privacy.ledger) if own else Ledger(ledger_file(folder, HOLDER) if folder else None)
    notice_memory(ledger, "ClientPrivacy(ledger=FILE), or out=FOLDER,")
    recorder.keep({HOLDER: ledger})
    return Clients(privacy, ledger, recorder, begun)


@dataclass(frozen=True, kw_only=True)
class Ledgers:
    """engines: of the parties, for promises of records. clients: of all together. shares: of parties
    that add noise in shares. clips: where adaptive clipping of records had come to, in a resumed run.
    """

    engines: Mapping[str, PrivacyEngine]
    clients: Clients | None
    shares: ShareLedgers | None
    clips: Mapping[str, float]
    recorder: Recorder

    @classmethod
    def open(cls, plan: Plan, recorder: Recorder, begun: int = 0) -> Ledgers:
        """begun: as in `Clients`. Raises: LedgerError; RunFolderError if a resumed run's clipping norms are lost."""
        clients = open_clients(plan.privacy, recorder, begun) if isinstance(plan.privacy, ClientPrivacy) else None
        if isinstance(plan.parties, DistantParties):  # each of which keeps its own
            shares = ShareLedgers.elsewhere(plan, recorder)
            return cls(engines={}, clients=clients, shares=shares, clips={}, recorder=recorder)
        left, clips = plan.rounds - recorder.completed, recorder.clips(plan.privacy)
        engines = open_privacy_engines(plan.by_record, plan.census.examples, recorder.ledger_folder, left, clips)
        recorder.keep({name: engine.ledger for name, engine in engines.items()})
        shares = ShareLedgers.open(plan, recorder)
        return cls(engines=engines, clients=clients, shares=shares, clips=clips, recorder=recorder)

    def rounds_paid_for(self, rounds: int, sums: int) -> tuple[int, str]:
        """How far a run of so many sums a round can go, `rounds` or less, and why no further. Raises: LedgerError."""
        if self.clients:
            return self.clients.rounds_paid_for(rounds, sums)
        if self.shares:
            return self.shares.rounds_paid_for(rounds)
        return rounds_paid_for(self.engines, self.recorder, rounds)

    @property
    def by_party(self) -> Mapping[str, Ledger]:
        """Of promises of records."""
        engines = {name: engine.ledger for name, engine in self.engines.items()}
        return self.shares.ledgers if self.shares else engines

    def spent(self) -> dict[str, Spent]:
        if self.clients:
            return self.clients.spent()
        if self.shares:
            return self.shares.spent()
        return {name: engine.spent() for name, engine in self.engines.items()}


def engines_here(plan: Plan, ranks: RankGroup, told: RankSetup) -> dict[str, PrivacyEngine]:
    """The privacy engines of the parties that stay at this rank."""
    if plan.by_record is None:
        return {}
    examples = plan.census.examples
    here = {party: examples[party] for party in ranks.parties_of(ranks.rank, examples)}
    folder = Path(told.folder) if told.folder else None
    return open_privacy_engines(plan.by_record, here, folder, told.rounds_left, told.clips)
