"""The loss of a batch against those of its parts, where one of them is infinite: nothing finite is near infinity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from choral.privacy.errors import UnsupportedModelError
from choral.privacy.record_independence import collation, separable_loss
from choral.privacy.record_independence.batch_mixing import CheckedForward


def subject(loss: Any, rows: int) -> CheckedForward:
    x = torch.arange(float(2 * rows)).reshape(rows, 2)
    return CheckedForward(model=nn.Linear(2, 1), layers={}, forward=loss, args=(x,), kwargs={}, rows=rows, step=True)


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_a_loss_that_is_infinite_for_a_record_alone_is_no_mean(rows: int) -> None:
    """It divides by how far the batch reaches: of two records, every part is one record, and infinite."""
    with pytest.raises(UnsupportedModelError, match="not the mean over its records"):
        separable_loss._refuse_by_losses(subject(lambda x: 1.0 / (x[:, 0].max() - x[:, 0].min()), rows))
    assert separable_loss._refuse_by_losses(subject(lambda x: x[:, 0].square().mean(), rows))


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, math.inf])
def test_a_loss_that_is_the_same_for_all_neither_passes_nor_fails(value: float) -> None:
    """It could not have differed: nothing was seen, and the loss is looked at again."""
    assert separable_loss._refuse_by_losses(subject(lambda x: torch.tensor(value), 3)) is False


def of_model(weight: Any) -> CheckedForward:
    """A random loss: each record's output times weight(its row), and noise that is the same for all."""
    model = nn.Linear(2, 1)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (model(x)[:, 0] * weight(x)).mean() + torch.rand(())

    x = torch.arange(8.0).reshape(4, 2)
    return CheckedForward(model=model, layers={"": model}, forward=loss, args=(x,), kwargs={}, rows=4, step=True)


def test_a_random_loss_is_judged_by_the_gradients_of_its_parts() -> None:
    honest, mixing = of_model(lambda x: x[:, 0] + 1.0), of_model(lambda x: x[:, 0] / x[:, 0].sum())
    assert separable_loss._refuse_by_losses(honest) is None
    separable_loss._refuse_by_shares(honest)
    separable_loss._refuse_by_shares(of_model(lambda x: 0.0 * x[:, 0]))
    with pytest.raises(UnsupportedModelError, match="not the mean over its records"):
        separable_loss._refuse_by_shares(mixing)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (1.0, 1.0 + 1e-6, True),
        (1.0, 1.0 + 1e-4, False),
        (0.0, 1e-8, True),
        (math.inf, math.inf, True),
        (math.nan, math.nan, True),
        (math.inf, 1.0, False),
        (1.0, math.inf, False),
        (math.inf, -math.inf, False),
        (math.nan, 1.0, False),
    ],
)
def test_a_number_of_a_batch_is_the_same_up_to_rounding(a: float, b: float, same: bool) -> None:
    assert collation._equal(a, b) is same
