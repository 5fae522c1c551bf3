"""What a ledger says was spent: every release on it composed, and what is guaranteed beyond that."""

from __future__ import annotations

from choral.privacy.accounting import client_level, record_level
from choral.privacy.accounting.events import CLIENT_NEIGHBOURS, CLIENT_UNIT, stated
from choral.privacy.ledgers.ledger import Ledger
from choral.privacy.ledgers.plans import guarantee
from choral.privacy.ledgers.spent import Spent, group_pair


def spent_on(ledger: Ledger, delta: float) -> Spent:
    """Return what a ledger says was spent by whatever it counts for. Raises: LedgerError, AccountingError."""
    return spent_by_clients(ledger, delta) if ledger.unit == CLIENT_UNIT else spent_by_records(ledger, delta)


def spent_by_records(ledger: Ledger, delta: float, records_per_person: int | None = None) -> Spent:
    """Return what a ledger of records says they have spent, at `delta`. Raises: LedgerError, AccountingError."""
    events = ledger.events
    epsilon = record_level.epsilon(events, delta, neighbours=ledger.neighbours)
    guaranteed = guarantee(ledger)
    one = max(epsilon, guaranteed or 0.0)
    person = (None, None) if records_per_person is None else group_pair(one, delta, records_per_person)
    return Spent(
        epsilon=epsilon,
        delta=delta,
        neighbours=stated(ledger.neighbours),
        accountant=record_level.accountant_of(events),
        steps=sum(e.steps for e in events),
        noise_multiplier=events[-1].noise_multiplier if events else 0.0,
        sample_rate=events[-1].sample_rate if events else 0.0,
        guarantee=guaranteed,
        records_per_person=records_per_person,
        person_epsilon=person[0],
        person_delta=person[1],
    )


def spent_by_clients(ledger: Ledger, delta: float) -> Spent:
    """Return what a ledger of clients says they have spent, at `delta`. Raises: LedgerError, AccountingError."""
    releases = client_level.settled(ledger.releases)
    return Spent(
        epsilon=client_level.epsilon(releases, delta),
        delta=delta,
        unit=CLIENT_UNIT,
        neighbours=CLIENT_NEIGHBOURS,
        accountant=client_level.accountant_of(releases),
        steps=sum(release.steps for release in releases),
        noise_multiplier=releases[-1].noise_multiplier if releases else 0.0,
        sample_rate=getattr(releases[-1], "sample_rate", 1.0) if releases else 0.0,
        guarantee=guarantee(ledger),
    )
