"""An attack on a whole training by sampled batches: below the promised epsilon, and it catches what is wrong.

Neighbours: one record is in the data or is not. Each of the `RECORDS` records has a gradient of norm far above C along
a coordinate of its own, so its coordinate of every release is its being sampled (0 or 1) plus noise, independent of all
others: one training through `PrivacyEngine.wrap`, with its loader, sampler, clipping and noise, is that many trials
with the record, and the coordinates that no record has are as many without it. The adversary sees every release, knows
the sample rate and the noise, and makes the likelihood-ratio test, at thresholds fixed beforehand.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from choral.privacy import Ledger, Privacy
from choral.privacy.accounting import record_level
from choral.privacy.dpsgd import poisson_loader, private_optimizer
from choral.privacy.dpsgd.engine import PrivacyEngine

RECORDS, RATE, PASSES = 2500, 0.2, 4
DELTA = 0.05  # at which the ledger's cost, 1.29, is held against what is found
# Found are 0.59 +- 0.06 as promised, 2.3 +- 0.16 with half the noise, 2.8 +- 0.15 at three times the rate: each is more
# than five deviations from what is promised. ALARM: the probability that an honest mechanism is accused, at any of the
# thresholds.
ALARM = 1e-6
THRESHOLDS = (0.0, 0.8, 2.0)  # of the logarithm of the likelihood ratio


class Directions(Dataset[torch.Tensor]):
    """Record i is 100 times the unit vector i of 2 * RECORDS."""

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, i: int) -> torch.Tensor:
        x = torch.zeros(2 * RECORDS)
        x[i] = 100.0
        return x


def training(ledger: Ledger) -> tuple[np.ndarray, float]:
    """All releases in clipping norms, shape (steps, 2 * RECORDS), and the noise multiplier that is promised."""
    engine = PrivacyEngine(Privacy(epsilon=4.0, delta=1e-4, epochs=PASSES), holder="a", ledger=ledger, passes=PASSES)
    model = nn.Linear(2 * RECORDS, 1, bias=False)
    private, optimizer, batches = engine.wrap(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        DataLoader(Directions(), batch_size=int(RATE * RECORDS), shuffle=True),
    )
    releases = []
    for _ in range(PASSES):
        for x in batches:
            optimizer.zero_grad()
            private(x).mean().backward()
            optimizer.step()
            assert model.weight.grad is not None
            releases.append(model.weight.grad[0].numpy() * RATE * RECORDS)
    return np.array(releases), float(optimizer.noise_multiplier)


@pytest.mark.parametrize("cheat", ["as promised", "half the noise", "three times the rate"])
def test_distinguisher(monkeypatch: pytest.MonkeyPatch, proved_epsilon: Callable[..., float], cheat: str) -> None:
    noise, sample = private_optimizer.grid_gaussian, poisson_loader.poisson_sample
    if cheat == "half the noise":
        monkeypatch.setattr(private_optimizer, "grid_gaussian", lambda *args: noise(*args) / 2)
    if cheat == "three times the rate":
        monkeypatch.setattr(poisson_loader, "poisson_sample", lambda size, rate, source: sample(size, 3 * rate, source))
    ledger = Ledger()
    releases, z = training(ledger)
    assert releases.shape == (PASSES / RATE, 2 * RECORDS)
    promised = record_level.epsilon(ledger.events, DELTA)
    assert 1.2 < promised < 1.4  # the figures above are for this
    statistic = np.log1p(RATE * np.expm1((releases - 0.5) / z**2)).sum(0)
    sides = statistic[:RECORDS], statistic[RECORDS:]
    found = proved_epsilon(*sides, THRESHOLDS, delta=DELTA, alarm=ALARM)
    assert (found > promised) == (cheat != "as promised"), (found, promised)
    if cheat == "as promised":
        assert found > 0.2 * promised  # the test is no weaker than it should be
