"""Made-up federations with known statistics: FedProx's synthetic(alpha, beta), and sparse posts by author."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.special import expit
from torch.utils.data import TensorDataset

from choral.errors import ConfigError
from choral.trainers.data.sparse_rows import SparseDataset

Array = np.ndarray[Any, Any]


def synthetic(
    alpha: float, beta: float, *, parties: int = 30, features: int = 60, classes: int = 10, seed: int
) -> dict[str, TensorDataset]:
    """synthetic(alpha, beta) of FedProx (Li et al. 2020, arXiv 1812.06127, section 5.1 and its code), also in LEAF.

    Party k: u_k ~ N(0, alpha), B_k ~ N(0, beta); model W_k, b_k ~ N(u_k, 1) entry by entry; centre v_k ~ N(B_k, 1);
    x ~ N(v_k, diag(j^-1.2)), y = argmax(W_k x + b_k); n_k = 50 + a whole lognormal(4, 2). So beta is how much
    data differ between parties. alpha was meant for the models, but u_k is the same for all classes and drops out of
    the argmax: what makes models differ is W_k around u_k. As in the authors' code both are standard deviations.

    Returns parties of features float32, shape (n_k, features), and labels int64, shape (n_k,).
    Raises: ConfigError for values out of range.
    """
    if not (0 <= alpha < np.inf and 0 <= beta < np.inf) or parties < 1 or features < 1 or classes < 2:
        raise ConfigError(
            f"expected alpha, beta >= 0, parties, features >= 1, classes >= 2; got {alpha:g}, {beta:g}, {parties},"
            f" {features}, {classes}",
            hint="(0, 0), (0.5, 0.5) and (1, 1) are usual",
        )
    random = np.random.default_rng(seed)
    counts = random.lognormal(4, 2, parties).astype(int) + 50
    model_means, data_means = random.normal(0, alpha, parties), random.normal(0, beta, parties)
    widths = np.arange(1, features + 1) ** -0.6
    made = {}
    for k, (count, model_mean, data_mean) in enumerate(zip(counts, model_means, data_means, strict=True)):
        weight, bias = random.normal(model_mean, 1, (features, classes)), random.normal(model_mean, 1, classes)
        points = random.normal(data_mean, 1, features) + widths * random.standard_normal((count, features))
        labels = (points @ weight + bias).argmax(axis=1)
        made[_name(k, parties)] = TensorDataset(torch.from_numpy(points).float(), torch.from_numpy(labels))
    return made


@dataclass(frozen=True, kw_only=True)
class Posts:
    """What :func:`sparse_posts` made. parties: to train on; tests: each author's later quarter."""

    parties: dict[str, SparseDataset]
    tests: dict[str, SparseDataset]


def sparse_posts(
    *,
    parties: int = 10_000,
    features: int = 20_002,
    words: float = 16.0,
    least: int = 75,
    most: int = 9_000,
    tail: float = 1.45,
    seed: int,
) -> Posts:
    """Posts with bags of words, by author: a federation with the statistics of the Google+ experiment.

    Those of Konecny et al. 2016 (arXiv 1610.02527, section 4), with the defaults: 10,000 authors, 20,002 features (the
    first two: 1 in every post, and 1 where a word is beyond the vocabulary), ``least`` to ``most`` posts to train on
    each, 2.2 million in all, 88 % of the features at fewer than a tenth of the authors; errors of always the same
    answer about 33 %, of each author's most frequent one about 17 %. A third as many posts, the later ones, are tests.

    Author k has a truncated Pareto number of posts, a Poisson(words) number of words in each, half of them from the
    common Zipf law and half from the same law over one of 50 topics' own order of the words, of which an author has
    one. Whether a post gets a comment is logistic in its words' weights, the topic's rate, which the words tell, and
    the author's own, which no feature tells: a linear model is between always the same and the author's own answer.

    Values are 0 or 1, rows CSR, float64. Raises: ConfigError for values out of range.
    """
    if parties < 1 or features < 10 or not 0 < words < np.inf or not 1 <= least < most or not 0 < tail < np.inf:
        raise ConfigError(
            f"expected parties >= 1, features >= 10, words > 0, 1 <= least < most, tail > 0; got {parties}, {features},"
            f" {words:g}, {least}, {most}, {tail:g}",
            hint="leave them out for the sizes of the paper",
        )
    random = np.random.default_rng(seed)
    vocabulary = features - 2
    law = np.cumsum(1.0 / np.arange(1, vocabulary + 1))
    law /= law[-1]
    topics = np.stack([random.permutation(vocabulary) for _ in range(50)])
    weights, rates = random.normal(0, 1.0, vocabulary), random.normal(0, 2.6, len(topics))
    shares = random.random(parties)
    counts = (least * (1 - shares * (1 - (least / most) ** tail)) ** (-1 / tail)).astype(int)
    train, tests = {}, {}
    for k, count in enumerate(counts):
        later = max(round(count / 3), 1)
        topic = random.integers(len(topics))
        rows = _bags(count + later, words, law, topics[topic], random)
        tilt = rows[:, 2:] @ weights / np.sqrt(words)
        rate = -1.3 + rates[topic] + 2.2 * random.standard_normal()
        labels = random.random(count + later) < expit(rate + 1.5 * tilt)
        targets = torch.from_numpy(labels).long()
        train[_name(k, parties)] = SparseDataset(rows[:count], targets[:count])
        tests[_name(k, parties)] = SparseDataset(rows[count:], targets[count:])
    return Posts(parties=train, tests=tests)


def _bags(posts: int, words: float, law: Array, topic: Array, random: np.random.Generator) -> sparse.csr_array:
    """Rows of 0 and 1, shape (posts, 2 + words in the vocabulary)."""
    lengths = random.poisson(words, posts)
    drawn = np.searchsorted(law, random.random(lengths.sum()), side="right").clip(max=len(law) - 1)
    drawn = np.where(random.random(len(drawn)) < 0.5, drawn, topic[drawn]) + 2
    owners = np.repeat(np.arange(posts), lengths)
    unknown = np.flatnonzero(random.random(posts) < 0.5)
    at = np.concatenate([owners, np.arange(posts), unknown])
    columns = np.concatenate([drawn, np.zeros(posts, int), np.ones(len(unknown), int)])
    rows = sparse.csr_array((np.ones(len(at)), (at, columns)), shape=(posts, len(law) + 2))
    rows.sum_duplicates()
    rows.data[:] = 1.0
    return rows


def _name(number: int, parties: int) -> str:
    return f"party-{number:0{len(str(parties - 1))}d}"
