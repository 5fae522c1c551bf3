"""What a person sees before they approve an offer: what would run, what would become known, and what it would cost.

All of a coordinator's words, and the code, are printed with every character that a terminal would not show as it is
(escape sequences, characters that change the direction of writing) spelt out.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from choral.doors import visible
from choral.errors import ChoralError
from choral.network.site.approvals import Approval, approvals
from choral.network.site.budget import DataBudget, begun_here, budget_of, open_ledger
from choral.network.site.objections import objections
from choral.network.site.offer import Offer
from choral.network.site.terms import follows_of, promise_of, setup_of, sum_of, terms_of
from choral.privacy import BandedPlan, ClientPrivacy, Privacy
from choral.privacy.accounting.budget import at_least, at_most, shown
from choral.protocols.homomorphic.front import Homomorphic
from choral.protocols.masking.ahead.floor import promised
from choral.protocols.masking.ahead.messages import AheadSetup
from choral.protocols.masking.masked import Masked
from choral.trainers.analytics.terms import StatisticsTerms
from choral.trainers.federated.terms.training_terms import TrainingTerms

if TYPE_CHECKING:
    from choral.network.site.folder import SiteFolder

LONGEST_DIFF = 2000  # lines
Row = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Review:
    """rows: what and its words, in order. against: why the site would refuse it whoever approved it. diff: lines of a
    unified diff of the training code against what was approved last for the same task.
    """

    rows: Sequence[Row]
    against: Sequence[str]
    diff: Sequence[str]


def review(folder: SiteFolder, offer: Offer, now: datetime | None = None) -> Review:
    """Raises: SiteError for a log that cannot be read; LedgerError for a ledger that cannot."""
    found = approvals(folder.log.read())
    before = [approval for approval in found.values() if approval.task == offer.task]
    words, diff = _code(folder, offer, before)
    rows = [
        ("job", f"{offer.job}, by coordinator {offer.coordinator}"),
        ("digest", offer.digest),
        ("approval", _standing(found.get(offer.digest), now or datetime.now(UTC))),
        ("code", words),
    ]
    against = objections(folder, offer)
    try:
        rows += _of_terms(folder, offer, terms_of(offer.terms))
    except ChoralError as error:
        rows.append(("terms", f"cannot be shown: {error}"))
    rows += [
        ("secure sum", _sum(offer)),
        ("sites", ", ".join(offer.parties)),
        ("evaluation", _evaluation(offer)),
        ("settings", plainly(json.dumps(dict(offer.settings), sort_keys=True))),
    ]
    return Review(
        rows=[(what, visible(text)) for what, text in rows],
        against=[visible(reason) for reason in against],
        diff=[visible(line) for line in diff],
    )


def _standing(approval: Approval | None, now: datetime) -> str:
    if approval is None:
        return "none"
    until = f"by {approval.by} on {approval.at:%Y-%m-%d}, until {approval.until}"
    return f"{until}: {why}" if (why := approval.refusal(now)) else until


def _code(folder: SiteFolder, offer: Offer, before: Sequence[Approval]) -> tuple[str, list[str]]:
    """In a line, and as a diff against what was approved last for this task."""
    if offer.by_engine:
        return (
            "this process runs none: an engine's process trains, by code that the coordinator ships and nobody "
            "approves here. It can read what the engine's user can read",
            [],
        )
    if offer.embedded:
        approved = f"; approved last: {before[-1].code}" if before else ""
        return f"the task {offer.task} of {offer.code}{approved}", []
    path = folder.path / "tasks" / offer.task
    if not path.is_file():
        return f"tasks/{offer.task} is not installed here; its SHA-256 is to be {offer.code}", []
    new = path.read_bytes()
    words = f"tasks/{offer.task}, {len(new)} bytes, SHA-256 {offer.code}"
    if not before:
        return f"{words}; nothing was approved for this task before: read all of it", _diff("", _text(new), "nothing")
    last = before[-1]
    when = f"approved on {last.at:%Y-%m-%d}"
    if last.code == offer.code:
        return f"{words}; unchanged since it was {when}", []
    kept = folder.path / "approved" / f"{last.code}.py"
    old = kept.read_bytes() if kept.is_file() else b""
    if hashlib.sha256(old).hexdigest() != last.code:
        return f"{words}; the copy of the code {when} is gone or changed: read all of it", _diff("", _text(new), "gone")
    return f"{words}; changed since the code {when}", _diff(_text(old), _text(new), when)


def _diff(old: str, new: str, when: str) -> list[str]:
    found = list(difflib.unified_diff(old.split("\n"), new.split("\n"), when, "installed here", lineterm=""))
    if len(found) > LONGEST_DIFF:
        return [*found[:LONGEST_DIFF], f"... and {len(found) - LONGEST_DIFF} lines more: read the file itself"]
    return found


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _of_terms(folder: SiteFolder, offer: Offer, terms: TrainingTerms) -> Iterator[Row]:
    record = terms.algorithm.record()
    if isinstance(terms, StatisticsTerms):
        record = {key: value for key, value in record.items() if key != "statistics"}
        for name, each in terms.sums.statistics.items():
            yield "statistic", f"{plainly(name)}: {plainly(json.dumps(dict(each), sort_keys=True))}"
    settings = ", ".join(f"{key} {plainly(value)}" for key, value in record.items() if key != "kind")
    yield "algorithm", f"{record['kind']}{f' ({settings})' if settings else ''}, {terms.rounds} rounds at most"
    for release in terms.algorithm.releases:
        how_often = "once" if release.once else "every round"
        yield "releases", f"{release.what} ({release.source}), {how_often}"
    if not isinstance(terms, StatisticsTerms):
        yield "model", f"{terms.federation.length} parameters in {len(terms.shapes)} tensors"
    encoding, largest = terms.encoding, terms.federation.largest
    weight = f"as many as its records, at most {largest}" if encoding.weights == "examples" else "as much as any other"
    yield "values", f"up to {encoding.value_bound:g} in {encoding.value_bits} bits; a site counts for {weight}"
    task = folder.settings.tasks.get(offer.task)
    if task is None:
        yield "data", "none: this training code may read no data set here"
        return
    data = folder.settings.data[task.data]
    yield "data", f"{task.data}: {data.path or data.part}, {data.records} records"
    asked = promise_of(terms.privacy, terms.federation.parties)
    try:
        begun = begun_here(folder, offer.digest)
        budget = budget_of(data, open_ledger(folder, task.data), asked, terms, offer.settings, begun=begun)
    except ChoralError as error:
        yield "privacy", f"it does not fit: {error}"
        return
    yield "privacy", _promise(asked)
    if (follows := follows_of(offer, terms.federation.parties)) is not None:
        promise, rounds = follows
        budget = replace(budget, asked=promise.epsilon)  # of both: one plan of them is written before the first sum
        yield "to follow", f"a training of {rounds} rounds at most; both together: {_promise(promise)}"
        yield "", "both stand on the ledger from this job on: all of it is spent, whether or not the training follows"
    yield from _spending(budget)
    if (plan := terms.shares) is not None:
        yield "noise", f"sized for {plan.honest} honest sites of {plan.terms.min_survivors} in a sum, the fewest"
        if isinstance(plan, BandedPlan):
            every, bands = plan.separation, len(plan.coefficients)
            yield "", f"batches are fixed and known: each record is in one of every {every} steps of its site"
            yield "", f"noise is correlated over steps by {bands} bands; earlier noise is kept in this process's memory"
            return
        rows = f"each step is computed on {plan.rows} rows, padded, whatever was drawn"
        yield "", f"{rows}, so that the time of an answer does not tell; no answer waits for a fixed time"


def _evaluation(offer: Offer) -> str:
    names = offer.terms.get("metrics", [])
    if offer.metrics == "none" and not names:
        return "nothing of the site's own becomes known"
    return f"{plainly(names)} of the site's own records: summed over the sites, {offer.metrics}"


def _sum(offer: Offer) -> str:
    said = ", ".join(f"{key} {plainly(value)}" for key, value in offer.secure_sum.items())
    try:
        summing = sum_of(offer.secure_sum)
        if not isinstance(summing, Masked | Homomorphic):
            return f"{said}: the coordinator sees what each site sends"
        if isinstance(summing, Homomorphic) and summing.key == "shared":
            return f"{said}: every site has the key of all that is sent"
        setup = setup_of(summing, offer.parties)
    except ChoralError as error:
        return f"{said}: {error}"
    trips = _in_trips(setup) if isinstance(setup, AheadSetup) else ""
    fewest = promised(setup, summing.min_survivors)
    return (
        f"{said}: over all {len(setup.roster)} sites, opened for the sum of {fewest} or more, "
        f"{setup.corrupt} corrupt; {setup.threshold} together can reconstruct a secret of one{trips}"
    )


def _in_trips(setup: AheadSetup) -> str:
    """What is different from four trips."""
    dealt = f"; in {setup.trips} trips: this process holds keys and shares of the next round between rounds"
    if setup.trips == 3:
        return dealt
    return (
        f"{dealt}. {setup.min_survivors} survivors are asked for, and nobody confirms them: a lying coordinator may"
        f" leave out others than it says, down to {setup.floor} honest sites, and no receipt names who was in the sum"
    )


def _promise(asked: Privacy | ClientPrivacy | None) -> str:
    if asked is None:
        return "none is promised"
    noise = {"local": "this site's own", "distributed": "each site's share", "central": "added by the coordinator"}
    unit = "site" if isinstance(asked, ClientPrivacy) else "record"
    clip = asked.clip if isinstance(asked, ClientPrivacy) else asked.max_grad_norm
    relation = f", {asked.neighbours}" if isinstance(asked, Privacy) else ""
    return (
        f"epsilon {shown(asked.epsilon)} at delta {shown(asked.delta)} for each {unit}{relation}; "
        f"clipping norm {clip}; noise is {noise[asked.noise]}"
    )


def _spending(budget: DataBudget) -> Iterator[Row]:
    promised = "no promise was made" if budget.promised is None else f"{shown(budget.promised)} promised in all"
    yield "budget", f"{at_least(budget.spent)} spent so far, {promised}"
    if budget.asked is None:
        return
    left = "" if budget.left is None else f", and {at_most(budget.left)} is left"
    yield "", f"when this job ends, all jobs on the data may have come to {shown(budget.asked)}{left}"
    if budget.goes_on is not None:
        yield "", f"it goes on with an earlier plan, of which {budget.goes_on} passes are left"
    elif budget.noise is not None:
        yield "", f"noise multiplier {budget.noise:.4g}"


def plainly(value: Any) -> str:
    """A value of an offer in few words."""
    return "by default" if value is None else str(value)
