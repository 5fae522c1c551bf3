"""Going on from a checkpoint: what an optimizer's state says of the budget, held against the ledger.

The ledger alone says what was spent; a checkpoint says only how the rest was planned. So a forged or stale one cannot
spend more: the plan is accounted for again on top of the ledger as it is.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from choral.privacy.accounting.events import PoissonSampledGaussian, ReleasePlan
from choral.privacy.errors import BudgetExceededError, LedgerError, PrivacyError
from choral.privacy.ledgers.ledger import Ledger
from choral.privacy.ledgers.plans import RemainingBudget


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the training was when its optimizer's state was saved."""

    max_grad_norm: float  # adaptive clipping has moved it
    noise_multiplier: float
    sample_rate: float
    steps: int  # of a pass
    passes_left: int  # planned and not begun
    events: int  # of the ledger
    head: str  # of the ledger: vouches for all of them


def checkpoint_of(entry: Any) -> Checkpoint:
    """Return the entry "privacy" of an optimizer's state. Raises: PrivacyError."""
    try:
        found = msgspec.convert(entry, Checkpoint)
    except msgspec.ValidationError as error:
        raise PrivacyError(f"the optimizer's state has a damaged entry: privacy: {error}") from error
    norm, noise = found.max_grad_norm, found.noise_multiplier
    if not (1e-30 <= norm <= 1e30 and math.isfinite(noise) and noise > 0.0 and found.passes_left >= 0):
        raise PrivacyError("the optimizer's state has a damaged entry: privacy: a number is out of range")
    return found


def passes_left(found: Checkpoint, ledger: Ledger) -> int:
    """Return how many passes are still to come; those begun since the checkpoint are paid for and gone.

    Raises: LedgerError unless the ledger is the checkpoint's, or has gone on from there.
    """
    events = ledger.events
    if len(events) < found.events or ledger.head_after(found.events) != found.head:
        raise LedgerError(
            f"the checkpoint was made with a ledger of {found.events} events, which this one, of {len(events)}, does "
            "not go on from",
            hint="Put back the ledger file that belongs to the checkpoint; one in memory ends with its process.",
        )
    return max(found.passes_left - (len(events) - found.events), 0)


def affordable(event: PoissonSampledGaussian, passes: int, remaining: RemainingBudget) -> ReleasePlan | None:
    """Return the plan to announce for so many more passes of `event`; None if they are left of the latest plan.

    Raises: BudgetExceededError if they are too much on top of what the ledger holds.
    """
    if passes == 0 or any(part.covers(event) and left >= passes for part, left in remaining.unfinished()):
        return None
    plan = remaining.plan(event, passes)
    try:
        remaining.check(plan.whole)
    except BudgetExceededError as error:
        raise BudgetExceededError(
            f"{passes} more passes as the checkpoint planned them: {error}",
            hint="Somebody else has spent from this ledger, or the promise was larger. Leave the checkpoint's entry "
            "'privacy' out: the noise is then calibrated for what is left.",
        ) from error
    return plan
