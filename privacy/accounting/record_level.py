"""What releases cost: epsilon at a delta, of records' releases. Imports no torch.

Every number here is for the Poisson-sampled Gaussian mechanism (:class:`PoissonSampledGaussian`; sums of shares,
:class:`PoissonSampledShares`, are priced as one, at delta less their failures) or the matrix mechanism
(:class:`CorrelatedGaussian`, which is one Gaussian mechanism), and an adversary who sees every noisy sum but neither
the noise nor who was sampled. Two neighbour relations: *zero out one record* (dp-accounting's REPLACE_SPECIAL,
of the same cost as its ADD_OR_REMOVE_ONE), and *replace one record* (its REPLACE_ONE;
:mod:`choral.privacy.loss_distributions.replace_one`).

Privacy loss distributions (PLD, pessimistic discretisation; Doroshenko et al. 2022, "Connect the Dots") give
the answer. dp-accounting's Renyi DP (Mironov, Talwar, Zhang 2019, with the conversion of Canonne, Kamath,
Steinke 2020) must not be below it, since it is the looser bound, and each calibration is compared with
dp-accounting's PLD. If they disagree, one is wrong and :class:`AccountingError` is raised.

>>> from choral.privacy.accounting.events import PoissonSampledGaussian
>>> event = PoissonSampledGaussian(sample_rate=0.01, noise_multiplier=4.0, steps=10_000)
>>> round(epsilon([event], 1e-5), 4)
0.947
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.metadata import version
from numbers import Real

from choral.errors import ConfigError
from choral.privacy.accounting.events import NEIGHBOURS, Priced, RecordEvent, Search, as_gaussians, replaces
from choral.privacy.accounting.merged_steps import Merged, gaussians_as_one, merge, without_search
from choral.privacy.accounting.plain_numbers import as_float
from choral.privacy.accounting.renyi import FEW_ORDERS, RENYI_ORDERS, by_renyi, rdp
from choral.privacy.errors import AccountingError
from choral.privacy.loss_distributions import pld

ACCOUNTANT = f"PLD, cross-checked by RDP and dp-accounting {version('dp-accounting')}"
SEARCH_ACCOUNTANT = (
    f"Renyi DP with private selection (Papernot and Steinke 2022), dp-accounting {version('dp-accounting')}; "
    "PLD does not apply to a search"
)

GRIDS = tuple(10.0**-place for place in range(2, 10))  # discretisations of the privacy loss, nested
ROUNDING = 1e-4  # of epsilon: two right answers near zero may differ by this much, by discretisation


def epsilon(events: Iterable[RecordEvent], delta: float, *, neighbours: str = NEIGHBOURS) -> float:
    """Return the epsilon at `delta` of all `events` together, by PLD, checked against RDP.

    Guarantee: an upper bound; the releases are (epsilon, delta)-DP for these neighbours.
    Raises: ConfigError (delta), AccountingError (the accountants disagree).
    """
    (known, delta), replace = priced(events, delta), replaces(neighbours)
    if any(isinstance(event, Search) for event in known):
        return _epsilon_with_search(known, delta, replace)
    merged = merge(without_search(known))
    return checked_epsilon(merged, delta, replace) if merged else 0.0


def bounds(
    events: Iterable[RecordEvent], delta: float, *, neighbours: str = NEIGHBOURS, about: float | None = None
) -> tuple[float, float]:
    """Return a lower and an upper bound on the epsilon at `delta` of all `events`: for audits.

    Both are rigorous (:mod:`choral.privacy.loss_distributions.pld`), rounding included; they come from grids that are
    refined until they are within 0.2 % or 0.001, or, where `about` is given, until that does not lie between them; or
    until memory ends. An epsilon below the lower one is refuted; one below the upper is not.
    Raises: ConfigError (delta; an event out of range; a private search among the events).
    """
    (known, delta), replace = priced(events, delta), replaces(neighbours)
    merged = merge(without_search(known))
    if not merged:
        return 0.0, 0.0
    lower, upper = 0.0, math.inf
    for grid in GRIDS[1:]:
        found = discretised(merged, delta, grid, replace)
        lower, upper = max(lower, found.lower), min(upper, found.upper)
        near = upper - lower <= max(2e-3 * upper, 1e-3) if about is None else not lower <= about < upper
        if found.grid > grid or near:
            break
    return lower, upper


def accountant_of(events: Iterable[RecordEvent]) -> str:
    """Return the method that :func:`epsilon` uses for these."""
    return SEARCH_ACCOUNTANT if any(isinstance(event, Search) for event in events) else ACCOUNTANT


def epsilon_rdp(events: Iterable[RecordEvent], delta: float, *, neighbours: str = NEIGHBOURS) -> float:
    """Return the epsilon at `delta` of all `events` together, by Renyi DP alone (an upper bound, looser than PLD)."""
    known, delta = priced(events, delta)
    for event in known:
        merge(event.tries if isinstance(event, Search) else (event,))  # refuses what is out of range
    return by_renyi(known, delta, RENYI_ORDERS, replaces(neighbours)) if known else 0.0


def check_target(epsilon: float, delta: float) -> None:
    """Raise ConfigError unless 0 < epsilon < infinity and 0 < delta < 1."""
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if isinstance(value, bool | int) or not isinstance(value, Real):  # an int may be too large for a float
            as_float(name, value)
    if not (math.isfinite(epsilon) and epsilon > 0.0):
        raise ConfigError(f"epsilon is {epsilon}, expected a finite number > 0", hint="Values from 1 to 8 are usual.")
    check_delta(delta)


def check_delta(delta: float) -> None:
    """Raise ConfigError unless delta is between 0 and 1, and not too small to account for."""
    if not 0.0 < delta < 1.0:
        raise ConfigError(
            f"delta is {delta}, expected 0 < delta < 1", hint="Choose delta below 1/n for n records, such as 1e-5."
        )
    if delta < pld.SMALLEST_DELTA:
        raise ConfigError(
            f"delta is {delta:g}, expected at least {pld.SMALLEST_DELTA:g}: double precision cannot account for less",
            hint="1e-10 is far below 1/n for any dataset there is.",
        )


def refuse_large_delta(delta: float, records: int, holder: str = "") -> None:
    """Raise ConfigError unless delta is below 1/n for the n records of the data owner `holder`, if one is named."""
    if delta >= 1.0 / records:
        whose = f"{holder}: " if holder else ""
        raise ConfigError(
            f"{whose}delta is {delta:g}, expected below 1/n = {1 / records:.3g} for {records} records",
            hint="At delta >= 1/n publishing a record outright would count as private.",
        )


def priced(events: Iterable[RecordEvent], delta: float) -> tuple[tuple[Priced, ...], float]:
    """Return what is priced, and at which delta. Raises: ConfigError (delta; too many failures of shares for it)."""
    check_delta(delta)
    known, left = as_gaussians(events, delta)
    if left < pld.SMALLEST_DELTA:
        raise ConfigError(f"delta is {delta:g}, and the failures of secure sums use up all of it but {left:g}")
    return known, left


def _epsilon_with_search(events: Sequence[Priced], delta: float, replace: bool) -> float:
    bound = by_renyi(events, delta, RENYI_ORDERS, replace)
    # Whatever a search may cost, it costs no less than one of its tries: another method, from below.
    once = [part for event in events for part in (event.tries if isinstance(event, Search) else (event,))]
    floor = checked_epsilon(merge(once), delta, replace)
    if bound * (1.0 + 1e-5) + ROUNDING < floor:
        raise AccountingError(
            f"Renyi DP says epsilon={bound:.6g} for a search, below the {floor:.6g} of one try at delta={delta:g}",
            hint="Please report this with the ledger; do not trust either number.",
        )
    return bound


@lru_cache(maxsize=4096)
def checked_epsilon(merged: Merged, delta: float, replace: bool) -> float:
    """Return the epsilon of steps by PLD. Raises: AccountingError unless Renyi DP is above it."""
    by_pld, _ = settled_on_grid(merged, delta, replace)
    by_rdp = rdp(merged, delta, FEW_ORDERS, replace)
    if by_pld.lower > by_rdp * (1.0 + 1e-5) + ROUNDING:
        raise AccountingError(
            f"PLD says epsilon>={by_pld.lower:.6g} but RDP, an upper bound, says {by_rdp:.6g} at delta={delta:g}",
            hint="Please report this with the sample rate, noise multiplier and steps; do not trust either number.",
        )
    return min(by_pld.upper, by_rdp)  # both are upper bounds; RDP is the lower where no grid fits the memory


def settled_on_grid(merged: Merged, delta: float, replace: bool) -> tuple[pld.EpsilonBounds, float]:
    """PLD on finer and finer grids until it settles: each value is an upper bound, a finer one is only tighter.

    Returns the bounds and the grid. The error of connecting the dots is of second order: when a ten times
    finer grid changed the value by half a percent, the next one would change it by about 0.005 %. The finer
    grids take seconds, so they are kept for changes of more than 3 %, and for sums that fit into memory on them.
    """
    found, grid = discretised(merged, delta, GRIDS[0], replace), GRIDS[0]
    for finer in GRIDS[1:]:
        if found.upper == 0.0 or found.grid > grid:
            break
        before, found, grid = found, discretised(merged, delta, finer, replace), finer
        if found.upper > before.upper:  # it did not fit, and a coarser one was taken
            found = before._replace(lower=max(before.lower, found.lower))
        if before.upper - found.upper <= (0.005 if grid > 1e-4 else 0.03) * found.upper:
            break
    return found, grid


@lru_cache(maxsize=4096)
def discretised(merged: Merged, delta: float, grid: float, replace: bool) -> pld.EpsilonBounds:
    """Return bounds on the epsilon of steps by PLD on this grid, or the finest coarser one that fits into memory."""
    if all(rate == 1.0 for rate, _, _ in merged):  # exact: Balle and Wang 2018, theorem 8
        precision = math.fsum(steps / noise**2 for _, noise, steps in merged)
        distance = 2.0 if replace else 1.0  # of a record from its replacement, or from zero
        from dp_accounting import get_epsilon_gaussian  # here: dp-accounting takes nearly as long to load as torch

        exact = float(get_epsilon_gaussian(precision**-0.5 / distance, delta))
        return pld.EpsilonBounds(exact * (1.0 - 1e-9), exact, grid)
    # T steps that take every record are exactly one Gaussian of noise / sqrt(T).
    return pld.bounds(gaussians_as_one(merged), delta, grid, replace)
