"""Where updates must stay within a bound, and what is said of one that does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flat_arguments import federate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Masked, Plain
from choral.errors import ConfigError
from choral.privacy.errors import EncodingError
from choral.trainers import value_bound_for
from choral.trainers.algorithms import FedNova, Scaffold

STORES = {name: torch.Generator().manual_seed(seed) for seed, name in enumerate(["bakery", "dairy", "fish"])}


def _sales(draw):
    points = torch.rand(40, 3, generator=draw)
    return TensorDataset(points, points @ torch.tensor([900.0, -400.0, 250.0]) + 1000.0)


def _job(**replaced):
    """Linear regression of sales in euros: the first round already moves weights by hundreds."""

    def build(dataset):
        model = nn.Linear(3, 1)
        nn.init.zeros_(model.weight)
        return model, torch.optim.SGD(model.parameters(), lr=0.2), DataLoader(dataset, batch_size=10)

    def fit(model, optimizer, loader):
        for points, sales in loader:
            optimizer.zero_grad()
            ((model(points)[:, 0] - sales) ** 2).mean().backward()
            optimizer.step()

    parties = {name: _sales(draw.manual_seed(seed)) for seed, (name, draw) in enumerate(STORES.items())}
    usual = {"build": build, "fit": fit, "evaluate": lambda model: {"bias": model.bias.item()}}
    return usual | {"parties": parties, "rounds": 3, "min_classes": 1} | replaced


def test_a_plain_sum_needs_no_bound():
    small, large = (federate(**_job(), secure_sum=Plain(), value_bound=bound) for bound in (0.5, 4096.0))
    for name in small.state:
        assert torch.allclose(small.state[name], large.state[name], rtol=1e-5, atol=1e-3)
    assert small.state["bias"].item() > 100.0
    assert small.history[1].largest == pytest.approx(large.history[1].largest)
    assert small.history[1].bytes_up > 0


def test_what_is_beyond_counts_by_the_weights_of_the_mean():
    """Against the mean in float64, where each party moves by a number of its own."""

    def fit(model, optimizer, loader):
        with torch.no_grad():
            model.weight += 10.0 * len(loader.dataset)

    parties = {"ant": TensorDataset(torch.rand(3, 3)), "bee": TensorDataset(torch.rand(1, 3))}
    job = _job(fit=fit, parties=parties, rounds=1, evaluate=lambda model: 0.5)
    run = federate(**job, value_bound=16.0)
    assert np.allclose(run.state["weight"].numpy(), (3 * 30.0 + 1 * 10.0) / 4, atol=1e-5)


def test_an_update_beyond_the_bound_names_party_round_parameter_and_setting(caplog):
    with pytest.raises(EncodingError, match=r"bakery: round 1, party 'bakery', update: .* 16 \(in 'bias'\)") as said:
        federate(**_job(), secure_sum=Masked(min_survivors=2))
    assert "secure_sum.value_bound" in said.value.hint
    assert "Encoding(value_bound=...)" in said.value.hint


@pytest.mark.parametrize(
    ("algorithm", "place"), [(Scaffold(), r"in 'weight'|in 'bias'"), (FedNova(max_steps=1 << 20), r"in 'bias'")]
)
def test_the_parameter_is_found_in_longer_vectors(algorithm, place):
    with pytest.raises(EncodingError, match=place):
        federate(**_job(), algorithm=algorithm, secure_sum=Masked(min_survivors=2), value_bound=1.0)


def test_a_dry_run_in_the_clear_gives_a_bound_that_holds():
    bound = value_bound_for(federate(**_job()))
    assert 1024 <= bound <= 8192
    assert federate(**_job(), secure_sum=Masked(min_survivors=2), value_bound=bound).finished
    with pytest.raises(ConfigError, match="does not show how large"):
        value_bound_for(federate(**_job(), secure_sum=Masked(min_survivors=2), value_bound=bound))


def test_a_transcript_of_a_plain_sum_keeps_to_the_bound(tmp_path):
    with pytest.raises(EncodingError, match="party 'bakery'"):
        federate(**_job(), out=tmp_path / "run", transcript="digests")
