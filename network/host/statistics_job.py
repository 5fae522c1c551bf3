"""A site's party of statistics: its records as the statistics' columns, its share of the noise, its ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from choral.errors import ConfigError
from choral.network.errors import OfferRefusedError, SiteError
from choral.network.host.training_code import Loaded
from choral.network.site.terms import follows_of
from choral.privacy import ClientPrivacy, SharesParty
from choral.privacy.dpsgd.joint_plan import joint_plan
from choral.privacy.record_shares.terms import SECURE_SUM_FAILURE
from choral.protocols.driver import PartyDriver
from choral.trainers.analytics.columns import columns_of, read_columns
from choral.trainers.analytics.terms import StatisticsParty, StatisticsTerms, statistic_of
from choral.trainers.federated.record_shares.own_process import check_drivers
from choral.trainers.federated.terms.trained_for import PartyMemory
from choral.trainers.federated.terms.training_terms import TrainingTerms
from choral.trainers.run_folder.evidence.party_receipts import Receipted, open_receipts
from choral.trainers.task.seeding import seeded
from choral.trainers.task.task import Task, checked_build

if TYPE_CHECKING:
    from choral.network.site.admission import Agreement


def statistics_party(
    name: str,
    agreement: Agreement,
    terms: StatisticsTerms,
    loaded: Callable[[], Loaded],
    drivers: Callable[[TrainingTerms], Mapping[str, PartyDriver]],
    memory: PartyMemory,
    receipted: Receipted,
) -> StatisticsParty:
    """loaded: what the training code makes of the data; where there is none, the data is a CSV file.

    Raises: DataError for records that lack a column; PrivacyError, BudgetExceededError, LedgerError, ConfigError for a
        plan that breaks the site's promise, or a sum of which it demands too little.
    """
    task: Task | None = None
    if agreement.code is not None or agreement.path is None:
        task, found = loaded()
    else:
        found = read_columns(agreement.path)
    wanted = frozenset(
        column for key, record in terms.sums.statistics.items() for column in statistic_of(record).columns(str(key))
    )
    columns = columns_of(found, name, wanted)
    examples = len(next(iter(columns.values())))
    if not 1 <= examples <= terms.federation.largest:
        raise SiteError(f"{examples} records, and the job is for 1 to {terms.federation.largest} of one site")
    shares = _shares(agreement, terms, name, task, found)
    sums = drivers(terms)
    check_drivers(terms.shares, sums)
    return StatisticsParty(
        name,
        terms,
        terms.packing.sums(columns),
        examples=examples,
        drivers=sums,
        shares=shares,
        receipts=open_receipts(receipted, name, terms.text, terms.digest, agreement.ledger),
        trained_for=memory.trained_for.bound(name, terms.digest),
    )


def _shares(
    agreement: Agreement, terms: StatisticsTerms, name: str, task: Task | None, dataset: Any
) -> SharesParty | None:
    """This site's share of the noise, the plan held against its own promise, and against the terms."""
    privacy, ledger, plan = agreement.privacy, agreement.ledger, terms.shares
    if privacy is None:
        return None
    if plan is None or ledger is None or isinstance(privacy, ClientPrivacy):
        raise OfferRefusedError(["statistics with privacy are of records, with noise in shares"])
    federation = terms.federation
    agreed = {
        "records": federation.examples,
        "batch_size": federation.examples,
        "steps": 1,
        "parties": federation.parties,
        "most_records": federation.largest,
        "length": federation.length,
        "failure": SECURE_SUM_FAILURE,
    }
    for key, value in agreed.items():
        if getattr(plan.terms, key) != value:
            raise ConfigError(f"the plan of the noise has {key} = {getattr(plan.terms, key)}, and the terms {value}")
    whole = None
    if (follows := follows_of(agreement.offer, federation.parties)) is not None:
        if task is None:
            raise OfferRefusedError(["a training follows, and no training code is named"])
        promise, rounds = follows
        with seeded(0, 0, "what follows"):
            loader = checked_build(task.build, dataset)[2]
        passes = rounds * promise.epochs
        whole = joint_plan(promise, loader, holder=name, ledger=ledger, passes=passes, beside=plan.event)
    return SharesParty(privacy, plan, holder=name, ledger=ledger, padded=True, whole=whole)
