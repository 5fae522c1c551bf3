"""Whoever drops out whenever: the exact sum of the survivors or a named refusal, never a wrong sum."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from choral.protocols.errors import TooFewSurvivorsError

STAGES = ("advertise", "share", "upload", "confirm", "unmask")


def vectors_of(names: tuple[str, ...], length: int, bound: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(-bound, bound, length, endpoint=True) for name in names}


def check(net: Any, drops: Mapping[str, str], seed: int) -> bool:
    """Run one round; whether it gave a sum. It must, when at least min_survivors stay to the end."""
    net.refused.clear()
    vectors = vectors_of(net.names, net.setup.length, net.setup.bound, seed)
    uploaded = tuple(name for name in net.names if drops.get(name) not in ("advertise", "share", "upload"))
    stayed = [name for name in net.names if name not in drops]
    try:
        outcome = net.round(vectors, drops=drops)
    except TooFewSurvivorsError as error:
        refusal = error
    else:
        refusal = None
    if refusal:
        assert refusal.survivors < refusal.needed
        assert len(stayed) < net.setup.min_survivors, (drops, str(refusal))
        return False
    assert not net.refused
    assert not net.rejected
    assert outcome.survivors == uploaded
    np.testing.assert_array_equal(outcome.total, sum(vectors[name] for name in uploaded))
    return True


def every_assignment(net: Any) -> tuple[int, int]:
    """Each party drops at each of the five stages or never: 6^n rounds of one session."""
    sums = rounds = 0
    for stages in itertools.product((None, *STAGES), repeat=len(net.names)):
        drops = {name: stage for name, stage in zip(net.names, stages, strict=True) if stage}
        rounds += 1
        sums += check(net, drops, rounds)
    assert rounds == 6 ** len(net.names)
    return sums, rounds


@pytest.mark.parametrize(("n", "changes"), [(2, {}), (3, {}), (4, {"corrupt": 1})])
def test_every_party_at_every_stage(network: Callable[..., Any], n: int, changes: dict[str, Any]) -> None:
    sums, rounds = every_assignment(network(n, **changes).open())
    assert 0 < sums < rounds


@pytest.mark.parametrize(
    ("n", "changes"), [(5, {"corrupt": 1}), (6, {"corrupt": 1}), (6, {"neighbours": 4, "threshold": 3})]
)
def test_every_subset_at_each_stage(network: Callable[..., Any], n: int, changes: dict[str, Any]) -> None:
    net = network(n, **changes).open()
    sums = 0
    for stage, size in itertools.product(STAGES, range(n + 1)):
        for gone in itertools.combinations(net.names, size):
            sums += sum_or_refusal(net, dict.fromkeys(gone, stage))
    assert 0 < sums < len(STAGES) * 2**n


def sum_or_refusal(net: Any, drops: Mapping[str, str]) -> bool:
    """As check(), for sparse graphs too, where a party may be stranded with too few neighbours."""
    if net.setup.complete:
        return check(net, drops, len(drops))
    net.refused.clear()
    vectors = vectors_of(net.names, net.setup.length, net.setup.bound, len(drops))
    try:
        outcome = net.round(vectors, drops=drops)
    except TooFewSurvivorsError:
        return False
    np.testing.assert_array_equal(outcome.total, sum(vectors[name] for name in outcome.survivors))
    return True


@pytest.mark.slow
@pytest.mark.parametrize(("n", "corrupt"), [(5, 1), (6, 1)])
def test_every_party_at_every_stage_of_larger_cohorts(network: Callable[..., Any], n: int, corrupt: int) -> None:
    sums, rounds = every_assignment(network(n, corrupt=corrupt, length=1).open())
    assert 0 < sums < rounds


@pytest.mark.parametrize("n", [2, 3, 4, 5, pytest.param(6, marks=pytest.mark.slow)])
def test_whoever_is_silent_while_a_session_opens(network: Callable[..., Any], n: int) -> None:
    """Every party at either opening stage, or at none: it opens when nobody is missing, else names exactly those."""
    for stages in itertools.product((None, "hello", "reveal"), repeat=n):
        net = network(n)
        at = dict(zip(net.names, stages, strict=True))
        for stage in ("hello", "reveal"):
            net.hooks["up", stage] = lambda name, raw, stage=stage, at=at: None if at[name] == stage else raw
        first = next((stage for stage in ("hello", "reveal") if stage in stages), None)
        if first is None:
            net.open()
            assert set(net.members) == set(net.names)
            assert check(net, {}, n)
            continue
        with pytest.raises(TooFewSurvivorsError) as caught:
            net.open()
        assert caught.value.missing == tuple(name for name in net.names if at[name] == first)
        assert (caught.value.survivors, caught.value.needed) == (n - stages.count(first), n)
        assert not net.members


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    n = draw(st.integers(2, 12))
    server = draw(st.sampled_from(["semi-honest", "malicious"]))
    neighbours = draw(st.sampled_from([k for k in range(2, n) if k % 2 == 0 or n % 2 == 0] + [n - 1]))
    holders = n if neighbours == n - 1 else neighbours
    corrupt = draw(st.integers(0, n - 2)) if holders == n else 0
    least = corrupt + 1
    if server == "malicious":
        least = (holders + corrupt) // 2 + 1 if holders == n else (neighbours + 1) // 2 + 1
    threshold = draw(st.integers(min(max(2, least), holders), holders))
    bound = draw(st.one_of(st.integers(1, 2**20), st.integers(1, (2**64 - 1) // (2 * n))))
    bits = (2 * n * bound).bit_length()
    return {
        "n": n,
        "neighbours": neighbours,
        "threshold": threshold,
        "server": server,
        "corrupt": corrupt,
        "min_survivors": draw(st.integers(max(threshold, corrupt + 2), n)),
        "bound": bound,
        "modulus_bits": draw(st.integers(bits, 64)),
        "length": draw(st.one_of(st.integers(1, 9), st.integers(1000, 70000))),
        "seed": draw(st.integers(0, 2**32)),
        "drops": draw(st.dictionaries(st.integers(0, n - 1), st.sampled_from(STAGES), max_size=n)),
    }


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases())
def test_any_parameters_give_the_plain_sum_or_a_refusal(network: Callable[..., Any], case: dict[str, Any]) -> None:
    drops = {f"p{party}": stage for party, stage in case.pop("drops").items()}
    n, seed = case["n"], case["seed"]
    net = network(**case, policy={"server": case["server"], "corrupt": case["corrupt"]}).open()
    vectors = vectors_of(net.names, net.setup.length, net.setup.bound, seed)
    try:
        outcome = net.round(vectors, drops=drops)
    except TooFewSurvivorsError:
        if net.setup.complete:
            assert n - len(drops) < net.setup.min_survivors
        return
    expected = sum(vectors[name].astype(object) for name in outcome.survivors)
    assert outcome.total.tolist() == list(expected)
