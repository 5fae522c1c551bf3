"""The ledger's own audit: every epsilon by several accountants.

An accountant that is wrong in one place is seldom wrong in the same way in another: our privacy loss distributions,
dp-accounting's, Opacus' privacy random variables and Renyi DP are four programs (three papers) over the same events.
The first brackets the cost, rounding included, as the third does; no upper bound of any may be below a lower one of
another. That one upper bound is looser than another is no fault: how much depends on the grid and the steps. PRV and
dp-accounting are asked where their rounding, which grows with the steps, is below delta / 100, for few kinds of steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from choral.audits.budgets.budgets import TOLERANCE, ledger_of, owners_of, unit_of
from choral.audits.budgets.phases import Phase, phases_of
from choral.audits.findings.schema import Check, Verdict
from choral.audits.findings.text import at_least, cost, power
from choral.errors import ConfigError

if TYPE_CHECKING:
    from choral.privacy import Ledger
    from choral.privacy.accounting.events import RecordEvent
    from choral.trainers.run_folder.run import Run

AGREE = 1e-3  # relative, of two programs on one grid, or for one Gaussian
ROUNDING = 1e-4  # of epsilon, near zero


class Accountants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ledger's cost at ``delta`` by each accountant; None where one does not apply.

    pld: ours. dp_accounting: its own PLD code, or its Renyi code where there is a private search. prv_low, prv_high:
    the bracket by privacy random variables, in Opacus' code; the bounds above are not below it. rdp: Renyi DP; for a
    client-level ledger with integer noise, the bound that is claimed. floor: for a client-level ledger, the exact cost
    of continuous Gaussian noise of the same size, below which no bound may be. steps: noisy steps. head: SHA-256 of the
    ledger's last line, which vouches for all of them: hold it against one that was kept elsewhere.
    """

    holder: str
    delta: float
    steps: int
    head: str
    pld: float | None = None
    dp_accounting: float | None = None
    prv_low: float | None = None
    prv_high: float | None = None
    rdp: float | None = None
    floor: float | None = None
    verdict: Verdict
    finding: str
    phases: tuple[Phase, ...] = ()


def accountants_of(run: Run) -> tuple[Accountants, ...]:
    """One row per ledger that is there; empty for a run without privacy.

    Raises: LedgerError if a ledger is damaged, edited or of another data owner.
    """
    rows = []
    for name in owners_of(run):
        ledger = ledger_of(run, name)
        if ledger is None:
            continue
        claimed = run.info.spent.get(name)
        delta = claimed.delta if claimed else float((run.info.privacy or {})["delta"])
        judge = _of_clients if unit_of(run) == "client" else _of_records
        rows.append(msgspec.structs.replace(judge(name, ledger, delta), phases=phases_of(ledger)))
    return tuple(rows)


def _of_records(name: str, ledger: Ledger, delta: float) -> Accountants:
    from choral.privacy.accounting import other_accountants, record_level
    from choral.privacy.accounting.events import Search
    from choral.privacy.errors import AccountingError

    events, relation = ledger.events, ledger.neighbours
    row = Accountants(
        holder=name,
        delta=delta,
        steps=sum(event.steps for event in events),
        head=ledger.head,
        verdict="holds",
        finding="",
    )
    try:
        row = msgspec.structs.replace(row, rdp=record_level.epsilon_rdp(events, delta, neighbours=relation))
        ours = record_level.epsilon(events, delta, neighbours=relation)
        if any(isinstance(event, Search) for event in events):
            row = msgspec.structs.replace(row, dp_accounting=_by_dp_accounting(events, delta, relation))
            verdict, finding = _searches_agree(ours, row.dp_accounting)
            return msgspec.structs.replace(row, verdict=verdict, finding=finding)
        lower, upper = record_level.bounds(events, delta, neighbours=relation)
        row = msgspec.structs.replace(row, pld=ours)
        if other_accountants.trusts_others(events, delta):
            bracket = _by_prv(events, delta, relation)
            low, high = bracket or (None, None)
            theirs = _by_dp_accounting(events, delta, relation)
            row = msgspec.structs.replace(row, prv_low=low, prv_high=high, dp_accounting=theirs)
            if bracket:
                other_accountants.check_by_prv((lower, min(upper, ours)), bracket, delta)
    except AccountingError as error:
        return msgspec.structs.replace(row, verdict="unverified", finding=f"the accountants disagree: {error}")
    except ConfigError as error:
        return msgspec.structs.replace(row, verdict="unverified", finding=f"no accountant takes this ledger: {error}")
    same = other_accountants.epsilon_on_grid_of_others(events, delta, neighbours=relation)
    if row.dp_accounting is not None and same is not None and not row.dp_accounting <= same * (1 + AGREE) + ROUNDING:
        finding = f"on one grid, dp-accounting says ε = {row.dp_accounting:.6g} and our code {same:.6g}"
        return msgspec.structs.replace(row, verdict="unverified", finding=finding)
    verdict, finding = _agreement(row, lower)
    return msgspec.structs.replace(row, verdict=verdict, finding=finding)


def _by_dp_accounting(events: Sequence[RecordEvent], delta: float, relation: str) -> float | None:
    """None where it has no bound, or takes too long."""
    from choral.privacy.accounting import other_accountants
    from choral.privacy.accounting.events import REPLACE_ONE, Search, relation_of
    from choral.privacy.errors import AccountingError

    if relation_of(relation) == REPLACE_ONE and any(isinstance(event, Search) for event in events):
        return None
    try:
        return other_accountants.epsilon_by_dp_accounting(events, delta, neighbours=relation)
    except AccountingError:
        return None


def _by_prv(events: Sequence[RecordEvent], delta: float, relation: str) -> tuple[float, float] | None:
    """None where it has no bound, or takes too long."""
    from choral.privacy.accounting import other_accountants
    from choral.privacy.accounting.events import REPLACE_ONE, relation_of
    from choral.privacy.errors import AccountingError

    if relation_of(relation) == REPLACE_ONE:
        return None
    try:
        return other_accountants.epsilon_by_prv(events, delta)
    except AccountingError:
        return None


def _searches_agree(ours: float, theirs: float | None) -> tuple[Verdict, str]:
    if theirs is None:
        return "holds", "a private search has a Renyi bound alone, above the cost of one try by PLD"
    if not (math.isfinite(theirs) and abs(ours - theirs) <= TOLERANCE * theirs + ROUNDING):
        return "unverified", f"two computations of a search's Renyi bound say ε = {ours:.6g} and {theirs:.6g}"
    return "holds", "a private search has a Renyi bound alone; dp-accounting computes the same"


def _agreement(row: Accountants, lower: float) -> tuple[Verdict, str]:
    """Every upper bound against the greatest lower one, ours or PRV's: one that is looser than another is no fault."""
    floor = max(lower, row.prv_low or 0.0)
    for name, bound in (("PLD", row.pld), ("dp-accounting", row.dp_accounting), ("Renyi DP", row.rdp)):
        if bound is not None and not bound >= floor * (1 - TOLERANCE) - ROUNDING:
            return "unverified", f"{name}, an upper bound, says ε = {bound:.6g}, below the lower bound {floor:.6g}"
    ours, rdp = row.pld or 0.0, row.rdp or 0.0
    parts = [f"PLD is at most {power(max(ours - lower, 0.0))} above the cost"]
    if row.dp_accounting is not None:
        parts.append(f"dp-accounting differs by {power(abs(ours - row.dp_accounting))}")
    if row.prv_low is not None and row.prv_high is not None:
        parts.append(f"PRV brackets it by {at_least(row.prv_low)} and {cost(row.prv_high)}")
    return "holds", "; ".join([*parts, f"Renyi DP is {max(rdp - ours, 0.0):.2g} above"])


def _of_clients(name: str, ledger: Ledger, delta: float) -> Accountants:
    """There is one bound for integer noise; what can be held against it is the continuous noise below it."""
    from choral.privacy.accounting import client_level, other_accountants
    from choral.privacy.errors import AccountingError

    try:
        events = client_level.settled(ledger.releases)
        bound = client_level.epsilon(events, delta)
    except AccountingError as error:
        return Accountants(
            holder=name, delta=delta, steps=len(ledger.releases), head=ledger.head, verdict="unverified",
            finding=str(error),
        )  # fmt: skip
    gaussian = client_level.as_record_events(events)
    floor = other_accountants.epsilon_by_dp_accounting(gaussian, delta, 1e-4)
    exact = all(event.mechanism == "gaussian" for event in events)
    near = abs(bound - floor) <= AGREE * floor + ROUNDING if exact else bound >= floor * (1 - AGREE) - ROUNDING
    sound = near and math.isfinite(floor)  # within a share of what is infinite everything would lie
    above = f"{bound / floor - 1:.1%}" if floor > 0.0 else f"ε = {bound:.2g}"
    finding = f"the bound is {above} above continuous Gaussian noise of the same size (dp-accounting)"
    if not sound:
        finding = f"the bound, ε = {bound:.6g}, does not fit continuous Gaussian noise of the same size, {floor:.6g}"
    return Accountants(
        holder=name,
        delta=delta,
        steps=sum(event.steps for event in events),
        head=ledger.head,
        pld=bound if exact else None,
        rdp=None if exact else bound,
        floor=floor,
        verdict="holds" if sound else "unverified",
        finding=finding,
    )


def accountants_check(rows: Sequence[Accountants]) -> list[Check]:
    """Whether the accountants agree on every ledger; nothing where there is none."""
    if not rows:
        return []
    name = "Several accountants agree on every ledger"
    if faulty := [row for row in rows if row.verdict != "holds"]:
        finding = "; ".join(f"{row.holder}: {row.finding}" for row in faulty[:3])
        return [Check(name=name, verdict="unverified", finding=f"{finding}.")]
    widest = max(rows, key=lambda row: row.pld or row.rdp or 0.0)
    return [
        Check(name=name, verdict="holds", finding=f"{len(rows)} of {len(rows)}; {widest.holder}: {widest.finding}.")
    ]
