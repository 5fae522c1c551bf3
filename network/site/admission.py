"""A site agrees to an offer, or refuses it; either way a line of its log says so before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from choral.network.errors import OfferRefusedError
from choral.network.site.approvals import approvals
from choral.network.site.budget import ledger_facts, open_ledger
from choral.network.site.files.log import AGREED, Fact, SiteLines
from choral.network.site.files.settings import DataSet, Maxima
from choral.network.site.objections import objections, policy_of
from choral.network.site.offer import Offer
from choral.network.site.terms import promise_of, sum_of, terms_of
from choral.privacy import ClientPrivacy, Ledger, Privacy
from choral.protocols.interface import SecureSum, SumSpec
from choral.protocols.masking.policy import Policy
from choral.trainers.federated.terms.training_terms import TrainingTerms

if TYPE_CHECKING:
    from choral.network.site.folder import SiteFolder

CLOCK_SLACK = timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What a site agreed to, and what it brings along. None of it was chosen by the coordinator beyond the offer.

    terms, secure_sum: of the offer, read strictly. policy: what the site accepts of a setup, keys filled in; by
    `policy_for` for one sum. privacy, ledger: both, or none. name, data: of the data set; path: where it lies, None for
    a part of a task of Choral's own data. code: the file of the training code, None for a task of Choral.
    """

    offer: Offer
    terms: TrainingTerms
    secure_sum: SecureSum
    policy: Policy
    privacy: Privacy | ClientPrivacy | None
    ledger: Ledger | None
    name: str
    data: DataSet
    path: Path | None
    code: Path | None
    maxima: Maxima

    def check(self, folder: SiteFolder, now: datetime | None = None) -> None:
        """Whether the approval still holds, while the job runs: it may have been revoked, or be over.

        Raises: OfferRefusedError; SiteError for a log that cannot be read.
        """
        approved(folder.log.read(), self.offer, now or datetime.now(UTC))

    def books(self) -> dict[str, Fact]:
        """How far the data set's ledger has come, for a line of the site's log; the next job is held against it.

        Raises: LedgerError.
        """
        return {} if self.ledger is None else ledger_facts(self.name, self.ledger)

    def policy_for(self, spec: SumSpec, *, everybody: bool = False) -> Policy:
        """The policy of the sum that this site expects, `spec` being what it computed from the terms by itself.

        everybody: it may be opened over all parties alone.
        """
        return replace(
            self.policy,
            minimum_cohort=len(spec.parties) if everybody else self.policy.minimum_cohort,
            encoding=spec.encoding,
            terms=spec.terms,
            maximum_bound=spec.bound,
            maximum_length=spec.length,
            maximum_modulus_bits=spec.modulus_bits,
            maximum_weight=spec.weight_bound,
            wraps_at=spec.wraps_at,
        )


def agree(folder: SiteFolder, offer: Offer, now: datetime | None = None) -> Agreement:
    """Hold the offer against the site's settings, its approvals and its budget.

    Raises: OfferRefusedError with every reason; SiteError for a log that cannot be read or written.
    """
    now = now or datetime.now(UTC)
    try:
        folder.offers.keep(offer)
        _may_begin(folder.log.read(), folder, offer, now)
        if against := objections(folder, offer):
            raise OfferRefusedError(against)
        return _agreed(folder, offer, now)
    except OfferRefusedError as error:
        cheap = objections(folder, offer, budget=False)  # which a coordinator may have computed as often as it likes
        reasons = list(dict.fromkeys([*error.reasons, *cheap]))
        folder.refused(reasons, now, digest=offer.digest, job=offer.job, coordinator=offer.coordinator)
        raise OfferRefusedError(reasons, hint=f"`choral site review {offer.digest[:16]}` shows the offer") from None


def _agreed(folder: SiteFolder, offer: Offer, now: datetime) -> Agreement:
    """What it brings along, once the line is written that says so; approvals are looked at under the log's lock."""
    terms = terms_of(offer.terms)
    privacy = promise_of(terms.privacy, terms.federation.parties)
    task = folder.settings.tasks[offer.task]
    data, ledger = folder.settings.data[task.data], open_ledger(folder, task.data)
    agreement = Agreement(
        offer=offer,
        terms=terms,
        secure_sum=sum_of(offer.secure_sum),
        policy=policy_of(folder, offer),
        privacy=privacy,
        ledger=None if privacy is None else ledger,
        name=task.data,
        data=data,
        path=None if data.path is None else folder.path / data.path,
        code=None if offer.embedded or offer.by_engine else folder.path / "tasks" / offer.task,
        maxima=folder.settings.maxima,
    )
    facts = {"digest": offer.digest, "job": offer.job, "coordinator": offer.coordinator}
    folder.log.append(
        AGREED,
        {**facts, **ledger_facts(task.data, ledger)},
        now,
        check=lambda lines: _may_begin(lines, folder, offer, now),
    )
    return agreement


def approved(lines: SiteLines, offer: Offer, now: datetime) -> None:
    """Whether a person's approval holds now, by the lines of the log.

    A clock that was put back would let approvals live again that are over: none holds before a line that came after it.
    Raises: OfferRefusedError.
    """
    found = approvals(lines)
    approval = found.get(offer.digest)
    if approval is None:
        others = [other for other in found.values() if other.job == offer.job and not other.refusal(now)]
        more = f": job {offer.job!r} was approved as {others[-1].digest[:16]}, and this is another" if others else ""
        raise OfferRefusedError([f"nobody approved it{more}"])
    if why := approval.refusal(now):
        raise OfferRefusedError([why])
    if now < (latest := max(lines.times[approval.line :])) - CLOCK_SLACK:
        raise OfferRefusedError(
            [
                f"it is {now:%Y-%m-%d %H:%M} UTC here, and there are lines of {latest:%Y-%m-%d %H:%M} in the log: "
                "set the clock; if it is right now, approve the job again"
            ]
        )


def _may_begin(lines: SiteLines, folder: SiteFolder, offer: Offer, now: datetime) -> None:
    """Approved, and the day has room for it. Raises: OfferRefusedError."""
    approved(lines, offer, now)
    most, today = folder.settings.maxima.jobs_a_day, now.astimezone(UTC).date()
    begun = {line.facts["digest"] for line in lines.entries if line.event == AGREED and line.when.date() == today}
    if len(begun - {offer.digest}) >= most:  # one that was begun goes on, however often: no round is trained twice
        raise OfferRefusedError([f"{most} other jobs were agreed to today already"])
