"""What a reader of the whole report has seen: all private trainings on the same records, composed.

Each model's epsilon is of that model alone. A report shows several: configurations, seeds, budgets; and a record of a
party is in all of them, in the pooled ones too. Their settings were fixed before any of them was trained, so that their
costs compose as fixed releases (:mod:`choral.privacy.accounting`). Records and clients are counted apart: an epsilon of
the one says nothing of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from choral.audits.budgets.budgets import ledger_of, owners_of, unit_of
from choral.audits.findings.whole import Composed

if TYPE_CHECKING:
    from choral.privacy import Ledger
    from choral.trainers.run_folder.run import Run

POOLED = "pooled"
MOST_OWNERS = 16
"""Data owners whose costs are composed; of more, those with the most by Renyi DP, which is coarser and takes no time.
"""


def composed(arms: Mapping[str, Sequence[Run]], budgets: Mapping[str, Sequence[Run]]) -> tuple[Composed, ...]:
    """One of each unit and neighbour relation that anything was promised for; the data owner with the most."""
    runs = {id(run): run for group in (*arms.values(), *budgets.values()) for run in group if run.info.privacy}
    by_folder = {run.folder or key: run for key, run in runs.items()}  # the headline's stand among those at all budgets
    units = {unit_of(run): None for run in by_folder.values()}
    found = []
    for unit in units:
        here = [run for run in by_folder.values() if unit_of(run) == unit]
        found += _of_unit(unit, here)
    return tuple(found)


def _of_unit(unit: str, runs: Sequence[Run]) -> list[Composed]:
    from choral.privacy import LedgerError

    delta = max(float((run.info.privacy or {})["delta"]) for run in runs)
    single = max(max(cost.epsilon, cost.guarantee or 0.0) for run in runs for cost in run.info.spent.values())
    try:
        by_owner = _ledgers(runs)
    except LedgerError:  # which the audit of that run says
        return [Composed(unit=unit, runs=len(runs), delta=delta, single=single)]
    if not by_owner or len({ledger.neighbours for each in by_owner.values() for ledger in each}) > 1:
        return [Composed(unit=unit, runs=len(runs), delta=delta, single=single)]
    costliest = sorted(by_owner, key=lambda name: _rough(by_owner[name], delta), reverse=True)[:MOST_OWNERS]
    costs = {name: _cost(by_owner[name], delta) for name in costliest}
    owner = max(costs, key=lambda name: costs[name])
    runs_of = len(by_owner[owner])
    return [Composed(unit=unit, runs=runs_of, delta=delta, single=single, owner=owner, epsilon=costs[owner])]


def _ledgers(runs: Sequence[Run]) -> dict[str, list[Ledger]]:
    """By data owner, with those on pooled data in each; none where one is missing. Raises: LedgerError."""
    found: dict[str, list[Ledger]] = {}
    for run in runs:
        for name in owners_of(run):
            ledger = ledger_of(run, name)
            if ledger is None:
                return {}
            found.setdefault(name, []).append(ledger)
    pooled = found.get(POOLED, [])
    parties = {name: [*each, *pooled] for name, each in found.items() if name != POOLED}
    return parties or found


def _cost(ledgers: Sequence[Ledger], delta: float) -> float:
    from choral.privacy.ledgers.plans import fixed_cost

    if ledgers[0].unit == "client":
        return fixed_cost([event for ledger in ledgers for event in ledger.releases], delta)
    return fixed_cost([event for ledger in ledgers for event in ledger.events], delta, ledgers[0].neighbours)


def _rough(ledgers: Sequence[Ledger], delta: float) -> float:
    """By Renyi DP, which takes no time: to find who has the most."""
    from choral.privacy.accounting.filters import PrivacyFilter

    rule = PrivacyFilter(8.0, delta, ledgers[0].neighbours)
    if ledgers[0].unit == "client":
        return rule.cost([event for ledger in ledgers for event in ledger.releases])
    return rule.cost([event for ledger in ledgers for event in ledger.events])
