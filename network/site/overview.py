"""What a site has set, pinned, offered and spent, in rows; and what is still to do before it can take part."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from choral.errors import ChoralError
from choral.network.site.approvals import approvals, code_of
from choral.network.site.files.log import AGREED

if TYPE_CHECKING:
    from choral.network.site.files.settings import DataSet
    from choral.network.site.folder import SiteFolder

Row = tuple[str, str]


def overview(folder: SiteFolder, now: datetime | None = None) -> Iterator[Row]:
    """Raises: SiteError for a log that cannot be read."""
    settings, certificate, today = folder.settings, folder.identity.certificate, (now or datetime.now(UTC)).date()
    log = folder.log.read()
    yield "site", f"{settings.name}, in {folder.path.resolve()}"
    yield (
        "certificate",
        f"{settings.name}.crt, until {certificate.not_after:%Y-%m-%d}; give it away",
    )
    yield "pin", " ".join(wrap(certificate.pin, 4))
    for name, hub in settings.coordinators.items():
        proxy = f" by the proxy {_without_password(hub.proxy)}" if hub.proxy else ""
        yield "coordinator", f"{name} at {hub.address or 'this machine, by an engine'}{proxy}"
    yield "sites", ", ".join(entry.name for entry in folder.pinned.sites) or "nobody is pinned"
    total, job = settings.sum, settings.job
    yield (
        "secure sum",
        f"{' or '.join(total.kinds)}, of at least {total.minimum_cohort} sites; {total.corrupt} of the pinned ones may "
        f"be corrupt; {total.server} coordinator",
    )
    yield "algorithms", f"{', '.join(job.algorithms)}; what is released is of {', '.join(job.releases)}"
    for name, data in settings.data.items():
        yield "data", f"{name}: {data.path or data.part}, {data.records} records; {_spent(folder, name, data)}"
    for task, given in settings.tasks.items():
        path = folder.path / "tasks" / task
        code = f"SHA-256 {code_of(path)}" if path.is_file() else "a task of Choral" if "." not in task else "missing"
        yield "task", f"{task}, reads {given.data}: {code}"
    agreed = {line.facts["digest"] for line in log.entries if line.event == AGREED and line.when.date() == today}
    yield "today", f"{len(agreed)} of {settings.maxima.jobs_a_day} jobs agreed to"
    yield "log", f"{len(log.entries)} lines, all checked; head {log.head}"
    for what in _to_do(folder):
        yield "to do", what


def offered(folder: SiteFolder, now: datetime | None = None) -> Iterator[Row]:
    """The offers that are kept, oldest first, and whether they may run."""
    found = approvals(folder.log.read())
    for offer in folder.offers.all():
        approval = found.get(offer.digest)
        why = "not approved" if approval is None else approval.refusal(now or datetime.now(UTC))
        state = why or f"approved until {approval.until}" if approval is not None else why
        yield offer.digest[:12], f"{offer.job}, by {offer.coordinator}: {state}"
    if not folder.offers.all():
        yield "none", "no job was offered yet"


def _spent(folder: SiteFolder, name: str, data: DataSet) -> str:
    if data.promise is None:
        return "used without a promise"
    from choral.network.site.budget import open_ledger, spent_of
    from choral.privacy.accounting.budget import at_least, shown

    promise = data.promise
    try:
        spent = at_least(spent_of(open_ledger(folder, name)))
    except ChoralError as error:
        return str(error)
    return f"{spent} spent of epsilon {shown(promise.epsilon)} at delta {shown(promise.delta)} for each {promise.unit}"


def _to_do(folder: SiteFolder) -> Iterator[str]:
    settings, pinned = folder.settings, folder.pinned
    if not settings.coordinators:
        yield "say in site.toml whom to connect to: [coordinators.NAME], address"
    for name in settings.coordinators:
        if name not in pinned.coordinators:
            yield f"pin the certificate of {name}: choral site directory add {name}.crt --coordinator --pin PIN"
    missing = settings.sum.minimum_cohort - 1 - len(pinned.sites)
    if missing > 0:
        yield f"pin {missing} more sites: a sum is of at least {settings.sum.minimum_cohort}"
    if not settings.data:
        yield "say in site.toml which data there is, and what may be spent of it: [data.NAME]"
    if not settings.tasks:
        yield "put training code into tasks/, and say in site.toml which data it may read: [tasks.FILE]"
    for task in settings.tasks:
        if task.endswith(".py") and not Path(folder.path / "tasks" / task).is_file():
            yield f"put {task} into tasks/"


def _without_password(proxy: str) -> str:
    scheme, _, rest = proxy.rpartition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if scheme else rest.rpartition("@")[2]
