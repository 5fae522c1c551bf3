"""Exposure is the rank of a secret, its p-value is exact, and a model that learned the secret gives it away."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest

from choral.audits import draw_secrets, exposure
from choral.errors import ConfigError, DataError

LETTERS = "ABCDE"
CANDIDATES = ["".join(letters) for letters in product(LETTERS, repeat=3)]


def test_exposure_is_the_logarithm_of_the_rank() -> None:
    """Carlini et al. 2019, definition 5: log2 |R| - log2 rank; of the likeliest, log2 |R|."""
    losses = np.arange(64.0)[None].repeat(3, axis=0)
    found = exposure(losses, np.array([0, 7, 63]))
    assert found.ranks == (1, 8, 64)
    assert found.bits == (6.0, 3.0, 0.0)
    assert found.most == 6.0
    assert found.p_values == (1 / 64, 1 / 8, 1.0)


def test_ties_count_against_the_secret() -> None:
    assert exposure(np.zeros((1, 10)), np.array([3])).p_value == pytest.approx(1.0)
    assert exposure(np.array([[1.0, 0.0, 1.0, 2.0]]), np.array([0])).ranks == (3,)


def test_the_p_value_is_exact_for_one_secret_and_an_upper_bound_for_several() -> None:
    """One: P[p <= t] = floor(40 t) / 40, by enumeration. Five: of 2,000, more than 135 below .05 have chance 4e-4 at
    5 %; not far fewer either, for the sum of logarithms is nearly exact."""
    losses = np.random.default_rng(1).normal(size=(1, 40))
    values = sorted(exposure(losses, np.array([secret])).p_values[0] for secret in range(40))
    assert values == pytest.approx([(rank + 1) / 40 for rank in range(40)])
    rng = np.random.default_rng(2)
    below = sum(exposure(rng.normal(size=(5, 200)), rng.integers(0, 200, 5)).p_value <= 0.05 for _ in range(2000))
    assert 60 <= below <= 135, below


def bigrams(text: str, weight: float) -> dict[tuple[str, str], float]:
    """A causal language model: minus log probabilities of the next letter after each, with added counts."""
    counts = dict.fromkeys(product(f"{LETTERS}.", repeat=2), weight)
    for pair in pairwise(text):
        counts[pair] = counts.get(pair, weight) + 1.0
    after = {a: sum(n for (first, _), n in counts.items() if first == a) for a, _ in counts}
    return {(a, b): -math.log(n / after[a]) for (a, b), n in counts.items()}


@pytest.mark.parametrize(("trained", "known"), [(True, True), (False, False)])
def test_a_model_that_was_trained_on_the_secrets_gives_them_away(trained: bool, known: bool) -> None:
    """By chance the three are found together once in 1,000 times, and then they would have to be."""
    secrets = draw_secrets(3, len(CANDIDATES))
    losses = []
    for secret in secrets:
        model = bigrams("." + (CANDIDATES[secret] if trained else "ABCDE") + ".", 0.01)
        losses.append([sum(model[pair] for pair in zip("." + each, each + ".", strict=False)) for each in CANDIDATES])
    found = exposure(np.array(losses), secrets)
    assert (found.p_value < 1e-3) == known, found
    if known:
        assert max(found.ranks) <= 4


def test_secrets_are_the_operating_systems() -> None:
    drawn = draw_secrets(4000, 8)
    assert np.bincount(drawn, minlength=8).min() > 380  # 500 expected, 5.7 deviations
    assert not (draw_secrets(50, 1000) == draw_secrets(50, 1000)).all()
    for count, candidates in ((0, 5), (3, 1)):
        with pytest.raises(ConfigError, match="candidates"):
            draw_secrets(count, candidates)


@pytest.mark.parametrize(
    ("losses", "secrets", "said"),
    [
        (np.zeros(4), np.array([1]), "shape"),
        (np.zeros((2, 4)), np.array([1]), "shape"),
        (np.zeros((1, 4)), np.array([4]), "integers from 0 to 3"),
        (np.zeros((1, 4)), np.array([0.5]), "integers"),
        (np.array([[0.0, np.inf]]), np.array([0]), "finite"),
    ],
)
def test_what_is_no_such_table_is_refused(losses: np.ndarray, secrets: np.ndarray, said: str) -> None:
    with pytest.raises(DataError, match=said):
        exposure(losses, secrets)
