"""What releases cost: epsilon at a delta, of records' releases. Imports no torch.

Every number here is for the Poisson-sampled Gaussian mechanism (:class:`PoissonSampledGaussian`) or the matrix
mechanism (:class:`CorrelatedGaussian`, which is one Gaussian mechanism), and an adversary who sees every noisy sum but
neither the noise nor who was sampled. Two neighbour relations: *zero out one record* (dp-accounting's REPLACE_SPECIAL,
of the same cost as its ADD_OR_REMOVE_ONE), and *replace one record* (its REPLACE_ONE;
:mod:`choral.privacy.accounting.replace_one`).

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

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from numbers import Real

import dp_accounting
import numpy as np
import numpy.typing as npt
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp import RdpAccountant, rdp_privacy_accountant

from choral.errors import ConfigError
from choral.privacy.accounting import pld, replace_one
from choral.privacy.accounting.events import (
    NEIGHBOURS,
    REPLACE_ONE,
    BaseEvent,
    CorrelatedGaussian,
    PoissonSampledShares,
    Priced,
    RecordEvent,
    Search,
    as_gaussians,
    replaces,
)
from choral.privacy.accounting.plain_numbers import as_float
from choral.privacy.errors import AccountingError

ACCOUNTANT = f"PLD, cross-checked by RDP and dp-accounting {version('dp-accounting')}"
SEARCH_ACCOUNTANT = (
    f"Renyi DP with private selection (Papernot and Steinke 2022), dp-accounting {version('dp-accounting')}; "
    "PLD does not apply to a search"
)

SMALLEST_RATE, SMALLEST_NOISE, LARGEST_NOISE, MOST_STEPS = 1e-9, 1e-2, 1e6, 2**24  # what is accounted for

GRIDS = tuple(10.0**-place for place in range(2, 10))  # discretisations of the privacy loss, nested
_MOST_PARTS = 256  # unlike steps that are told apart
RENYI_ORDERS = _ALL_ORDERS = tuple(rdp_privacy_accountant.DEFAULT_RDP_ORDERS)
_FEW_ORDERS = tuple(float(order) for order in (*range(2, 65), 128, 256))
_ROUNDING = 1e-4  # of epsilon: two right answers near zero may differ by this much, by discretisation

_LEAST_WHOLE, _MOST_WHOLE = 1e-6, 1e9  # noise multipliers of one Gaussian whose exact epsilon double precision holds
_POINTS_OF_OTHERS = 1 << 19
_PARTS_OF_OTHERS = 16  # unlike steps; each takes seconds

Merged = tuple[tuple[float, float, int], ...]


def epsilon(events: Iterable[RecordEvent], delta: float, *, neighbours: str = NEIGHBOURS) -> float:
    """Return the epsilon at `delta` of all `events` together, by PLD, checked against RDP.

    Guarantee: an upper bound; the releases are (epsilon, delta)-DP for these neighbours.
    Raises: ConfigError (delta), AccountingError (the accountants disagree).
    """
    (known, delta), replace = _priced(events, delta), replaces(neighbours)
    if any(isinstance(event, Search) for event in known):
        return _epsilon_with_search(known, delta, replace)
    merged = merge(without_search(known))
    return checked_epsilon(merged, delta, replace) if merged else 0.0


def bounds(
    events: Iterable[RecordEvent], delta: float, *, neighbours: str = NEIGHBOURS, about: float | None = None
) -> tuple[float, float]:
    """Return a lower and an upper bound on the epsilon at `delta` of all `events`: for audits.

    Both are rigorous (:mod:`choral.privacy.accounting.pld`), rounding included; they come from grids that are refined
    until they are within 0.2 % or 0.001, or, where `about` is given, until that does not lie between them; or until
    memory ends. An epsilon below the lower one is refuted; one below the upper is not.
    Raises: ConfigError (delta; an event out of range; a private search among the events).
    """
    (known, delta), replace = _priced(events, delta), replaces(neighbours)
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
    known, delta = _priced(events, delta)
    for event in known:
        merge(event.tries if isinstance(event, Search) else (event,))  # refuses what is out of range
    return _by_renyi(known, delta, _ALL_ORDERS, replaces(neighbours)) if known else 0.0


def epsilon_by_dp_accounting(
    events: Iterable[RecordEvent], delta: float, grid: float = 1e-3, *, neighbours: str = NEIGHBOURS
) -> float:
    """Return the same as :func:`epsilon`, an upper bound, by dp-accounting's own PLD code: for audits.

    grid: discretisation of the privacy loss; a finer one is tighter and slower.
    Where a private search is among the events, by its Renyi accountant, since PLD does not apply.
    Where the grid would need too many points, a coarser one is taken, whose bound is looser.
    Raises: ConfigError (delta; a private search where one record is replaced, for which dp-accounting has no bound),
    AccountingError (too many unlike steps).
    """
    (known, delta), replace = _priced(events, delta), replaces(neighbours)
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
    known, delta = _priced(events, delta)
    merged = merge(without_search(known))
    if not merged:
        return 0.0, 0.0
    _refuse_many(merged)
    from choral.privacy.accounting.prv import bracket

    return bracket(merged, delta)


def epsilon_on_grid_of_others(
    events: Iterable[RecordEvent], delta: float, grid: float = 1e-3, *, neighbours: str = NEIGHBOURS
) -> float | None:
    """Return our upper bound on the grid that :func:`epsilon_by_dp_accounting` takes; None if that is too fine for us.

    Raises: ConfigError (delta; a private search among the events).
    """
    (known, delta), replace = _priced(events, delta), replaces(neighbours)
    merged = merge(without_search(known))
    wanted = _grid_of_others(merged, grid, replace)
    found = discretised(merged, delta, wanted, replace)
    return found.upper if found.grid == wanted else None


def trusts_others(events: Iterable[RecordEvent], delta: float) -> bool:
    """Whether the rounding of accountants that raise a plain FFT to the number of steps stays below delta / 100.

    It does at a million steps from delta 1e-7 up. Ours (:mod:`choral.privacy.accounting.pld`) tilts first.
    """
    return sum(event.steps for event in events) * 1e-15 <= 1e-2 * delta


def check_by_prv(by_pld: tuple[float, float], bracket: tuple[float, float], delta: float) -> None:
    """Raise AccountingError if the bounds of PLD (:func:`bounds`) and PRV (:func:`epsilon_by_prv`) exclude each other.

    An upper bound above another upper bound refutes nothing; one below a lower bound does.
    """
    (lower, upper), (low, high) = by_pld, bracket
    if upper < low - _ROUNDING or lower > high * (1.0 + 1e-5) + _ROUNDING:
        raise AccountingError(
            f"PLD says epsilon is in [{lower:.6g}, {upper:.6g}], outside the bracket [{low:.6g}, {high:.6g}] of PRV"
            f" at delta={delta:g}",
            hint="Please report this with the sample rate, noise multiplier and steps; do not trust either number.",
        )


def check_target(epsilon: float, delta: float) -> None:
    """Raise ConfigError unless 0 < epsilon < infinity and 0 < delta < 1."""
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if isinstance(value, bool | int) or not isinstance(value, Real):  # an int may be too large for a float
            as_float(name, value)
    if not (math.isfinite(epsilon) and epsilon > 0.0):
        raise ConfigError(f"epsilon is {epsilon}, expected a finite number > 0", hint="Values from 1 to 8 are usual.")
    _check_delta(delta)


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ConfigError(
            f"delta is {delta}, expected 0 < delta < 1", hint="Choose delta below 1/n for n records, such as 1e-5."
        )
    if delta < pld.SMALLEST_DELTA:
        raise ConfigError(
            f"delta is {delta:g}, expected at least {pld.SMALLEST_DELTA:g}: double precision cannot account for less",
            hint="1e-10 is far below 1/n for any dataset there is.",
        )


def _priced(events: Iterable[RecordEvent], delta: float) -> tuple[tuple[Priced, ...], float]:
    """What is priced, and at which delta. Raises: ConfigError (delta; too many failures of shares for it)."""
    _check_delta(delta)
    known, left = as_gaussians(events, delta)
    if left < pld.SMALLEST_DELTA:
        raise ConfigError(f"delta is {delta:g}, and the failures of secure sums use up all of it but {left:g}")
    return known, left


def without_search(events: Iterable[Priced]) -> tuple[BaseEvent, ...]:
    """The events as they are. Raises: ConfigError if one is a private search, which has a Renyi bound alone."""
    known = tuple(events)
    plain = tuple(event for event in known if not isinstance(event, Search))
    if len(plain) != len(known):
        raise ConfigError(
            "a private search has a bound by Renyi DP alone", hint="Use epsilon() or epsilon_rdp() for this ledger."
        )
    return plain


def _by_renyi(events: Sequence[Priced], delta: float, orders: tuple[float, ...], replace: bool) -> float:
    """Epsilon by Renyi DP of events with searches among them: curves add, a search has that of its theorem."""
    total = np.zeros(len(orders))
    for event in events:
        parts = merge(event.tries if isinstance(event, Search) else (event,))
        curve = sum((t * _rdp_of_one_step(q, s, orders, replace) for q, s, t in parts), np.zeros(len(orders)))
        total += best_of(event, orders, curve) if isinstance(event, Search) else curve
    with _quiet():
        return float(rdp_privacy_accountant.compute_epsilon(orders, total, delta)[0])


def renyi(
    event: BaseEvent | PoissonSampledShares, orders: Sequence[float], *, neighbours: str = NEIGHBOURS
) -> npt.NDArray[np.float64]:
    """Return an upper bound on the Renyi divergence of each order > 1 between neighbours, in both directions.

    Of all steps of `event`, shape (orders,); infinite where no bound is known.
    """
    kept, replace = tuple(map(float, orders)), replaces(neighbours)
    parts = merge(without_search(as_gaussians((event,), 1.0)[0]))
    return np.asarray(sum((t * _rdp_of_one_step(q, s, kept, replace) for q, s, t in parts), np.zeros(len(kept))))


def best_of(search: Search, orders: Sequence[float], curve: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the Renyi divergences of `search` from those of one try at `orders` > 1, both of shape (orders,).

    Papernot and Steinke 2022, theorem 2 (truncated negative binomial number of tries) and theorem 6 (Poisson). The
    curve must bound both directions of the neighbour relation.
    """
    lam = np.asarray(orders, dtype=np.float64)
    own = curve + math.log(search.mean) / (lam - 1.0)
    if search.distribution == "poisson":
        hats = np.log1p(1.0 / (lam - 1.0))
        deltas = [rdp_privacy_accountant.compute_delta(orders, curve, float(hat))[0] for hat in hats]
        bound = own + search.mean * np.asarray(deltas)
    else:
        at_hat = (1.0 - 1.0 / lam) * curve - math.log(search.gamma) / lam  # any order may stand in for lambda hat
        bound = own + (1.0 + search.shape) * float(np.min(at_hat))
    return np.minimum.accumulate(bound[::-1])[::-1]  # divergences grow with the order


def _epsilon_with_search(events: Sequence[Priced], delta: float, replace: bool) -> float:
    bound = _by_renyi(events, delta, _ALL_ORDERS, replace)
    # Whatever a search may cost, it costs no less than one of its tries: another method, from below.
    once = [part for event in events for part in (event.tries if isinstance(event, Search) else (event,))]
    floor = checked_epsilon(merge(once), delta, replace)
    if bound * (1.0 + 1e-5) + _ROUNDING < floor:
        raise AccountingError(
            f"Renyi DP says epsilon={bound:.6g} for a search, below the {floor:.6g} of one try at delta={delta:g}",
            hint="Please report this with the ledger; do not trust either number.",
        )
    return bound


def merge(events: Iterable[BaseEvent]) -> Merged:
    totals: dict[tuple[float, float], int] = {}
    correlated = 0.0
    for event in events:
        if isinstance(event, CorrelatedGaussian):
            correlated += event.noise_multiplier**-2  # Gaussian mechanisms compose to one: precisions add
            continue
        key = (event.sample_rate, event.noise_multiplier)
        totals[key] = totals.get(key, 0) + event.steps
    if correlated:
        key = (1.0, correlated**-0.5)
        totals[key] = totals.get(key, 0) + 1
    _check_range(totals)
    return _told_apart(totals)


def _check_range(totals: Mapping[tuple[float, float], int]) -> None:
    """Raise ConfigError for what is not accounted for: before anything is computed."""
    for rate, noise in totals:
        if rate < SMALLEST_RATE:
            raise ConfigError(
                f"sample_rate is {rate:g}, expected {SMALLEST_RATE:g} <= sample_rate <= 1 for the accountant",
                hint="Take larger batches.",
            )
        if not SMALLEST_NOISE <= noise <= LARGEST_NOISE and rate < 1.0:
            raise ConfigError(
                f"noise_multiplier is {noise:g}, expected {SMALLEST_NOISE:g} to {LARGEST_NOISE:g} for the accountant",
                hint="Below that nothing is hidden; above it nothing is learned.",
            )
    steps = sum(count for (rate, _), count in totals.items() if rate < 1.0)
    if steps > MOST_STEPS:
        raise ConfigError(
            f"there are {steps} sampled steps, expected at most {MOST_STEPS} for the accountant",
            hint="Train fewer steps of larger batches.",
        )
    whole = {noise: count for (rate, noise), count in totals.items() if rate == 1.0}
    least = min((noise / math.sqrt(count) for noise, count in whole.items()), default=_LEAST_WHOLE)
    if not (least >= _LEAST_WHOLE and max(whole, default=0.0) <= _MOST_WHOLE):
        raise ConfigError(
            f"steps of full batches have noise multipliers {min(whole):g} to {max(whole):g}, expected that of each"
            f" kind over the root of its number to be {_LEAST_WHOLE:g} to {_MOST_WHOLE:g} for the accountant"
        )


def _told_apart(totals: Mapping[tuple[float, float], int]) -> Merged:
    """The steps in order; where too many are unlike, nearly alike ones are counted as the worst of them.

    Less noise costs more, since noise may be added to what is released, and so does a larger rate q: the pair of q' < q
    is a mixture of q's and of one that tells nothing.
    """
    step = 1e-3
    parts = totals
    while len(parts) > _MOST_PARTS:
        grown: dict[tuple[float, float], int] = {}
        worst: dict[tuple[int, int], tuple[float, float]] = {}
        for rate, noise in totals:
            cell = (math.floor(math.log(rate) / step), math.floor(math.log(noise) / step))
            most, least = worst.get(cell, (rate, noise))
            worst[cell] = (max(most, rate), min(least, noise))
        for (rate, noise), count in totals.items():
            key = worst[math.floor(math.log(rate) / step), math.floor(math.log(noise) / step)]
            grown[key] = grown.get(key, 0) + count
        parts, step = grown, 2.0 * step
    return tuple(sorted((rate, noise, steps) for (rate, noise), steps in parts.items()))


@lru_cache(maxsize=4096)
def checked_epsilon(merged: Merged, delta: float, replace: bool) -> float:
    by_pld, _ = settled_on_grid(merged, delta, replace)
    by_rdp = _rdp(merged, delta, _FEW_ORDERS, replace)
    if by_pld.lower > by_rdp * (1.0 + 1e-5) + _ROUNDING:
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
    if all(rate == 1.0 for rate, _, _ in merged):  # exact: Balle and Wang 2018, theorem 8
        precision = math.fsum(steps / noise**2 for _, noise, steps in merged)
        distance = 2.0 if replace else 1.0  # of a record from its replacement, or from zero
        exact = float(dp_accounting.get_epsilon_gaussian(precision**-0.5 / distance, delta))
        return pld.EpsilonBounds(exact * (1.0 - 1e-9), exact, grid)
    # T steps that take every record are exactly one Gaussian of noise / sqrt(T).
    return pld.bounds(_gaussians_as_one(merged), delta, grid, replace)


def _gaussians_as_one(merged: Merged) -> Merged:
    return tuple((q, s / math.sqrt(t), 1) if q == 1.0 else (q, s, t) for q, s, t in merged)


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
    if not abs(ours - theirs) <= 1e-3 * theirs + _ROUNDING:
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
    widest, spread = pld.extent(_gaussians_as_one(merged), replace)
    points = (widest * len(merged) + 40.0 * spread) / grid
    return grid * 2.0 ** max(math.ceil(math.log2(points / _POINTS_OF_OTHERS)), 0)


def _by_dp_accounting(merged: Merged, delta: float, grid: float, replace: bool) -> float:
    relation = NeighboringRelation.REPLACE_ONE if replace else NeighboringRelation.REPLACE_SPECIAL
    if all(rate == 1.0 for rate, _, _ in merged):
        return discretised(merged, delta, grid, replace).upper
    accountant = PLDAccountant(relation, _grid_of_others(merged, grid, replace))
    for rate, noise, steps in _gaussians_as_one(merged):
        accountant.compose(_dp_event(rate, noise), steps)
    return float(accountant.get_epsilon(delta))


def _searches_by_dp_accounting(events: Sequence[Priced], delta: float) -> float:
    accountant = RdpAccountant(_ALL_ORDERS)
    with _quiet():
        for event in events:
            parts = merge(event.tries if isinstance(event, Search) else (event,))
            steps = [dp_accounting.SelfComposedDpEvent(_dp_event(q, s), t) for q, s, t in parts]
            together = dp_accounting.ComposedDpEvent(steps)
            if isinstance(event, Search):
                shape = math.inf if event.distribution == "poisson" else event.shape
                together = dp_event.RepeatAndSelectDpEvent(together, event.mean, shape)
            accountant.compose(together)
    return float(accountant.get_epsilon(delta))


def _dp_event(rate: float, noise: float) -> dp_accounting.DpEvent:
    event = dp_accounting.GaussianDpEvent(noise)
    return event if rate == 1.0 else dp_accounting.PoissonSampledDpEvent(rate, event)


@lru_cache(maxsize=4096)
def _rdp(merged: Merged, delta: float, orders: tuple[float, ...], replace: bool) -> float:
    total = sum(steps * _rdp_of_one_step(rate, noise, orders, replace) for rate, noise, steps in merged)
    with _quiet():
        return float(rdp_privacy_accountant.compute_epsilon(orders, total, delta)[0])


@lru_cache(maxsize=512)
def _rdp_of_one_step(rate: float, noise: float, orders: tuple[float, ...], replace: bool) -> npt.NDArray[np.float64]:
    if replace:
        return replace_one.renyi(rate, noise, orders)
    accountant = RdpAccountant(orders)
    with _quiet():
        return np.asarray(accountant.compose(_dp_event(rate, noise)).rdp)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # RDP warns for every fractional order whose series does not converge and leaves that order out, which is sound; and
    # where a divergence of nearly nothing is rounded to a little less.
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in ("failed to converge", "Negative Renyi divergence"))

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
