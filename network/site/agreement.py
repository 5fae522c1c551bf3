"""A site agrees to an offer, or refuses it; either way a line of its log says so before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from choral.network.errors import OfferRefusedError
from choral.network.site.approvals import approvals
from choral.network.site.budget import open_ledger
from choral.network.site.files.log import AGREED, REFUSED, SiteLine
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
MOST_REFUSALS = 200  # lines of the log on one day


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What a site agreed to, and what it brings along. None of it was chosen by the coordinator beyond the offer.

    terms, secure_sum: of the offer, read strictly. policy: what the site accepts of a setup, keys filled in; by
    `policy_for` for one sum. privacy, ledger: both, or none. data: the data set; path: where it lies, None for a
    part of a task of Choral's own data. code: the file of the training code, None for a task of Choral.
    """

    offer: Offer
    terms: TrainingTerms
    secure_sum: SecureSum
    policy: Policy
    privacy: Privacy | ClientPrivacy | None
    ledger: Ledger | None
    data: DataSet
    path: Path | None
    code: Path | None
    maxima: Maxima

    def policy_for(self, spec: SumSpec) -> Policy:
        """The policy of the sum that this site expects, `spec` being what it computed from the terms by itself."""
        return replace(
            self.policy,
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
    lines = folder.log.read().entries
    try:
        folder.offers.keep(offer)
        reasons = [*_clock(lines, now), *objections(folder, offer), *_approval(lines, offer, now)]
        reasons += [] if reasons else _too_often(folder, lines, now)
    except OfferRefusedError as error:
        reasons = list(error.reasons)
    if reasons:
        _refuse(folder, lines, offer, reasons, now)
    terms = terms_of(offer.terms)
    privacy = promise_of(terms.privacy, terms.federation.parties)
    task = folder.settings.tasks[offer.task]
    data = folder.settings.data[task.data]
    agreement = Agreement(
        offer=offer,
        terms=terms,
        secure_sum=sum_of(offer.secure_sum),
        policy=policy_of(folder, offer),
        privacy=privacy,
        ledger=None if privacy is None else open_ledger(folder, task.data),
        data=data,
        path=None if data.path is None else folder.path / data.path,
        code=None if offer.embedded else folder.path / "tasks" / offer.task,
        maxima=folder.settings.maxima,
    )
    folder.log.append(
        AGREED, {"digest": offer.digest, "job": offer.job, "coordinator": offer.coordinator, "data": task.data}, now
    )
    return agreement


def _clock(lines: tuple[SiteLine, ...], now: datetime) -> list[str]:
    """A clock that was put back would let approvals live again that are over."""
    last = lines[-1].when
    if now < last - CLOCK_SLACK:
        return [f"it is {now:%Y-%m-%d %H:%M} UTC here, before the last line of the log ({last:%Y-%m-%d %H:%M})"]
    return []


def _approval(lines: tuple[SiteLine, ...], offer: Offer, now: datetime) -> list[str]:
    found = approvals(lines)
    if (approval := found.get(offer.digest)) is not None:
        return [why] if (why := approval.refusal(now)) else []
    others = [approval for approval in found.values() if approval.job == offer.job and not approval.refusal(now)]
    if others:
        return [f"nobody approved it: job {offer.job!r} was approved as {others[-1].digest[:16]}, and this is another"]
    return ["nobody approved it"]


def _too_often(folder: SiteFolder, lines: tuple[SiteLine, ...], now: datetime) -> list[str]:
    most, today = folder.settings.maxima.jobs_a_day, now.astimezone(UTC).date()
    if sum(line.event == AGREED and line.when.date() == today for line in lines) >= most:
        return [f"training was agreed to {most} times today already"]
    return []


def _refuse(folder: SiteFolder, lines: tuple[SiteLine, ...], offer: Offer, reasons: list[str], now: datetime) -> None:
    """Write the refusal down, once a day for the same reasons and 200 times in all, and raise it."""
    today = now.astimezone(UTC).date()
    said = [line for line in lines if line.event == REFUSED and line.when.date() == today]
    facts = {"digest": offer.digest, "job": offer.job, "coordinator": offer.coordinator, "reasons": "; ".join(reasons)}
    if len(said) < MOST_REFUSALS and not any(
        (line.facts["digest"], line.facts["reasons"]) == (facts["digest"], facts["reasons"]) for line in said
    ):
        folder.log.append(REFUSED, dict(facts), now)
    raise OfferRefusedError(
        reasons, hint=f"`choral site review {offer.digest[:16]}` shows the offer; nothing was sent but the word refused"
    )
