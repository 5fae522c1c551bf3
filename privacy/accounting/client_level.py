"""What sums of client vectors with noise cost: Renyi DP of the distributed discrete Gaussian and of Skellam.

Unit: the client. Neighbour relation: *zero out one client*, whose vector is the zero vector in every round on one side
and anything of norm at most the clipping norm on the other; who takes part is public and the same on both sides.
Replacing one client's vector by another is two such steps: the same events cost at most what they would with half the
noise. Sampling clients does not amplify (q = 1) where whoever runs the rounds is to be held off, who knows who was
selected: it does where a trusted server keeps that secret (:class:`SampledClientRelease`).

- *Distributed discrete Gaussian* (Kairouz, Liu, Steinke 2021): the sum of n shares of N_Z(0, v) is no
  discrete Gaussian, but within tau of one, tau = 10 sum_{k=1}^{n-1} exp(-2 pi^2 v k / (k + 1)). One share has tau = 0.
- *Skellam* (Agarwal, Kairouz, Liu 2021, theorem 3.5): shares add up exactly; integer orders only.
- *Gaussian*, where the server adds the noise: the exact trade-off of Balle and Wang 2018, or its Renyi curve when it is
  composed with the others. With secret cohorts, the PLD of the Poisson-sampled Gaussian mechanism, as for records.

Both distributed bounds hold for integer vectors in any number of coordinates, whatever the rounding that made them
integer. Renyi curves add over rounds (Mironov 2017) and convert by Canonne, Kamath, Steinke 2020, proposition 12, in
dp-accounting's code. No bound may be below the continuous Gaussian with the same noise and sensitivity; if one is,
:class:`AccountingError` is raised.

>>> release = ClientRelease(
...     mechanism="discrete_gaussian", sensitivity_squared=10_000, share_variance=10_000.0, shares=100, length=1024)
>>> round(epsilon([release], 1e-5), 3)
0.375
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.metadata import version

import msgspec
import numpy as np
import numpy.typing as npt

from choral.privacy.accounting import record_level
from choral.privacy.accounting import renyi as record_renyi
from choral.privacy.accounting.events import ClientRelease, PoissonSampledGaussian, SampledClientRelease
from choral.privacy.errors import AccountingError

ACCOUNTANT = f"Renyi DP of integer noise, converted by dp-accounting {version('dp-accounting')}"
CENTRAL_ACCOUNTANT = "the exact Gaussian mechanism (Balle and Wang 2018)"
SAMPLED_ACCOUNTANT = "PLD of the Poisson-sampled Gaussian mechanism"

_ORDERS = (*range(2, 257), 320, 384, 512, 640, 768, 1024, 1536, 2048, 4096, 8192, 16384)
_BETWEEN = tuple(1.0 + 0.02 * 1.02**i for i in range(400))  # the discrete Gaussian and Gaussian have them too
_Floats = npt.NDArray[np.float64]


def epsilon(releases: Iterable[ClientRelease], delta: float) -> float:
    """Return the epsilon at `delta` of all `releases` together: an upper bound.

    Guarantee: the releases are (epsilon, delta)-DP for the unit and neighbours of this module.
    Raises: ConfigError (delta); AccountingError (a bound below the continuous Gaussian's; a release that settles
    nothing).
    """
    record_level.check_target(1.0, delta)
    events = settled(releases)
    if not events:
        return 0.0
    if all(event.mechanism == "gaussian" for event in events):
        return _continuous(events, delta)
    bound = _by_renyi(events, delta)
    floor = _continuous(events, delta)
    if bound < floor * (1.0 - 1e-6) - 1e-6:
        raise AccountingError(
            f"Renyi DP says epsilon={bound:.6g}, below the continuous Gaussian's {floor:.6g} at delta={delta:g}",
            hint="Please report this with the ledger; do not trust either number.",
        )
    return bound


def settled(releases: Iterable[ClientRelease]) -> tuple[ClientRelease, ...]:
    """The releases, each one that settles in the place of the one it settles; alike ones are counted together.

    Raises: AccountingError for one that settles nothing, or differs from what was paid for in anything but more shares.
    """
    effective: list[tuple[ClientRelease, bool]] = []
    for release in releases:
        if not release.settles:
            effective.append((release, False))
            continue
        paid, done = effective[-1] if effective else (None, True)
        plain = msgspec.structs.replace(release, settles=False)
        if paid is None or done or plain != msgspec.structs.replace(paid, shares=plain.shares):
            raise AccountingError("a release settles nothing that was paid for", hint="the ledger was edited")
        if plain.shares < paid.shares:
            raise AccountingError(
                f"a sum had {plain.shares} unknown noise shares, but {paid.shares} were paid for",
                hint="fewer than the minimum survived; such a sum must never be opened",
            )
        effective[-1] = (plain, True)
    counts: dict[ClientRelease, int] = {}
    for event, _ in effective:
        key = msgspec.structs.replace(event, steps=1)
        counts[key] = counts.get(key, 0) + event.steps
    return tuple(msgspec.structs.replace(event, steps=steps) for event, steps in counts.items())


def accountant_of(releases: Iterable[ClientRelease]) -> str:
    """The method that :func:`epsilon` uses for these."""
    releases = tuple(releases)
    exact = all(event.mechanism == "gaussian" for event in releases)
    if exact and any(isinstance(event, SampledClientRelease) for event in releases):
        return SAMPLED_ACCOUNTANT
    return CENTRAL_ACCOUNTANT if all(event.mechanism == "gaussian" for event in releases) else ACCOUNTANT


def renyi(release: ClientRelease, orders: Sequence[float]) -> _Floats:
    """Return an upper bound on the Renyi divergence of each order > 1 between neighbours, per step, shape (orders,).

    Infinite where no bound is known: Skellam at orders that are no integers.
    """
    if isinstance(release, SampledClientRelease):
        return np.asarray(record_renyi.renyi(_sampled(release, steps=1), orders))
    alpha = np.asarray(orders, dtype=np.float64)
    total = release.shares * release.share_variance
    squared = float(release.sensitivity_squared)
    gaussian = alpha * squared / (2.0 * total)
    if release.mechanism == "gaussian":
        return gaussian
    absolute = math.sqrt(squared) * min(math.sqrt(release.length), math.sqrt(squared))  # L1 norm of an integer vector
    if release.mechanism == "skellam":
        first = ((2.0 * alpha - 1.0) * squared + 6.0 * absolute) / (4.0 * total**2)
        return np.where(alpha == np.rint(alpha), gaussian + np.minimum(first, 3.0 * absolute / (2.0 * total)), np.inf)
    distance = tau(release.shares, release.share_variance)
    a, a1, d = math.sqrt(squared / total), absolute / math.sqrt(total), float(release.length)
    # The theorem's third bound has sqrt(d) a for a1, and is no less: an L1 norm is at most sqrt(d) times the L2 norm.
    grown = alpha / 2.0 * (a**2 + 2.0 * a1 * distance + distance**2 * d)
    return np.asarray(np.minimum(gaussian + distance * d, grown))


@lru_cache(maxsize=1024)
def tau(shares: int, variance: float) -> float:
    """How far a sum of `shares` discrete Gaussians is from one, in log probability (Kairouz et al. 2021)."""
    k = np.arange(1, shares, dtype=np.float64)
    return float(10.0 * np.exp(-2.0 * math.pi**2 * variance * k / (k + 1.0)).sum())


def _by_renyi(events: Sequence[ClientRelease], delta: float) -> float:
    from dp_accounting.rdp import rdp_privacy_accountant  # here, since it takes long to load

    orders = tuple(sorted({*_BETWEEN, *map(float, _ORDERS)}))
    total = sum((event.steps * renyi(event, orders) for event in events), np.zeros(len(orders)))
    finite = np.isfinite(total)
    kept = [order for order, good in zip(orders, finite, strict=True) if good]
    return float(rdp_privacy_accountant.compute_epsilon(kept, total[finite], delta)[0])


def _continuous(events: Sequence[ClientRelease], delta: float) -> float:
    """The cost of continuous Gaussians of the same noise and sensitivity: exact; by PLD where cohorts were secret."""
    return record_level.epsilon(as_record_events(events), delta)


def as_record_events(events: Sequence[ClientRelease]) -> tuple[PoissonSampledGaussian, ...]:
    """Continuous Gaussians of the same noise and sensitivity, those of everybody composed to a single one."""
    sampled = [event for event in events if isinstance(event, SampledClientRelease)]
    whole = [event for event in events if not isinstance(event, SampledClientRelease)]
    found = [_sampled(event, steps=event.steps) for event in sampled]
    if whole:
        precision = math.fsum(event.steps / event.noise_multiplier**2 for event in whole)
        found.append(PoissonSampledGaussian(sample_rate=1.0, noise_multiplier=precision**-0.5, steps=1))
    return tuple(found)


def _sampled(event: SampledClientRelease, *, steps: int) -> PoissonSampledGaussian:
    return PoissonSampledGaussian(sample_rate=event.sample_rate, noise_multiplier=event.noise_multiplier, steps=steps)
