"""Renyi DP of records' releases: curves of divergences, which add up, and what a private search makes of them.

dp-accounting's curves of one step (Mironov, Talwar, Zhang 2019), and its conversion to epsilon (Canonne, Kamath,
Steinke 2020); ours where one record is replaced (:mod:`choral.privacy.loss_distributions.replace_one`).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from choral.privacy.accounting.events import (
    NEIGHBOURS,
    BaseEvent,
    PoissonSampledShares,
    Priced,
    Search,
    as_gaussians,
    replaces,
)
from choral.privacy.accounting.merged_steps import Merged, merge, without_search
from choral.privacy.loss_distributions import replace_one, sampled_renyi

if TYPE_CHECKING:
    import dp_accounting  # elsewhere where it is used: it takes nearly as long to load as torch

RENYI_ORDERS = (*(1 + tenth / 10.0 for tenth in range(1, 100)), *range(11, 64), 128, 256, 512, 1024)  # its own
FEW_ORDERS = tuple(float(order) for order in (*range(2, 65), 128, 256))


def by_renyi(events: Sequence[Priced], delta: float, orders: tuple[float, ...], replace: bool) -> float:
    """Return epsilon by Renyi DP of events with searches among them: curves add, a search has that of its theorem."""
    total = np.zeros(len(orders))
    for event in events:
        parts = merge(event.tries if isinstance(event, Search) else (event,))
        curve = sum((t * _rdp_of_one_step(q, s, orders, replace) for q, s, t in parts), np.zeros(len(orders)))
        total += best_of(event, orders, curve) if isinstance(event, Search) else curve
    return epsilon_of_curve(orders, total, delta)


def epsilon_of_curve(orders: Sequence[float], curve: npt.NDArray[np.float64], delta: float) -> float:
    """Return the epsilon at `delta` of Renyi divergences at `orders`, by dp-accounting's conversion."""
    return sampled_renyi.epsilon_of(orders, curve, delta)


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
        from dp_accounting.rdp import rdp_privacy_accountant

        hats = np.log1p(1.0 / (lam - 1.0))
        deltas = [rdp_privacy_accountant.compute_delta(orders, curve, float(hat))[0] for hat in hats]
        bound = own + search.mean * np.asarray(deltas)
    else:
        at_hat = (1.0 - 1.0 / lam) * curve - math.log(search.gamma) / lam  # any order may stand in for lambda hat
        bound = own + (1.0 + search.shape) * float(np.min(at_hat))
    return np.minimum.accumulate(bound[::-1])[::-1]  # divergences grow with the order


def dp_event_of(rate: float, noise: float) -> dp_accounting.DpEvent:
    """Return one step as an event of dp-accounting's."""
    import dp_accounting

    event = dp_accounting.GaussianDpEvent(noise)
    return event if rate == 1.0 else dp_accounting.PoissonSampledDpEvent(rate, event)


@lru_cache(maxsize=4096)
def rdp(merged: Merged, delta: float, orders: tuple[float, ...], replace: bool) -> float:
    """Return epsilon by Renyi DP of steps; an upper bound, whatever the orders."""
    total = sum(steps * _rdp_of_one_step(rate, noise, orders, replace) for rate, noise, steps in merged)
    return epsilon_of_curve(orders, np.asarray(total), delta)


@lru_cache(maxsize=512)
def _rdp_of_one_step(rate: float, noise: float, orders: tuple[float, ...], replace: bool) -> npt.NDArray[np.float64]:
    return replace_one.renyi(rate, noise, orders) if replace else sampled_renyi.divergences(rate, noise, orders)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out two warnings of dp-accounting's.

    It warns for every fractional order whose series does not converge and leaves that order out, which is sound; and
    where a divergence of nearly nothing is rounded to a little less.
    """
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in ("failed to converge", "Negative Renyi divergence"))

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
