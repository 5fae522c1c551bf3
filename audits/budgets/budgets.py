"""Recompute what each data owner has spent, from its ledger, and hold it against what was claimed and promised."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from choral.audits.findings.claims import short_path
from choral.audits.findings.schema import Check, OwnerBudget, Verdict
from choral.audits.findings.text import cost, power
from choral.errors import ChoralError, ConfigError
from choral.privacy.accounting.events import RELATIONS, ZERO_OUT, relation_of, stated
from choral.privacy.errors import AccountingError

if TYPE_CHECKING:
    from choral.privacy import Ledger
    from choral.privacy.accounting.events import RecordEvent
    from choral.privacy.ledgers.spent import Spent
    from choral.trainers.run_folder.run import Run

_OLDER_WORDS = "its ledger states the neighbours in older words"
TOLERANCE = 1e-5  # relative, of the same computation done again; it agrees to about 1e-9
SETTLED = 5e-3  # relative, of the same cost on two grids that an accountant may have settled on
MISSTATED, MISSTATED_LEAST = 0.03, 0.03  # how far a statement may be from the cost: relative, or this


class Recomputed(NamedTuple):
    """What a ledger costs: `upper` as the product computes it, `bracket` from both sides, to decide about a number."""

    upper: float
    bracket: Callable[[float], tuple[float, float]]
    event: RecordEvent | None = None  # the latest, of records


def owner_budgets(run: Run) -> tuple[OwnerBudget, ...]:
    """One row per data owner; empty for a run without privacy.

    Raises: LedgerError if a ledger is damaged, edited or of another data owner.
    """
    return tuple(_owner_budget(run, name) for name in owners_of(run))


def of_run(run: Run, error: Exception) -> str:
    """What an error says, for a report: without the path to the run's folder; of other libraries' the kind alone."""
    if not isinstance(error, ChoralError | OSError):
        return type(error).__name__
    return str(error) if run.folder is None else str(error).replace(str(run.folder), short_path(run.folder))


def unverifiable(run: Run, error: Exception) -> OwnerBudget:
    """A row for the ledgers of a run of which one is damaged, edited, or another's: no promise rests on them."""
    privacy = run.info.privacy or {}
    return OwnerBudget(
        holder="its ledgers",
        promised=float(privacy["epsilon"]),
        claimed=None,
        recomputed=None,
        delta=float(privacy["delta"]),
        steps=0,
        verdict="violated",
        finding=f"a ledger does not verify, so that nothing proves what was spent: {of_run(run, error)}",
    )


def owners_of(run: Run) -> list[str]:
    """Whoever has, or should have, a ledger; empty for a run without privacy."""
    if run.info.privacy is None:
        return []
    if unit_of(run) == "client":
        owners = ["clients"]
    else:
        owners = [*run.info.parties, *run.info.sites] if run.info.kind == "federated" else ["pooled"]
    return owners + [name for name in run.info.spent if name not in owners]


def _owner_budget(run: Run, name: str) -> OwnerBudget:
    privacy = run.info.privacy or {}
    promised, delta = float(privacy["epsilon"]), float(privacy["delta"])
    claimed = run.info.spent.get(name)
    events, recomputed, relation = _from_ledger(run, name, claimed.delta if claimed else delta)
    verdict, finding = _judge(promised, delta, claimed, events, recomputed, finished=run.finished)
    if recomputed is None and name in run.info.sites:
        finding = "its ledger is at its own site, which alone can recompute it"
    if claimed and not _of_unit(claimed, unit_of(run), relation):  # the same epsilon for more than the ledger is about
        verdict, finding = "violated", f"the cost is stated for each {claimed.unit} ({claimed.neighbours})"
    elif relation and unit_of(run) == "record" and relation_of(relation) != privacy.get("neighbours", ZERO_OUT):
        verdict, finding = "violated", f"the promise is for other neighbours than the ledger's ({stated(relation)})"
    elif relation and stated(relation) != relation:
        finding += f"; {_OLDER_WORDS}: {stated(relation)}"
    guarantee, planned = _guarantee_of(run, name)
    if verdict == "holds":
        verdict, finding = _judge_plans(promised, claimed, guarantee, planned, finding)
    return OwnerBudget(
        holder=name,
        promised=promised,
        claimed=claimed.epsilon if claimed else None,
        recomputed=recomputed.upper if isinstance(recomputed, Recomputed) else None,
        guarantee=guarantee,
        delta=claimed.delta if claimed else delta,
        steps=events,
        verdict=verdict,
        finding=finding,
    )


def _guarantee_of(run: Run, name: str) -> tuple[float | None, bool]:
    """What the ledger's plans guarantee, computed again, and whether any plan is on it."""
    from choral.privacy.ledgers.plans import guarantee

    ledger = ledger_of(run, name)
    if ledger is None:
        return None, False
    return guarantee(ledger), any(plan is not None for plan, _ in ledger.segments)


def _judge_plans(
    promised: float, claimed: Spent | None, guarantee: float | None, planned: bool, finding: str
) -> tuple[Verdict, str]:
    """The same for whoever chose as he went: a price for fixed parameters says nothing against him."""
    if guarantee is None and planned:
        return "violated", "the ledger holds more than was planned, or plans that no filter admits within the promise"
    if guarantee is not None and _above(guarantee, promised):
        return "violated", "the plans on the ledger come to more than was promised"
    if claimed and claimed.guarantee is not None and (guarantee is None or _above(guarantee, claimed.guarantee)):
        return "violated", "the ledger guarantees less than run.json claims"
    if guarantee is None:
        finding += (
            "; no plan was recorded in advance, so for whoever stopped or trained again by what he saw there is none"
        )
    return "holds", finding


def _from_ledger(run: Run, name: str, delta: float) -> tuple[int, Recomputed | str | None, str]:
    """Noisy steps on the ledger, what they cost at ``delta``, and its neighbours; 0, None, "" where there is none.

    The cost is computed as it was claimed, which settles on the same grid; or why it cannot be. How little it may be is
    computed only where that does not bear a statement out.
    """
    from choral.privacy.accounting.client_level import settled
    from choral.privacy.accounting.events import Search

    ledger = ledger_of(run, name)
    if ledger is None:
        return 0, None, ""
    try:
        upper = ledger.epsilon(delta)
    except (AccountingError, ConfigError) as error:
        held = ledger.releases if unit_of(run) == "client" else ledger.events
        return sum(event.steps for event in held), str(error), ledger.neighbours
    if unit_of(run) == "client":  # there is one bound for integer noise, evaluated again from what the ledger says
        steps = sum(release.steps for release in settled(ledger.releases))
        return steps, Recomputed(upper, lambda _: (upper, upper)), ledger.neighbours
    events = ledger.events
    steps = sum(event.steps for event in events)
    latest = events[-1] if events else None
    if any(isinstance(event, Search) for event in events):  # there is one bound for a private search
        return steps, Recomputed(upper, lambda _: (upper, upper), latest), ledger.neighbours
    relation = ledger.neighbours
    return steps, Recomputed(upper, lambda limit: _bracket(events, delta, relation, limit), latest), relation


def _bracket(events: Sequence[RecordEvent], delta: float, relation: str, limit: float) -> tuple[float, float]:
    """The greatest lower and the least upper bound there are: by our finest grids, and PRV where it is reliable."""
    from choral.privacy.accounting import record_level
    from choral.privacy.accounting.events import REPLACE_ONE, relation_of
    from choral.privacy.accounting.other_accountants import epsilon_by_prv, trusts_others

    lower, upper = record_level.bounds(events, delta, neighbours=relation, about=limit)
    if lower <= limit < upper and relation_of(relation) != REPLACE_ONE and trusts_others(events, delta):
        try:
            low, _ = epsilon_by_prv(events, delta)
        except AccountingError:
            return lower, upper
        lower = max(lower, low) if low <= upper else lower
    return lower, upper


def unit_of(run: Run) -> str:
    return str((run.info.privacy or {}).get("unit", "record"))


def _of_unit(claimed: Spent, unit: str, relation: str) -> bool:
    """Whether the cost is stated for the unit and neighbours of the ledger, which is read as one of ``unit``.

    relation: of the ledger; empty where there is none, and then any of the unit's.
    """
    meant = relation_of(claimed.neighbours)
    return claimed.unit == unit and (meant == relation_of(relation) if relation else meant in RELATIONS.get(unit, ()))


def ledger_path(run: Run, name: str) -> Path | None:
    from choral.trainers.run_folder.folder import ledger_file

    return ledger_file(run.folder / "ledger", name) if run.folder else None


def ledger_of(run: Run, name: str) -> Ledger | None:
    """A data owner's ledger: the file in the run's folder, else what a run without one carries; None without either.

    Raises: LedgerError if it is damaged, edited or of another data owner.
    """
    from choral.privacy import Ledger

    path = ledger_path(run, name)
    if path is not None:
        return Ledger(path, holder=name) if path.is_file() else None
    return Ledger.read(run.ledgers[name], holder=name) if name in run.ledgers else None


def _above(value: float, limit: float) -> bool:
    """Fails closed: what is not a number is above every limit."""
    return not value <= limit * (1 + TOLERANCE)


def _judge(
    promised: float,
    delta: float,
    claimed: Spent | None,
    steps: int,
    recomputed: Recomputed | str | None,
    *,
    finished: bool,
) -> tuple[Verdict, str]:
    """An upper bound above a statement refutes nothing: *violated* needs a lower bound that is above it."""
    if claimed and _above(claimed.delta, delta):
        return "violated", f"the cost is stated at δ = {power(claimed.delta)}, the promise at δ = {power(delta)}"
    if claimed and _above(claimed.epsilon, promised):
        return "violated", "run.json itself claims more than was promised"
    if recomputed is None:
        return "unverified", "there is no ledger to recompute it from"
    if isinstance(recomputed, str):
        return "unverified", f"no accountant can price the ledger: {recomputed}"
    verdict = _within(recomputed, promised)
    if verdict != "holds":
        return verdict, _ABOVE[verdict].format("was promised")
    if claimed is None:
        return ("violated" if finished and steps else "unverified"), "run.json claims no cost for this data owner"
    if steps < claimed.steps:
        return "unverified", f"the ledger holds {steps} steps, run.json claims {claimed.steps}: part of it is missing"
    verdict = _within(recomputed, claimed.epsilon)
    if verdict != "holds" and not finished:
        return "holds", "the ledger also holds a round that was cut short; the ledger counts"
    if verdict != "holds":
        return verdict, _ABOVE[verdict].format("run.json claims")
    if finished and (unlike := _unlike(claimed, steps, recomputed)):
        return "violated", unlike
    return "holds", "recomputed from the ledger, within claim and promise"


_ABOVE: dict[Verdict, str] = {
    "violated": "the ledger costs more than {}",
    "unverified": "no upper bound on the ledger's cost is as low as {}, and no lower bound is above it",
}


def _within(recomputed: Recomputed, limit: float) -> Verdict:
    """Whether the cost is at most `limit`: by the grid of the claim, else by finer ones, from both sides."""
    if not _above(recomputed.upper, limit):
        return "holds"
    lower, upper = recomputed.bracket(limit)
    if not _above(upper, limit):
        return "holds"
    if not lower <= limit:  # and of what is not a number
        return "violated"
    # In between: true for all that can be known, if what can be known is narrow; an infinite bound says nothing.
    narrow = math.isfinite(upper) and upper - lower <= max(MISSTATED * upper, MISSTATED_LEAST)
    return "holds" if narrow else "unverified"


def _unlike(claimed: Spent, steps: int, recomputed: Recomputed) -> str:
    """What run.json states of a finished run other than its ledger; empty if nothing."""
    if steps != claimed.steps:
        return f"the ledger holds {steps} steps, run.json states {claimed.steps}"
    event = recomputed.event
    if event is None:
        return ""
    for words, said, held in (
        ("noise multiplier", claimed.noise_multiplier, event.noise_multiplier),
        ("sample rate", claimed.sample_rate, event.sample_rate),
    ):
        if not math.isclose(said, held, rel_tol=1e-9):
            return f"run.json states a {words} of {said:.6g}, the ledger's latest is {held:.6g}"
    if not claimed.epsilon <= recomputed.upper + max(MISSTATED * recomputed.upper, MISSTATED_LEAST):
        return (
            f"run.json claims ε = {claimed.epsilon:.6g} for what costs {recomputed.upper:.6g}: one of them was edited"
        )
    return ""


def budget_checks(run: Run, rows: Sequence[OwnerBudget]) -> list[Check]:
    """The rows in a sentence each, and whether history, delta and folder agree with them."""
    if run.info.privacy is None:
        return _no_promise(run)
    return [_all_owners(rows), *_no_other_ledger(run), _history_agrees(run), _delta_means_something(run)]


def _no_other_ledger(run: Run) -> list[Check]:
    """Where a ledger is in the folder whose data owner run.json does not name, what that one spent is not claimed."""
    known = {ledger_path(run, name) for name in owners_of(run)}
    stray = sorted(path for path in run.folder.glob("ledger/*.jsonl") if path not in known) if run.folder else []
    if not stray:
        return []
    finding = (
        f"{len(stray)} in the folder ({stray[0].name}) of data owners that run.json does not name: it was edited or"
        " mixed up."
    )
    return [Check(name="Every ledger is of a data owner that run.json names", verdict="unverified", finding=finding)]


def _all_owners(rows: Sequence[OwnerBudget]) -> Check:
    name = "Every data owner's budget, recomputed from its ledger"
    for verdict in ("violated", "unverified"):
        faulty = [row for row in rows if row.verdict == verdict]
        if faulty:
            said = "; ".join(f"{row.holder}: {row.finding}" for row in faulty[:3])
            more = f"; and {len(faulty) - 3} more" if len(faulty) > 3 else ""
            return Check(name=name, verdict=verdict, finding=f"{said}{more}.")
    worst = max(rows, key=lambda row: row.recomputed or 0.0)
    finding = (
        f"{len(rows)} of {len(rows)} hold; the most is ε = {cost(worst.recomputed or 0.0)} ({worst.holder}), of"
        f" {worst.promised:g} promised."
    )
    if older := next((row for row in rows if _OLDER_WORDS in row.finding), None):
        finding += f" {older.holder}: {older.finding}."
    return Check(name=name, verdict="holds", finding=finding)


def _history_agrees(run: Run) -> Check:
    """The running epsilon in the history may not pass the promise, nor end above the claim."""
    name = "The history stays within the promise"
    promised = float((run.info.privacy or {})["epsilon"])
    if run.info.sites and all(entry.epsilon is None for entry in run.history):
        return Check(name=name, verdict="unverified", finding="No round says a cost: the ledgers are at the sites.")
    claimed = run.spent.epsilon if run.spent else promised
    for entry in run.history:
        # An earlier cost may have settled on a coarser grid than the last one.
        if entry.epsilon is not None and _above(entry.epsilon, min(promised, claimed) * (1 + SETTLED)):
            finding = (
                f"Round {entry.round} says ε = {entry.epsilon:.6g}; claimed are {claimed:.6g}, promised {promised:g}."
            )
            return Check(name=name, verdict="violated", finding=finding)
    return Check(name=name, verdict="holds", finding=f"No round says more than ε = {cost(claimed)}.")


def _delta_means_something(run: Run) -> Check:
    """At delta >= 1/n a mechanism may publish one of n records in the clear."""
    name = "Delta is below 1/n for every data owner"
    delta = float((run.info.privacy or {})["delta"])
    sizes = [*run.info.parties.values()] if run.info.population is None else [run.info.population.largest]
    if unit_of(run) == "client":
        clients = run.info.party_count
        if not delta * clients < 1:
            finding = f"δ = {power(delta)} with {clients} clients allows one update in the clear."
            return Check(name=name, verdict="violated", finding=finding)
        return Check(name=name, verdict="holds", finding=f"δ = {power(delta)}; there are {clients:,} clients.")
    most = max(sizes, default=0) if run.info.kind == "federated" else sum(sizes)
    if not most or not delta < 1 / most:
        return Check(
            name=name, verdict="violated", finding=f"δ = {power(delta)} with {most} records allows one in the clear."
        )
    return Check(name=name, verdict="holds", finding=f"δ = {power(delta)}; the largest has {most:,} records.")


def _no_promise(run: Run) -> list[Check]:
    stray = sorted(run.folder.glob("ledger/*.jsonl")) if run.folder else []
    if not stray:
        return []
    finding = (
        f"run.json promises none, yet there are {len(stray)} privacy ledgers in the folder: it was edited or mixed up."
    )
    return [Check(name="No privacy was promised", verdict="unverified", finding=finding)]
