"""Other accountants' numbers for the same releases, and ours held against them: dp-accounting's PLD, and PRV.

For audits, and for each calibration. If two disagree, one is wrong, and :class:`AccountingError` is raised.
dp-accounting takes nearly as long to load as torch: it is imported where it is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from choral.errors import ConfigError
from choral.privacy.accounting.events import NEIGHBOURS, REPLACE_ONE, Priced, RecordEvent, Search, replaces
from choral.privacy.accounting.merged_steps import Merged, gaussians_as_one, merge, without_search
from choral.privacy.accounting.record_level import GRIDS, ROUNDING, discretised, priced
from choral.privacy.accounting.renyi import RENYI_ORDERS, dp_event_of, quiet
from choral.privacy.errors import AccountingError
from choral.privacy.loss_distributions import pld

_POINTS_OF_OTHERS = 1 << 19
_PARTS_OF_OTHERS = 16  # unlike steps; each takes seconds


def epsilon_by_dp_accounting(
    events: Iterable[RecordEvent], delta: float, grid: float = 1e-3, *, neighbours: str = NEIGHBOURS
) -> float:
    """Return an upper bound on the epsilon at `delta` of all `events`, by dp-accounting's own PLD code: for audits.

    grid: discretisation of the privacy loss; a finer one is tighter and slower.
    Where a private search is among the events, by its Renyi accountant, since PLD does not apply.
    Where the grid would need too many points, a coarser one is taken, whose bound is looser.
    Raises: ConfigError (delta; a private search where one record is replaced, for which dp-accounting has no bound),
    AccountingError (too many unlike steps).
    """
    (known, delta), replace = priced(events, delta), replaces(neighbours)
    if any(isinstance(event, Search) for event in known):
        if replace:
            raise ConfigError(f"dp-accounting has no bound for a private search where the neighbours {REPLACE_ONE}")
        return _searches_by_dp_accounting(known, delta)
    merged = merge(without_search(known))
    _refuse_many(merged)
    return _by_dp_accounting(merged, delta, grid, replace) if merged else 0.0


def epsilon_by_prv(events: Iterable[RecordEvent], delta: float) -> tuple[float, float]:
    """Return a lower and an upper bound on the epsilon at `delta`, by privacy random variables: for audits.

    Gopi, Lee, Wutschitz 2021, in Opacus' code, for *zero out* alone; the first call imports torch, about two seconds.
    Raises: ConfigError (delta; a private search among the events), AccountingError (no answer there).
    """
    known, delta = priced(events, delta)
    merged = merge(without_search(known))
    if not merged:
        return 0.0, 0.0
    _refuse_many(merged)
    from choral.privacy.loss_distributions.prv import bracket

    return bracket(merged, delta)


def epsilon_on_grid_of_others(
    events: Iterable[RecordEvent], delta: float, grid: float = 1e-3, *, neighbours: str = NEIGHBOURS
) -> float | None:
    """Return our upper bound on the grid that :func:`epsilon_by_dp_accounting` takes; None if that is too fine for us.

    Raises: ConfigError (delta; a private search among the events).
    """
    (known, delta), replace = priced(events, delta), replaces(neighbours)
    merged = merge(without_search(known))
    wanted = _grid_of_others(merged, grid, replace)
    found = discretised(merged, delta, wanted, replace)
    return found.upper if found.grid == wanted else None


def trusts_others(events: Iterable[RecordEvent], delta: float) -> bool:
    """Whether the rounding of accountants that raise a plain FFT to the number of steps stays below delta / 100.

    It does at a million steps from delta 1e-7 up. Ours (:mod:`choral.privacy.loss_distributions.pld`) tilts first.
    """
    return sum(event.steps for event in events) * 1e-15 <= 1e-2 * delta


def check_by_prv(by_pld: tuple[float, float], bracket: tuple[float, float], delta: float) -> None:
    """Raise AccountingError if our bounds of PLD, and those of PRV (:func:`epsilon_by_prv`), exclude each other.

    An upper bound above another upper bound refutes nothing; one below a lower bound does.
    """
    (lower, upper), (low, high) = by_pld, bracket
    if upper < low - ROUNDING or lower > high * (1.0 + 1e-5) + ROUNDING:
        raise AccountingError(
            f"PLD says epsilon is in [{lower:.6g}, {upper:.6g}], outside the bracket [{low:.6g}, {high:.6g}] of PRV"
            f" at delta={delta:g}",
            hint="Please report this with the sample rate, noise multiplier and steps; do not trust either number.",
        )


def check_others(merged: Merged, delta: float, replace: bool = False) -> None:
    """Raise AccountingError unless dp-accounting's PLD, on a coarse grid, says what ours says.

    Where its memory or its rounding, which grows with the steps, allow of an answer.
    """
    if (
        sum(steps for _, _, steps in merged) * 1e-15 > 1e-3 * delta
        or _grid_of_others(merged, GRIDS[0], replace) > GRIDS[0]
    ):
        return
    ours, theirs = (
        discretised(merged, delta, GRIDS[0], replace).upper,
        _by_dp_accounting(merged, delta, GRIDS[0], replace),
    )
    if not abs(ours - theirs) <= 1e-3 * theirs + ROUNDING:
        raise AccountingError(
            f"two computations of the same privacy loss distribution say {ours:.6g} and {theirs:.6g}",
            hint="Please report this with the sample rate, noise multiplier and steps; do not trust either number.",
        )


def _refuse_many(merged: Merged) -> None:
    if len(merged) > _PARTS_OF_OTHERS:
        raise AccountingError(
            f"{len(merged)} unlike kinds of steps are too many for another accountant, which takes {_PARTS_OF_OTHERS}",
            hint="Our own bounds, from above and below, still hold.",
        )


def _grid_of_others(merged: Merged, grid: float, replace: bool) -> float:
    """The grid, or the least coarser one, on which dp-accounting's distributions have a bounded number of points."""
    widest, spread = pld.extent(gaussians_as_one(merged), replace)
    points = (widest * len(merged) + 40.0 * spread) / grid
    return grid * 2.0 ** max(math.ceil(math.log2(points / _POINTS_OF_OTHERS)), 0)


def _by_dp_accounting(merged: Merged, delta: float, grid: float, replace: bool) -> float:
    if all(rate == 1.0 for rate, _, _ in merged):
        return discretised(merged, delta, grid, replace).upper
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.privacy_accountant import NeighboringRelation

    relation = NeighboringRelation.REPLACE_ONE if replace else NeighboringRelation.REPLACE_SPECIAL
    accountant = PLDAccountant(relation, _grid_of_others(merged, grid, replace))
    for rate, noise, steps in gaussians_as_one(merged):
        accountant.compose(dp_event_of(rate, noise), steps)
    return float(accountant.get_epsilon(delta))


def _searches_by_dp_accounting(events: Sequence[Priced], delta: float) -> float:
    from dp_accounting import ComposedDpEvent, SelfComposedDpEvent
    from dp_accounting.dp_event import RepeatAndSelectDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(RENYI_ORDERS)
    with quiet():
        for event in events:
            parts = merge(event.tries if isinstance(event, Search) else (event,))
            steps = [SelfComposedDpEvent(dp_event_of(q, s), t) for q, s, t in parts]
            together = ComposedDpEvent(steps)
            if isinstance(event, Search):
                shape = math.inf if event.distribution == "poisson" else event.shape
                together = RepeatAndSelectDpEvent(together, event.mean, shape)
            accountant.compose(together)
    return float(accountant.get_epsilon(delta))
