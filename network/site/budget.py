"""What a job would spend of a data set's promise: its ledger as it is, with the job on top.

The epsilon of a job is what all jobs on the data set together may have come to when it ends: a promise is for the life
of the data. The noise is made for what is left under it, so a second job that asks for no more than was spent finds
nothing left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from choral.errors import ChoralError
from choral.network.site.files.log import Fact, SiteLine
from choral.network.site.files.settings import DataSet, ledger_of
from choral.privacy import ClientPrivacy, Ledger, LedgerError, Privacy
from choral.privacy.accounting.events import CLIENT_UNIT, ClientRelease, Event
from choral.privacy.ledgers.ledger_file import RESTORE
from choral.privacy.ledgers.plans import RemainingBudget, guarantee
from choral.trainers.federated.terms.clients import clients_of
from choral.trainers.federated.terms.training_terms import TrainingTerms

if TYPE_CHECKING:
    from choral.network.site.folder import SiteFolder


def open_ledger(folder: SiteFolder, name: str) -> Ledger:
    """The ledger of the data set `name`. Raises: LedgerError."""
    return Ledger(folder.path / ledger_of(name, folder.settings.data[name]), holder=folder.settings.name)


def ledger_facts(name: str, ledger: Ledger) -> dict[str, Fact]:
    """For a line of the site's log: how far the data set's ledger had come. Raises: LedgerError."""
    count = sum(len(events) for _, events in ledger.segments)
    return {"data": name, "ledger_events": count, "ledger_head": ledger.head_after(count)}


def check_ledger(name: str, ledger: Ledger, lines: Sequence[SiteLine]) -> None:
    """Whether the ledger still holds what the site's log says it held: one that was put back forgets what was spent.

    Raises: LedgerError.
    """
    for line in reversed(lines):
        count, head = line.facts.get("ledger_events"), line.facts.get("ledger_head")
        if line.facts.get("data") == name and isinstance(count, int) and isinstance(head, str):
            if ledger.head_after(count) != head:
                raise LedgerError(f"the ledger of {name!r} is not the one that the site's log tells of", hint=RESTORE)
            return


def spent_of(ledger: Ledger) -> float:
    """The epsilon that was spent so far, at the ledger's delta, as much as anybody may count. Raises: LedgerError."""
    if ledger.delta is None:
        return 0.0
    return max(guarantee(ledger) or 0.0, ledger.epsilon(ledger.delta))


@dataclass(frozen=True, kw_only=True)
class DataBudget:
    """Of one data set, at a delta. promised: None where it takes jobs without privacy. spent: by the filter's promise
    where there are several plans, so as much as anybody may count. asked: see the module; None without privacy.
    noise: the noise multiplier of each step that fits, where the job says what is needed to compute it. goes_on: the
    passes that are left of an earlier plan, if the job goes on with that.
    """

    promised: float | None
    spent: float
    asked: float | None
    noise: float | None = None
    goes_on: int | None = None

    @property
    def left(self) -> float | None:
        """Of the promise when the job has ended."""
        return None if self.promised is None else max(0.0, self.promised - max(self.asked or 0.0, self.spent))


def begun_here(folder: SiteFolder, digest: str) -> bool:
    """Whether this site has trained for that job: as `SiteJob` notes it, ahead of any charge."""
    return (folder.path / "state" / digest / "trained-for").exists()


def budget_of(
    data: DataSet,
    ledger: Ledger,
    privacy: Privacy | ClientPrivacy | None,
    terms: TrainingTerms,
    settings: Mapping[str, Any],
    *,
    begun: bool = False,
) -> DataBudget:
    """settings: of the offer, whose training has the batch size. begun: whether this site has trained for the job.

    Raises: BudgetExceededError if the job does not fit; LedgerError for a ledger of another delta, unit or holder, or
        one that is damaged; ConfigError for a batch size that is none.
    """
    promised = data.promise.epsilon if data.promise is not None else None
    spent = spent_of(ledger)
    if privacy is None:
        return DataBudget(promised=promised, spent=spent, asked=None)
    by_client = isinstance(privacy, ClientPrivacy)
    ledger.bind(
        str(ledger.holder),
        privacy.delta,
        unit=CLIENT_UNIT if by_client else "record",
        neighbours=None if isinstance(privacy, ClientPrivacy) else privacy.neighbours,
    )
    remaining = RemainingBudget.on(ledger, privacy.epsilon, privacy.delta)
    noise, unfinished = None, remaining.unfinished()
    goes_on = sum(left for part, left in unfinished if _is_of(part.event, data, terms, settings)) or None
    if isinstance(privacy, ClientPrivacy):
        if (engine := clients_of(terms, privacy, ledger, str(ledger.holder), begun=begun)) is not None:
            noise, goes_on = engine.ratio, engine.rounds if engine.goes_on else None
    elif goes_on is not None:
        pass  # with the noise and the price of then
    elif (plan := terms.shares) is not None:
        remaining.check([msgspec.structs.replace(plan.event, steps=plan.terms.steps)])
        noise = plan.noise_multiplier
    elif batch := _batch(settings, data.records):
        steps = math.ceil(data.records / batch) * privacy.epochs * terms.rounds
        noise = remaining.noise_multiplier(batch / data.records, steps)
    elif not remaining.empty:
        remaining.check(())  # what a step costs is not known here: only that something is left
    return DataBudget(promised=promised, spent=spent, asked=privacy.epsilon, noise=noise, goes_on=goes_on)


def _is_of(event: Event, data: DataSet, terms: TrainingTerms, settings: Mapping[str, Any]) -> bool:
    """Whether an earlier plan's event is what this job would make, so that it goes on with that plan."""
    if isinstance(event, ClientRelease):
        return False  # its engine says how far
    if terms.shares is not None:
        return event == terms.shares.event
    batch = _batch(settings, data.records)
    return batch is not None and event.sample_rate == batch / data.records


def _batch(settings: Mapping[str, Any], records: int) -> int | None:
    training = settings.get("training")
    batch = training.get("batch_size") if isinstance(training, dict) else None
    return min(batch, records) if type(batch) is int and batch >= 1 else None


def budget_objection(
    folder: SiteFolder,
    name: str,
    privacy: Privacy | ClientPrivacy | None,
    terms: TrainingTerms,
    settings: Mapping[str, Any],
    begun: bool,
) -> str:
    """Why the data set's budget does not admit the job; "" if it does."""
    try:
        ledger = open_ledger(folder, name)
        check_ledger(name, ledger, folder.log.read().entries)
        budget_of(folder.settings.data[name], ledger, privacy, terms, settings, begun=begun)
    except ChoralError as error:
        return str(error)
    return ""
