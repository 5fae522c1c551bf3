"""What a sum decodes to when one party deviates within what the secure sum lets through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from choral.privacy import EncodingError
from choral.protocols import Masked
from choral.trainers.algorithms.interface import Channel
from choral.trainers.federated.codec import WeightedCodec

NAMES = tuple(f"p{place}" for place in range(10))


def mean_of(weight: int, value: int, weighing: str = "examples") -> torch.Tensor:
    """Nine honest parties of 100 records and updates of .001; the tenth sends this weight and this integer."""
    channel = Channel(length=3, weighing=weighing)
    codec = WeightedCodec(dict.fromkeys(NAMES, 100), channel, bound=1.0, value_bits=16, privacy_engines={})
    session = Masked(corrupt=1).open(codec.spec)
    summing = session.begin()
    for name in NAMES[:-1]:
        summing.submit(name, codec.encode(name, torch.full((3,), 0.001)))
    summing.submit(NAMES[-1], np.array([value] * 3 + [weight], np.int64))
    mean: torch.Tensor = codec.decode(summing.finish()).value
    return mean


@pytest.mark.parametrize("weight", [-900, -895, -891, 381, 4_000, 4_194_176])
def test_a_weight_that_so_many_survivors_cannot_have_is_refused(weight: int) -> None:
    """Ten parties weigh from 10 to 1280 together; the vector's own bound would let 4,194,176 through."""
    with pytest.raises(EncodingError, match=r"total weight is .*, expected 10 to 1280"):
        mean_of(weight, 0)


@pytest.mark.parametrize("weight", [1, 100, 128, 380])
def test_weights_that_survivors_can_have_are_taken(weight: int) -> None:
    assert float(mean_of(weight, 0).abs().max()) <= 0.00102


@pytest.mark.parametrize("weight", [0, 2, -8, 100])
def test_parties_that_weigh_alike_have_one_weight_in_all(weight: int) -> None:
    with pytest.raises(EncodingError, match="expected 10 to 10"):
        mean_of(weight, 0, weighing="parties")
    assert float(mean_of(1, 0, weighing="parties").abs().max()) <= 0.00102


def test_values_within_the_range_move_the_mean_as_the_guide_says() -> None:
    """What is left: one party of ten, within the bound, moves the mean by up to range x cap / total weight."""
    largest = 128 * (2**15 - 1)
    assert float(mean_of(128, largest).max()) == pytest.approx((0.9 + 128) / 1028, rel=1e-3)
    assert float(mean_of(-700, largest).max()) == pytest.approx((0.9 + 128) / 200, rel=1e-3)  # worse by its weight
