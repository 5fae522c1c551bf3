"""An attack on neighbouring inputs: it must stay below the promised epsilon, and catch half the noise.

The adversary sees the noisy sum of one full-batch step with and without one record whose gradient has norm C, and
thresholds its projection on that gradient: the best possible test. Confidence 1 - 1e-6 for each error rate.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta
from torch import nn

from choral.privacy.accounting import record_level
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.noise.gaussian import os_stream
from choral.privacy.per_sample.model import with_per_sample_gradients

# At this size half the noise is caught, and the promised noise passes, with six standard deviations to spare on both
# error rates: a false alarm or a miss has probability below 1e-9.
TRIALS = 1500
DELTA = 0.1


def releases(rows: int, noise: float) -> np.ndarray:
    """The gradient on `rows` equal records, each at the clipping norm 1, projected on their direction."""
    model = nn.Linear(4, 1, bias=False)
    private = with_per_sample_gradients(model)
    private.compared.update(model.parameters())
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        private,
        noise_multiplier=noise,
        max_grad_norm=1.0,
        expected_batch_size=1,
        source=os_stream,
    )
    x = torch.full((rows, 4), 100.0)
    result = np.empty(TRIALS)
    for i in range(TRIALS):
        optimizer.expect(rows)
        private(x).mean().backward()
        optimizer.step()
        result[i] = float(model.weight.grad.sum()) / 2  # type: ignore[union-attr]
    return result


def lower_bound(without: np.ndarray, with_it: np.ndarray) -> float:
    """The largest epsilon that some threshold proves at confidence 1 - 1e-6 (Clopper-Pearson)."""
    best = 0.0
    for cut in np.linspace(-2, 4, 25):
        true = beta.ppf(5e-7, (with_it > cut).sum() or 1e-9, TRIALS - (with_it > cut).sum() + 1)
        false = beta.ppf(1 - 5e-7, (without > cut).sum() + 1, max(TRIALS - (without > cut).sum(), 1e-9))
        if true > DELTA and false > 0:
            best = max(best, math.log((true - DELTA) / false))
    return best


@pytest.mark.parametrize("cheat", [1.0, 0.5], ids=["as promised", "half the noise"])
def test_distinguisher(cheat: float) -> None:
    noise = 1.0
    promised = record_level.epsilon([PoissonSampledGaussian(sample_rate=1.0, noise_multiplier=noise, steps=1)], DELTA)
    found = lower_bound(releases(2, cheat * noise) - 2, releases(3, cheat * noise) - 2)
    assert (found > promised) == (cheat < 1.0), (found, promised)
