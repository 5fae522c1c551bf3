from __future__ import annotations

import pytest
import torch

from choral.errors import ConfigError, DataError
from choral.trainers import dirichlet_split

LABELS = torch.arange(2000) % 10


def test_covers_every_record_once_and_is_seeded():
    shares = dirichlet_split(LABELS, parties=10, alpha=0.5, seed=3)
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(2000))
    assert all(
        torch.equal(a, b) for a, b in zip(shares, dirichlet_split(LABELS, parties=10, alpha=0.5, seed=3), strict=True)
    )
    assert not torch.equal(shares[0], dirichlet_split(LABELS, parties=10, alpha=0.5, seed=4)[0])
    assert min(map(len, shares)) >= 10


def test_alpha_decides_how_unequal():
    """Share variance of Dirichlet(a, ..., a) over k parties is (1 - 1/k) / (k (k a + 1)), for each label."""
    for alpha in (0.5, 5.0):
        variances = []
        for seed in range(40):
            shares = dirichlet_split(LABELS, parties=5, alpha=alpha, seed=seed, min_records=1)
            counts = torch.stack([torch.bincount(LABELS[share], minlength=10) for share in shares]) / 200
            variances.append(counts.double().var(dim=0, correction=0).mean().item())
        # The mean over 40 seeds of 10 labels: standard error below 6 %, so 25 % is over four of them.
        expected = (1 - 1 / 5) / (5 * (5 * alpha + 1))
        assert sum(variances) / 40 == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("bad", [{"alpha": 0.0}, {"alpha": float("nan")}, {"parties": 0}, {"min_records": 0}])
def test_bad_settings(bad):
    with pytest.raises(ConfigError):
        dirichlet_split(LABELS, **({"parties": 5, "alpha": 1.0, "seed": 0} | bad))


def test_impossible_split_ends():
    with pytest.raises(DataError, match="no Dirichlet"):
        dirichlet_split(LABELS[:50], parties=10, alpha=0.1, seed=0)
