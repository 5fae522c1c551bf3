"""What a filter costs against fixed parameters: noise of k equal plans, chosen one by one or all in advance.

For each budget and kind of training, one JSON line: `fixed` is the noise multiplier with which k plans, all fixed in
advance, cost epsilon by privacy loss distributions (for one plan, what the first training on a ledger gets); `filter`
is the one with which a ledger admits k of them, each chosen after the one before was seen. `more_noise` is the
quotient; `epsilon_as_fixed` what the k plans with the filter's noise cost by privacy loss distributions.

    python benchmarks/filters.py            # the table of docs/privacy.md; a minute on one core
    python benchmarks/filters.py --markdown
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from choral.privacy.accounting import record_level, record_noise
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.accounting.filters import PrivacyFilter

DELTA = 1e-5
EPSILONS = (1.0, 3.0, 8.0)
PLANS = (2, 10)
TRAININGS = {
    "q = 0.01, 1,000 steps": (0.01, 1_000),
    "q = 0.1, 100 steps": (0.1, 100),
    "all records, 10 steps": (1.0, 10),
}


def rows() -> Iterator[dict[str, Any]]:
    """Yield one row for each budget, number of plans and kind of training."""
    for epsilon in EPSILONS:
        for plans in PLANS:
            for name, (rate, steps) in TRAININGS.items():
                yield {"epsilon": epsilon, "delta": DELTA, "plans": plans, "each": name} | row(
                    epsilon, rate, steps * plans
                )


def row(epsilon: float, rate: float, steps: int) -> dict[str, Any]:
    """Return both noise multipliers for so many steps in all, and what the filter's would cost if fixed in advance."""
    rule = PrivacyFilter(epsilon, DELTA)

    def all_of_it(noise: float) -> list[PoissonSampledGaussian]:
        return [PoissonSampledGaussian(sample_rate=rate, noise_multiplier=noise, steps=steps)]

    fixed = record_noise.noise_multiplier(epsilon, DELTA, rate, steps, slack=1e-4)
    late = record_noise.least_noise(lambda noise: rule.cost(all_of_it(noise)), epsilon, slack=1e-4)
    return {
        "fixed": round(fixed, 4),
        "filter": round(late, 4),
        "more_noise": round(late / fixed, 3),
        "epsilon_as_fixed": round(record_level.epsilon(all_of_it(late), DELTA), 3),
        "orders": rule.orders,
    }


def markdown(found: list[dict[str, Any]]) -> str:
    """The rows as the table of the documentation."""
    lines = ["| epsilon | plans | " + " | ".join(TRAININGS) + " |", "|---" * (2 + len(TRAININGS)) + "|"]
    for epsilon in EPSILONS:
        for plans in PLANS:
            cells = [
                f"{one['fixed']:.3f} and {one['filter']:.3f} (x {one['more_noise']:.2f}; {one['epsilon_as_fixed']:.2f})"
                for one in found
                if (one["epsilon"], one["plans"]) == (epsilon, plans)
            ]
            lines.append(f"| {epsilon:g} | {plans} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--markdown" in sys.argv[1:]:
        print(markdown(list(rows())))
    else:
        for line in rows():
            print(json.dumps(line), flush=True)
