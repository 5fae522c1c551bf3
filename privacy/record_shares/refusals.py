"""What each party refuses for itself: a plan that breaks its own promise, and a sum that hides too little."""

from __future__ import annotations

from typing import TYPE_CHECKING

from choral.privacy.accounting import record_level
from choral.privacy.dpsgd.clip_settings import norm_of_all
from choral.privacy.errors import PrivacyError
from choral.privacy.record_shares.plan import BandedPlan, SharesPlan, bands_of, refuse_other_promise

if TYPE_CHECKING:
    from choral.privacy.dpsgd.engine import Privacy


def refuse_broken_promise(privacy: Privacy, plan: SharesPlan) -> None:
    """Raise PrivacyError unless `plan`, wherever it came from, keeps this party's own promise; ConfigError for another
    kind of promise, or a delta of 1/n and more.

    The plan is computed again, not believed: the noise of one party is far too little for one, and so it matters to
    each how many others add theirs.
    """
    refuse_other_promise(privacy)
    _refuse_other_noise(privacy, plan)
    record_level.refuse_large_delta(privacy.delta, plan.terms.records)
    hint = "The party's own settings decide; no server may weaken them."
    if plan.clip != norm_of_all(privacy.max_grad_norm):
        raise PrivacyError(
            f"the plan clips to {plan.clip:g}, and the promise to {norm_of_all(privacy.max_grad_norm):g}", hint=hint
        )
    if plan.colluders < privacy.colluders:
        raise PrivacyError(
            f"the plan withstands {plan.colluders} colluders, and {privacy.colluders} are promised", hint=hint
        )
    cost = plan.epsilon(privacy.delta, neighbours=privacy.neighbours)
    if not cost <= privacy.epsilon:
        raise PrivacyError(f"the plan costs epsilon {cost:.4g}, and {privacy.epsilon:g} is promised", hint=hint)


def _refuse_other_noise(privacy: Privacy, plan: SharesPlan) -> None:
    """Raise PrivacyError for correlated noise where independent noise is promised, or the other way round; or for other
    bands than are promised.
    """
    made = plan.coefficients if isinstance(plan, BandedPlan) else None
    promised = bands_of(privacy)
    if (made is None) != (promised is None):
        kinds = "batches that are drawn at random and independent noise", "fixed batches and correlated noise"
        raise PrivacyError(
            f"the plan is of {kinds[made is not None]}, and the promise of {kinds[promised is not None]}",
            hint="The party's own settings decide; no server may change them.",
        )
    if made is not None and promised and len(made) != promised:
        raise PrivacyError(
            f"the plan has {len(made)} bands, and {promised} are promised",
            hint="The party's own settings decide; no server may change them.",
        )


def refuse_weak_sum(plan: SharesPlan, *, parties: int, min_survivors: int, corrupt: int) -> None:
    """Raise PrivacyError unless a secure sum of these figures hides what the plan rests on: asked by each party.

    parties: in the sum. min_survivors: the fewest over which it may be opened. corrupt: parties that it withstands.
    """
    if parties > plan.terms.parties:
        raise PrivacyError(
            f"the sum is of {parties} parties, and the plan was made for {plan.terms.parties} at most",
            hint="The rounding, and the bound of a sum, were computed for those: plan again.",
        )
    needed = plan.honest + plan.colluders
    if min_survivors < needed:
        raise PrivacyError(
            f"the sum may be opened over {min_survivors} parties, and the noise is sized for {needed}: {plan.honest} "
            f"honest ones and {plan.colluders} colluders",
            hint=f"Set min_survivors={needed}, or plan for fewer survivors, with more noise. Nothing was sent.",
        )
    if corrupt < plan.colluders:
        raise PrivacyError(
            f"the sum withstands {corrupt} corrupt parties, and the noise {plan.colluders} colluders",
            hint=f"Set corrupt={plan.colluders}: parties that could open a single vector would see it nearly bare.",
        )
