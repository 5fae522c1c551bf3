"""Noise in shares, for a report's first words: its worst case, and what the noise that was there would cost.

The promise is the worst case: as few honest survivors as a sum may be opened over. Where more survived there was more
noise, and what that would cost holds **only if who drops out does not depend on what was released**: it stands beside
the promise with that condition, and nowhere else. In two trips nobody confirms who survived: no more are counted there
than are in a sum for certain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from choral.audits.budgets.budgets import ledger_of, owners_of, unit_of
from choral.audits.budgets.participation import sure_survivors
from choral.audits.findings.schema import SharesTrust

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run


def shares_trust(runs: Sequence[Run]) -> SharesTrust | None:
    """Of an arm's runs; None where noise is not in shares."""
    promise = runs[0].info.privacy or {}
    if unit_of(runs[0]) != "record" or promise.get("noise") != "distributed":
        return None
    fewest, colluders = int(promise.get("min_survivors", 0)), int(promise.get("colluders", 0))
    realised = [_realised(run, fewest - colluders, colluders) for run in runs]
    known = [cost for cost in realised if cost is not None]
    return SharesTrust(
        honest=fewest - colluders,
        colluders=colluders,
        min_survivors=fewest,
        secure_sum=str((runs[0].info.secure_sum or {}).get("name", "")),
        realised=max(known) if len(known) == len(runs) else None,
    )


def _realised(run: Run, honest: int, colluders: int) -> float | None:
    """What the steps on the ledger cost with as many shares as survived; None without a ledger of such steps, and of
    no others: whose shares those of another job were, this run does not know.

    A round says who was left at its end: no fewer were at its earlier steps. Steps of no round are as promised.
    """
    from choral.privacy import LedgerError
    from choral.privacy.accounting import record_level
    from choral.privacy.accounting.events import PoissonSampledShares

    try:
        ledger = ledger_of(run, next(iter(owners_of(run))))
    except LedgerError:
        return None  # it is damaged, which is found where ledgers are looked at
    if ledger is None:
        return None
    events = ledger.events
    if not events or not isinstance(first := events[0], PoissonSampledShares):
        return None
    if any(msgspec.structs.replace(event, steps=first.steps) != first for event in events):
        return None
    each, total = int((run.info.algorithm or {}).get("steps_per_round", 1)), sum(event.steps for event in events)
    shares: Counter[int] = Counter()
    for entry in run.history:
        if entry.round and not entry.failed:
            shares[max(sure_survivors(run, entry.survivors) - colluders, honest)] += each
    shares[honest] += max(total - shares.total(), 0)
    counted = [msgspec.structs.replace(first, honest=n, steps=steps) for n, steps in shares.items() if steps]
    return record_level.epsilon(counted, float((run.info.privacy or {})["delta"]), neighbours=ledger.neighbours)
