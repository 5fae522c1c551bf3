"""One white-box run of digits at a true epsilon of 4 shows 2.5 and more in the median, and less than the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from choral.audits.attacks.gradient_canaries import GradientCanaries
from choral.audits.findings.evidence import ScoreAudit
from choral.errors import ConfigError
from choral.privacy import Privacy


def attacked(canaries: int, epochs: int) -> ScoreAudit:
    images, digits = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(images[:1438] / 16.0).float(), torch.tensor(digits[:1438])
    beside = GradientCanaries(nn.Linear(64, 10), inputs, labels, canaries=canaries)
    plain = torch.optim.SGD(beside.model.parameters(), lr=0.5)
    beside.watch(plain)
    privacy = Privacy(epsilon=4.0, delta=1e-5, epochs=epochs)
    model, optimizer, loader = privacy.wrap(beside.model, plain, DataLoader(beside.dataset, 256, shuffle=True))
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    found = beside.audit(privacy.spent(), batch_size=256)
    with torch.no_grad():
        right = (beside.model.model(inputs).argmax(dim=1) == labels).float().mean()
    assert right > 0.6  # it is trained on the digits all the same
    return found


def test_the_white_box_bound_stands_beside_the_one_that_decides() -> None:
    found = attacked(500, 4)
    assert found.decisive != "white-box separation"
    white = found.bounds[-1]
    assert white.method == "white-box separation"
    assert 0.8 < white.epsilon < 4.0
    assert white.epsilon > found.bounds[0].epsilon
    assert "normal" in white.assumptions[0]


@pytest.mark.slow
def test_one_run_of_digits_shows_two_and_a_half_in_the_median() -> None:
    found = [attacked(2000, 10).bounds[-1].epsilon for _ in range(7)]
    assert np.median(found) >= 2.5, found
    assert max(found) < 4.0


def test_what_was_not_watched_is_not_audited() -> None:
    beside = GradientCanaries(nn.Linear(4, 2), torch.zeros(30, 4), torch.zeros(30, dtype=torch.long), canaries=30)
    with pytest.raises(ConfigError, match="no step was watched"):
        beside.audit(Privacy(1.0, 1e-5).spent(), batch_size=10)
    with pytest.raises(ConfigError, match="canaries"):
        GradientCanaries(nn.Linear(4, 2), torch.zeros(30, 4), torch.zeros(29), canaries=30)
