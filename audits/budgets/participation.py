"""Who took part against who was planned for: the fewest parties of a sum, and the noise that the ledger counted on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING

import msgspec

from choral.audits.budgets.budgets import ledger_of, owners_of, unit_of
from choral.audits.budgets.consistency import own_events
from choral.audits.budgets.contributed import contributor_checks
from choral.audits.findings.schema import Check
from choral.audits.findings.text import cost

if TYPE_CHECKING:
    from choral.privacy import ClientRelease
    from choral.privacy.accounting.events import RecordEvent, ShareEvent
    from choral.trainers.run_folder.run import Run


_EQUAL = 1e-9  # numbers that were written down and read again


class ParticipationSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who was planned for, and who took part.

    planned: parties times rounds; realised: survivors over all rounds that were completed. claimed_minimum: the fewest
    parties of a sum that may be opened, by the secure sum and the promise; fewest: the fewest in any round.
    epsilon_realised: of a client-level ledger, its cost if each sum had as many noise shares as parties survived, or
        in two trips as are in it for certain.
    """

    rounds: int
    completed: int
    parties: int
    planned: int
    realised: int
    fewest: int
    claimed_minimum: int | None
    epsilon_realised: float | None = None


def participation_of(run: Run) -> ParticipationSummary | None:
    """None for pooled training, which has no parties that could fail to come. Raises: LedgerError."""
    rounds = [entry for entry in run.history if entry.round and not entry.failed]  # those opened no sum
    if run.info.kind != "federated" or not rounds:
        return None
    minimum = [(run.info.secure_sum or {}).get("min_survivors"), (run.info.privacy or {}).get("min_survivors")]
    known = [int(value) for value in minimum if isinstance(value, int)]
    parties = run.info.party_count
    return ParticipationSummary(
        rounds=run.info.rounds,
        completed=len(rounds),
        parties=parties,
        planned=parties * run.info.rounds,
        realised=sum(entry.survivors for entry in rounds),
        fewest=min(entry.survivors for entry in rounds),
        claimed_minimum=max(known, default=None),
        epsilon_realised=_epsilon_realised(run),
    )


def participation_checks(run: Run, found: ParticipationSummary | None) -> list[Check]:
    """Whether the survivors ever fell below what is claimed, and whether the noise was counted by who survived."""
    if found is None:
        return []
    checks = contributor_checks(run)
    name = "No sum was opened over fewer parties than claimed"
    if found.claimed_minimum is not None:
        opened = [entry for entry in run.history if entry.round and not entry.failed]
        low = [entry for entry in opened if entry.survivors < found.claimed_minimum]
        said = f"At least {found.fewest} of {found.parties} in every round; {found.claimed_minimum} are claimed."
        if failed := sum(bool(entry.failed) for entry in run.history):
            said += f" {failed} more rounds had too few and opened no sum, as the run records them."
        if (run.info.secure_sum or {}).get("trips") == 2:
            said += " Nobody confirms them in two trips."
        if low:
            said = (
                f"Round {low[0].round} has {low[0].survivors} of {found.parties} parties, {found.claimed_minimum} are"
                f" claimed" + (f"; {len(low)} rounds in all." if len(low) > 1 else ".")
            )
        checks.append(Check(name=name, verdict="violated" if low else "holds", finding=said))
    if _releases(run):
        checks.append(_noise_by_survivors(run, found.epsilon_realised))
    return checks + _noise_elsewhere(run) + _shares_as_charged(run)


def _noise_elsewhere(run: Run) -> list[Check]:
    """Where run.json says that noise is added somewhere else than the ledger was charged for: the adversary differs.

    Central noise is continuous, the other kinds are of integers; with local noise a client counts on its own share.
    """
    where, rate = ((run.info.privacy or {}).get(key) for key in ("noise", "sample_rate"))
    ledger = ledger_of(run, "clients") if unit_of(run) == "client" else None
    if ledger is None:
        return []
    for release in ledger.releases:
        central = release.mechanism == "gaussian" and rate == getattr(release, "sample_rate", None)
        fits = {"central": central, "distributed": not central, "local": not central and release.shares == 1}
        if not fits.get(str(where), False):
            finding = (
                f"run.json says {where}; the ledger was charged for {release.mechanism.replace('_', ' ')} noise in"
                f" {release.shares} unknown shares{_of_cohorts(rate, release)}."
            )
            return [Check(name="The noise is added where the promise says", verdict="violated", finding=finding)]
    return []


def _of_cohorts(rate: object, release: ClientRelease) -> str:
    """Where the rate at which secret cohorts are drawn is another than was charged."""
    charged = getattr(release, "sample_rate", None)
    return "" if rate == charged else f", of cohorts drawn at the rate {charged or 1:g}, of which run.json says {rate}"


def _shares_as_charged(run: Run) -> list[Check]:
    """Records' noise in shares: what run.json says of it, and so its claim, against ledgers and secure sum.

    Nothing to say where no ledger holds a step: a ledger that is missing is found elsewhere.
    """
    from choral.privacy.accounting.events import ShareEvent

    promise = run.info.privacy or {}
    said = unit_of(run) == "record" and promise.get("noise") == "distributed"
    honest = int(promise.get("min_survivors", 0)) - int(promise.get("colluders", 0))
    found, counted = _beyond_sum(run) if said else [], 0
    for name in owners_of(run) if unit_of(run) == "record" else ():
        ledger = ledger_of(run, name)
        events = own_events(run, ledger)
        found += [f"{name}: {why}" for why in _out_of_order(events)]
        for event in events:
            if not isinstance(event, ShareEvent):
                found += [f"{name}: run.json says shares, the ledger was charged for noise of another kind"] * said
            elif not said and _standardised_by(run, event):
                honest = event.honest
            elif not said:
                found.append(f"{name}: the ledger was charged for noise in shares, and run.json does not say so")
            elif event.honest != honest:
                found.append(f"{name}: charged for {event.honest} unknown shares, and {honest} are promised")
            elif event.parties < run.info.party_count:
                found.append(f"{name}: charged for sums of {event.parties} parties, of {run.info.party_count}")
            elif not _standardised_by(run, event):
                found += [f"{name}: {why}" for why in _beyond_plan(run, event)]
            counted += event.steps if isinstance(event, ShareEvent) else 0
    if not (counted or found):
        return []
    distinct = list(dict.fromkeys(found))
    more = f"; and {len(distinct) - 3} more" if len(distinct) > 3 else ""
    finding = f"{'; '.join(distinct[:3])}{more}." if found else f"{counted} steps, each for {honest} unknown shares."
    return [
        Check(
            name="Noise in shares is counted for the honest survivors that are promised",
            verdict="violated" if found else "holds",
            finding=finding,
        )
    ]


def _out_of_order(events: Sequence[RecordEvent]) -> list[str]:
    """Where steps of correlated noise are not numbered as they follow each other, by which records take turns, or a row
    was made twice or after a later one.
    """
    from choral.privacy.accounting.banded_shares import BandedShares

    steps = [event for event in events if isinstance(event, BandedShares)]
    found = [
        f"its step {place} was charged as number {event.number} of its plan"
        for place, event in enumerate(steps, 1)
        if event.number != place
    ]
    found += [
        f"row {after.row} was made after row {before.row}"
        for before, after in pairwise(steps)
        if after.row <= before.row
    ]
    return found[:1]


def _other_noise(run: Run, event: ShareEvent, every: int) -> list[str]:
    """Where noise is not correlated as run.json says, or a record was charged to take part less often."""
    from choral.privacy.accounting.banded_shares import BandedShares

    promise, recorded = run.info.privacy or {}, run.info.fixed_point or {}
    banded = promise.get("mechanism") == "banded"
    if not isinstance(event, BandedShares):
        return ["charged for independent noise, and run.json says that it is correlated"] if banded else []
    if not banded:
        return ["charged for correlated noise, and run.json does not say so"]
    found, bands = [], len(event.coefficients)
    if event.separation != every or recorded.get("separation") != every:
        found.append(f"charged for a record every {event.separation} steps, and a pass has {every}")
    if recorded.get("bands") != bands or promise.get("bands") not in (0, bands):
        found.append(f"charged for {bands} bands, and run.json says {promise.get('bands') or recorded.get('bands')}")
    return found


def _beyond_plan(run: Run, event: ShareEvent) -> list[str]:
    """Where a step was charged for a smaller rate, or for more noise, than run.json says its parties kept to."""
    algorithm, recorded = run.info.algorithm or {}, run.info.fixed_point or {}
    batch, records = algorithm.get("batch_size"), run.info.total_examples
    if not isinstance(batch, int) or batch < 1 or not records:
        batch = records = 1
    rate = batch / records
    found = _other_noise(run, event, math.ceil(records / batch))
    if event.sample_rate < rate * (1.0 - _EQUAL):
        found.append(f"charged for the rate {event.sample_rate:.6g}, and run.json says {rate:.6g}")
    share = recorded.get("share")
    if share is not None and event.share > float(share) * (1.0 + _EQUAL):
        found.append(f"charged for shares of {event.share:.6g} clipping norms, and run.json says {float(share):.6g}")
    return found


def _standardised_by(run: Run, event: ShareEvent) -> bool:
    """Whether this is the one sum, of all records, that run.json says was taken before a training of local noise."""
    stated = run.info.standardised or {}
    honest = int(stated.get("min_survivors", 0)) - int(stated.get("colluders", 0))
    return event.sample_rate == 1.0 and event.steps == 1 and event.honest == honest


def _beyond_sum(run: Run) -> list[str]:
    """Where more is promised of survivors or colluders than the secure sum states; of a plain one nothing is."""
    promise, stated = run.info.privacy or {}, run.info.secure_sum or {}
    if stated.get("name") == "plain":
        return []
    found = []
    for ours, theirs in (("min_survivors", "min_survivors"), ("colluders", "corrupt")):
        promised, withstood = int(promise.get(ours, 0)), int(stated.get(theirs, 0))
        if promised > withstood:
            found.append(f"{ours} = {promised} is promised, and the secure sum has {theirs} = {withstood}")
    return found


def _releases(run: Run) -> tuple[ClientRelease, ...]:
    """What each sum was charged with, one release per sum: those that settle stand in the place of what they settle."""
    if unit_of(run) != "client" or (run.info.privacy or {}).get("noise") != "distributed":
        return ()
    ledger = ledger_of(run, "clients")
    if ledger is None:
        return ()
    effective: list[ClientRelease] = []
    for release in ledger.releases:
        if release.settles and effective:
            effective.pop()
        effective += [msgspec.structs.replace(release, settles=False, steps=1)] * release.steps
    return tuple(effective)


def _shares_survived(run: Run) -> list[int]:
    """Noise shares that the adversary does not know, by round: those of the survivors that are not colluders."""
    colluders = int((run.info.privacy or {}).get("colluders", 0))
    return [
        sure_survivors(run, entry.survivors) - colluders for entry in run.history if entry.round and not entry.failed
    ]


def sure_survivors(run: Run, reported: int) -> int:
    """Of so many survivors of a sum, as many as are in it for certain: in two trips nobody confirms who they are."""
    stated = run.info.secure_sum or {}
    return min(reported, int(stated.get("min_survivors", 0))) if stated.get("trips") == 2 else reported


def _overcounted(run: Run) -> list[tuple[int, int, int]]:
    """(place, charged for, survived) of sums that were charged for more shares than survived.

    Sum by sum where the ledger holds just this run's rounds; where it holds more (rounds that were cut short, earlier
    runs), the sums of many shares may not outnumber the rounds that had as many, plus what is over.
    """
    charged, survived = [release.shares for release in _releases(run)], _shares_survived(run)
    over = len(charged) - len(survived)
    if over:
        charged, survived = sorted(charged, reverse=True)[max(over, 0) :], sorted(survived, reverse=True)
    return [
        (place, paid, there)
        for place, (paid, there) in enumerate(zip_longest(charged, survived, fillvalue=0), 1)
        if paid > there
    ]


def _epsilon_realised(run: Run) -> float | None:
    """The cost of the ledger with no more shares in any sum than survived; None where some sum had none at all."""
    from choral.privacy.accounting import client_level

    releases, survived = _releases(run), _shares_survived(run)
    if not releases:
        return None
    if not _overcounted(run):
        return client_level.epsilon(releases, float((run.info.privacy or {})["delta"]))
    if min(survived) < 1:
        return None
    if len(releases) != len(survived):
        survived = [min(survived)] * len(releases)
    counted = [
        msgspec.structs.replace(release, shares=min(release.shares, there))
        for release, there in zip(releases, survived, strict=True)
    ]
    return client_level.epsilon(counted, float((run.info.privacy or {})["delta"]))


def _noise_by_survivors(run: Run, realised: float | None) -> Check:
    name, unconfirmed = "Noise was counted by who survived", (run.info.secure_sum or {}).get("trips") == 2
    if over := _overcounted(run):
        place, charged, survived = over[0]
        there = "are in it for certain, in two trips" if unconfirmed else "survived"
        finding = f"Sum {place} was charged for {charged} noise shares, {survived} {there} ({len(over)} sums in all)."
        if realised is not None:
            promised = float((run.info.privacy or {})["epsilon"])
            by = "those" if unconfirmed else "who survived"
            finding += f" By {by}, the cost is ε = {cost(realised)}; {promised:g} were promised."
        return Check(name=name, verdict="violated", finding=finding)
    there = "are in it for certain, in two trips" if unconfirmed else "parties survived"
    finding = f"No sum was charged for more noise shares than {there}; ε = {cost(realised or 0.0)}."
    return Check(name=name, verdict="holds", finding=finding)
