"""A release and the training after it, fixed together before either: one plan on the ledger, priced as one.

What is fixed in advance is priced by privacy loss distributions; a training that is planned after something was
released is priced by a filter, and has nearly twice the noise for it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader

from choral.errors import ConfigError
from choral.privacy.accounting import record_level
from choral.privacy.accounting.events import PlannedEvents, RecordEvent, ReleasePlan
from choral.privacy.dpsgd.engine import Privacy
from choral.privacy.dpsgd.poisson_loader import sizes_of
from choral.privacy.ledgers.ledger import Ledger
from choral.privacy.ledgers.plans import RemainingBudget


def joint_plan(
    privacy: Privacy, loader: DataLoader[Any], *, holder: str, ledger: Ledger, passes: int, beside: RecordEvent
) -> ReleasePlan:
    """Return the plan of `beside`, released once, and then of so many passes of DP-SGD over such a loader.

    Guarantee: all of it together keeps `privacy` on top of what the ledger holds. Whoever releases `beside` writes the
    plan in front of it; a :class:`~choral.privacy.PrivacyEngine` on the same ledger then goes on with the passes.
    Raises: ConfigError for a promise of a kind of its own, or one of noise in shares; UnsupportedLoaderError,
        BudgetExceededError, LedgerError.
    """
    if type(privacy) is not Privacy or privacy.noise != "local":
        raise ConfigError(
            f"a plan of something beside a training by {type(privacy).__name__}", hint="Privacy(...) with its own noise"
        )
    ledger.bind(holder, privacy.delta, neighbours=privacy.neighbours)
    records, batch_size = sizes_of(loader, holder)
    record_level.refuse_large_delta(privacy.delta, records, holder)
    steps = records // batch_size if loader.drop_last else math.ceil(records / batch_size)
    remaining = RemainingBudget.on(ledger, privacy.epsilon, privacy.delta)
    remaining = replace(remaining, beside=(PlannedEvents(event=beside, times=1),))
    plan = privacy.execution_plan(records, batch_size, steps, passes, remaining)
    return remaining.plan(plan.event, passes)
