"""A ledger's cost in the parameters of other definitions, at several deltas, and for a whole person."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from choral.audits.budgets.budgets import ledger_of, owners_of, unit_of
from choral.audits.findings.parameters import AtDelta, PersonPair, PromiseParameters, Renyi
from choral.errors import ChoralError

if TYPE_CHECKING:
    from choral.privacy import Ledger
    from choral.privacy.accounting.events import RecordEvent
    from choral.trainers.run_folder.run import Run

DELTAS = (1e-5, 1e-6)  # and 1/n^2
ORDERS = (1.5, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0, 64.0)


def parameters_of(run: Run) -> PromiseParameters | None:
    """Those of the data owner who has spent the most; None without a promise, or without its ledger."""
    ledgers = {name: ledger for name in owners_of(run) if (ledger := ledger_of(run, name)) is not None}
    spent = {name: run.info.spent[name] for name in ledgers if name in run.info.spent}
    if not spent:
        return None
    holder = max(spent, key=lambda name: spent[name].epsilon)
    ledger, cost = ledgers[holder], spent[holder]
    rho = _rho(ledger)
    return PromiseParameters(
        holder=holder,
        neighbours=ledger.neighbours,
        at=_at_deltas(ledger, sorted({cost.delta, *DELTAS, *_of_all(run, holder)}, reverse=True)),
        rho=rho,
        mu=None if rho is None else math.sqrt(2.0 * rho),
        renyi=_curve(ledger),
        person=_person(cost.records_per_person, max(cost.epsilon, cost.guarantee or 0.0), cost.delta),
    )


def _of_all(run: Run, holder: str) -> tuple[float, ...]:
    """1/n^2, if it is known how many there are, and can be accounted for."""
    from choral.privacy.loss_distributions.pld import SMALLEST_DELTA

    if unit_of(run) == "client":
        count = run.info.party_count
    elif (run.info.privacy or {}).get("noise") == "distributed":  # each record is one of all parties'
        count = run.info.total_examples
    else:
        count = run.info.parties.get(holder, run.info.total_examples if holder == "pooled" else 0)
    return (count**-2.0,) if count > 1 and count**-2.0 >= SMALLEST_DELTA else ()


def _at_deltas(ledger: Ledger, deltas: Sequence[float]) -> tuple[AtDelta, ...]:
    found = []
    for delta in deltas:
        try:
            found.append(AtDelta(delta=delta, epsilon=ledger.epsilon(delta)))
        except ChoralError:  # secure sums' failures use it up, or no accountant goes so far: it is left out
            continue
    return tuple(found)


def _person(records: int | None, epsilon: float, delta: float) -> PersonPair | None:
    from choral.privacy.ledgers.spent import group_pair

    if records is None or records < 1:
        return None
    together = group_pair(epsilon, delta, records)
    return PersonPair(records=records, epsilon=together[0], delta=together[1])


def _rho(ledger: Ledger) -> float | None:
    """The sum over steps of (sensitivity over noise)^2 / 2; None where not of Gaussians alone, or not accounted for."""
    from choral.privacy.accounting import client_level
    from choral.privacy.accounting.events import CLIENT_UNIT, Search, as_gaussians, replaces
    from choral.privacy.accounting.merged_steps import merge, without_search

    events: Sequence[RecordEvent]
    if ledger.unit == CLIENT_UNIT:
        releases = client_level.settled(ledger.releases)
        if any(release.mechanism != "gaussian" for release in releases):
            return None
        events, distance = client_level.as_record_events(releases), 1.0
    else:
        events, distance = ledger.events, 2.0 if replaces(ledger.neighbours) else 1.0
    if any(isinstance(event, Search) for event in events):
        return None
    try:
        merged = merge(without_search(as_gaussians(events, 1.0)[0]))
    except ChoralError:  # more steps, or less noise, than is accounted for
        return None
    return math.fsum(steps * (distance / noise) ** 2 / 2.0 for _, noise, steps in merged)


def _curve(ledger: Ledger) -> tuple[Renyi, ...]:
    """Of a whole ledger at some orders; none where a part of it is not accounted for."""
    from choral.privacy.accounting import client_level, renyi
    from choral.privacy.accounting.events import CLIENT_UNIT, Search, as_gaussians

    total = np.zeros(len(ORDERS))
    if ledger.unit == CLIENT_UNIT:
        for release in client_level.settled(ledger.releases):
            total = total + release.steps * client_level.renyi(release, ORDERS)
    else:
        for event in as_gaussians(ledger.events, 1.0)[0]:
            if isinstance(event, Search):
                return ()
            try:
                total = total + renyi.renyi(event, ORDERS, neighbours=ledger.neighbours)
            except ChoralError:
                return ()
    return tuple(
        Renyi(order=order, divergence=float(value))
        for order, value in zip(ORDERS, total, strict=True)
        if math.isfinite(value)
    )
