"""What a sum decodes to when one party deviates within what the secure sum lets through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from flat_arguments import federate
from torch import nn
from torch.utils.data import DataLoader

from choral.privacy import EncodingError
from choral.protocols import Masked, Plain
from choral.trainers.algorithms import Scaffold
from choral.trainers.algorithms.interface import Channel
from choral.trainers.federated.codec import Encoding, WeightedCodec
from choral.trainers.local_steps.resident_model import initial_model
from choral.trainers.run_folder.algorithm_state import read_algorithm_state

NAMES = tuple(f"p{place}" for place in range(10))


def mean_of(weight: int, value: int, weighing: str = "examples") -> torch.Tensor:
    """Nine honest parties of 100 records and updates of .001; the tenth sends this weight and this integer."""
    channel = Channel(length=3, weighing=weighing)
    codec = WeightedCodec(channel, Encoding(value_bound=1.0, value_bits=16), cap=128, roster=NAMES)
    spec = replace(codec.spec, weight_bound=None)  # the tenth party does not look at its own weight
    session, honest = Masked(corrupt=1).open(spec), codec.party(100)
    summing = session.begin()
    for name in NAMES[:-1]:
        summing.submit(name, honest.encode(torch.full((3,), 0.001)).vector)
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


@pytest.mark.parametrize("secure_sum", [Plain(), Masked(min_survivors=2)], ids=repr)
def test_parties_that_count_alike_move_the_model_by_their_plain_mean(job, parties, secure_sum):
    """One full-batch step each from one start: the mean by hand, and another one where records count."""

    def build(dataset):
        model = nn.Linear(5, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=len(dataset))

    given = job(build=build, rounds=1)
    alike = federate(**given, secure_sum=secure_sum, weights="equal")
    counted = federate(**given, secure_sum=secure_sum)
    model = initial_model(build, parties["north"], 0)
    moved = []
    for dataset in parties.values():
        loss = nn.functional.cross_entropy(model(dataset.tensors[0]), dataset.tensors[1])
        moved.append(torch.autograd.grad(loss, model.weight)[0])
    expected = model.weight.detach() - 0.2 * torch.stack(moved).mean(0)
    torch.testing.assert_close(alike.state["weight"], expected, rtol=0, atol=1e-6)
    assert (counted.state["weight"] - expected).abs().max() > 1e-4
    assert (alike.info.weights, counted.info.weights) == ("equal", "examples")
    assert "counts alike" in alike.info.secure_sum["trust"]
    assert "counts alike" not in counted.info.secure_sum["trust"]
    assert alike.info.fixed_point["max_weight"] == 1


def test_variates_of_parties_that_count_alike_stay_their_plain_mean(job, tmp_path):
    federate(**job(rounds=3), algorithm=Scaffold(), weights="equal", out=tmp_path / "run")
    kept = read_algorithm_state(tmp_path / "run", 3)
    mean = torch.stack([state["variate"] for state in kept.parties.values()]).mean(0)
    torch.testing.assert_close(kept.server["control"], mean, rtol=0, atol=1e-6)
