"""What fits a budget: solve for the noise, the cost, the steps or the batch size of a training. Imports no torch.

All for the Poisson-sampled Gaussian mechanism; the rest is as in :mod:`choral.privacy.accounting.record_level`.

>>> budget(epsilon=3.0, delta=1e-5, noise_multiplier=1.0, epochs=10).steps
439
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

import msgspec

from choral.doors import worded
from choral.errors import ConfigError
from choral.privacy.accounting import record_level, record_noise
from choral.privacy.accounting.events import NEIGHBOURS, UNIT, PoissonSampledGaussian, check_relation, replaces
from choral.privacy.accounting.merged_steps import MOST_STEPS, SMALLEST_RATE, merge
from choral.privacy.accounting.other_accountants import check_others
from choral.privacy.errors import AccountingError, BudgetExceededError

ACCOUNTANT = "PLD, cross-checked by RDP"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The answer of :func:`budget`: `steps` at `sample_rate` with `noise_multiplier` cost `epsilon` at `delta`.

    `epsilon` is the PLD value, the one to quote; `epsilon_rdp` the looser cross-check.
    """

    epsilon: float
    epsilon_rdp: float
    delta: float
    sample_rate: float
    steps: int
    noise_multiplier: float
    unit: str = UNIT
    neighbours: str = NEIGHBOURS
    accountant: str = ACCOUNTANT

    def __str__(self) -> str:
        """The answer in lines. Noise, rate and steps are what was priced, to the last digit; bounds are rounded up."""
        return (
            f"noise multiplier  {_four_decimals(self.noise_multiplier)}\n"
            f"epsilon           {at_least(self.epsilon)}  (PLD; RDP, the looser bound: {at_least(self.epsilon_rdp)})\n"
            f"delta             {shown(self.delta)}\n"
            f"steps             {self.steps} at sample rate {shown(self.sample_rate)}, Poisson sampling\n"
            f"unit              {self.unit}; neighbours: {self.neighbours}\n"
            f"accountant        {self.accountant}"
        )


def shown(value: float) -> str:
    """Return text that reads as this very number, with no more digits than that takes."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def _four_decimals(value: float) -> str:
    fixed = f"{value:.4f}"
    return fixed if float(fixed) == value else repr(float(value))


def at_least(value: float, digits: int = 4) -> str:
    """Return a number of so many digits, and four decimals, not below `value`: of noise, or an upper bound."""
    return _rounded(value, digits, ROUND_CEILING)


def at_most(value: float, digits: int = 4) -> str:
    """Return a number of so many digits, and four decimals, not above `value`: of a rate, or a lower bound."""
    return _rounded(value, digits, ROUND_FLOOR)


def _rounded(value: float, digits: int, way: str) -> str:
    if not math.isfinite(value) or value == 0.0:
        return f"{value:.4f}"
    exact = Decimal(repr(float(value)))
    last = Decimal(1).scaleb(-max(4, digits - 1 - exact.adjusted()))
    return f"{exact.quantize(last, ROUND_CEILING if way == ROUND_CEILING else ROUND_FLOOR, Context(prec=400)):f}"


def steps_within(
    epsilon: float, delta: float, sample_rate: float, noise_multiplier: float, *, neighbours: str = NEIGHBOURS
) -> int:
    """Return the largest number of releases that cost at most `epsilon` at `delta`; 0 if not even one fits.

    Raises: ConfigError (a number out of range).
    """
    record_level.check_target(epsilon, delta)
    one = PoissonSampledGaussian(sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=1)

    def fits(steps: int) -> bool:
        event = msgspec.structs.replace(one, steps=steps)
        return record_level.epsilon([event], delta, neighbours=neighbours) <= epsilon

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if high > 2**40:
            raise AccountingError(
                f"more than 2^39 steps fit into epsilon={epsilon}", hint="Check the sample rate and the noise."
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def sample_rate_within(
    epsilon: float,
    delta: float,
    noise_multiplier: float,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    neighbours: str = NEIGHBOURS,
) -> tuple[float, int]:
    """Return the largest sample rate whose training costs at most `epsilon`, and its number of steps.

    Give `steps`, or `epochs`: passes over the data, on average, of which a rate q takes ceil(epochs / q) steps. The
    batch size is the rate times the number of records. The rate is right to a relative 1e-6, and never too large.
    Raises: ConfigError (a number out of range, not one of the two), BudgetExceededError (no rate fits).
    """
    record_level.check_target(epsilon, delta)
    if (steps is None) == (epochs is None):
        raise ConfigError("expected exactly one of steps and epochs")

    def fits(rate: float, count: int) -> bool:
        event = PoissonSampledGaussian(sample_rate=rate, noise_multiplier=noise_multiplier, steps=count)
        return record_level.epsilon([event], delta, neighbours=neighbours) <= epsilon

    low, high = SMALLEST_RATE, 1.0
    if steps is None:
        passes = _check_epochs(epochs)
        steps = _fewest(lambda count: fits(passes / count, count), math.ceil(passes), epsilon)
        # One step fewer is too many records a step, and this many steps are one pass too many at that rate.
        low, high = passes / steps, min(1.0, passes / (steps - 1) if steps > 1 else 1.0)
    if fits(high, steps) and (epochs is None or high == 1.0):
        return high, steps
    if not fits(low, steps):
        raise _nothing_fits(epsilon, delta, noise_multiplier)
    while high > low * (1.0 + 1e-6):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle, steps) else (low, middle)
    return low, steps


def _fewest(fits: Callable[[int], bool], least: int, epsilon: float) -> int:
    """Return the smallest count from `least` that fits, given that more always do."""
    if fits(least):
        return least
    low, high = least, 2 * least
    while not fits(high):
        low, high = high, 2 * high
        if high > MOST_STEPS:
            raise BudgetExceededError(
                f"no sample rate fits these passes into epsilon={epsilon:g}, not even in {MOST_STEPS} steps",
                hint="Take more noise or fewer passes.",
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _check_epochs(epochs: float | None) -> float:
    if epochs is None or not (math.isfinite(epochs) and 0.0 < epochs <= MOST_STEPS):
        raise ConfigError(f"epochs is {epochs}, expected a number > 0 and at most {MOST_STEPS}")
    return float(epochs)


def _nothing_fits(epsilon: float, delta: float, noise: float) -> BudgetExceededError:
    return BudgetExceededError(
        f"with noise multiplier {noise:g} nothing fits into epsilon={epsilon:g} at delta={delta:g}",
        hint="Take more noise, or fewer steps.",
    )


def budget(
    *,
    delta: float,
    sample_rate: float | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    neighbours: str = NEIGHBOURS,
    check: bool = False,
) -> Budget:
    """Solve for the one that is not given of `epsilon`, `noise_multiplier`, `sample_rate` and `steps`.

    `epochs`, passes over the data, may stand in the place of `steps`: a sample rate q takes ceil(epochs / q) of them.
    The answer keeps the promise: the least noise, the most steps or the largest sample rate within `epsilon`, with
    few digits, rounded up (noise) or down (rate), so that what is printed may be typed in.
    check: also have dp-accounting compute it, which takes nearly as long to load as torch; every training does.
    Raises: ConfigError (not all but one given, or a number out of range), BudgetExceededError (nothing fits),
    AccountingError (it was checked, and the two disagree).
    """
    check_relation(neighbours)
    _check_one_unknown(epsilon, noise_multiplier, sample_rate, steps, epochs)
    rate_given = sample_rate is not None
    if sample_rate is None:
        sample_rate, steps = sample_rate_within(
            _number(epsilon), delta, _number(noise_multiplier), steps=steps, epochs=epochs, neighbours=neighbours
        )
    elif epochs is not None:
        PoissonSampledGaussian(sample_rate=sample_rate, noise_multiplier=1.0, steps=1)
        steps = math.ceil(_check_epochs(epochs) / sample_rate - 1e-9)
    elif steps is None:
        steps = steps_within(_number(epsilon), delta, sample_rate, _number(noise_multiplier), neighbours=neighbours)
        if steps == 0:
            raise _nothing_fits(_number(epsilon), delta, _number(noise_multiplier))
    count = int(_number(steps))
    if noise_multiplier is not None:
        noise = noise_multiplier
    else:
        noise = _least_noise(_number(epsilon), delta, sample_rate, count, neighbours)
    if not rate_given:
        sample_rate = _first(
            sample_rate, at_most, 6, lambda q: _cost(q, noise, count, delta, neighbours), _number(epsilon)
        )
    event = PoissonSampledGaussian(sample_rate=sample_rate, noise_multiplier=noise, steps=count)
    if check:
        check_others(merge((event,)), delta, replaces(neighbours))
    return Budget(
        epsilon=record_level.epsilon([event], delta, neighbours=neighbours),
        epsilon_rdp=record_level.epsilon_rdp([event], delta, neighbours=neighbours),
        delta=delta,
        sample_rate=sample_rate,
        steps=count,
        noise_multiplier=noise,
        neighbours=neighbours,
        accountant=record_level.ACCOUNTANT if check else ACCOUNTANT,
    )


def _least_noise(epsilon: float, delta: float, sample_rate: float, steps: int, neighbours: str) -> float:
    noise = record_noise.noise_multiplier(epsilon, delta, sample_rate, steps, neighbours=neighbours, others=False)
    return _first(noise, at_least, 5, lambda z: _cost(sample_rate, z, steps, delta, neighbours), epsilon)


def _check_one_unknown(
    epsilon: float | None,
    noise_multiplier: float | None,
    sample_rate: float | None,
    steps: int | None,
    epochs: float | None,
) -> None:
    """Raise ConfigError unless all but exactly one are given, and not both of steps and epochs."""
    given = [value is not None for value in (epsilon, noise_multiplier, sample_rate)]
    lengths = (steps is not None) + (epochs is not None)
    if lengths > 1 or sum(given) + lengths != 3:
        raise ConfigError(
            "expected all but exactly one of epsilon, noise_multiplier, sample_rate and steps (or epochs)",
            hint="Leave out "
            + worded(command="--noise-multiplier", python="noise_multiplier")
            + " to learn the noise, "
            + worded(command="--epsilon", python="epsilon")
            + " to learn the cost, and so on.",
        )


def _cost(rate: float, noise: float, steps: int, delta: float, neighbours: str) -> float:
    event = PoissonSampledGaussian(sample_rate=rate, noise_multiplier=noise, steps=steps)
    return record_level.epsilon([event], delta, neighbours=neighbours)


def _first(
    exact: float, rounded: Callable[[float, int], str], start: int, cost: Callable[[float], float], epsilon: float
) -> float:
    """Return the number of few digits nearest to `exact`, on the safe side, that keeps the promise; else of more.

    Costs are bounds that may settle on another grid from one number to the next, so each is tried.
    """
    for digits in (start, 8, 12):
        value = float(rounded(exact, digits))
        if value > 0.0 and cost(value) <= epsilon:
            return value
    return exact


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # not a number is refused by every check
