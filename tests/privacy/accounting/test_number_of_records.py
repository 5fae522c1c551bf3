"""Why the number of records is public: the noise of one released step tells it, whatever the records are.

Every record is zeros and every gradient zero, so a released step is noise alone. Its size was calibrated for the
sampling rate and the number of steps, and so for the number of records N. Over 10,000 coordinates its standard
deviation is known to 0.7 %, and between 20 and 21 records it differs by a tenth. So "add or remove one record" is a
relation under which no training of this kind is private: the first test refutes it. Under the relation that is claimed,
*zero out one record*, both datasets have the same N, and the same distinguisher has no advantage.

False alarms: ALARM bounds the probability that the distinguisher accuses two experiments that cannot be told apart. The
first test fails by chance only if a standard deviation errs by seven of its own deviations, in 120 tries: below 1e-9.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.audits import audit_scores
from choral.privacy import CorrelatedPrivacy, Ledger, Privacy, PrivacyEngine

pytestmark = pytest.mark.usefixtures("looked_at_once")

RUNS, BATCH, WIDTH, EPSILON, DELTA, ALARM = 60, 10, 5000, 1.0, 1e-5, 1e-6
EMPTY = torch.zeros(20, WIDTH)
ONE_MORE = torch.zeros(21, WIDTH)
ONE_RECORD = EMPTY.index_fill(0, torch.tensor([0]), 1.0)  # its gradient is far longer than C = 1


def deviations(records: torch.Tensor, promise: Privacy) -> tuple[np.ndarray, float]:
    """Standard deviation of the first released step of each of RUNS trainings, and what it is known to be."""
    found, expected = [], 0.0
    for _ in range(RUNS):
        model = nn.Linear(WIDTH, 2, bias=False)
        engine = PrivacyEngine(promise, holder="a", ledger=Ledger(), passes=1)
        private, optimizer, loader = engine.wrap(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            DataLoader(TensorDataset(records), batch_size=BATCH, shuffle=True),
        )
        for (x,) in loader:
            private(x).mean().backward()
            optimizer.step()
            break
        assert model.weight.grad is not None
        found.append(float(model.weight.grad.std()))
        assert engine.noise_multiplier is not None
        expected = engine.noise_multiplier / BATCH
    return np.array(found), expected


def test_the_noise_of_one_step_tells_twenty_records_from_twenty_one(proved_epsilon: Callable[..., float]) -> None:
    promise = Privacy(epsilon=EPSILON, delta=DELTA)
    (with_it, high), (without, low) = deviations(ONE_MORE, promise), deviations(EMPTY, promise)
    assert abs(high - low) > 0.1 * low
    sign = np.sign(high - low)
    scores, cut = sign * np.concatenate([with_it, without]), sign * (high + low) / 2
    assert (scores[:RUNS] > cut).all()
    assert (scores[RUNS:] <= cut).all()
    assert proved_epsilon(scores[:RUNS], scores[RUNS:], [cut], delta=DELTA, alarm=ALARM) > EPSILON
    found = audit_scores(
        scores, [1] * RUNS + [0] * RUNS, design="runs", delta=DELTA, claimed=EPSILON, guessing=float(cut)
    )
    assert found.finding == "violated"


@pytest.mark.parametrize("kind", [Privacy, CorrelatedPrivacy])
def test_a_record_against_an_empty_one_is_not_told_by_the_noise(
    kind: type[Privacy], proved_epsilon: Callable[..., float]
) -> None:
    promise = kind(epsilon=EPSILON, delta=DELTA)
    (with_it, high), (without, low) = deviations(ONE_RECORD, promise), deviations(EMPTY, promise)
    assert high == low
    cuts = [0.995 * low, low, 1.005 * low]  # a deviation errs by 0.7 %
    assert proved_epsilon(with_it, without, cuts, delta=DELTA, alarm=ALARM) == 0.0
    assert proved_epsilon(-with_it, -without, [-cut for cut in cuts], delta=DELTA, alarm=ALARM) == 0.0
