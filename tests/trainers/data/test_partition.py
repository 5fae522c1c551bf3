from __future__ import annotations

import pytest
import torch

from choral.errors import ConfigError, DataError
from choral.trainers.data.partition import dirichlet_split, iid_split, key_split, reshuffled, shard_split

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


def test_key_split():
    shares = key_split(["b", "a", "b", "c", "a", "b"], min_records=2)
    assert {name: share.tolist() for name, share in shares.items()} == {"a": [1, 4], "b": [0, 2, 5]}
    with pytest.raises(DataError, match="none of 3 parties"):
        key_split(["a", "b", "c"], min_records=2)
    with pytest.raises(DataError):
        key_split([])


def test_shards_are_pathological():
    shares = shard_split(LABELS, parties=50, seed=2)
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(2000))
    assert {len(share) for share in shares} == {40}
    # 100 shards of 20 within labels of 200: each shard is pure, so no party has more than two labels.
    assert max(len(torch.unique(LABELS[share])) for share in shares) == 2
    with pytest.raises(DataError, match="cannot be cut"):
        shard_split(LABELS, parties=1001, seed=0)


def test_iid_split():
    shares = iid_split(103, parties=10, seed=0)
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(103))
    assert sorted(map(len, shares)) == [10] * 7 + [11] * 3
    with pytest.raises(DataError, match="too few"):
        iid_split(5, parties=6, seed=0)


def test_reshuffled_keeps_sizes_and_records():
    """Label counts of a reshuffled share are hypergeometric: mean n_k/10 per label, variance below n_k .09."""
    shares = dirichlet_split(LABELS, parties=10, alpha=0.1, seed=1)
    again = reshuffled(shares, seed=5)
    assert [len(share) for share in again] == [len(share) for share in shares]
    assert torch.equal(torch.cat(again).sort().values, torch.arange(2000))
    for share in again:
        counts = torch.bincount(LABELS[share], minlength=10)
        # 100 counts at 5.5 standard deviations: false alarm below 1e-5; the split they come from is far outside.
        assert (counts - len(share) / 10).abs().max() <= 5.5 * (0.09 * len(share)) ** 0.5 + 1
    worst = max((torch.bincount(LABELS[share], minlength=10) - len(share) / 10).abs().max() for share in shares)
    assert worst > 5.5 * (0.09 * 300) ** 0.5
    with pytest.raises(DataError):
        reshuffled([], seed=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: key_split(["a"], min_records=0),
        lambda: shard_split(LABELS, parties=0, seed=0),
        lambda: shard_split(LABELS, parties=2, seed=0, shards=0),
        lambda: iid_split(5, parties=0, seed=0),
    ],
)
def test_bad_settings_of_the_others(call):
    with pytest.raises(ConfigError):
        call()
