"""Which algorithm comes closest in 30 rounds, on sparse posts by author that no step size was chosen on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flat_arguments import federate
from torch import nn
from torch.utils.data import DataLoader

from choral.trainers import DivergedError
from choral.trainers.algorithms import FSVRG, GD, CoCoA, FedAvg
from choral.trainers.centralized.optimum import Objective
from choral.trainers.data.generators import sparse_posts
from choral.trainers.data.partition import reshuffled
from choral.trainers.data.sparse_rows import SparseDataset
from choral.trainers.local_steps.logistic_regression import ClosedForm

FEATURES = 1002


def gap(objective: Objective, least: float, parties: dict[str, Any], algorithm: Any, rate: float = 1.0) -> float:
    """f - f* after 30 rounds from 0; infinite where it diverges."""

    def build(dataset: Any) -> Any:
        model = nn.Linear(FEATURES, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=objective.ridge)
        return model, optimizer, DataLoader(dataset, shuffle=True)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1].float(), reduction="none")

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        """Called on three records, to be compared with the closed form."""
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            optimizer.step()

    try:
        run = federate(
            build=build,
            fit=fit,
            loss=loss,
            evaluate=lambda _: 0.0,
            parties=parties,
            rounds=30,
            algorithm=algorithm,
            engine=ClosedForm.of(rate=rate, batch_size=1, decay=objective.ridge),
            min_classes=1,
        )
    except DivergedError:
        return float("inf")
    return objective.value(run.state["weight"][0].double().numpy()) - least


@pytest.mark.slow
@pytest.mark.parametrize("seed", [101, 102])
def test_the_ordering_holds_on_new_seeds(seed):
    """K = 200, n about 15,000, d = 1002, as in the facts that this toolkit's algorithms were first checked on."""
    from scipy import sparse

    parties = sparse_posts(parties=200, features=FEATURES, words=8, least=40, most=400, seed=seed).parties
    rows = sparse.csr_array(sparse.vstack([data.rows for data in parties.values()]))
    targets = torch.cat([data.targets for data in parties.values()])
    ends = torch.tensor([len(data) for data in parties.values()]).cumsum(0)
    shares = reshuffled(torch.arange(len(targets)).tensor_split(ends[:-1]), seed=seed)
    shuffled = {name: SparseDataset(rows[at.numpy()], targets[at]) for name, at in zip(parties, shares, strict=True)}
    objective = Objective(rows, targets.double().numpy(), 1 / len(targets))
    _, least = objective.least()

    def best(algorithms: list[Any], dealt: dict[str, Any] = parties) -> float:
        return min(gap(objective, least, dealt, algorithm) for algorithm in algorithms)

    ridge = objective.ridge
    descent = best([GD(rate=step, ridge=ridge) for step in (1.0, 2.0, 4.0)])
    averaged = min(gap(objective, least, parties, FedAvg(), rate) for rate in (0.03, 0.1, 0.3))
    plain = best([FSVRG(step=step, ridge=ridge, scaled=False) for step in (3.0, 10.0, 20.0)])
    scaled = best([FSVRG(step=step, ridge=ridge) for step in (3.0, 10.0, 20.0)])
    dealt_again = best([FSVRG(step=step, ridge=ridge) for step in (3.0, 10.0, 20.0)], shuffled)
    cocoa = best([CoCoA(ridge=ridge)])
    # Dealt out again is not always the better one: 0.0049 against 0.0020 for the first of these seeds.
    assert max(dealt_again, scaled) < plain < min(descent, averaged)
    assert max(dealt_again, scaled) < min(descent, averaged) / 5
    assert descent < cocoa
