"""Offers that a site keeps, and which of them a person has approved: until when, or no longer.

Approvals and revocations are lines of the site's log (:mod:`choral.network.site.files.log`) and nowhere else: whoever
changes one would have to sign. An approval is of an offer's digest, so of every word of it, code included.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from choral.network.errors import OfferError, OfferRefusedError, SiteError
from choral.network.site.files.log import APPROVED, REVOKED, SiteLines
from choral.network.site.files.private import write_private
from choral.network.site.offer import LARGEST_OFFER, Offer

if TYPE_CHECKING:
    from choral.network.site.folder import SiteFolder

MOST_KEPT = 200  # offers; each has at most 1 MiB
LONGEST_APPROVAL = timedelta(days=3660)


@dataclass(frozen=True, kw_only=True)
class Approval:
    """What was approved. until: the last day on which it holds, UTC. by: who, as their system knows them. line: of the
    log, from 0.
    """

    digest: str
    job: str
    task: str
    code: str
    until: date
    by: str
    at: datetime
    line: int
    revoked: bool = False

    def refusal(self, now: datetime) -> str:
        """Why it does not hold now; "" if it does."""
        if self.revoked:
            return "its approval was revoked"
        if now.astimezone(UTC).date() > self.until:
            return f"its approval expired on {self.until}"
        return ""


def approvals(lines: SiteLines) -> dict[str, Approval]:
    """The latest approval of each digest, in the order of those. lines: of a verified log."""
    found: dict[str, Approval] = {}
    for line, entry in lines.decisions:
        facts = entry.facts
        digest = str(facts["digest"])
        if entry.event == APPROVED:
            found.pop(digest, None)
            found[digest] = Approval(
                digest=digest,
                job=str(facts["job"]),
                task=str(facts["task"]),
                code=str(facts["code"]),
                until=date.fromisoformat(str(facts["until"])),
                by=str(facts["by"]),
                at=entry.when,
                line=line,
            )
        elif (before := found.get(digest)) is not None:
            found[digest] = Approval(**{**vars(before), "revoked": True})
    return found


def check_until(until: date, now: datetime) -> date:
    """Return `until`. Raises: SiteError for a day that is over, or ten years away."""
    today = now.astimezone(UTC).date()
    if until < today:
        raise SiteError(f"{until} is over: today is {today} (UTC)", hint="an approval holds to the end of its last day")
    if until - today > LONGEST_APPROVAL:
        raise SiteError(f"{until} is more than ten years away", hint="approve again when it ends")
    return until


class KeptOffers:
    """The offers that reached this site, each in a file named by its digest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, offer: Offer) -> None:
        """Keep it, if it is not kept yet. Raises: OfferRefusedError if there are too many; SiteError."""
        path = self.folder / f"{offer.digest}.json"
        if path.exists():
            return
        if len(list(self.folder.glob("*.json"))) >= MOST_KEPT:
            raise OfferRefusedError(
                [f"{MOST_KEPT} offers are kept already, and no more are"],
                hint=f"remove what nobody asks for any longer from {self.folder}",
            )
        write_private(path, offer.message())

    def all(self) -> list[Offer]:
        """All that can be read, oldest first. A file that is no offer, or not the one it is named for, is left out."""
        paths = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        return [offer for path in paths if (offer := _read(path)) is not None]

    def find(self, text: str) -> Offer:
        """The one whose digest begins with `text`, or whose job is called that.

        Raises: SiteError if there is none, or more than one.
        """
        offers = self.all()
        found = [offer for offer in offers if text == offer.job or (len(text) >= 12 and offer.digest.startswith(text))]
        if len(found) > 1:
            digests = ", ".join(offer.digest[:16] for offer in found)
            raise SiteError(f"{text!a:.80} stands for {len(found)} offers", hint=f"give more of a digest: {digests}")
        if not found:
            known = ", ".join(f"{offer.job} ({offer.digest[:16]})" for offer in offers[-5:]) or "none"
            raise SiteError(
                f"no offer {text!a:.80} is kept here",
                hint=f"kept: {known}. An offer is kept when its coordinator made it, or when its file is reviewed",
            )
        return found[0]


def _read(path: Path) -> Offer | None:
    try:
        with path.open("rb") as file:
            offer = Offer.read(file.read(LARGEST_OFFER + 1))
    except (OfferError, OSError):
        return None
    return offer if offer.digest == path.stem else None


def code_of(path: Path) -> str:
    """SHA-256 of a file of training code, in hexadecimal. Raises: SiteError if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SiteError(f"{path} cannot be read: {error.strerror or type(error).__name__}") from None


def approve(folder: SiteFolder, offer: Offer, until: date, *, by: str, now: datetime | None = None) -> None:
    """Approve the offer by its digest, and keep the training code that it names, as it is installed now.

    Raises: SiteError for a day that is over or far away, or if other code is installed than the offer names.
    """
    now = now or datetime.now(UTC)
    check_until(until, now)
    if not (offer.embedded or offer.by_engine):
        path = folder.path / "tasks" / offer.task
        if code_of(path) != offer.code:
            raise SiteError(
                f"{path} has another SHA-256 than the code in this offer: what would run is not what is asked for",
                hint="install the file that is meant, or have the coordinator make the offer anew",
            )
        write_private(folder.path / "approved" / f"{offer.code}.py", path.read_bytes())
    facts = {"digest": offer.digest, "job": offer.job, "task": offer.task, "code": offer.code, "until": f"{until}"}
    folder.log.append(APPROVED, {**facts, "by": by}, now)


def revoke(folder: SiteFolder, digest: str, *, by: str, now: datetime | None = None) -> Approval:
    """Revoke what was approved. digest: or its beginning. Raises: SiteError if that is none, or more than one."""
    standing = [approval for approval in approvals(folder.log.read()).values() if not approval.revoked]
    found = [approval for approval in standing if approval.digest.startswith(digest)]
    if len(found) != 1:
        raise SiteError(f"{len(found)} approvals of {digest!a:.80} to revoke", hint="`choral site log` lists them")
    folder.log.append(REVOKED, {"digest": found[0].digest, "job": found[0].job, "by": by}, now)
    return found[0]
