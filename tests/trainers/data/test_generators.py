from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from choral.errors import ConfigError
from choral.trainers.data.generators import sparse_posts, synthetic


class TestSynthetic:
    def test_sizes_and_seed(self):
        made = synthetic(1, 1, parties=200, seed=3)
        counts = np.array([len(data) for data in made.values()])
        assert counts.min() >= 50
        # The median of 50 + lognormal(4, 2) is 104.6; of 200 draws it has a standard error of 2 * 1.25 / sqrt(200)
        # = .18 in log units, so the bounds are four of them.
        assert 4 - 0.72 < np.log(np.median(counts) - 50) < 4 + 0.72
        again = synthetic(1, 1, parties=200, seed=3)
        assert all(torch.equal(made[name].tensors[0], again[name].tensors[0]) for name in made)
        assert len(torch.unique(torch.cat([data.tensors[1] for data in made.values()]))) == 10

    @pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
    def test_beta_spreads_centres_and_the_covariance_falls(self, beta):
        """Centre j of party k: v_kj ~ N(B_k, 1), B_k ~ N(0, beta): variance of a party's mean centre beta^2 + 1/60."""
        made = synthetic(0, beta, parties=300, seed=1)
        centres = np.array([data.tensors[0].double().mean().item() for data in made.values()])
        # The variance of 300 normal values has a relative standard error of .082; five of them.
        assert centres.var() == pytest.approx(beta**2 + 1 / 60, rel=0.41)
        large = max(made.values(), key=len).tensors[0].double()
        expected = np.arange(1, 61) ** -1.2
        assert large.var(dim=0).numpy() == pytest.approx(expected, rel=5 * (2 / len(large)) ** 0.5)

    def test_alpha_does_not_reach_the_labels(self):
        """u_k shifts every entry of W_k and b_k alike, so argmax W_k x + b_k does not see it: for one seed, alpha
        changes no label. That is FedProx's own definition; what makes parties differ is W_k around u_k.
        """
        plain, shifted = synthetic(0, 1, parties=10, seed=2), synthetic(5, 1, parties=10, seed=2)
        for name, data in plain.items():
            assert torch.equal(data.tensors[0], shifted[name].tensors[0])
            assert torch.equal(data.tensors[1], shifted[name].tensors[1])

    @pytest.mark.parametrize("bad", [{"alpha": -1}, {"beta": np.nan}, {"parties": 0}, {"classes": 1}])
    def test_refuses(self, bad):
        with pytest.raises(ConfigError):
            synthetic(**({"alpha": 1.0, "beta": 1.0, "seed": 0} | bad))


@pytest.fixture(scope="module")
def posts():
    return sparse_posts(parties=1000, seed=0)


class TestSparsePosts:
    def test_statistics_of_the_paper(self, posts):
        """With a tenth of the authors: sizes, the share of rare features, and the three error rates of the slides."""
        counts = np.array([len(data) for data in posts.parties.values()])
        assert counts.min() >= 75
        assert counts.max() <= 9000
        assert counts.mean() == pytest.approx(216.7, rel=0.12)  # 2,166,693 posts of 10,000 authors
        holders = sum(np.bincount(np.unique(data.rows.indices), minlength=20_002) for data in posts.parties.values())
        assert (holders < 100).mean() == pytest.approx(0.88, abs=0.04)
        labels = torch.cat([data.targets for data in posts.parties.values()]).double()
        tests = torch.cat([data.targets for data in posts.tests.values()]).double()
        assert min(tests.mean(), 1 - tests.mean()).item() == pytest.approx(0.33, abs=0.05)
        assert abs(labels.mean() - tests.mean()) < 0.01
        wrong = sum(
            int((tested.targets != round(posts.parties[name].targets.double().mean().item())).sum())
            for name, tested in posts.tests.items()
        )
        assert wrong / len(tests) == pytest.approx(0.17, abs=0.03)

    def test_rows(self, posts):
        data = posts.parties["party-000"]
        assert isinstance(data.rows, sparse.csr_array)
        assert set(np.unique(data.rows.data)) == {1.0}
        assert (data.rows[:, [0]].toarray() == 1).all()
        dense, label = data[3]
        assert torch.equal(dense, torch.from_numpy(data.rows[[3]].toarray()[0]).float())
        assert label == data.targets[3]
        assert sum(len(tested) for tested in posts.tests.values()) == pytest.approx(
            sum(len(kept) for kept in posts.parties.values()) / 3, rel=0.01
        )

    def test_seed_and_size(self):
        first, again, other = (sparse_posts(parties=20, features=300, seed=seed) for seed in (1, 1, 2))
        name = "party-07"
        assert (first.parties[name].rows != again.parties[name].rows).nnz == 0
        assert len(first.parties) == 20
        assert first.parties[name].rows.shape[1] == 300
        assert [len(a) for a in first.parties.values()] != [len(a) for a in other.parties.values()]

    @pytest.mark.parametrize(
        "bad", [{"parties": 0}, {"features": 9}, {"words": 0}, {"least": 10, "most": 10}, {"tail": 0}]
    )
    def test_refuses(self, bad):
        with pytest.raises(ConfigError):
            sparse_posts(**({"seed": 0} | bad))
