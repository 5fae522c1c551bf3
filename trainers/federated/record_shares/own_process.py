"""Noise in shares at a party in a process of its own: what it is told is held against what it promised its records.

The plan comes with the training terms, which all parties sign. This party computes its cost anew
(:class:`~choral.privacy.SharesParty`), compares its public constants with the terms, and joins only a sum whose own
policy, not the server's word, demands the survivors and withstands the colluders that the noise is sized for.

Every step is computed on equally many rows, plan.rows, of which those that no record fills repeat one with weight
zero: whoever sees when a process answers does not learn from it how many records it drew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from choral.errors import ConfigError
from choral.privacy import ClientPrivacy, Ledger, Privacy, PrivacyError, SharesPlan, refuse_weak_sum
from choral.privacy.record_shares.terms import SECURE_SUM_FAILURE
from choral.protocols.driver import PartyDriver
from choral.protocols.masking.parameters import colluding
from choral.protocols.masking.policy import Policy
from choral.trainers.federated.record_shares.checks import check_algorithm, in_shares
from choral.trainers.local_steps.batch_gradients import ShareSteps

if TYPE_CHECKING:
    from choral.trainers.federated.terms.training_terms import TrainingTerms
    from choral.trainers.local_steps.resident_model import Resident


def own_plan(
    resident: Resident, name: str, privacy: Privacy | ClientPrivacy | None, ledger: Ledger | None, terms: TrainingTerms
) -> SharesPlan | None:
    """The plan in the terms, of which the resident trainer then makes the steps; None for a promise of another kind.

    Raises: ConfigError for no plan, or one of other constants than the terms; PrivacyError for one that breaks the
    promise; BudgetExceededError, LedgerError.
    """
    if not in_shares(privacy) or ledger is None:
        return None
    if (plan := terms.shares) is None:
        raise ConfigError(
            'noise="distributed" without a plan in the training terms',
            hint="TrainingTerms(shares=plan_shares(privacy, SharesTerms(...))), the same at all parties",
        )
    federation = terms.federation
    check_algorithm(terms.algorithm)
    batch_size, steps = terms.algorithm.share_steps(federation.examples)
    agreed = {
        "records": federation.examples,
        "parties": federation.parties,
        "most_records": federation.largest,
        "length": resident.length,
        "batch_size": batch_size,
        "steps": terms.rounds * steps,
        "failure": SECURE_SUM_FAILURE,
    }
    for key, value in agreed.items():
        if getattr(plan.terms, key) != value:
            raise ConfigError(
                f"the plan of the noise has {key} = {getattr(plan.terms, key)}, and the training terms {value}",
                hint="plan again, from the terms that the parties agreed on",
            )
    from choral.privacy import SharesParty  # which loads per-sample gradients

    resident.shares = {name: ShareSteps(SharesParty(privacy, plan, holder=name, ledger=ledger, padded=True))}
    return plan


def check_drivers(plan: SharesPlan | None, drivers: Mapping[str, PartyDriver]) -> None:
    """Of noise in shares: is each sum such a one that a vector with a share of the noise alone may go into it?

    Raises: PrivacyError where this party itself does not demand what the noise is sized for, or what delta counts on;
    ConfigError where it demands nothing: under a plain sum the server sees every vector.
    """
    if plan is None:
        return
    for driver in drivers.values():
        pinned, least, corrupt = demanded_of(driver)
        refuse_weak_sum(plan, parties=pinned, min_survivors=least, corrupt=corrupt)
        _refuse_likely_failure(plan, driver)


def _refuse_likely_failure(plan: SharesPlan, driver: PartyDriver) -> None:
    """A sparse graph of masks is taken from the server as soon as it fails no oftener than this party's policy says."""
    bits = driver.policy.security_bits  # type: ignore[attr-defined]
    if 2.0**-bits > plan.terms.failure:
        counted = -math.log2(plan.terms.failure)
        raise PrivacyError(
            f"this party joins sums that may fail with probability 2^-{bits}, and delta counts on 2^-{counted:g} each",
            hint=f"Set security_bits={math.ceil(counted)}, or more, in its own policy.",
        )


def demanded_of(driver: PartyDriver) -> tuple[int, int, int]:
    """By a party's own policy of its sum: how many parties there are, the fewest in a sum, how many may collude.

    Raises: ConfigError where it has none.
    """
    policy = getattr(driver, "policy", None)
    if not isinstance(policy, Policy):
        raise ConfigError(
            f"{type(driver).__name__} has no policy that this party holds the server to, and a party in a process"
            " of its own adds a share of the noise only where it has",
            hint="use Masked(...), or Homomorphic(...) with its split key",
        )
    pinned = policy.pinned
    corrupt = colluding(policy.corrupt, pinned, pinned, "everyone")
    return pinned, max(policy.minimum_cohort, corrupt + 2), corrupt  # which a masked setup is always held to
