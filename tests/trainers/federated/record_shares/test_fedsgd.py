"""Federated SGD, plain and with noise in shares: against DP-SGD on the pooled records, through each secure sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import choral.privacy
from choral import Homomorphic, Masked, Participation, Plain, Privacy, federate
from choral.privacy.noise import record_noise_shares as noise_shares
from choral.privacy.record_shares import party as party_module
from choral.trainers import FedSGD, Run, Task
from choral.trainers.federated.record_shares.codec import SharesCodec

PROMISE = Privacy(4.0, 1e-4, noise="distributed", max_grad_norm=0.5)
SUM = Masked(corrupt=1, dropouts=1, min_survivors=4)
STEPS = FedSGD(batch_size=40, steps_per_round=4, learning_rate=0.8)
LENGTH = 12
ALARM = 1e-7  # of a statistical test
Make = Callable[..., Task]


class Stream:
    """Bytes that may be drawn again: the same for the same party, whatever is drawn in between."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def __call__(self, count: int) -> bytes:
        return self._generator.bytes(count)


def private(task: Task, **changes: Any) -> Run:
    given: dict[str, Any] = {"rounds": 2, "algorithm": STEPS, "privacy": PROMISE, "secure_sum": SUM}
    return federate(task, **given | changes)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws and noise of each party from a seed of its own, so that two runs are alike."""
    real = party_module.SharesParty

    def made(*args: Any, holder: str, **rest: Any) -> Any:
        return real(*args, holder=holder, source=Stream(sum(holder.encode())), **rest)

    monkeypatch.setattr(choral.privacy, "SharesParty", made)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise: what is left is clipping, the rounding, and the sum."""
    monkeypatch.setattr(noise_shares, "gaussian", lambda count, source: np.zeros(count))


def clipped_sum(state: Mapping[str, torch.Tensor], dataset: Any, places: list[int]) -> np.ndarray:
    """The sum of clipped gradients of binary softmax regression, in float64 numpy. Shape (12,)."""
    weight, bias = state["weight"].double().numpy(), state["bias"].double().numpy()
    total = np.zeros(LENGTH)
    for place in places:
        x, y = dataset[place]
        x = x.double().numpy()
        scores = weight @ x + bias
        error = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum() - np.eye(2)[int(y)]
        gradient = np.concatenate([np.outer(error, x).ravel(), error])
        total += gradient * min(1.0, 0.5 / np.linalg.norm(gradient))
    return total


@pytest.fixture
def means(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What the server steps with, step by step. Shape (12,)."""
    seen: list[np.ndarray] = []
    real = SharesCodec.decode

    def decode(self: SharesCodec, result: Any) -> Any:
        mean = real(self, result)
        seen.append(mean.value.numpy().copy())
        return mean

    monkeypatch.setattr(SharesCodec, "decode", decode)
    return seen


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_without_noise_it_is_dp_sgd_on_the_pooled_records(
    task: Make, monkeypatch: pytest.MonkeyPatch, means: list[np.ndarray], optimizer: str
) -> None:
    """Draws are forced: every party's step takes the records that one rule picks, pooled DP-SGD the same ones.

    In each step, at the weights that the steps before led to: what is opened is the pooled clipped sum over B, to the
    grid (five roundings of half a step) and 1e-4 of C a record, by which clipping stays below C. Then the optimizer.
    """
    counts: dict[int, int] = {}

    def forced(size: int, rate: Any, source: Any) -> np.ndarray:
        counts[size] = counts.get(size, -1) + 1
        return np.arange(size)[np.arange(size) % 4 == counts[size] % 4]

    monkeypatch.setattr(party_module, "poisson_sample", forced)
    own = {"sgd": {}, "momentum": {"momentum": 0.9}, "adam": {"optimizer": "adam", "learning_rate": 0.05}}[optimizer]
    algorithm = FedSGD(**{"batch_size": 40, "steps_per_round": 4, "learning_rate": 0.8} | own)  # type: ignore[arg-type]
    made = task()
    run = private(made, algorithm=algorithm)
    start = federate(made, rounds=1, algorithm=FedSGD(learning_rate=1e-300)).state
    weights = {name: tensor.double() for name, tensor in start.items()}
    first = second = np.zeros(LENGTH)
    grid = float((run.info.fixed_point or {})["error_bound"])
    assert len(means) == 8
    for step, mean in enumerate(means):
        expected, drawn = np.zeros(LENGTH), 0
        for dataset in made.parties.values():
            places = [place for place in range(len(dataset)) if place % 4 == step % 4]
            expected, drawn = expected + clipped_sum(weights, dataset, places), drawn + len(places)
        assert np.abs(mean - expected / 40).max() <= grid + drawn * 0.5 * 2e-4 / 40, step
        assert np.abs(mean).max() > 5 * grid  # so that an opened sum of nothing would not pass
        if optimizer == "adam":
            first, second = 0.9 * first + 0.1 * mean, 0.999 * second + 0.001 * mean**2
            scale = np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
            change = -0.05 * first / (1 - 0.9 ** (step + 1)) / scale
        else:
            first = algorithm.momentum * first + mean
            change = -0.8 * first
        weights["weight"] = weights["weight"] + torch.from_numpy(change[:10].reshape(2, 5))
        weights["bias"] = weights["bias"] + torch.from_numpy(change[10:])
    for name, tensor in run.state.items():
        assert torch.allclose(tensor.double(), weights[name], atol=2e-6), name


@pytest.mark.usefixtures("known")
def test_masked_homomorphic_and_plain_sums_are_equal_to_the_bit(task: Make) -> None:
    sums = {
        "plain": Plain(),
        "masked": SUM,
        "homomorphic": Homomorphic(corrupt=1, dropouts=1, min_survivors=4),
    }
    states = {}
    for name, secure_sum in sums.items():
        states[name] = private(task(), secure_sum=secure_sum, participation=Participation(least=4)).state
    for name in ("masked", "homomorphic"):
        for key, tensor in states["plain"].items():
            assert torch.equal(tensor, states[name][key]), (name, key)


def test_draws_and_noise_are_no_function_of_the_seed(task: Make) -> None:
    one, two = private(task(), rounds=1).state, private(task(), rounds=1).state
    assert not torch.equal(one["weight"], two["weight"])


def test_the_opened_sum_has_the_noise_of_all_who_survived(
    task: Make, monkeypatch: pytest.MonkeyPatch, means: list[np.ndarray]
) -> None:
    """Nobody draws a record: 400 opened sums are noise alone, of variance n s^2 C^2, s^2 = sigma^2 / h, n = 5, h = 3.

    And of rounding, a twelfth of the grid's step squared, for each. Two-sided chi-square of 4,800 numbers, false alarm
    1e-7. A party that adds none (4/5), and noise sized for four (3/4) or all five (3/5), would be found but once in
    10,000 times at most.
    """
    monkeypatch.setattr(party_module, "poisson_sample", lambda size, rate, source: np.arange(0))
    many = FedSGD(batch_size=40, steps_per_round=400, learning_rate=0.1)
    run = private(task(), rounds=1, algorithm=many, secure_sum=Plain(), participation=Participation(least=4))
    numbers = run.info.fixed_point or {}
    share = 0.5 * numbers["noise_multiplier"] / math.sqrt(3)
    assert share == pytest.approx(0.5 * numbers["share"], rel=1e-12)
    variance = 5 * (share**2 + numbers["step"] ** 2 / 12) / 40**2
    count = 400 * LENGTH
    low, high = stats.chi2.ppf([ALARM / 2, 1 - ALARM / 2], count)
    assert low <= np.square(np.concatenate(means)).sum() / variance <= high
    for fault in (4 / 5, 3 / 4, 3 / 5):
        assert fault * stats.chi2.ppf(1 - 1e-4, count) < low


def test_the_divisor_is_the_batch_that_was_agreed_on(task: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the records drawn nor the survivors count: half as many drawn move the model half as far."""
    monkeypatch.setattr(noise_shares, "gaussian", lambda count, source: np.zeros(count))
    moved = []
    for drawn in (8, 4):
        monkeypatch.setattr(party_module, "poisson_sample", lambda *_, drawn=drawn: np.zeros(drawn, np.int64))
        algorithm = FedSGD(batch_size=40, steps_per_round=1, learning_rate=0.8)
        state = private(task(), rounds=1, algorithm=algorithm).state
        start = federate(task(), rounds=1, algorithm=FedSGD(learning_rate=1e-300)).state
        moved.append(float((state["weight"] - start["weight"]).norm()))
    assert moved[0] == pytest.approx(2 * moved[1], rel=0.05)


def test_plain_federated_sgd_with_all_records_is_gradient_descent(task: Make) -> None:
    from choral.trainers import GD

    whole = federate(task(), rounds=5, algorithm=FedSGD(batch_size=160, steps_per_round=1, learning_rate=0.3))
    known = federate(task(), rounds=5, algorithm=GD(rate=0.3))
    for name, tensor in known.state.items():
        assert torch.allclose(whole.state[name], tensor, atol=1e-6)
    several = federate(task(), rounds=1, algorithm=FedSGD(batch_size=160, steps_per_round=5, learning_rate=0.3))
    for name, tensor in known.state.items():
        assert torch.allclose(several.state[name], tensor, atol=1e-6)


def test_plain_draws_differ_by_step_and_are_the_seeds(task: Make) -> None:
    one = federate(task(), rounds=2, algorithm=STEPS)
    two = federate(task(), rounds=2, algorithm=STEPS)
    assert all(torch.equal(one.state[name], two.state[name]) for name in one.state)
    assert one.metrics["accuracy"] > 0.7
    once = federate(task(), rounds=1, algorithm=FedSGD(batch_size=40, steps_per_round=1, learning_rate=0.8))
    half = federate(task(), rounds=1, algorithm=FedSGD(batch_size=40, steps_per_round=2, learning_rate=0.4))
    assert not torch.allclose(once.state["weight"], half.state["weight"], atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"momentum": 1.0}, {"batch_size": 0}, {"learning_rate": 0}, {"optimizer": "lbfgs"}]
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    from choral.errors import ConfigError

    with pytest.raises(ConfigError, match=next(iter(changes))):
        FedSGD(**changes)
