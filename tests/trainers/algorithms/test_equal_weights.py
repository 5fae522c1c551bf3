"""``weights="equal"``: a party with five times the records counts for no more, by each algorithm that takes it.

South's nine records are given once, or five times over: the same mean loss, so that the next model is the same where
parties count alike, and another where records count. What is alike is the weight: a party that makes a step for each
record or batch goes further the more it has, so here all make one step, or as long a way in more of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flat_arguments import federate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.errors import ConfigError
from choral.trainers.algorithms import (
    DANE,
    FSVRG,
    GD,
    KINDS,
    Algorithm,
    CoCoA,
    FedAdam,
    FedAvg,
    FedNova,
    FedProx,
    FedSGD,
    FedYogi,
    Scaffold,
)

from .conftest import fit, loss

NORTH, SOUTH, TIMES = 12, 9, 5
ALIKE: list[Algorithm] = [
    FedAvg(),
    FedProx(mu=0.5),
    Scaffold(),
    FedAdam(tau=1.0),
    FedYogi(tau=1.0),
    FedNova(),
    GD(rate=0.5),
    DANE(mu=1.0, ridge=0.1),
    DANE(mu=1.0, ridge=0.1, mean="examples"),
    FSVRG(scaled=False, step=0.02),
    FSVRG(scaled=False, step=0.02, mean="parties"),
]
REFUSED: list[Algorithm] = [CoCoA(), FSVRG()]


def whole_batch(dataset: TensorDataset) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    model = nn.Linear(6, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.4), DataLoader(dataset, batch_size=len(dataset))


def trained(algorithm: Algorithm, weights: str, times: int, rounds: int = 2) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    north, south = (torch.randn(count, 6, generator=draw) for count in (NORTH, SOUTH))
    shift = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, 0.7])
    labels = {"north": (north @ shift > 0).long(), "south": (south @ shift < 0.3).long().repeat(times)}
    parties = {"north": north, "south": south.repeat(times, 1)}
    run = federate(
        build=whole_batch,
        fit=fit,
        loss=loss,
        evaluate=lambda model: 0.0,
        parties={name: TensorDataset(points, labels[name]) for name, points in parties.items()},
        rounds=rounds,
        algorithm=algorithm,
        weights=weights,
    )
    return torch.cat([tensor.reshape(-1) for tensor in run.state.values()])


def moves(of: Any) -> tuple[float, float]:
    """By how much the model is another with five times the records, in parts of its whole way: alike, and counted."""
    start = trained(GD(rate=1e-30), "equal", 1)
    once = trained(of(1), "equal", 1)
    way = (once - start).norm()
    return tuple(float((trained(of(TIMES), weights, TIMES) - once).norm() / way) for weights in ("equal", "examples"))


@pytest.mark.parametrize("algorithm", ALIKE, ids=repr)
def test_a_party_of_more_records_counts_for_no_more(algorithm: Algorithm) -> None:
    alike, counted = moves(lambda _: algorithm)
    assert alike < 0.02
    assert counted > 0.1


def test_in_federated_sgd_too() -> None:
    """Its batch is of all records, each drawn for certain."""
    alike, counted = moves(lambda times: FedSGD(batch_size=NORTH + SOUTH * times, steps_per_round=1))
    assert alike < 0.02
    assert counted > 0.1


@pytest.mark.parametrize("algorithm", REFUSED, ids=repr)
def test_where_the_sum_grows_with_the_records_it_is_refused(algorithm: Algorithm) -> None:
    with pytest.raises(ConfigError, match=f'{algorithm.kind} with weights="equal"'):
        trained(algorithm, "equal", 1)


def test_the_table_has_every_algorithm() -> None:
    assert {one.kind for one in (*ALIKE, *REFUSED, FedSGD())} == set(KINDS)
