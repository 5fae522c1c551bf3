"""Replace one record: its own privacy loss, against dp-accounting, numerical integration and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from scipy.special import logsumexp
from scipy.stats import norm

from choral.errors import ConfigError
from choral.privacy import CorrelatedPrivacy, Ledger, LedgerError, Privacy, PrivacyEngine, Search, private_search
from choral.privacy.accounting import other_accountants, record_level, record_noise
from choral.privacy.accounting.events import ADD_OR_REMOVE, REPLACE_ONE, ZERO_OUT, PoissonSampledGaussian
from choral.privacy.loss_distributions.replace_one import ReplacedGaussian, renyi

DELTA = 1e-5


def event(rate: float, noise: float, steps: int = 1) -> PoissonSampledGaussian:
    return PoissonSampledGaussian(sample_rate=rate, noise_multiplier=noise, steps=steps)


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


# Numbers


def test_known_values_of_three_relations() -> None:
    events = [event(0.05, 1.1, 400)]
    zero_out, replaced = (record_level.epsilon(events, DELTA, neighbours=n) for n in (ZERO_OUT, REPLACE_ONE))
    assert (round(zero_out, 4), round(replaced, 4)) == (5.5971, 9.2473)
    assert (
        zero_out == record_level.epsilon(events, DELTA) == record_level.epsilon(events, DELTA, neighbours=ADD_OR_REMOVE)
    )
    assert replaced < 2.0 * zero_out - 1.5  # computed, not doubled
    for relation, ours in [
        (NeighboringRelation.REPLACE_SPECIAL, zero_out),
        (NeighboringRelation.ADD_OR_REMOVE_ONE, zero_out),
        (NeighboringRelation.REPLACE_ONE, replaced),
    ]:
        accountant = PLDAccountant(relation, 1e-3)
        accountant.compose(PoissonSampledDpEvent(0.05, GaussianDpEvent(1.1)), 400)
        assert ours == pytest.approx(accountant.get_epsilon(DELTA), rel=2e-4)


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "delta"),
    [
        (0.01, 1.0, 1000, 1e-5),
        (0.01, 4.0, 10_000, 1e-5),
        (0.5, 8.0, 100, 1e-5),
        (0.001, 0.6, 1000, 1e-6),
        (0.9, 2.0, 3, 1e-3),
        (1e-4, 0.8, 100, 1e-9),
    ],
)
def test_epsilon_is_that_of_dp_accounting(rate: float, noise: float, steps: int, delta: float) -> None:
    events = [event(rate, noise, steps)]
    ours = record_level.epsilon(events, delta, neighbours=REPLACE_ONE)
    accountant = PLDAccountant(NeighboringRelation.REPLACE_ONE, 1e-4)
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    assert ours == pytest.approx(accountant.get_epsilon(delta), rel=1e-3)
    assert record_level.epsilon(events, delta) < ours < record_level.epsilon_rdp(events, delta, neighbours=REPLACE_ONE)


def test_where_every_record_is_taken_the_distance_doubles_exactly() -> None:
    replaced = record_level.epsilon([event(1.0, 8.0, 10)], DELTA, neighbours=REPLACE_ONE)
    assert replaced == pytest.approx(record_level.epsilon([event(1.0, 4.0, 10)], DELTA), rel=1e-12)


@pytest.mark.parametrize(("rate", "noise"), [(0.05, 1.1), (0.4, 0.5), (0.9, 3.0), (1.0, 2.0)])
def test_no_two_records_are_further_apart_than_opposite_ones(rate: float, noise: float) -> None:
    """Divergences of sums with v or w in two dimensions, by integration over a grid, both signs of eps."""
    eps = np.array([-1.5, -0.2, 0.0, 0.3, 1.0, 2.5])
    bound, error = ReplacedGaussian(rate, noise).divergence(eps)
    assert (error < 1e-12).all()
    axis = np.linspace(-8.0 * noise - 1.0, 8.0 * noise + 1.0, 1201)
    cell = (axis[1] - axis[0]) ** 2
    x, y = np.meshgrid(axis, axis)

    def density(v: tuple[float, float]) -> np.ndarray:
        def normal(a: float, b: float) -> np.ndarray:
            return np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * noise**2)) / (2 * math.pi * noise**2)

        return (1.0 - rate) * normal(0.0, 0.0) + rate * normal(*v)

    plus = density((1.0, 0.0))
    for w in [(-1.0, 0.0), (0.0, 1.0), (-0.6, 0.8), (0.0, 0.0), (0.3, -0.4), (1.0, 0.0)]:
        minus = density(w)
        found = np.array([float(np.maximum(plus - math.exp(e) * minus, 0.0).sum()) * cell for e in eps])
        assert (found <= bound + 1e-4).all()
        if w == (-1.0, 0.0):
            assert found == pytest.approx(bound, abs=1e-4)
        else:
            assert (found[1:5] < bound[1:5] - 1e-3).any() or w == (0.0, 1.0)


@pytest.mark.parametrize(("rate", "noise"), [(0.05, 1.1), (1e-4, 0.7), (0.9, 50.0), (0.2, 0.8), (1e-6, 100.0)])
def test_renyi_divergences_are_those_of_numerical_integration(rate: float, noise: float) -> None:
    orders = (1.1, 2.0, 8.0)

    def one(order: float) -> float:
        def integrand(x: Any) -> Any:  # P^order Q^(1 - order), in 40 digits
            alone, plus, minus = (mpmath.npdf(x, mean, noise) for mean in (0, 1, -1))
            stay, sampled = 1 - mpmath.mpf(rate), mpmath.mpf(rate)
            return (stay * alone + sampled * plus) ** order * (stay * alone + sampled * minus) ** (1 - order)

        ends = [-14 * noise, *np.arange(-1.0, 2 * order + 1, max(noise, 0.5)), 2 * order + 14 * noise]
        with mpmath.workdps(40):
            return float(mpmath.log(mpmath.quad(integrand, ends)) / (order - 1))

    expected = [one(order) for order in orders]
    assert renyi(rate, noise, orders) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("rate", "noise", "order"),
    [
        (0.3, 0.3, 64.0),
        (0.05, 0.5, 200.0),
        (0.5, 1.0, 32.0),
        (0.01, 4.0, 400.0),
        (0.01, 0.1, 8.0),
        (0.3, 0.05, 1.5),
    ],
)
def test_renyi_divergences_of_high_orders_by_sums_on_a_dense_grid(rate: float, noise: float, order: float) -> None:
    x = np.linspace(-order - 20.0 * noise, order + 20.0 * noise, 1_000_001)
    plus, minus = (
        np.logaddexp(math.log1p(-rate), math.log(rate) + (side * 2.0 * x - 1.0) / (2.0 * noise**2)) for side in (1, -1)
    )
    logs = order * plus + (1.0 - order) * minus - 0.5 * (x / noise) ** 2 - math.log(noise * math.sqrt(2.0 * math.pi))
    expected = (float(logsumexp(logs)) + math.log(x[1] - x[0])) / (order - 1.0)
    (found,) = renyi(rate, noise, (order,))
    assert found == pytest.approx(expected, rel=2e-9)
    assert found >= expected * (1.0 - 1e-12)  # what the quadrature may lack is added


@pytest.mark.parametrize(("rate", "noise"), [(0.3, 0.5), (0.01, 2.0), (0.9, 0.2), (1.0, 1.0)])
def test_the_rounding_of_divergences_is_stated_for_each_exponential(rate: float, noise: float) -> None:
    """Exponents are rounded in proportion to their size, and so are the values of their exponentials."""
    pair = ReplacedGaussian(rate, noise)
    x = np.linspace(0.05, min(6.0 * noise, 1.0 + 3.0 * noise), 20)
    eps = pair._log_density(x) - pair._log_density(-x)
    _, error = pair.divergence(eps)
    near = rate * norm.cdf((1.0 - x) / noise)
    far = (1.0 - rate) * np.expm1(eps) * norm.cdf(-x / noise) + rate * np.exp(eps) * norm.cdf((-1.0 - x) / noise)
    exponents = np.minimum(((x + 1.0) / noise) ** 2, 1600.0) + eps
    assert (error >= (16.0 + 4.0 * exponents) * (near + far) * 2.0**-53 * (1.0 - 1e-6)).all()
    assert (error < 1e-9).all()


def test_renyi_divergence_in_closed_form_and_never_above_it() -> None:
    assert renyi(1.0, 3.0, (2.0, 5.0)) == pytest.approx([4.0 / 9.0, 10.0 / 9.0], rel=1e-12)
    assert (renyi(0.3, 0.02, (1.5, 1024.0)) <= np.array([3.0, 2048.0]) / 0.02**2).all()
    tiny = renyi(1e-6, 1000.0, (2.0, 64.0))  # of second order: alpha / 2 (2 q / s)^2
    assert tiny == pytest.approx([4e-18, 1.28e-16], rel=1e-6)


@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
def test_calibrated_noise_keeps_the_promise_and_is_more_than_for_zero_out(target: float) -> None:
    noise = record_noise.noise_multiplier(target, DELTA, 0.02, 500, slack=1e-3, neighbours=REPLACE_ONE)
    spent = record_level.epsilon([event(0.02, noise, 500)], DELTA, neighbours=REPLACE_ONE)
    assert 0.999 * target <= spent <= target
    less = record_noise.noise_multiplier(target, DELTA, 0.02, 500, slack=1e-3)
    assert less * 1.02 < noise < less * 2.0


def test_a_search_takes_the_curve_of_its_tries() -> None:
    tries = event(0.05, 2.0, 200)
    search = Search(tries=(tries,), mean=5.0)
    ours = record_level.epsilon([search], DELTA, neighbours=REPLACE_ONE)
    orders = np.array([*np.arange(1.5, 20, 0.1), *range(20, 64)])
    curve = 200 * renyi(0.05, 2.0, tuple(orders))
    # Papernot and Steinke 2022, theorem 2, for the geometric distribution, written out.
    best = np.min((1.0 - 1.0 / orders) * curve + math.log(5.0) / orders)
    bound = curve + 2.0 * best + math.log(5.0) / (orders - 1.0)
    by_hand = bound + np.log1p(-1.0 / orders) - (math.log(DELTA) + np.log(orders)) / (orders - 1.0)
    assert ours == pytest.approx(float(by_hand.min()), rel=2e-3)
    assert ours > record_level.epsilon([tries], DELTA, neighbours=REPLACE_ONE)
    assert ours > record_level.epsilon([search], DELTA)
    with pytest.raises(ConfigError, match="private search"):
        other_accountants.epsilon_by_dp_accounting([search], DELTA, neighbours=REPLACE_ONE)


# Promises


@pytest.mark.parametrize("kind", [Privacy, CorrelatedPrivacy])
def test_a_promise_for_replaced_records_is_calibrated_charged_and_written_down_so(
    problem: Any, loop: Callable[..., int], tmp_path: Path, kind: type[Privacy]
) -> None:
    path = tmp_path / "a.jsonl"
    privacy = kind(epsilon=3.0, delta=1e-3, epochs=2, ledger=path, neighbours=REPLACE_ONE)
    model = problem.model()
    loop(*privacy.wrap(model, sgd(model), problem.loader()), epochs=2)
    spent = privacy.spent()
    assert 2.98 < spent.epsilon <= 3.0
    assert spent.neighbours == REPLACE_ONE
    assert '"neighbours":"replace one record"' in path.read_text().splitlines()[0]
    again = Ledger(path)
    assert again.neighbours == REPLACE_ONE
    assert again.epsilon(1e-3) == spent.epsilon == record_level.epsilon(again.events, 1e-3, neighbours=REPLACE_ONE)
    ratio = noise_for(problem, kind, REPLACE_ONE) / noise_for(problem, kind, ZERO_OUT)
    assert ratio == pytest.approx(2.0, rel=2e-3) if kind is CorrelatedPrivacy else 1.05 < ratio < 1.95


def noise_for(problem: Any, kind: type[Privacy], neighbours: str) -> float:
    privacy = kind(epsilon=3.0, delta=1e-3, epochs=2, neighbours=neighbours)
    engine, model = PrivacyEngine(privacy, holder="a", ledger=Ledger(), passes=2), problem.model()
    engine.wrap(model, sgd(model), problem.loader())
    assert engine.noise_multiplier is not None
    return engine.noise_multiplier


def test_a_ledger_keeps_to_one_relation(problem: Any, loop: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    model = problem.model()
    loop(*Privacy(epsilon=3.0, delta=1e-3, ledger=path).wrap(model, sgd(model), problem.loader()))
    written = path.read_text()
    other = Privacy(epsilon=30.0, delta=1e-3, ledger=path, neighbours=REPLACE_ONE)
    with pytest.raises(LedgerError, match="for the neighbours 'zero out one record', not") as refused:
        other.wrap(model, sgd(model), problem.loader())
    assert "one neighbour relation for the life of the data" in str(refused.value.hint)
    assert path.read_text() == written


def test_two_promises_of_other_relations_may_not_share_a_ledger_that_is_still_empty(problem: Any) -> None:
    ledger = Ledger()
    PrivacyEngine(Privacy(epsilon=3.0, delta=1e-3), holder="a", ledger=ledger, passes=1)
    with pytest.raises(LedgerError, match="for the neighbours"):
        PrivacyEngine(Privacy(epsilon=3.0, delta=1e-3, neighbours=REPLACE_ONE), holder="a", ledger=ledger, passes=1)


@pytest.mark.parametrize("words", ["add or remove one record", "zero out", "replace one", "", 3, None])
def test_other_words_are_refused(words: Any) -> None:
    with pytest.raises(ConfigError, match="expected 'zero out one record' or 'replace one record'") as refused:
        Privacy(epsilon=3.0, delta=1e-3, neighbours=words)
    assert ("number of records is public" in str(refused.value.hint)) == (words == "add or remove one record")


def test_a_checkpoint_goes_on_at_the_price_of_its_relation(
    problem: Any, loop: Callable[..., int], tmp_path: Path
) -> None:
    """The rest of the plan is accounted for again, as for the neighbours of the ledger."""
    path = tmp_path / "a.jsonl"
    first = Privacy(epsilon=3.0, delta=1e-3, epochs=2, ledger=path, neighbours=REPLACE_ONE)
    model = problem.model()
    private, optimizer, loader = first.wrap(model, sgd(model), problem.loader())
    loop(private, optimizer, loader)
    state = optimizer.state_dict()
    again = Privacy(epsilon=3.0, delta=1e-3, epochs=2, ledger=path, neighbours=REPLACE_ONE)
    other = problem.model()
    loop(*again.wrap(other, sgd(other), problem.loader(), resume=state))
    assert 2.98 < again.spent().epsilon <= 3.0


def test_a_private_search_is_charged_for_replaced_records(problem: Any, loop: Callable[..., int]) -> None:
    privacy = Privacy(epsilon=6.0, delta=1e-3, neighbours=REPLACE_ONE)

    def train(rate: float, promise: Privacy) -> tuple[float, float]:
        assert promise.neighbours == REPLACE_ONE
        model = problem.model()
        loop(*promise.wrap(model, sgd(model), problem.loader()))
        return rate, rate

    found = private_search(privacy, [0.1, 0.2], train, records=200, batch_size=20, mean=2.0)
    assert found is not None
    assert found.spent.neighbours == REPLACE_ONE
    assert 5.9 < found.spent.epsilon <= 6.0
