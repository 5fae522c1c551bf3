"""Whether what a run wrote down in several places is the same in all of them: run.json, ledgers, history, settings.

Each quantity is held for equality, both ways: a ledger that costs less than is claimed was edited no less than one
that costs more. What all of it together could be rewritten to, no check of the folder alone can find.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from choral.audits.budgets.budgets import ledger_of, owners_of, unit_of
from choral.audits.findings.schema import Check, Verdict

if TYPE_CHECKING:
    from choral.privacy import Ledger
    from choral.privacy.accounting.events import RecordEvent
    from choral.privacy.ledgers.spent import Spent
    from choral.trainers.run_folder.run import Run

_EQUAL = 1e-9  # relative: floats that were written once and read twice


def books_checks(run: Run) -> list[Check]:
    """The checks that apply to this run. Raises: LedgerError for a ledger that is damaged."""
    return [*_ledgers_agree(run), *_rates_agree(run), _history_agrees(run), *_transcript_kept(run)]


def _ledgers_agree(run: Run) -> list[Check]:
    """Steps and delta that run.json states for a data owner, against its ledger's; its cost holds noise and rate."""
    rows = []
    for name in owners_of(run):
        ledger, claimed = ledger_of(run, name), run.info.spent.get(name)
        if claimed is not None and ledger is not None:
            rows.append((name, _differences(run, ledger, claimed)))
    if not rows:
        return []
    found = [f"{name}: {said}" for name, all_said in rows for said in all_said]
    verdict: Verdict = "violated" if found else "holds"
    same = f"Steps and delta are the same in both, for each of {len(rows)}."
    return [Check(name="run.json and the ledgers state the same", verdict=verdict, finding=_first(found) or same)]


def _differences(run: Run, ledger: Ledger, claimed: Spent) -> list[str]:
    promised = float((run.info.privacy or {})["delta"])
    said = []
    for what, here, there in (
        ("run.json's promise", promised, claimed.delta),
        ("the ledger", ledger.delta, claimed.delta),
    ):
        if here is not None and not _same(here, there):
            said.append(f"delta is {there:g} in run.json's cost and {here:g} in {what}")
    if unit_of(run) == "client":
        return said
    steps = sum(event.steps for event in ledger.events)
    if claimed.steps != steps and (run.finished or claimed.steps > steps):
        said.append(f"run.json states {claimed.steps} noisy steps, the ledger holds {steps}")
    return said


def _rates_agree(run: Run) -> list[Check]:
    """Poisson sampling takes each of n records with probability B / n, for a whole number B: the batch size."""
    from choral.privacy.accounting.events import PoissonSampledGaussian

    if unit_of(run) != "record" or not owners_of(run):
        return []
    asked = run.info.config.get("training")
    # Only the tasks that come with Choral are known to batch as the settings say; a task of one's own may do otherwise.
    ours = not str(run.info.config.get("task", ".py")).endswith(".py")
    asked = asked.get("batch_size") if isinstance(asked, dict) and ours else None
    searched = run.info.tuning is not None  # the search chose the batch size, which is then not the settings'
    found, counted = [], 0
    for name in owners_of(run):
        ledger, records = ledger_of(run, name), run.info.parties.get(name, 0)
        records = run.info.total_examples if run.info.kind == "centralized" else records
        for event in own_events(run, ledger):
            if not isinstance(event, PoissonSampledGaussian) or event.sample_rate == 1.0:
                continue
            counted += 1
            batch = event.sample_rate * records
            if not (records and batch > 0.5 and _same(round(batch), batch)):
                found.append(f"{name}: rate {event.sample_rate:.6g} of {records} records is no whole batch")
            elif isinstance(asked, int) and not searched and round(batch) != asked:
                found.append(f"{name}: rate {event.sample_rate:.6g} of {records} records is a batch of {batch:.0f},"
                             f" and the settings ask for {asked}")  # fmt: skip
    if not counted:
        return []
    finding = _first(list(dict.fromkeys(found))) or "Every rate is the batch size over the number of records."
    name = "Sampling rates fit the numbers of records"
    return [Check(name=name, verdict="violated" if found else "holds", finding=finding)]


def own_events(run: Run, ledger: Ledger | None) -> tuple[RecordEvent, ...]:
    """This run's: of a ledger for the life of the data, those of the latest plan, before which others stand."""
    if ledger is None or run.info.ledgers == "run":
        return ledger.events if ledger is not None else ()
    latest = ledger.segments[-1][1] if ledger.segments else ()
    return tuple(event for event in ledger.events[len(ledger.events) - len(latest) :])


def _history_agrees(run: Run) -> Check:
    """No more survivors than selected, nor selected than there are; spending that never falls and ends as stated."""
    name = "The history is of these parties and adds up"
    found, spent = [], 0.0
    for entry in run.history:
        if run.info.kind == "federated" and entry.round:
            selected = entry.selected if entry.selected is not None else run.info.party_count
            if not 0 <= entry.survivors <= selected <= run.info.party_count:
                found.append(f"round {entry.round} has {entry.survivors} survivors of {selected} selected, and run.json"
                             f" names {run.info.party_count} parties")  # fmt: skip
        if entry.epsilon is not None and not entry.epsilon >= spent * (1.0 - _EQUAL):
            found.append(f"epsilon falls from {spent:.6g} to {entry.epsilon:.6g} at round {entry.round}")
        spent = entry.epsilon if entry.epsilon is not None else spent
    if run.history[-1].round > run.info.rounds:
        found.append(f"{run.history[-1].round} rounds are recorded, and {run.info.rounds} were asked for")
    most = max((cost.epsilon for cost in run.info.spent.values()), default=None)
    last = run.history[-1].epsilon
    # A run that was closed before its last round may have paid for one more, which was cut short.
    cut = run.info.ended and most is not None and last is not None and most > last
    if run.finished and most is not None and last is not None and run.info.spent and not cut and not _same(most, last):
        found.append(f"it ends at epsilon = {last:.6g}, and run.json states {most:.6g}")
    finding = _first(found) or f"{len(run.history)} entries; no more survivors than parties."
    return Check(name=name, verdict="violated" if found else "holds", finding=finding)


def _transcript_kept(run: Run) -> list[Check]:
    """Where the settings ask for a transcript and run.json knows of none."""
    asked = run.info.config.get("transcript", "none")
    if run.info.kind != "federated" or asked == "none" or run.info.transcript is not None or run.folder is None:
        return []
    finding = f"The settings ask for a transcript ({asked}), and run.json tells of none: it was taken away or edited."
    return [Check(name="The transcript that was asked for is there", verdict="unverified", finding=finding)]


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_EQUAL, abs_tol=0.0)


def _first(found: list[str]) -> str:
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{'; '.join(found[:3])}{more}." if found else ""
