"""What a step of noise in shares takes, and what it tells: its time by the number of records drawn, padded and not.

First what a step takes beside the gradients: the masked sum of ten parties, all of them and the server in this process.
Then one party of 144 records of digits' size (64 features, 2,410 parameters), q = 64 / 1,437; the numbers drawn are
set, in turn. One JSON line for each: the median of the processor time of a step, and its standard error. Then what a
party's answers would cost if its counts were known, one draw of them for each size of a party, and the bits of a value.

    python benchmarks/noise_in_shares.py [--sum | --banded]  # figures of docs/noise-in-shares.md; a minute on one core
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.privacy import (
    BandedPlan,
    CorrelatedPrivacy,
    Ledger,
    PoissonSampledGaussian,
    Privacy,
    SharesParty,
    SharesPlan,
    SharesTerms,
    plan_shares,
)
from choral.privacy.accounting import record_level
from choral.privacy.accounting.matrix_strategies import Banded
from choral.privacy.record_shares import party as party_module
from choral.protocols import Masked, SumSpec

DELTA = 1e-5
DRAWN, STEPS, WARM = (0, 6, 20), 1500, 40


def plan_of(epsilon: float, steps: int) -> SharesPlan:
    """Ten parties, nine of which survive, one of which colludes."""
    terms = SharesTerms(
        records=1437, batch_size=64, steps=steps, parties=10, min_survivors=9, length=2410, most_records=144
    )
    return plan_shares(Privacy(epsilon, DELTA, noise="distributed"), terms)


def times(*, padded: bool) -> dict[str, Any]:
    """Return the median processor time of a step in milliseconds, and its error, by how many records were drawn."""
    data = TensorDataset(torch.randn(144, 64), torch.randint(0, 10, (144,)))
    party = SharesParty(
        Privacy(1.0, DELTA, noise="distributed"), plan_of(1.0, STEPS), holder="a", ledger=Ledger(), padded=padded
    )
    network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model, optimizer, loader = party.wrap(network, DataLoader(data))
    counts = np.random.default_rng(1).choice(DRAWN, size=STEPS)
    spent = np.empty(STEPS)
    for step, count in enumerate(counts):
        with mock.patch.object(party_module, "poisson_sample", lambda *_, n=count: np.arange(n)):
            begun = time.process_time()
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            party.take()
            spent[step] = 1e3 * (time.process_time() - begun)
    found = {}
    for n in DRAWN:
        sorted_times = np.sort(spent[WARM:][counts[WARM:] == n])[20:-20]
        error = 1.25 * sorted_times.std() / len(sorted_times) ** 0.5
        found[str(n)] = [round(float(np.median(sorted_times)), 3), round(float(error), 3)]
    return {"padded": padded, "milliseconds_by_drawn": found}


def epsilon_of_known_counts(records: int, steps: int) -> float:
    """Return what the steps cost a record of a party of so many, if it is known how many each step drew of them."""
    counts = np.random.default_rng(records).binomial(records, 64 / 1437, steps)
    noise = plan_of(1.0, steps).event.noise_multiplier
    events = [
        PoissonSampledGaussian(sample_rate=count / records, noise_multiplier=noise, steps=int(times))
        for count, times in zip(*np.unique(counts, return_counts=True), strict=True)
        if count
    ]
    return record_level.epsilon(events, DELTA)


def masked_sum(length: int, rounds: int = 60) -> dict[str, Any]:
    """Return the processor time of one sum of ten parties in milliseconds: least and median of `rounds`."""
    names = tuple(f"party-{place:02d}" for place in range(10))
    bound = plan_of(4.0, 300).bound
    session = Masked(corrupt=1, dropouts=1, min_survivors=9).open(SumSpec(parties=names, length=length, bound=bound))
    draws = np.random.default_rng(length)
    vectors = {name: draws.integers(-bound, bound, length, endpoint=True) for name in names}
    spent = []
    for number in range(rounds + 10):
        begun = time.process_time()
        summing = session.begin()
        for name in names:
            summing.submit(name, vectors[name])
        total = summing.finish().total
        if number >= 10:
            spent.append(1e3 * (time.process_time() - begun))
        if not np.array_equal(total, sum(vectors.values())):
            raise ArithmeticError("the sum is wrong")
    return {"length": length, "least": round(min(spent), 1), "median": round(float(np.median(spent)), 1)}


def banded() -> None:
    """Noise in the sum of steps with C of 1, 4 and up to 32 bands, over that of independent noise with secret draws."""

    def in_the_model(plan: SharesPlan) -> float:
        column = Banded(plan.coefficients if isinstance(plan, BandedPlan) else (1.0,))
        prefix = np.cumsum(column.inverse(plan.terms.steps))
        return plan.noise_multiplier * math.sqrt(float(np.cumsum(prefix**2).mean()))

    for records, batch, steps, parties in ((1437, 64, 460, 10), (10_000, 100, 100, 10), (60_000, 600, 1000, 100)):
        for epsilon in (1.0, 3.0, 8.0):
            terms = SharesTerms(
                records=records,
                batch_size=batch,
                steps=steps,
                parties=parties,
                min_survivors=parties * 9 // 10 + (parties == 100),
                length=2410,
                most_records=records // parties + 1,
            )
            drawn = plan_shares(Privacy(epsilon, DELTA, noise="distributed"), terms)
            line: dict[str, float] = {"records": records, "epsilon": epsilon, "bits": drawn.bits}
            for bands in (1, 4, None):
                promise = CorrelatedPrivacy(epsilon, DELTA, mechanism="banded", bands=bands, noise="distributed")
                fixed = plan_shares(promise, terms)
                line[f"bands {bands or 'up to 32'}"] = round(in_the_model(fixed) / in_the_model(drawn), 2)
                line[f"bits of {bands or 'up to 32'}"] = fixed.bits
            print(json.dumps(line), flush=True)


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sum", action="store_true", help="the masked sum alone")
    parser.add_argument("--banded", action="store_true", help="what correlated noise gains, alone")
    torch.set_num_threads(1)
    asked = parser.parse_args()
    sums_alone = asked.sum
    if asked.banded:
        banded()
        return
    for length in (2410, 10_000):
        print(json.dumps({"masked_sum_of_ten": masked_sum(length)}), flush=True)
    if sums_alone:
        return
    torch.manual_seed(0)
    for padded in (True, False):
        print(json.dumps(times(padded=padded)), flush=True)
    for records in (144, 50, 20, 5, 1):
        print(json.dumps({"records": records, "epsilon_if_counts_are_known": epsilon_of_known_counts(records, 300)}))
    for epsilon in (1.0, 2.0, 4.0, 8.0):
        plan = plan_of(epsilon, 300)
        print(json.dumps({"epsilon": epsilon, "bits": plan.bits, "rows": plan.rows, "share": plan.share}))


if __name__ == "__main__":
    main()
